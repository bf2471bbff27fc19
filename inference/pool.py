"""Arrays in blocks of 16 tokens, addressed by tables of block numbers. Whose a block is, is for others to know.

N blocks   S tokens of a sequence so far   T new tokens of several, one sequence's after another's
B sequences that are read together, as many new tokens each
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from inference.blocks import BLOCK

# Tokens of sequences that are read at once: what is kept of more would leave the cache between the copy and the product. Of 8
# sequences of 100 tokens one by one takes 1.5 to 2.5 times as long as at once; of 800, at once takes 1.6 times as long.
AT_ONCE = 1024


class Span(NamedTuple):
    """A sequence's part of a step: `tokens` new ones from position `first` on, in the blocks of `table`."""

    first: int
    tokens: int
    table: Sequence[int]


class Group(NamedTuple):
    """Sequences that are read at once. `at`: where their new tokens stand; `tables`: their blocks (B, N), a shorter one's last
    repeated; `length`: the longest one's S; `beyond`: the places (b, s) behind a shorter one's end; `hidden`: (B, T, S), 0 or
    -inf where a new token must not look; None for one sequence."""

    at: slice
    tables: np.ndarray
    length: int
    beyond: tuple[np.ndarray, ...] = ()
    hidden: np.ndarray | None = None


def grouped(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Neighbours that decode, with as many new tokens each, up to AT_ONCE places, at most half of them beyond a sequence's end;
    all others one by one. Where contexts are short, the calls for a sequence cost more than its products."""
    group: list[Span] = []
    for span in spans:
        more = [*group, span]
        lengths = [first + tokens for first, tokens, _ in more]
        alike, places = span.tokens == more[0].tokens <= BLOCK, max(lengths) * len(more)
        if group and not (alike and places <= min(AT_ONCE, 2 * sum(lengths))):
            yield group
            more = [span]
        group = more
    if group:
        yield group


def laid_out(group: Sequence[Span], begin: int, dtype: np.dtype) -> Group:
    """`begin`: where the first one's new tokens stand."""
    tokens, blocks = group[0].tokens, max(len(span.table) for span in group)
    at = slice(begin, begin + tokens * len(group))
    tables_BN = np.array([[*span.table, *span.table[-1:] * (blocks - len(span.table))] for span in group], np.int64)
    lengths_B = np.array([span.first + tokens for span in group])
    length = int(lengths_B.max())
    if len(group) == 1:
        return Group(at, tables_BN, length)
    places_S = np.arange(length)
    seen_BT = (lengths_B[:, None] - tokens) + np.arange(tokens)
    hidden_BTS = np.where(places_S > seen_BT[..., None], dtype.type(-np.inf), dtype.type(0))
    return Group(at, tables_BN, length, np.nonzero(places_S >= lengths_B[:, None]), hidden_BTS)


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

    def read(self, layer: int, tables: np.ndarray, length: int, beyond: tuple[np.ndarray, ...] = ()) -> list[np.ndarray]:
        """(B, S, ...) of each kind: the first `length` tokens of the blocks of each of B tables, copied together; zeros in the
        places `beyond`, where what stands is another's: hidden, it would still spread if it were NaN."""
        found = []
        for held in self._arrays[layer]:
            a = held[tables].reshape(len(tables), tables.shape[1] * BLOCK, *held.shape[2:])[:, :length]
            if beyond:
                a[beyond] = 0
            found.append(a)
        return found

    def stores(self, spans: Sequence[Span]) -> list[Callable[..., Iterator[tuple]]]:
        """Each layer's side of a step: keeps what is new, yields what is kept of each group of sequences."""
        positions = [np.arange(first, first + tokens) for first, tokens, _ in spans]
        tables = [np.asarray(table, np.int64) for _, _, table in spans]
        blocks_T = np.concatenate([t[p // BLOCK] for t, p in zip(tables, positions, strict=True)])
        places_T = np.concatenate(positions) % BLOCK
        groups, begin = [], 0
        for group in grouped(spans):
            groups.append(laid_out(group, begin, self.dtype))
            begin = groups[-1].at.stop

        def store(layer: int, *new: np.ndarray) -> Iterator[tuple]:
            self.write(layer, blocks_T, places_T, new)
            for at, tables_BN, length, beyond, hidden_BTS in groups:
                yield at, hidden_BTS, *self.read(layer, tables_BN, length, beyond)

        return [lambda *new, layer=layer: store(layer, *new) for layer in range(len(self.shapes))]
