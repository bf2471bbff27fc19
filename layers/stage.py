"""Consecutive parts of a language model: a whole one, or what one rank of a pipeline computes.

T tokens   D model width   V vocabulary   v, t this rank's share over tp of V and, where rows are cut, of T
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from layers.batch import Balance, Batch
from layers.block import Block, Recomputed
from layers.embedding import Head, LearnedPositions, VocabParallelEmbedding
from layers.loss import VocabParallelCrossEntropy
from layers.moe import MoE
from layers.norm import LayerNorm, RMSNorm
from layers.pieces import Pieces
from layers.rope import Rope
from layers.saved import nbytes
from layers.work import Work, condensed, operations
from parallel.axis import Axis
from parallel.holder import IN_PLACE, Holder
from parallel.later import Later, put_off
from parallel.ledger import Traffic
from parallel.parameter import Parameter
from parallel.rows import held, is_whole, own


class Beginning:
    """What comes before the blocks: x_tD = embedding(ids_T) (+ Wpe[positions])."""

    def __init__(self, embedding: VocabParallelEmbedding, positions: LearnedPositions | None = None) -> None:
        self.embedding, self.positions = embedding, positions

    @property
    def parameters(self) -> list[Parameter]:
        return [*self.embedding.parameters, *([] if self.positions is None else self.positions.parameters)]

    def forward(self, ids_T: np.ndarray, batch: Batch) -> tuple[np.ndarray, tuple]:
        """ids (T,) -> x (t, D), saved."""
        x_tD, saved_embedding = self.embedding.forward(ids_T, batch.rows)
        if self.positions is None:
            return x_tD, (saved_embedding, None)
        x_tD, saved_positions = self.positions.forward(x_tD, own(batch.positions_T, batch.rows, self.embedding.tp.rank))
        return x_tD, (saved_embedding, saved_positions)

    def backward(self, dx_tD: np.ndarray, saved: tuple, later: Later | None = None) -> None:
        """dx (t, D), saved. Adds into the gradients."""
        saved_embedding, saved_positions = saved
        if self.positions is not None:
            dx_tD = self.positions.backward(dx_tD, saved_positions, later)
        self.embedding.backward(dx_tD, saved_embedding, later)

    def traffic(self, batch: Batch) -> list[Traffic]:
        """What forward and backward of the batch send."""
        return self.embedding.traffic(batch.tokens, batch.rows)

    def work(self, batch: Batch) -> list[Work]:
        """What forward and backward of the batch compute."""
        own = held(batch.tokens, batch.rows, self.embedding.tp.rank)
        return self.embedding.work(batch.tokens) + ([] if self.positions is None else self.positions.work(own))

    def saved_bytes(self, batch: Batch) -> int:
        """Nothing: the ids and the positions are the batch's."""
        return 0

    def later_bytes(self, batch: Batch) -> int:
        """What is kept where the rows of the tables are put off. With whole rows both read the same dx."""
        size = self.embedding.later_bytes(batch.tokens)
        if self.positions is None or is_whole(batch.rows):
            return size
        return size + self.embedding.later_bytes(held(batch.tokens, batch.rows, self.embedding.tp.rank))


class End:
    """What comes after the blocks: logits_Tv = head(norm(x_tD)), and the loss of these."""

    def __init__(self, norm: RMSNorm | LayerNorm, head: Head) -> None:
        self.norm, self.head = norm, head
        self.loss = VocabParallelCrossEntropy(head.tp, head.cut)

    @property
    def parameters(self) -> list[Parameter]:
        return [*self.norm.parameters, *self.head.parameters]

    def forward(self, x_tD: np.ndarray, batch: Batch) -> tuple[np.ndarray, tuple]:
        """x (t, D) -> logits (T, v), this rank's columns, saved."""
        h_tD, saved_norm = self.norm.forward(x_tD)
        logits_Tv, saved_head = self.head.forward(h_tD, batch.rows)
        return logits_Tv, (saved_norm, saved_head)

    def backward(self, dlogits_Tv: np.ndarray, saved: tuple, later: Later | None = None) -> np.ndarray:
        """dlogits (T, v), saved -> dx (t, D). Adds into the gradients."""
        saved_norm, saved_head = saved
        dh_tD = self.head.backward(dlogits_Tv, saved_head, later)
        return self.norm.backward(dh_tD, saved_norm)

    def traffic(self, batch: Batch) -> list[Traffic]:
        """What forward and backward of the batch send, without the loss."""
        return self.head.traffic(batch.tokens, batch.rows)

    def work(self, batch: Batch) -> list[Work]:
        """What forward and backward of the batch compute, without the loss."""
        return [*self.norm.work(held(batch.tokens, batch.rows, self.head.tp.rank)), *self.head.work(batch.tokens)]

    def saved_bytes(self, batch: Batch) -> int:
        own = held(batch.tokens, batch.rows, self.head.tp.rank)
        return self.norm.saved_bytes(own) + self.head.saved_bytes(batch.tokens, batch.rows)

    def later_bytes(self, batch: Batch) -> int:
        """What is kept where the product of the head is put off."""
        return self.head.later_bytes(batch.tokens)


