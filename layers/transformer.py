"""A whole language model: embedding, blocks, last norm and head.

T tokens   D model width   V vocabulary   v, t this rank's share over tp of V and, where rows are cut, of T
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np

from layers.block import Block, Recomputed
from layers.embedding import Head, LearnedPositions, VocabParallelEmbedding
from layers.loss import VocabParallelCrossEntropy
from layers.norm import LayerNorm, RMSNorm
from layers.rope import Rope
from layers.store import Store
from parallel.ledger import Traffic
from parallel.parameter import Parameter
from parallel.rows import cut_rows, held, own
from parallel.shard import Cut


class Transformer:
    """logits = head(norm(blocks(embedding(ids) + positions))): a whole language model, its vocabulary cut over tp.

        x_tD      = embedding(ids_T) (+ Wpe[positions])
        x_tD      = block(x_tD), one after another
        logits_Tv = gather_rows(norm(x_tD)) @ head

    `rope` rotates queries and keys by the positions 0, 1, ... of each sequence; `positions` adds a learned row to each token.
    `cuts_rows`: between products the tokens are cut over tp (sequence parallelism, 2205.05198), in training; cached, they are
    not. Saved for backward: what the parts save.
    """

    def __init__(
        self,
        embedding: VocabParallelEmbedding,
        blocks: Sequence[Block | Recomputed],
        norm: RMSNorm | LayerNorm,
        head: Head,
        rope: Rope | None = None,
        positions: LearnedPositions | None = None,
        cuts_rows: bool = False,
    ) -> None:
        self.embedding, self.positions, self.blocks, self.norm, self.head = embedding, positions, list(blocks), norm, head
        self.rope, self.cuts_rows = rope, cuts_rows
        self.loss = VocabParallelCrossEntropy(embedding.tp, embedding.cut)

    @property
    def parameters(self) -> list[Parameter]:
        """In the order of forward."""
        return [*self._before_head, *self.head.parameters]

    @property
    def _before_head(self) -> list[Parameter]:
        return [*self._first, *(p for block in self.blocks for p in block.parameters), *self.norm.parameters]

    @property
    def _first(self) -> list[Parameter]:
        return [*self.embedding.parameters, *([] if self.positions is None else self.positions.parameters)]

    def forward(self, ids_T: np.ndarray, lengths: Sequence[int]) -> tuple[np.ndarray, tuple]:
        """ids (T,) of sequences of `lengths`, one after another -> logits (T, v), this rank's columns, saved."""
        positions_T, rows = np.concatenate([np.arange(n) for n in lengths]), self.rows(len(ids_T))
        x_tD, saved_embedding = self.embedding.forward(ids_T, rows)
        saved_positions = None
        if self.positions is not None:
            x_tD, saved_positions = self.positions.forward(x_tD, own(positions_T, rows, self.embedding.tp.rank))
        rotation = None if self.rope is None else self.rope.at(positions_T, x_tD.dtype)
        saved_blocks = []
        for block in self.blocks:
            x_tD, saved = block.forward(x_tD, lengths, rotation, rows)
            saved_blocks.append(saved)
        h_tD, saved_norm = self.norm.forward(x_tD)
        logits_Tv, saved_head = self.head.forward(h_tD, rows)
        return logits_Tv, ((saved_embedding, saved_positions), tuple(saved_blocks), saved_norm, saved_head)

    def rows(self, tokens: int) -> Cut | None:
        """How the tokens are cut over tp between products; None where every rank has all of them."""
        return cut_rows(tokens, self.embedding.tp.size) if self.cuts_rows else None

    def cached(self, ids_T: np.ndarray, positions_T: np.ndarray, stores: Sequence[Store], rows: np.ndarray) -> np.ndarray:
        """ids (T,) of new tokens at `positions` of their sequences -> logits (len(rows), v) of those `rows` of them.

        `stores`: a cache's side of each block; of fewer blocks, only these are run.
        """
        x_TD, _ = self.embedding.forward(ids_T)
        if self.positions is not None:
            x_TD, _ = self.positions.forward(x_TD, positions_T)
        rotation = None if self.rope is None else self.rope.at(positions_T, x_TD.dtype)
        for block, store in zip(self.blocks, stores, strict=False):
            x_TD = block.cached(x_TD, rotation, store)
        return self.head.apply(self.norm.forward(x_TD[rows])[0])

    def backward(
        self, dlogits_Tv: np.ndarray, saved: tuple, filled: Callable[[list[Parameter]], None] = lambda parameters: None
    ) -> None:
        """dlogits (T, v), saved. Adds into the gradients. `filled` is told of parameters whose gradients are complete."""
        (saved_embedding, saved_positions), saved_blocks, saved_norm, saved_head = saved
        dh_tD = self.head.backward(dlogits_Tv, saved_head)
        filled(self.head.parameters)
        dx_tD = self.norm.backward(dh_tD, saved_norm)
        filled(self.norm.parameters)
        for block, saved_block in zip(reversed(self.blocks), reversed(saved_blocks), strict=True):
            dx_tD = block.backward(dx_tD, saved_block)
            filled(block.parameters)
        if self.positions is not None:
            dx_tD = self.positions.backward(dx_tD, saved_positions)
        self.embedding.backward(dx_tD, saved_embedding)
        filled(self._first)

    @property
    def filling_order(self) -> list[Parameter]:
        """The parameters in the order in which backward completes their gradients."""
        blocks = [p for block in reversed(self.blocks) for p in block.parameters]
        return [*self.head.parameters, *self.norm.parameters, *blocks, *self._first]

    def traffic_of_logits(self, tokens: int) -> list[Traffic]:
        """What forward and backward of `tokens` tokens send, without a loss."""
        rows = self.rows(tokens)
        return [t for part in (self.embedding, *self.blocks, self.head) for t in part.traffic(tokens, rows)]

    def traffic(self, tokens: int) -> list[Traffic]:
        """What forward, loss and backward of `tokens` tokens send."""
        return [*self.traffic_of_logits(tokens), *self.loss.traffic(tokens, self.embedding.table_vD.data.itemsize)]

    def flops(self, sequence_length: int) -> float:
        """Operations a token of forward and backward, as model-FLOPs utilisation counts them (arXiv 2204.02311, appendix B):
        those of the blocks, and 6 for each weight of the head."""
        blocks = sum(block.flops(sequence_length) for block in self.blocks)
        return blocks + 6.0 * prod(self.head.matrix.layout.shape)

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that this rank reads for one new token: idle experts are not read, and of a table only a row."""
        return int(sum(p.data.nbytes * p.read for p in self._before_head)) + self.head.matrix.data.nbytes

    def saved_bytes(self, tokens: int) -> int:
        """What this rank keeps from forward to backward, the loss included; the batch's ids and positions are not counted."""
        rows, b = self.rows(tokens), self.embedding.table_vD.data.itemsize
        norm = self.norm.saved_bytes(held(tokens, rows, self.embedding.tp.rank))
        parts = sum(part.saved_bytes(tokens, rows) for part in (*self.blocks, self.head))
        return parts + norm + self.loss.saved_bytes(tokens, b)
