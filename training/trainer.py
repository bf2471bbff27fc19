"""A training step of a language model on a dp x tp mesh, and what it keeps and sends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from layers.optimizer import AdamW, global_norm
from layers.saved import nbytes
from layers.transformer import Transformer
from parallel.checkpoint import Checkpoint, Piece, pieces
from parallel.data import Flat, GradientSums
from parallel.ledger import Traffic
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.parameter import Parameter
from parallel.replicas import Copy, copies
from training.text import MicroBatch


@dataclass(frozen=True)
class Plan:
    """`clip`: the largest norm of the whole gradient, or 0 for none. `zero`: split the optimizer's state over dp.
    `overlap`: send buckets of gradients while backward goes on."""

    clip: float = 1.0
    zero: bool = False
    overlap: bool = True
    bucket_bytes: int = 4 * 2**20
    weight_decay: float = 0.1


class Trainer:
    """`step(...)` does all of it: forward and backward of each micro-batch, sums over dp, clipping, AdamW."""

    def __init__(self, model: Transformer, mesh: Mesh, plan: Plan) -> None:
        self.model, self.mesh, self.plan = model, mesh, plan
        self.owed = Owed(mesh, model.parameters)
        # What is owed a sum comes last: it is sent when that has been made.
        self._late = dict.fromkeys(self.owed.homes)
        self.flat = Flat(sorted(model.filling_order, key=lambda p: p.home in self._late))
        self.sums = GradientSums(self.flat, mesh.dp, plan.bucket_bytes, plan.overlap, plan.zero)
        self.optimizer = AdamW(self.flat, self.sums.owned, weight_decay=plan.weight_decay)
        self.everyone = mesh.over(*mesh.sizes)
        # What is split over dp is counted wherever it lies.
        self._counted = self.flat.counted_once({name: at for name, at in mesh.place.items() if name != "dp" or not plan.zero})
        self.saved_bytes = 0

    def gradients(self, micro_batches: Sequence[MicroBatch], tokens: int) -> float:
        """The gradient of the mean over the `tokens` of all ranks' micro-batches in flat.grad; the mean itself."""
        self.flat.zero_grad()
        total = 0.0
        for batch in micro_batches:
            with self.mesh.phase("forward"):
                logits_Tv, saved = self.model.forward(batch.ids, self.model.batch(batch.lengths))
                nll_T, saved_loss = self.model.loss.forward(logits_Tv, batch.targets)
            self.saved_bytes = max(self.saved_bytes, self.model.kept(saved) + nbytes(saved_loss[:2]))
            total += float(nll_T.sum(dtype=np.float64))
            with self.mesh.phase("backward"):
                dlogits_Tv = self.model.loss.backward(np.full(len(nll_T), 1 / tokens, nll_T.dtype), saved_loss)
                # Only the last micro-batch completes a gradient.
                filled = self._filled if batch is micro_batches[-1] else lambda parameters: None
                self.model.backward(dlogits_Tv, saved, filled)
        with self.mesh.phase("backward"):
            self.owed.sum()
            if self._late:
                self.sums.filled(p for home in self._late for p, _ in home.parts)
            self.sums.finish()
        with self.mesh.phase("step"):
            return self.mesh.dp.all_reduce(np.array([total / tokens])).item()

    def _filled(self, parameters: Sequence[Parameter]) -> None:
        self.sums.filled(p for p in parameters if p.home not in self._late)

    def update(self, lr: float) -> float:
        """AdamW from flat.grad; the norm of the whole gradient before clipping."""
        with self.mesh.phase("step"):
            norm = global_norm(self.flat, self.sums.owned, self._counted, self.everyone)
            # As PyTorch and Megatron clip: the small number is theirs.
            scale = min(1.0, self.plan.clip / (norm + 1e-6)) if self.plan.clip else 1.0
            self.optimizer.step(lr, scale)
            self.sums.gather(self.flat.data)
        return norm

    def step(self, micro_batches: Sequence[MicroBatch], tokens: int, lr: float) -> float:
        """One step on this rank's micro-batches; the mean loss over all `tokens`, in nats."""
        loss = self.gradients(micro_batches, tokens)
        self.update(lr)
        return loss

    def loss(self, batch: MicroBatch) -> float:
        """The sum of this micro-batch's nll, no gradients."""
        with self.mesh.phase("validation"):
            logits_Tv, _ = self.model.forward(batch.ids, self.model.batch(batch.lengths))
            return float(self.model.loss.forward(logits_Tv, batch.targets)[0].sum(dtype=np.float64))

    def copies(self) -> Iterator[Copy]:
        """What other ranks hold too, in the order of forward: weights, and the optimizer's state unless it is split over dp."""
        for home, at in reversed([*self.flat.places()]):
            kinds = [("", home.data)]
            if not self.plan.zero:
                kinds += zip(("m of ", "v of "), self.optimizer.state_in(at), strict=True)
            for kind, flat in kinds:
                for p, index in home.parts:
                    yield from copies(kind + p.name, p.layout, self.mesh.place, flat.reshape(home.data.shape)[index])

    def traffic(self, micro_batches: Sequence[MicroBatch]) -> list[Traffic]:
        """What one step on these micro-batches sends."""
        sent = [t for batch in micro_batches for t in self.model.traffic(len(batch.ids))]
        scalars = [Traffic("all_reduce", axis, "step", 8) for axis in ("dp", self.everyone.name)]
        return [*sent, *self.owed.traffic(), *self.sums.traffic(), *scalars]

    def memory(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        """This rank's bytes: counted, and where there is a closed form beside it."""
        return {
            "weights": self.flat.data.nbytes,
            "gradients": self.flat.grad.nbytes,
            "optimizer": self.optimizer.m.nbytes + self.optimizer.v.nbytes,
            "saved": self.saved_bytes,
            "predicted_saved": max(self.model.saved_bytes(len(batch.ids)) for batch in micro_batches),
        }

    # --- checkpoints

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes of weights and optimizer state. All ranks go through it together: state that is split over dp
        is put together one array at a time, and the arrays are dealt out over dp to be written."""
        place = {name: at for name, at in self.mesh.place.items() if name != "dp"}
        for n, (home, at) in enumerate(self.flat.places()):
            moments = self.optimizer.state_in(at)
            if self.plan.zero:
                # Zero where another rank has it: the sum is exact.
                with self.mesh.phase("checkpoint"):
                    moments = self.mesh.dp.all_reduce(moments)
            if n % self.mesh.dp.size != self.mesh.dp.rank:
                continue
            for kind, flat in (("", home.data), ("m.", moments[0]), ("v.", moments[1])):
                for p, index in home.parts:
                    part = flat.reshape(home.data.shape)[index]
                    yield from pieces(kind + p.name, p.layout, place, part)

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
        self.optimizer.steps = checkpoint.step

    def checkpoint_traffic(self) -> list[Traffic]:
        """What one checkpoint sends."""
        sizes = [2 * home.data.nbytes for home in self.flat.homes] if self.plan.zero else []
        return [Traffic("all_reduce", "dp", "checkpoint", n) for n in sizes]