class Stage:
    """`blocks` of a language model, one after another; with a `beginning` it takes token ids, with an `end` it gives logits.

    y = part(x), part by part: beginning, blocks, end
    dx = part'(dy), in reverse

    `rope` rotates queries and keys by the positions 0, 1, ... of each sequence. `cuts_rows`: between products the tokens are
    cut over tp (sequence parallelism, 2205.05198). Without blocks and ends it hands on what it gets. Saved for backward: what
    the parts save.
    """

    def __init__(
        self,
        tp: Axis,
        d_model: int,
        blocks: Sequence[Block | Recomputed],
        beginning: Beginning | None = None,
        end: End | None = None,
        rope: Rope | None = None,
        cuts_rows: bool = False,
    ) -> None:
        self.tp, self.d_model, self.blocks, self.beginning, self.end = tp, d_model, list(blocks), beginning, end
        self.rope, self.cuts_rows = rope, cuts_rows
        self.parts = [part for part in (beginning, *blocks, end) if part is not None]

    @property
    def parameters(self) -> list[Parameter]:
        """In the order of forward."""
        return [p for part in self.parts for p in part.parameters]

    @property
    def filling_order(self) -> list[Parameter]:
        """The parameters in the order in which backward completes their gradients."""
        return [p for part in reversed(self.parts) for p in part.parameters]

    def batch(
        self, lengths: Sequence[int], every: tuple[Pieces, ...] = (), rank: int = 0, balance: Balance | None = None
    ) -> Batch:
        """What the layers are told of sequences of `lengths`, one after another; the rest as Batch has it."""
        rope, cut_over = self.rope if self.blocks else None, self.tp.size if self.cuts_rows else None
        dtype = None if rope is None else self.parameters[0].data.dtype
        return Batch.of(lengths, rope, dtype, cut_over, every=every, rank=rank, balance=balance)

    def forward(self, x: np.ndarray, batch: Batch, holder: Holder = IN_PLACE) -> tuple[np.ndarray, tuple]:
        """x: ids (T,), or (t, D) where another stage has begun -> logits (T, v), or (t, D) where another goes on; saved."""
        saved = []
        for part in self.parts:
            with holder.using(part.parameters):
                x, of_part = part.forward(x, batch)
            saved.append(of_part)
        return x, tuple(saved)

    def backward(
        self, dy: np.ndarray, saved: tuple, holder: Holder = IN_PLACE, later: Later | None = None
    ) -> np.ndarray | None:
        """dy of what forward gave, saved -> dx (t, D), or None with a beginning. Adds into the gradients; `holder` is told of
        them part by part, where products are put off with these."""
        for part, of_part in zip(reversed(self.parts), reversed(saved), strict=True):
            put_off(later, partial(holder.filling, part.parameters))
            with holder.using(part.parameters):
                dy = part.backward(dy, of_part, later)
            put_off(later, partial(holder.filled, part.parameters))
        return dy

    def exchanged(self, batch: Batch) -> list[Traffic]:
        """What forward and backward have sent beyond `traffic`: rows to their experts, as they were chosen."""
        return [t for block in self.blocks for t in block.exchanged(batch)]

    @property
    def routed(self) -> list[MoE]:
        """The layers that choose experts."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]

    def traffic_of_logits(self, batch: Batch) -> list[Traffic]:
        """What forward and backward of the batch send, without a loss."""
        return [t for part in self.parts for t in part.traffic(batch)]

    def traffic(self, batch: Batch) -> list[Traffic]:
        """What forward, loss and backward of the batch send, within the stage."""
        loss = [] if self.end is None else self.end.loss.traffic(batch.tokens, self.end.head.matrix.data.itemsize)
        return [*self.traffic_of_logits(batch), *loss]

    def work(self, batch: Batch) -> list[Work]:
        """What this rank computes in forward, loss and backward of the batch."""
        loss = [] if self.end is None else self.end.loss.work(batch.tokens)
        return condensed([*loss, *(w for part in self.parts for w in part.work(batch))])

    def flops(self, sequence_length: int) -> float:
        """Operations a token of forward and backward on this rank (`layers.work.operations`)."""
        return operations(self.work(self.batch([sequence_length]))) / sequence_length

    def kept(self, saved: tuple) -> int:
        """Bytes of what forward saved; ids and positions are the batch's and are not counted."""
        return nbytes(saved[1:] if self.beginning is not None else saved)

    def saved_bytes(self, batch: Batch) -> int:
        """What this rank keeps from forward to backward, the loss included; the batch's ids and positions are not counted."""
        loss = 0 if self.end is None else self.end.loss.saved_bytes(batch.tokens, self.end.head.matrix.data.itemsize)
        return loss + sum(part.saved_bytes(batch) for part in self.parts)

    def later_bytes(self, batch: Batch) -> int:
        """What this rank keeps where the products of weights are put off."""
        return sum(part.later_bytes(batch) for part in self.parts)
