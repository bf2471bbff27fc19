"""A whole language model: embedding, blocks, last norm and head.

T tokens   D model width   V vocabulary   v, t this rank's share over tp of V and, where rows are cut, of T
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layers.block import Block, Recomputed
from layers.embedding import VocabParallelEmbedding
from layers.loss import VocabParallelCrossEntropy
from layers.rope import Rope
from layers.stage import Beginning, End, Stage
from layers.store import Store


class Transformer(Stage):
    """logits = head(norm(blocks(embedding(ids) + positions))): a whole language model, its vocabulary cut over tp.

        x_tD      = embedding(ids_T) (+ Wpe[positions])
        x_tD      = block(x_tD), one after another
        logits_Tv = gather_rows(norm(x_tD)) @ head

    A stage with both ends, and what only a whole model can: to go on from a cache. Cached, rows are not cut.
    """

    def __init__(
        self,
        beginning: Beginning,
        blocks: Sequence[Block | Recomputed],
        end: End,
        rope: Rope | None = None,
        cuts_rows: bool = False,
    ) -> None:
        embedding = beginning.embedding
        super().__init__(embedding.tp, embedding.table_vD.data.shape[1], blocks, beginning, end, rope, cuts_rows)
        self.norm, self.head = end.norm, end.head

    @property
    def embedding(self) -> VocabParallelEmbedding:
        return self.beginning.embedding

    @property
    def loss(self) -> VocabParallelCrossEntropy:
        return self.end.loss

    def cached(self, ids_T: np.ndarray, positions_T: np.ndarray, stores: Sequence[Store], rows: np.ndarray) -> np.ndarray:
        """ids (T,) of new tokens at `positions` of their sequences -> logits (len(rows), v) of those `rows` of them.

        `stores`: a cache's side of each block; of fewer blocks, only these are run.
        """
        x_TD, _ = self.embedding.forward(ids_T)
        if self.beginning.positions is not None:
            x_TD, _ = self.beginning.positions.forward(x_TD, positions_T)
        rotation = None if self.rope is None else self.rope.at(positions_T, x_TD.dtype)
        for block, store in zip(self.blocks, stores, strict=False):
            x_TD = block.cached(x_TD, rotation, store)
        return self.head.apply(self.norm.forward(x_TD[rows])[0])

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that this rank reads for one new token: idle experts are not read, and of a table only a row."""
        before = [p for part in self.parts[:-1] for p in part.parameters] + self.norm.parameters
        return int(sum(p.data.nbytes * p.read for p in before)) + self.head.matrix.data.nbytes
