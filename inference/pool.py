"""Arrays in blocks of 16 tokens, addressed by tables of block numbers. Whose a block is, is for others to know.

N blocks   S tokens of a sequence so far   T new tokens of several, one sequence's after another's
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

BLOCK = 16


class Span(NamedTuple):
    """A sequence's part of a step: `tokens` new ones from position `first` on, in the blocks of `table`."""

    first: int
    tokens: int
    table: Sequence[int]


class Pool:
    """`shapes`: by layer, the shapes of what is kept of a token. Grows to the highest block that it is told to hold."""

    def __init__(self, shapes: Sequence[Sequence[tuple[int, ...]]], dtype: np.dtype | str, blocks: int = 0) -> None:
        self.shapes, self.dtype = [list(s) for s in shapes], np.dtype(dtype)
        self._arrays = [[np.empty((blocks, BLOCK, *shape), self.dtype) for shape in layer] for layer in self.shapes]
        self.blocks = blocks

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for layer in self._arrays for a in layer)

    def hold(self, blocks: int) -> None:
        """Room for so many blocks; what is there stays."""
        if blocks <= self.blocks:
            return
        for layer in self._arrays:
            for n, a in enumerate(layer):
                layer[n] = np.empty((blocks, *a.shape[1:]), self.dtype)
                layer[n][: self.blocks] = a
        self.blocks = blocks

    def copy(self, source: int, target: int) -> None:
        for layer in self._arrays:
            for a in layer:
                a[target] = a[source]

    def write(self, layer: int, blocks_T: np.ndarray, places_T: np.ndarray, new: Sequence[np.ndarray]) -> None:
        """Each of T tokens into a place of a block."""
        for held, a in zip(self._arrays[layer], new, strict=True):
            held[blocks_T, places_T] = a

    def read(self, layer: int, table: Sequence[int], length: int) -> list[np.ndarray]:
        """(S, ...) of each kind: the first `length` tokens of a table's blocks, copied together."""
        return [held[table].reshape(-1, *held.shape[2:])[:length] for held in self._arrays[layer]]

    def stores(self, spans: Sequence[Span]) -> list[Callable[..., Iterator[tuple]]]:
        """Each layer's side of a step: keeps what is new, yields what is kept of each sequence's tokens."""
        tables = [np.asarray(table, np.int64) for _, _, table in spans]
        positions = [np.arange(first, first + tokens) for first, tokens, _ in spans]
        blocks_T = np.concatenate([t[p // BLOCK] for t, p in zip(tables, positions, strict=True)])
        places_T = np.concatenate(positions) % BLOCK

        def store(layer: int, *new: np.ndarray) -> Iterator[tuple]:
            self.write(layer, blocks_T, places_T, new)
            begin = 0
            for (first, tokens, _), table in zip(spans, tables, strict=True):
                yield slice(begin, begin + tokens), *self.read(layer, table, first + tokens)
                begin += tokens

        return [lambda *new, layer=layer: store(layer, *new) for layer in range(len(self.shapes))]
