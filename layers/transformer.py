"""A whole language model: embedding, blocks, last norm and head.

T tokens   D model width   V vocabulary   v this rank's share of V over tp
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


class Transformer:
    """logits = head(norm(blocks(embedding(ids) + positions))): a whole language model, its vocabulary cut over tp.

        x_TD      = embedding(ids_T) (+ Wpe[positions])
        x_TD      = block(x_TD), one after another
        logits_Tv = norm(x_TD) @ head

    `rope` rotates queries and keys by the positions 0, 1, ... of each sequence; `positions` adds a learned row to each token.
    Saved for backward: what the parts save.
    """

    def __init__(
        self,
        embedding: VocabParallelEmbedding,
        blocks: Sequence[Block | Recomputed],
        norm: RMSNorm | LayerNorm,
        head: Head,
        rope: Rope | None = None,
        positions: LearnedPositions | None = None,
    ) -> None:
        self.embedding, self.positions, self.blocks, self.norm, self.head = embedding, positions, list(blocks), norm, head
        self.rope = rope
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
        positions_T = np.concatenate([np.arange(n) for n in lengths])
        x_TD, saved_embedding = self.embedding.forward(ids_T)
        if self.positions is not None:
            x_TD, positions_T = self.positions.forward(x_TD, positions_T)
        rotation = None if self.rope is None else self.rope.at(positions_T, x_TD.dtype)
        saved_blocks = []
        for block in self.blocks:
            x_TD, saved = block.forward(x_TD, lengths, rotation)
            saved_blocks.append(saved)
        h_TD, saved_norm = self.norm.forward(x_TD)
        logits_Tv, saved_head = self.head.forward(h_TD)
        return logits_Tv, ((saved_embedding, positions_T), tuple(saved_blocks), saved_norm, saved_head)

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
        (saved_embedding, positions_T), saved_blocks, saved_norm, saved_head = saved
        dh_TD = self.head.backward(dlogits_Tv, saved_head)
        filled(self.head.parameters)
        dx_TD = self.norm.backward(dh_TD, saved_norm)
        filled(self.norm.parameters)
        for block, saved_block in zip(reversed(self.blocks), reversed(saved_blocks), strict=True):
            dx_TD = block.backward(dx_TD, saved_block)
            filled(block.parameters)
        if self.positions is not None:
            dx_TD = self.positions.backward(dx_TD, positions_T)
        self.embedding.backward(dx_TD, saved_embedding)
        filled(self._first)

    @property
    def filling_order(self) -> list[Parameter]:
        """The parameters in the order in which backward completes their gradients."""
        blocks = [p for block in reversed(self.blocks) for p in block.parameters]
        return [*self.head.parameters, *self.norm.parameters, *blocks, *self._first]

    def traffic_of_logits(self, tokens: int) -> list[Traffic]:
        """What forward and backward of `tokens` tokens send, without a loss."""
        return [t for part in (self.embedding, *self.blocks, self.head) for t in part.traffic(tokens)]

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
        parts = (*self.blocks, self.norm, self.head)
        return sum(part.saved_bytes(tokens) for part in parts) + self.loss.saved_bytes(
            tokens, self.embedding.table_vD.data.itemsize
        )
