"""The operations of a pipeline plan on a model's stages: what one rank computes in a step.

T tokens   D model width   V vocabulary   v, t this rank's share over tp of V and, where rows are cut, of T
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import numpy as np

from layers.batch import Batch
from layers.moe import MoE, Routed
from layers.saved import nbytes
from layers.stage import Stage
from layers.step import Kept, crossing, together
from parallel.holder import Holder
from parallel.later import Later
from parallel.ledger import Traffic
from parallel.schedule import Op
from training.text import MicroBatch


class Work:
    """`work(op, x)` does one operation of this rank.

    Micro-batches are whole; this rank's tokens of each are taken here, by its Batch. `tokens`: of the whole batch, over all
    ranks: the loss is the mean over these. `ops`: those of this rank; where all are F, nothing is kept for backward. `holder`
    has the weights, and is told of gradients.

    What comes of it: `nats`, the sum of this rank's losses; `bad`, where the first token is whose loss is no finite number:
    its micro-batch, sequence and position; `logits`, by micro-batch, of those without targets; `most`, the most that was kept
    at a time, and `in_flight`, of how many micro-batches on stages.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        micro_batches: Sequence[MicroBatch],
        tokens: int,
        ops: Sequence[Op],
        holder: Holder,
        batches: Sequence[Batch],
    ) -> None:
        self.stages, self.micro_batches, self.tokens, self.holder = stages, micro_batches, tokens, holder
        self.batches = batches
        self.nats, self.logits, self.most, self.in_flight = 0.0, {}, Kept(), 0
        self.bad: tuple[int, int, int] | None = None
        self._trains = {op.stage for op in ops if op.kind != "F"}
        self._saved: dict[tuple[int, int], tuple] = {}
        self._later: dict[tuple[int, int], Later] = {}
        self._kept: dict[tuple[int, int], Kept] = {}

    def __call__(self, op: Op, x: np.ndarray | None) -> np.ndarray | None:
        do = {"F": self._forward, "I": self._backward, "B": self._backward, "W": self._weights}[op.kind]
        made = do(op, x)
        self.most = max(self.most, together(self._kept.values()), key=lambda kept: kept.nbytes)
        self.in_flight = max(self.in_flight, len(self._kept))
        return made

    @property
    def routed(self) -> list[tuple[MoE, Routed]]:
        """What each layer that chooses experts has found out, in each micro-batch."""
        layers = [layer for stage in self.stages.values() for layer in stage.routed]
        return [(layer, batch.noted[layer]) for batch in self.batches for layer in layers if layer in batch.noted]

    @property
    def exchanged(self) -> list[Traffic]:
        """What was sent to other ranks' experts, and back."""
        return [t for batch in self.batches for stage in self.stages.values() for t in stage.exchanged(batch)]

    def shape(self, micro_batch: int) -> tuple[int, int]:
        """(t, D): of what crosses from stage to stage."""
        return crossing(self.stages, self.batches[micro_batch])

    def _forward(self, op: Op, x: np.ndarray | None) -> np.ndarray | None:
        stage, part, at = self.stages[op.stage], self.micro_batches[op.micro_batch], op[1:]
        batch = self.batches[op.micro_batch]
        y, saved = stage.forward(batch.take(part.ids) if x is None else x, batch, self.holder)
        kept, saved_loss = stage.kept(saved), ()
        if stage.end is not None and part.targets is None:
            self.logits[op.micro_batch] = y
        elif stage.end is not None:
            nll_T, saved_loss = stage.end.loss.forward(y, batch.take(part.targets))
            nats = float(nll_T.sum(dtype=np.float64))
            if not isfinite(nats) and self.bad is None:
                token = int(np.flatnonzero(~np.isfinite(nll_T))[0])
                self.bad = op.micro_batch, int(batch.sequence_T[token]), int(batch.positions_T[token])
            self.nats += nats
            kept += nbytes(saved_loss[:2])
        if op.stage in self._trains:
            self._saved[at], self._kept[at] = (saved, saved_loss), Kept(kept)
        return None if stage.end is not None else y

    def _backward(self, op: Op, dy: np.ndarray | None) -> np.ndarray | None:
        """I or B: of the last stage from its loss."""
        stage, at = self.stages[op.stage], op[1:]
        saved, saved_loss = self._saved.pop(at)
        if dy is None:
            p_Tv = saved_loss[0]
            dnll_T = np.full(len(p_Tv), 1 / self.tokens, p_Tv.dtype)
            dy = stage.end.loss.backward(dnll_T, saved_loss)
        if op.kind == "B":
            dx = stage.backward(dy, saved, self.holder)
            del self._kept[at]
            return dx
        later = self._later[at] = Later()
        dx = stage.backward(dy, saved, self.holder, later)
        self._kept[at] = Kept(0, later.nbytes)
        return dx

    def _weights(self, op: Op, nothing: None) -> None:
        self._later.pop(op[1:]).do()
        del self._kept[op[1:]]
