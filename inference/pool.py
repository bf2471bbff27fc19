"""Arrays in blocks of 16 tokens, addressed by tables of block numbers. `blocks` says whose a block is.

N blocks   S tokens of a sequence so far   T new tokens of several, one sequence's after another's
B sequences that are read at once, with as many new tokens each
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from inference.blocks import BLOCK
from layers.store import Store

# The most tokens that are read at once: of more, what is kept would leave the processor's cache between the copy and the
# product. For 8 sequences of 100 tokens, one by one takes 1.5 to 2.5 times as long as at once; for 8 of 800, at once takes 1.6
# times as long.
AT_ONCE = 1024


class Extent(NamedTuple):
    """Where a sequence's new tokens go: `tokens` of them, from place `first` of the blocks of `table` on. That is their
    position, unless blocks before these were given back."""

    first: int
    tokens: int
    table: Sequence[int]


class Bundle(NamedTuple):
    """Sequences that are read at once. `at`: where their new tokens stand in the batch; `tables`: (B, N), their blocks, where a
    shorter table repeats its last block; `length`: S of the longest; `beyond`: the places (b, s) behind a shorter one's end;
    `hidden`: by window of attention, (B, T, S), -inf where a new token must not look, else 0; none for one sequence."""

    at: slice
    tables: np.ndarray
    length: int
    beyond: tuple[np.ndarray, ...] = ()
    hidden: Mapping[int, np.ndarray] = {}


def bundled(extents: Sequence[Extent]) -> Iterator[list[Extent]]:
    """Neighbours with as many new tokens each, at most BLOCK, if together they have at most AT_ONCE places, and no more than
    half of these beyond a sequence's end; all others one by one. Where contexts are short, a sequence's calls cost more than
    its products."""
    bundle: list[Extent] = []
    for extent in extents:
        more = [*bundle, extent]
        lengths = [first + tokens for first, tokens, _ in more]
        alike, places = extent.tokens == more[0].tokens <= BLOCK, max(lengths) * len(more)
        if bundle and not (alike and places <= min(AT_ONCE, 2 * sum(lengths))):
            yield bundle
            more = [extent]
        bundle = more
    if bundle:
        yield bundle


def laid_out(bundle: Sequence[Extent], begin: int, dtype: np.dtype, windows: Iterable[int] = (0,)) -> Bundle:
    """`begin`: where the first one's new tokens stand in the batch. `windows`: those that layers attend within, 0 for none."""
    tokens, blocks = bundle[0].tokens, max(len(extent.table) for extent in bundle)
    at = slice(begin, begin + tokens * len(bundle))
    tables_BN = np.array([[*extent.table, *extent.table[-1:] * (blocks - len(extent.table))] for extent in bundle], np.int64)
    lengths_B = np.array([extent.first + tokens for extent in bundle])
    length = int(lengths_B.max())
    if len(bundle) == 1:
        return Bundle(at, tables_BN, length)
    places_S = np.arange(length)
    seen_BT = (lengths_B[:, None] - tokens) + np.arange(tokens)
    hidden = {}
    for window in windows:
        behind_BTS = places_S > seen_BT[..., None]
        if window:
            behind_BTS |= places_S <= seen_BT[..., None] - window
        hidden[window] = np.where(behind_BTS, dtype.type(-np.inf), dtype.type(0))
    return Bundle(at, tables_BN, length, np.nonzero(places_S >= lengths_B[:, None]), hidden)


class Pool:
    """`shapes`: by layer, the shapes of what is kept of a token; `windows`: by layer, how many tokens its queries see, 0 for
    all; () for all in all layers. `hold` lets it grow."""

    def __init__(
        self, shapes: Sequence[Sequence[tuple[int, ...]]], dtype: np.dtype | str, blocks: int = 0, windows: Sequence[int] = ()
    ) -> None:
        self.shapes, self.dtype = [list(s) for s in shapes], np.dtype(dtype)
        self.windows = list(windows) or [0] * len(self.shapes)
        self._arrays = [[np.empty((blocks, BLOCK, *shape), self.dtype) for shape in layer] for layer in self.shapes]
        self.blocks = blocks

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for layer in self._arrays for a in layer)

    def hold(self, blocks: int) -> None:
        """Make room for so many blocks, and keep what is there."""
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
        """Put each of T tokens into its place of its block."""
        for held, a in zip(self._arrays[layer], new, strict=True):
            held[blocks_T, places_T] = a

    def read(self, layer: int, tables: np.ndarray, length: int, beyond: tuple[np.ndarray, ...] = ()) -> list[np.ndarray]:
        """(B, S, ...) of each shape: a copy of the first `length` tokens of each of B tables. The places `beyond` get zeros:
        what stands there is another's, and a NaN in it would spread, hidden or not."""
        kept = []
        for held in self._arrays[layer]:
            a = held[tables].reshape(len(tables), tables.shape[1] * BLOCK, *held.shape[2:])[:, :length]
            if beyond:
                a[beyond] = 0
            kept.append(a)
        return kept

    def stores(self, extents: Sequence[Extent]) -> list[Store]:
        """Each layer's side of a step: it keeps what is new, and yields what is kept of each bundle of sequences."""
        positions = [np.arange(first, first + tokens) for first, tokens, _ in extents]
        tables = [np.asarray(table, np.int64) for _, _, table in extents]
        blocks_T = np.concatenate([t[p // BLOCK] for t, p in zip(tables, positions, strict=True)])
        places_T = np.concatenate(positions) % BLOCK
        bundles, begin = [], 0
        for bundle in bundled(extents):
            bundles.append(laid_out(bundle, begin, self.dtype, set(self.windows)))
            begin = bundles[-1].at.stop

        def store(layer: int, *new: np.ndarray) -> Iterator[tuple]:
            self.write(layer, blocks_T, places_T, new)
            for at, tables_BN, length, beyond, hidden in bundles:
                yield at, hidden.get(self.windows[layer]), *self.read(layer, tables_BN, length, beyond)

        return [Store(partial(store, layer)) for layer in range(len(self.shapes))]
