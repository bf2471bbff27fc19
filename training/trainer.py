"""A training step of a language model on a mesh of pp, dp, ep, cp and tp, and what it keeps and sends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from typing import NoReturn

import numpy as np

from layers import block
from layers.batch import Balance, Batch
from layers.moe import Routed
from layers.optimizer import AdamW, global_norm
from layers.stage import Stage
from layers.step import Kept, Recipe, Step, most_kept
from parallel import pipeline, schedules
from parallel.checkpoint import Checkpoint, Piece, pieces
from parallel.data import Groups
from parallel.ledger import Traffic, condensed
from parallel.mesh import Mesh
from parallel.parameter import Parameter
from parallel.replicas import Copy, copies
from parallel.schedule import Op, Plan, forward_only
from parallel.shard import DATA
from parallel.sharded import Units
from training.text import MicroBatch
from training.work import Work


class NotFinite(ArithmeticError):
    """A loss, a gradient or a weight is NaN or infinite. Raised on all ranks alike, before anything more is changed."""


class Trainer:
    """`step(...)` does all of it: forward and backward of the micro-batches in the order of a plan, sums over the data
    axes, clipping, AdamW.

    `stages`: those of this rank of pp, by number; a whole model is stage 0.
    """

    def __init__(self, stages: Mapping[int, Stage], mesh: Mesh, recipe: Recipe) -> None:
        self.mesh, self.recipe = mesh, recipe
        dtypes = [str(p.data.dtype) for stage in stages.values() for p in stage.parameters[:1]]
        every = mesh.control.everyone((mesh.pp.rank, [*stages], dtypes))
        self.rank_of = dict(sorted((stage, rank) for rank, stages, _ in every for stage in stages))
        self.form = Step(stages, mesh, recipe, next(dtype for *_, of in every for dtype in of), Groups, Units)
        self.stages, self.parameters, self.routed, self.dtype = (
            getattr(self.form, name) for name in ("stages", "parameters", "routed", "dtype")
        )
        self.holder: Groups | Units = self.form.holder
        self.numbering, owned = self.holder.numbering, self.holder.owned
        self.optimizer = AdamW(self.numbering, owned, weight_decay=recipe.weight_decay)
        counted = self.numbering.counted_once(mesh.place, recipe.zero_over if recipe.zero else ())
        self._counted = [counted[part.at].copy() for part in owned]
        self._plans: dict[int, Plan] = {}
        self.kept, self._predicted, self.in_flight = Kept(), Kept(), 0
        # What was sent to experts so far, beyond `traffic`; and of the last step what was found out in each micro-batch by each
        # layer that chooses them, the balance loss, and the whole batch's choices by layer.
        self.exchanged: list[Traffic] = []
        self.noted: list[list[Routed]] = []
        self.balance, self.chosen = 0.0, {}

    def plan(self, micro_batches: int) -> Plan:
        """The order of a step of so many micro-batches. All ranks call it together; the first call sees that they agree."""
        if micro_batches not in self._plans:
            r, plan = self.recipe, self.recipe.schedule
            if isinstance(plan, str):
                plan = schedules.plan(plan, self.mesh.pp.size, micro_batches, r.chunks)
            if plan.rank_of != self.rank_of or plan.micro_batches != micro_batches:
                raise ValueError(
                    f"the plan is for {plan.micro_batches} micro-batches and stages on ranks {[*plan.rank_of.values()]}, the "
                    f"trainer has {micro_batches} and stages on ranks {[*self.rank_of.values()]}: use the same"
                )
            pipeline.require_same(plan, self.mesh.control)
            self._plans[micro_batches] = plan
        return self._plans[micro_batches]

    def gradients(self, micro_batches: Sequence[MicroBatch], tokens: int) -> float:
        """The gradient of the mean over the `tokens` of all ranks' micro-batches, where it is owned; the mean itself."""
        plan = self.plan(len(micro_batches))
        ops = plan.ranks[self.mesh.pp.rank]
        self.holder.zero_grad()
        self.holder.begin(ops, pipeline.PHASES)
        work = self._work(micro_batches, tokens, ops, self.form.balance(tokens))
        pipeline.run(plan, self.mesh.pp, work, work.shape, self.dtype)
        by_size = lambda kept: kept.nbytes  # noqa: E731
        self.kept, self.in_flight = max(self.kept, work.most, key=by_size), max(self.in_flight, work.in_flight)
        if self.routed:
            self.noted = [[batch.noted[one]._replace(d_shares=None) for one in self.routed] for batch in work.batches]
            self._predicted = max(self._predicted, most_kept(self.stages, work.batches, ops), key=by_size)
        self.exchanged = condensed([*self.exchanged, *work.exchanged])
        with self.mesh.phase("backward"):
            self.form.owed.sum()
            self.holder.finish()
        with self.mesh.phase("step"):
            self._count(work)
            mine = np.array([work.nats / tokens, sum(found.loss for _, found in work.routed)])
            loss, self.balance = self.form.losses.all_reduce(mine).tolist()
        if not isfinite(loss + self.balance):
            self._refuse_loss(loss, work)
        return loss

    def _refuse_loss(self, loss: float, work: Work) -> NoReturn:
        """All ranks of pp and the data axes have the same loss, and those of tp, too."""
        found = _there(self.mesh.control.everyone(work.bad))
        where = [f"rank {rank} at position {p} of sequence {s} of its micro-batch {m}" for rank, (m, s, p) in found]
        raise NotFinite(f"the loss is {loss}, on {where[0]}" if where else f"the loss of uneven experts is {self.balance}")

    def _count(self, work: Work) -> None:
        """How often the whole batch chose each expert, by layer. Counted once, also where it is computed again."""
        if self.routed:
            mine = [sum(found.counts for layer, found in work.routed if layer is one) for one in self.routed]
            self.chosen = dict(zip(self.routed, self.form.data.all_reduce(np.array(mine)), strict=True))

    def _work(
        self, micro_batches: Sequence[MicroBatch], tokens: int = 1, ops: Sequence[Op] = (), balance: Balance | None = None
    ) -> Work:
        batches = self._batches(micro_batches, balance)
        return Work(self.stages, micro_batches, tokens, ops, self.holder, batches)

    def _batches(self, micro_batches: Sequence[MicroBatch], balance: Balance | None = None) -> list[Batch]:
        return self.form.batches((part.lengths for part in micro_batches), balance)

    def update(self, lr: float) -> float:
        """AdamW from the gradients; the norm of the whole gradient before clipping."""
        with self.mesh.phase("step"):
            norm = global_norm(self.optimizer.owned, self._counted, self.form.everyone)
            if not isfinite(norm):
                self.require_finite("grad", f"the norm of the gradient is {norm}: ")
                raise NotFinite(f"the norm of the gradient is {norm}, though each of its entries is finite")
            # As PyTorch and Megatron clip: the small number is theirs.
            scale = min(1.0, self.recipe.clip / (norm + 1e-6)) if self.recipe.clip else 1.0
            self.optimizer.step(lr, scale)
            for layer, counts in self.chosen.items():
                for br_X in layer.buffers:
                    br_X.data += self.recipe.gamma * np.sign(counts.mean() - counts).astype(br_X.data.dtype)
            self.holder.spread()
        return norm

    def require_finite(self, kind: str = "data", lead: str = "") -> None:
        """Raises NotFinite for weights or AdamW's state ("data"), or for gradients ("grad"), that hold NaN or infinity, naming
        the rank and the parameter. All ranks call it together."""
        parts = [(part.at.start, getattr(part, kind)) for part in self.optimizer.owned]
        if kind == "data":
            begin = 0
            for part in self.optimizer.owned:
                state = slice(begin, begin + len(part.data))
                parts += [(part.at.start, a[state]) for a in (self.optimizer.m, self.optimizer.v)]
                begin = state.stop
        bad = next((start + int((~np.isfinite(a)).argmax()) for start, a in parts if not np.isfinite(a).all()), None)
        mine = None if bad is None else next(home.parts[0][0].name for home, at in self.numbering.places() if bad < at.stop)
        what = {"data": "weights, or optimizer's state,", "grad": "a gradient"}[kind]
        for rank, name in _there(self.mesh.control.everyone(mine)):
            raise NotFinite(f"{lead}rank {rank} has {what} of {name} with NaN or infinity in it")

    def step(self, micro_batches: Sequence[MicroBatch], tokens: int, lr: float) -> float:
        """One step on this rank's micro-batches; the mean loss over all `tokens`, in nats. Raises NotFinite, and then has
        changed nothing."""
        loss = self.gradients(micro_batches, tokens)
        self.update(lr)
        return loss

    def forward(self, micro_batches: Sequence[MicroBatch], phase: str) -> Work:
        """These through all stages, no gradients: their `nats`, or without targets their `logits`, where the last stage is."""
        plan = forward_only(self.rank_of, len(micro_batches))
        self.holder.begin(plan.ranks[self.mesh.pp.rank], {"F": phase})
        work = self._work(micro_batches)
        pipeline.run(plan, self.mesh.pp, work, work.shape, self.dtype, {"F": phase})
        self.exchanged = condensed([*self.exchanged, *block.forward_only(work.exchanged, phase)])
        return work

    def wholes(self, kind: str) -> dict[str, np.ndarray]:
        """Copies of whole weights ("data") or gradients ("grad"), by name. All ranks call it together."""
        mine = self.holder.wholes(kind)
        return {p.name: p.whole(self.mesh, mine[p.name]) for p in dict.fromkeys(self.parameters)}

    def copies(self) -> Iterator[Copy]:
        """What other ranks hold too, in the order of forward: weights, and the optimizer's state, unless they are split."""
        for home, at in reversed([*self.numbering.places()]):
            state, zero = self.optimizer.state_in(at), self.recipe.zero
            for kind, flat in zip(("", "m of ", "v of "), state if zero == 0 else [home.data] * (zero < 3), strict=False):
                for p, index in home.parts:
                    yield from copies(kind + p.name, p.layout, self.mesh.place, flat.reshape(home.data.shape)[index])
        for p in self._buffers:
            yield from copies(p.name, p.layout, self.mesh.place, p.data)
        if self.recipe.zero == 3:
            for shard in self.holder.shards:
                first, zero_over = shard.numbering.parameters[0], self.recipe.zero_over
                rest = [name for name in DATA if name not in zero_over and name not in first.layout.cuts]
                yield Copy(f"the share with {first.name}", shard.data, tuple(n for n in self.mesh.sizes if n not in rest))

    def traffic(self, micro_batches: Sequence[MicroBatch]) -> list[Traffic]:
        """What one step on these micro-batches sends, `exchanged` aside."""
        return self.form.traffic(self.plan(len(micro_batches)), self._batches(micro_batches, self.form.balance(1)))

    def forward_traffic(self, micro_batches: Sequence[MicroBatch], phase: str) -> list[Traffic]:
        """What `forward` sends, `exchanged` aside."""
        batches, sent = self._batches(micro_batches), []
        for part, batch in zip(micro_batches, batches, strict=True):
            ask = Stage.traffic_of_logits if part.targets is None else Stage.traffic
            sent += block.forward_only((t for stage in self.stages.values() for t in ask(stage, batch)), phase)
        plan = forward_only(self.rank_of, len(micro_batches))
        sent += self.holder.gathered(self.form.ops(plan), {"F": phase})
        return sent + self.form.between(plan, batches, {"F": phase})

    @property
    def held(self) -> dict[str, int]:
        """This rank's bytes, as they were counted: of what stays, and of what came and went at most."""
        state = self.optimizer.m.nbytes + self.optimizer.v.nbytes
        return {**self.holder.held, "optimizer": state, **self.holder.peaks, **self.kept._asdict()}

    def memory(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        """This rank's bytes: counted, and of what comes and goes the closed form beside it."""
        ops, kept = self.form.ops(self.plan(len(micro_batches))), self._predicted
        if not kept.nbytes:
            kept = most_kept(self.stages, self._batches(micro_batches), ops)
        most = {f"predicted_{kind}": size for kind, size in self.holder.most(ops).items()}
        counted = {kind: size for kind, size in self.held.items() if kind not in Kept._fields}
        return {**counted, **most, "saved": self.kept.nbytes, "predicted_saved": kept.nbytes}

    # --- checkpoints

    @property
    def _buffers(self) -> list[Parameter]:
        return [p for layer in self.routed for p in layer.buffers]

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes of weights and optimizer state. All ranks go through it together: what is split is put together
        one array at a time, and the arrays are dealt out over the data axes to be written."""
        for n, (home, at) in enumerate(self.numbering.places()):
            state, over = self.optimizer.state_in(at), self.holder.over_of[home]
            if self.recipe.zero:
                # Zero where another rank has it: the sum is exact.
                with self.mesh.phase("checkpoint"):
                    state = over.axis.all_reduce(state)
            mine, every = over.number
            if n % every != mine:
                continue
            for kind, flat in zip(("", "m.", "v."), state, strict=True):
                for p, index in home.parts:
                    part, cuts = flat.reshape(home.data.shape)[index], p.layout.cuts
                    place = {name: at for name, at in self.mesh.place.items() if name not in DATA or name in cuts}
                    yield from pieces(kind + p.name, p.layout, place, part)
        for p in self._buffers:
            yield from pieces(p.name, p.layout, self.mesh.place, p.data)

    def load(self, checkpoint: Checkpoint) -> None:
        """Weights and optimizer state from a checkpoint of whatever mesh."""
        for home, at in self.numbering.places():
            state = np.empty((3, home.data.size), self.dtype)
            for kind, flat in zip(("", "m.", "v."), state, strict=True):
                whole = flat.reshape(home.data.shape)
                for p, index in home.parts:
                    whole[index] = checkpoint.read(kind + p.name, p.layout, self.mesh.place, self.dtype)
            self.holder.take(home, state[0].reshape(home.data.shape))
            self.optimizer.take_state(at, state)
        for p in self._buffers:
            p.data[...] = checkpoint.read(p.name, p.layout, self.mesh.place, self.dtype)
        self.optimizer.steps = checkpoint.step

    def checkpoint_traffic(self) -> list[Traffic]:
        """What one checkpoint sends."""
        split = self.numbering.homes if self.recipe.zero else []
        return [Traffic("all_reduce", self.holder.over_of[h].axis.name, "checkpoint", 3 * h.data.nbytes) for h in split]


def _there(every: Iterable[object]) -> Iterator[tuple[int, object]]:
    """By rank, what those have that have something."""
    return ((rank, has) for rank, has in enumerate(every) if has is not None)
