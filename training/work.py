"""The operations of a pipeline plan on a model's stages: what one rank computes in a step.

T tokens   D model width   V vocabulary   v, t this rank's share over tp of V and, where rows are cut, of T
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite

import numpy as np

from layers.batch import Balance
from layers.moe import MoE, Routed
from layers.saved import nbytes
from layers.stage import Stage
from parallel.holder import IN_PLACE, Holder
from parallel.later import Later
from parallel.ledger import Traffic
from parallel.rows import held
from parallel.schedule import Op
from training.text import MicroBatch


class Work:
    """`work(op, x)` does one operation of this rank.

    Micro-batches are whole; `of` says which pieces of sequences of such lengths each rank of cp has, as Batch has them, and
    this rank's tokens are taken here. `tokens`: of the whole batch, over all ranks: the loss is the mean over these. `ops`:
    those of this rank; where all are F, nothing is kept for backward. `holder` has the weights, and is told of gradients.
    `alpha`: the weight of the loss for experts that are chosen unevenly.

    What comes of it: `nats`, the sum of this rank's losses; `bad`, where the first token is whose loss is no finite number:
    its micro-batch, sequence and position; `logits`, by micro-batch, of those without targets; `most`, the most bytes that were
    kept at a time.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        micro_batches: Sequence[MicroBatch],
        tokens: int = 1,
        ops: Sequence[Op] = (),
        holder: Holder = IN_PLACE,
        of: Callable[[Sequence[int]], tuple] = lambda lengths: (),
        alpha: float = 0.0,
    ) -> None:
        self.stages, self.micro_batches, self.tokens, self.holder = stages, micro_batches, tokens, holder
        self.nats, self.logits, self.most = 0.0, {}, 0
        self.bad: tuple[int, int, int] | None = None
        balance = Balance(alpha, tokens) if alpha else None
        # All stages read one batch, which is as the one with most blocks needs it: without blocks nothing is rotated.
        self._fullest = max(stages.values(), key=lambda stage: len(stage.blocks))
        self.batches = [self._fullest.batch(part.lengths, *of(part.lengths), balance=balance) for part in micro_batches]
        self._trains = {op.stage for op in ops if op.kind != "F"}
        self._saved: dict[tuple[int, int], tuple] = {}
        self._later: dict[tuple[int, int], Later] = {}
        self._kept: dict[tuple[int, int], int] = {}

    def __call__(self, op: Op, x: np.ndarray | None) -> np.ndarray | None:
        do = {"F": self._forward, "I": self._backward, "B": self._backward, "W": self._weights}[op.kind]
        made = do(op, x)
        self.most = max(self.most, sum(self._kept.values()))
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
        batch = self.batches[micro_batch]
        return held(batch.tokens, batch.rows, self._fullest.tp.rank), self._fullest.d_model

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
            self._saved[at], self._kept[at] = (saved, saved_loss), kept
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
        self._kept[at] = later.nbytes
        return dx

    def _weights(self, op: Op, nothing: None) -> None:
        self._later.pop(op[1:]).do()
        del self._kept[op[1:]]


def most_kept(work: Work, ops: Iterable[Op]) -> int:
    """The most bytes that a rank with these operations keeps at a time, by the closed forms."""
    now: dict[tuple[int, int], int] = {}
    most = 0
    for op in ops:
        stage, batch = work.stages[op.stage], work.batches[op.micro_batch]
        now[op[1:]] = stage.saved_bytes(batch) if op.kind == "F" else stage.later_bytes(batch) if op.kind == "I" else 0
        most = max(most, sum(now.values()))
    return most
