"""A training step of a language model on a mesh of pp, dp, ep, cp and tp, and what it keeps and sends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layers import block
from layers.optimizer import AdamW, global_norm
from layers.pieces import LAYOUTS, Pieces
from layers.stage import Stage
from parallel import pipeline, schedules
from parallel.axis import Axis
from parallel.checkpoint import Checkpoint, Piece, pieces
from parallel.data import Groups
from parallel.ledger import Traffic, condensed, message
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.parameter import Fused, Parameter
from parallel.replicas import Copy, copies
from parallel.schedule import Plan, forward_only
from training.text import MicroBatch
from training.work import Work, most_kept

# The axes over which ranks see different tokens.
DATA = ("dp", "ep", "cp")


@dataclass(frozen=True)
class Recipe:
    """How a step is made. `clip`: the largest norm of the whole gradient, or 0 for none. `zero`: split the optimizer's state
    over the data axes. `overlap`: send buckets of gradients while backward goes on. `schedule`: of the stages along pp, by name
    or a plan of one's own; `chunks`: stages a rank, where the schedule leaves it open. `layout`: how cp cuts sequences.
    `alpha`: the weight of a loss for experts that are chosen unevenly; `gamma`: by how much the bias of one that is chosen too
    often, or too rarely, is moved after each step (auxiliary-loss-free balancing, arXiv 2408.15664).
    """

    clip: float = 1.0
    zero: bool = False
    overlap: bool = True
    bucket_bytes: int = 4 * 2**20
    weight_decay: float = 0.1
    schedule: str | Plan = "1f1b"
    chunks: int | None = None
    layout: str = "zigzag"
    alpha: float = 0.0
    gamma: float = 0.0


class Trainer:
    """`step(...)` does all of it: forward and backward of the micro-batches in the order of a plan, sums over the data
    axes, clipping, AdamW.

    `stages`: those of this rank of pp, by number; a whole model is stage 0.
    """

    def __init__(self, stages: Mapping[int, Stage], mesh: Mesh, recipe: Recipe) -> None:
        self.stages, self.mesh, self.recipe = dict(stages), mesh, recipe
        self.parameters = [p for stage in self.stages.values() for p in stage.parameters]
        self.owed = Owed(mesh, self.parameters)
        # Later stages come first: what the first stage shares with the last is sent when both are complete.
        filling = [p for _, stage in sorted(self.stages.items(), reverse=True) for p in stage.filling_order]
        # What is owed a sum comes last: it is sent when that has been made.
        self._late = dict.fromkeys(self.owed.homes)
        every = mesh.control.everyone((mesh.pp.rank, [*self.stages], str(filling[0].data.dtype) if filling else None))
        self.rank_of = dict(sorted((stage, rank) for rank, stages, _ in every for stage in stages))
        dtype = next(dtype for *_, dtype in every if dtype)
        self.everyone, self.data = mesh.over(*mesh.sizes), mesh.over(*DATA)
        self.losses = mesh.over("pp", *DATA)
        # All ranks make the same axes, whatever their stages have.
        over = {cut: mesh.over(*(name for name in DATA if name not in cut)) for cut in ((), ("ep",))}
        axes: dict[Axis, dict[Parameter | Fused, None]] = {axis: {} for axis in over.values()}
        for p in sorted(filling, key=lambda p: p.home in self._late):
            axes[over[tuple(name for name in p.layout.cuts if name in DATA)]][p.home] = None
        self.sums = Groups(axes, recipe.bucket_bytes, recipe.overlap, recipe.zero, dtype)
        self.flat = self.sums.flat
        self.optimizer = AdamW(self.flat, self.sums.owned, weight_decay=recipe.weight_decay)
        self._counted = self.flat.counted_once(mesh.place, DATA if recipe.zero else ())
        self._plans: dict[int, Plan] = {}
        self.saved_bytes, self._predicted_saved = 0, 0
        # What was sent to experts so far, beyond `traffic`; and the last step's balance loss and choices, by layer.
        self.exchanged: list[Traffic] = []
        self.balance, self.chosen = 0.0, {}
        self.routed = [layer for stage in self.stages.values() for layer in stage.routed]

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
        """The gradient of the mean over the `tokens` of all ranks' micro-batches in flat.grad; the mean itself."""
        self.flat.zero_grad()
        plan = self.plan(len(micro_batches))
        ops = plan.ranks[self.mesh.pp.rank]
        work = Work(self.stages, micro_batches, tokens, ops, self._filled, self.pieces_of, self.recipe.alpha)
        pipeline.run(plan, self.mesh.pp, work, work.shape, self.flat.data.dtype)
        self.saved_bytes = max(self.saved_bytes, work.most)
        if self.routed:
            self._predicted_saved = max(self._predicted_saved, most_kept(work, ops))
        self.exchanged = condensed([*self.exchanged, *work.exchanged])
        with self.mesh.phase("backward"):
            self.owed.sum()
            if self._late:
                self.sums.filled(p for home in self._late for p, _ in home.parts)
            self.sums.finish()
        with self.mesh.phase("step"):
            self._count(work)
            mine = np.array([work.nats / tokens, sum(found.loss for _, found in work.routed)])
            loss, self.balance = self.losses.all_reduce(mine).tolist()
        return loss

    def _count(self, work: Work) -> None:
        """How often the whole batch chose each expert, by layer. Counted once, also where it is computed again."""
        if self.routed:
            mine = [sum(found.counts for layer, found in work.routed if layer is one) for one in self.routed]
            self.chosen = dict(zip(self.routed, self.data.all_reduce(np.array(mine)), strict=True))

    def pieces_of(self, lengths: Sequence[int]) -> tuple[tuple[Pieces, ...], int]:
        """Of sequences of these lengths, as Batch has them."""
        return LAYOUTS[self.recipe.layout](lengths, self.mesh.cp.size), self.mesh.cp.rank

    def _work(self, micro_batches: Sequence[MicroBatch], alpha: float = 0.0) -> Work:
        return Work(self.stages, micro_batches, of=self.pieces_of, alpha=alpha)

    def _filled(self, parameters: Sequence[Parameter]) -> None:
        self.sums.filled(p for p in parameters if p.home not in self._late)

    def update(self, lr: float) -> float:
        """AdamW from flat.grad; the norm of the whole gradient before clipping."""
        with self.mesh.phase("step"):
            norm = global_norm(self.flat, self.sums.owned, self._counted, self.everyone)
            # As PyTorch and Megatron clip: the small number is theirs.
            scale = min(1.0, self.recipe.clip / (norm + 1e-6)) if self.recipe.clip else 1.0
            self.optimizer.step(lr, scale)
            for layer, counts in self.chosen.items():
                for br_X in layer.buffers:
                    br_X.data += self.recipe.gamma * np.sign(counts.mean() - counts).astype(br_X.data.dtype)
            self.sums.gather(self.flat.data)
        return norm

    def step(self, micro_batches: Sequence[MicroBatch], tokens: int, lr: float) -> float:
        """One step on this rank's micro-batches; the mean loss over all `tokens`, in nats."""
        loss = self.gradients(micro_batches, tokens)
        self.update(lr)
        return loss

    def forward(self, micro_batches: Sequence[MicroBatch], phase: str) -> Work:
        """These through all stages, no gradients: their `nats`, or without targets their `logits`, where the last stage is."""
        work, plan = self._work(micro_batches), forward_only(self.rank_of, len(micro_batches))
        pipeline.run(plan, self.mesh.pp, work, work.shape, self.flat.data.dtype, {"F": phase})
        self.exchanged = condensed([*self.exchanged, *block.forward_only(work.exchanged, phase)])
        return work

    def copies(self) -> Iterator[Copy]:
        """What other ranks hold too, in the order of forward: weights, and the optimizer's state unless it is split."""
        for home, at in reversed([*self.flat.places()]):
            kinds = [("", home.data)]
            if not self.recipe.zero:
                kinds += zip(("m of ", "v of "), self.optimizer.state_in(at), strict=True)
            for kind, flat in kinds:
                for p, index in home.parts:
                    yield from copies(kind + p.name, p.layout, self.mesh.place, flat.reshape(home.data.shape)[index])
        for p in self._buffers:
            yield from copies(p.name, p.layout, self.mesh.place, p.data)

    def traffic(self, micro_batches: Sequence[MicroBatch]) -> list[Traffic]:
        """What one step on these micro-batches sends, `exchanged` aside."""
        work = self._work(micro_batches, self.recipe.alpha)
        sent = [t for batch in work.batches for stage in self.stages.values() for t in stage.traffic(batch)]
        sent += self._between(self.plan(len(micro_batches)), work)
        scalars = [Traffic("all_reduce", self.losses.name, "step", 16), Traffic("all_reduce", self.everyone.name, "step", 8)]
        if self.routed:
            counts = message((len(self.routed), self.routed[0].router.count), 8)
            scalars.append(Traffic("all_reduce", self.data.name, "step", counts))
        return [*sent, *self.owed.traffic(), *self.sums.traffic(), *scalars]

    def forward_traffic(self, micro_batches: Sequence[MicroBatch], phase: str) -> list[Traffic]:
        """What `forward` sends, `exchanged` aside."""
        work, sent = self._work(micro_batches), []
        for part, batch in zip(micro_batches, work.batches, strict=True):
            ask = Stage.traffic_of_logits if part.targets is None else Stage.traffic
            sent += block.forward_only((t for stage in self.stages.values() for t in ask(stage, batch)), phase)
        return sent + self._between(forward_only(self.rank_of, len(micro_batches)), work, {"F": phase})

    def _between(self, plan: Plan, work: Work, phases: Mapping[str, str] = pipeline.PHASES) -> list[Traffic]:
        """What goes from stage to stage."""
        return pipeline.traffic(plan, self.mesh.pp, lambda i: message(work.shape(i), self.flat.data.itemsize), phases)

    def memory(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        """This rank's bytes: counted, and where there is a closed form beside it."""
        ops = self.plan(len(micro_batches)).ranks[self.mesh.pp.rank]
        return {
            "weights": self.flat.data.nbytes,
            "gradients": self.flat.grad.nbytes,
            "optimizer": self.optimizer.m.nbytes + self.optimizer.v.nbytes,
            "saved": self.saved_bytes,
            "predicted_saved": self._predicted_saved or most_kept(self._work(micro_batches), ops),
        }

    # --- checkpoints

    @property
    def _buffers(self) -> list[Parameter]:
        return [p for layer in self.routed for p in layer.buffers]

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes of weights and optimizer state. All ranks go through it together: state that is split is put
        together one array at a time, and the arrays are dealt out over the data axes to be written."""
        for n, (home, at) in enumerate(self.flat.places()):
            moments, data = self.optimizer.state_in(at), self.sums.axis_of[home]
            if self.recipe.zero:
                # Zero where another rank has it: the sum is exact.
                with self.mesh.phase("checkpoint"):
                    moments = data.all_reduce(moments)
            if n % data.size != data.rank:
                continue
            for kind, flat in (("", home.data), ("m.", moments[0]), ("v.", moments[1])):
                for p, index in home.parts:
                    part, cuts = flat.reshape(home.data.shape)[index], p.layout.cuts
                    place = {name: at for name, at in self.mesh.place.items() if name not in DATA or name in cuts}
                    yield from pieces(kind + p.name, p.layout, place, part)
        for p in self._buffers:
            yield from pieces(p.name, p.layout, self.mesh.place, p.data)

    def load(self, checkpoint: Checkpoint) -> None:
        """Weights and optimizer state from a checkpoint of whatever mesh."""
        dtype = self.flat.data.dtype
        for home, at in self.flat.places():
            moments = np.empty((2, home.data.size), dtype)
            for kind, flat in (("", home.data), ("m.", moments[0]), ("v.", moments[1])):
                whole = flat.reshape(home.data.shape)
                for p, index in home.parts:
                    whole[index] = checkpoint.read(kind + p.name, p.layout, self.mesh.place, dtype)
            self.optimizer.take_state(at, moments)
        for p in self._buffers:
            p.data[...] = checkpoint.read(p.name, p.layout, self.mesh.place, dtype)
        self.optimizer.steps = checkpoint.step

    def checkpoint_traffic(self) -> list[Traffic]:
        """What one checkpoint sends."""
        split = self.flat.homes if self.recipe.zero else []
        return [Traffic("all_reduce", self.sums.axis_of[home].name, "checkpoint", 2 * home.data.nbytes) for home in split]
