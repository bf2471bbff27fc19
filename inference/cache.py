"""What attention keeps of earlier tokens, for several sequences: in one array, in blocks, or striped over the ranks.

    S tokens of a sequence so far   T new tokens of several, one sequence's after another's

A layer that attends within a window reads the last tokens only. What no query will read again is forgotten.

A cache knows neither heads nor latents: a layer says which arrays it keeps of a token (`cache_shapes`). One interface:

    cache.open(s); cache.extend(s, n)         # room for n more tokens; then every layer's store fills it
    cache.truncate(s, length); cache.branch(s, t); cache.free(s)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from math import prod

import numpy as np

from inference.blocks import BLOCK, BlockPool, OutOfBlocks, needed
from inference.pool import Pool
from layers.store import Store, StripedStore

# So many tokens more than the window are kept, as drafts may be taken back.
SLACK = BLOCK

# Sequences of a step in their order, each with the number of its new tokens.
Batch = Sequence[tuple[int, int]]


class Cache(ABC):
    """`shapes`: by layer, the shapes of what is kept of a token; `windows`: by layer, how many tokens its queries see, 0 for
    all; () for all in all layers. `lengths`: tokens of each sequence, the same in every layer, forgotten ones among them.

    Raises KeyError for a sequence that is not open, and ValueError for one that is open already or shorter than a new length.
    """

    def __init__(self, shapes: Sequence[Sequence[tuple[int, ...]]], dtype: np.dtype | str, windows: Sequence[int] = ()) -> None:
        self.shapes, self.dtype = [list(s) for s in shapes], np.dtype(dtype)
        self.windows = list(windows) or [0] * len(self.shapes)
        self.lengths: dict[int, int] = {}

    def open(self, sequence: int) -> None:
        """Begin a sequence without tokens."""
        if sequence in self.lengths:
            raise ValueError(f"sequence {sequence} is open already: free it first")
        self.lengths[sequence] = 0

    def extend(self, sequence: int, tokens: int) -> None:
        """Room for so many more tokens, which the layers' stores fill."""
        self._reserve(sequence, self.lengths[sequence] + tokens)
        self.lengths[sequence] += tokens

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.lengths[sequence]:
            raise ValueError(f"cannot cut sequence {sequence} to {length} tokens: it has {self.lengths[sequence]}")
        if length < self.lengths[sequence] and any(
            w and first > max(0, length - w + 1) for w, first in zip(self.windows, self._firsts(sequence), strict=True)
        ):
            raise ValueError(f"cannot cut sequence {sequence} to {length} tokens: what is before them has been forgotten")
        self.lengths[sequence] = length
        self._release(sequence, length)

    def branch(self, sequence: int, new: int) -> None:
        """A new sequence with the tokens that `sequence` has; then each goes its own way."""
        self.open(new)
        self.lengths[new] = self.lengths[sequence]
        self._share(sequence, new)

    def free(self, sequence: int) -> None:
        del self.lengths[sequence]
        self._forget(sequence)

    def stores(self, batch: Batch) -> list[Store]:
        """Each layer's side of a step: appends what it keeps of the new tokens, yields what is kept of all."""

        def store(layer: int, *new: np.ndarray) -> Iterator[tuple]:
            first = 0
            for sequence, tokens in batch:
                at = slice(first, first + tokens)
                self._write(layer, sequence, [a[at] for a in new])
                yield at, None, *(a[None] for a in self._read(layer, sequence))
                first += tokens

        return [Store(partial(store, layer)) for layer in range(len(self.shapes))]

    def bytes_of(self, sequence: int) -> int:
        """The bytes that this rank keeps of a sequence, counted."""
        return sum(a.nbytes for layer in range(len(self.shapes)) for a in self._read(layer, sequence))

    @property
    def bytes_per_token(self) -> int:
        """The bytes that this rank keeps of one token, in all layers, by formula."""
        return self.dtype.itemsize * sum(prod(shape) for layer in self.shapes for shape in layer)

    # What the kinds differ in.

    @abstractmethod
    def _firsts(self, sequence: int) -> list[int]:
        """By layer, the first position that is kept."""

    @abstractmethod
    def _reserve(self, sequence: int, length: int) -> None:
        """Make room for `length` tokens in all, and keep those that are there and may be read again."""

    @abstractmethod
    def _release(self, sequence: int, length: int) -> None:
        """What stands behind the first `length` tokens is not needed any more."""

    @abstractmethod
    def _share(self, sequence: int, new: int) -> None:
        """`new` gets what `sequence` has."""

    @abstractmethod
    def _forget(self, sequence: int) -> None:
        """A sequence ends."""

    @abstractmethod
    def _write(self, layer: int, sequence: int, new: list[np.ndarray]) -> None:
        """Keep `new` as the last len(new[0]) tokens of the sequence, in this layer."""

    @abstractmethod
    def _read(self, layer: int, sequence: int) -> list[np.ndarray]:
        """What is kept of the sequence's tokens, in this layer."""


def _behind(length: int, window: int) -> int:
    """How many of the first `length` tokens no later query sees, nor one that is taken back."""
    return max(0, length - (window - 1) - SLACK) if window else 0


class ContiguousCache(Cache):
    """An array for each sequence, layer and shape. It is doubled when full, so that a token is copied once on average; that of
    a layer with a window is made anew without what is behind it, once in a window."""

    def __init__(self, shapes: Sequence[Sequence[tuple[int, ...]]], dtype: np.dtype | str, windows: Sequence[int] = ()) -> None:
        super().__init__(shapes, dtype, windows)
        self._arrays: dict[int, list[list[np.ndarray]]] = {}
        self._begins: dict[int, list[int]] = {}

    def open(self, sequence: int) -> None:
        super().open(sequence)
        self._arrays[sequence] = [[np.empty((0, *shape), self.dtype) for shape in layer] for layer in self.shapes]
        self._begins[sequence] = [0] * len(self.shapes)

    def _firsts(self, sequence: int) -> list[int]:
        return self._begins[sequence]

    def _reserve(self, sequence: int, length: int) -> None:
        kept, begins = self.lengths[sequence], self._begins[sequence]
        for arrays, n in zip(self._arrays[sequence], range(len(begins)), strict=True):
            room, window = len(arrays[0]), self.windows[n]
            if length - begins[n] <= room:
                continue
            first = max(begins[n], _behind(kept, window))
            most = 2 * (window + SLACK) if window else 2 * room
            room = max(length - first, min(2 * room, most), BLOCK)
            for i, old in enumerate(arrays):
                arrays[i] = np.empty((room, *old.shape[1:]), self.dtype)
                arrays[i][: kept - first] = old[first - begins[n] : kept - begins[n]]
            begins[n] = first

    def _release(self, sequence: int, length: int) -> None:
        """The memory stays for later tokens."""

    def _share(self, sequence: int, new: int) -> None:
        self._arrays[new] = [[a.copy() for a in layer] for layer in self._arrays[sequence]]
        self._begins[new] = list(self._begins[sequence])

    def _forget(self, sequence: int) -> None:
        del self._arrays[sequence], self._begins[sequence]

    def _write(self, layer: int, sequence: int, new: list[np.ndarray]) -> None:
        length = self.lengths[sequence] - self._begins[sequence][layer]
        for held, a in zip(self._arrays[sequence][layer], new, strict=True):
            held[length - len(a) : length] = a

    def _read(self, layer: int, sequence: int) -> list[np.ndarray]:
        length = self.lengths[sequence] - self._begins[sequence][layer]
        return [held[:length] for held in self._arrays[sequence][layer]]

    @property
    def bytes_held(self) -> int:
        return sum(a.nbytes for arrays in self._arrays.values() for layer in arrays for a in layer)


class PagedCache(Cache):
    """Blocks of 16 tokens from one pool, and a table of blocks a sequence (PagedAttention, arXiv 2309.06180).

    Sequences share blocks after `branch`; before one writes into a shared block, it copies the block. `blocks`: the pool's
    size; None: it grows. At most 15 places a sequence are empty. `extend` raises OutOfBlocks, before anything is changed. Where
    all layers have a window, blocks that are wholly behind the widest are given back.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[tuple[int, ...]]],
        dtype: np.dtype | str,
        windows: Sequence[int] = (),
        blocks: int | None = None,
    ) -> None:
        super().__init__(shapes, dtype, windows)
        self.tables: dict[int, list[int]] = {}
        self.blocks = BlockPool(blocks)
        self.window = max(self.windows) if all(self.windows) else 0
        # Of each sequence: tokens of blocks that were given back.
        self._begins: dict[int, int] = {}
        self._pool = Pool(shapes, dtype, blocks or 0)

    @property
    def bytes_held(self) -> int:
        return self._pool.nbytes

    def open(self, sequence: int) -> None:
        super().open(sequence)
        self.tables[sequence], self._begins[sequence] = [], 0

    def _firsts(self, sequence: int) -> list[int]:
        return [self._begins[sequence]] * len(self.shapes)

    def _held(self, sequence: int) -> int:
        """How many tokens its blocks have."""
        return self.lengths[sequence] - self._begins[sequence]

    def _writes_shared(self, sequence: int, tokens: int) -> bool:
        """Whether the first of so many new tokens goes into a block that another sequence uses too."""
        return bool(tokens and self.lengths[sequence] % BLOCK and self.blocks.users[self.tables[sequence][-1]] > 1)

    def needed(self, sequence: int, tokens: int) -> int:
        """Blocks that `extend` would take from the pool, a copy of a shared last one included."""
        there = len(self.tables[sequence]) - self._writes_shared(sequence, tokens)
        return needed(self._held(sequence) + tokens) - there

    def _reserve(self, sequence: int, length: int) -> None:
        table, tokens = self.tables[sequence], length - self.lengths[sequence]
        wanted = self.needed(sequence, tokens)
        if wanted > self.blocks.free:
            raise OutOfBlocks(f"sequence {sequence} needs {wanted} blocks of {BLOCK} tokens, {self.blocks.free} are free")
        shared = table.pop() if self._writes_shared(sequence, tokens) else None
        whole = len(table)
        self.blocks.grow(table, length - self._begins[sequence])
        self._pool.hold(len(self.blocks.users))
        if shared is not None:
            self._pool.copy(shared, table[whole])
            self.blocks.drop(shared)
        self._begins[sequence] += BLOCK * self.blocks.shed(
            table, _behind(length - tokens, self.window) - self._begins[sequence]
        )

    def _release(self, sequence: int, length: int) -> None:
        self.blocks.cut(self.tables[sequence], length - self._begins[sequence])

    def _share(self, sequence: int, new: int) -> None:
        self.tables[new], self._begins[new] = list(self.tables[sequence]), self._begins[sequence]
        for block in self.tables[new]:
            self.blocks.use(block)

    def _forget(self, sequence: int) -> None:
        self.blocks.cut(self.tables.pop(sequence), 0)
        del self._begins[sequence]

    def _write(self, layer: int, sequence: int, new: list[np.ndarray]) -> None:
        length, table = self._held(sequence), np.array(self.tables[sequence], np.int64)
        positions = np.arange(length - len(new[0]), length)
        self._pool.write(layer, table[positions // BLOCK], positions % BLOCK, new)

    def _read(self, layer: int, sequence: int) -> list[np.ndarray]:
        table_BN = np.array([self.tables[sequence]], np.int64)
        return [a[0] for a in self._pool.read(layer, table_BN, self._held(sequence))]


class Striped:
    """Of a cache whose layers are the same on every rank, this rank's every p-th position: token n is kept by rank n mod p.

    Wraps a cache that holds this rank's positions; its stores also say how many of them each new token sees.
    """

    def __init__(self, own: Cache, ranks: int, rank: int) -> None:
        self.own, self.ranks, self.rank = own, ranks, rank
        self.lengths: dict[int, int] = {}

    def _mine(self, length: int) -> int:
        """How many of the first `length` positions are this rank's."""
        return (length - self.rank + self.ranks - 1) // self.ranks if length > self.rank else 0

    def open(self, sequence: int) -> None:
        self.own.open(sequence)
        self.lengths[sequence] = 0

    def extend(self, sequence: int, tokens: int) -> None:
        self.lengths[sequence] += tokens
        self.own.extend(sequence, self._mine(self.lengths[sequence]) - self.own.lengths[sequence])

    def truncate(self, sequence: int, length: int) -> None:
        self.own.truncate(sequence, self._mine(length))
        self.lengths[sequence] = length

    def branch(self, sequence: int, new: int) -> None:
        self.own.branch(sequence, new)
        self.lengths[new] = self.lengths[sequence]

    def free(self, sequence: int) -> None:
        self.own.free(sequence)
        del self.lengths[sequence]

    def stores(self, batch: Batch) -> list[StripedStore]:
        positions = [np.arange(self.lengths[s] - n, self.lengths[s]) for s, n in batch]
        kept = [p % self.ranks == self.rank for p in positions]
        own = self.own.stores([(s, int(k.sum())) for (s, _), k in zip(batch, kept, strict=True)])
        chosen = np.flatnonzero(np.concatenate(kept))

        def store(inner: Store, *new: np.ndarray) -> Iterator[tuple]:
            first = 0
            for p, (_, _, *held) in zip(positions, inner(*(a[chosen] for a in new)), strict=True):
                yield slice(first, first + len(p)), [self._mine(int(n) + 1) for n in p], *held
                first += len(p)

        return [StripedStore(partial(store, inner)) for inner in own]

    def bytes_of(self, sequence: int) -> int:
        return self.own.bytes_of(sequence)

    @property
    def bytes_per_token(self) -> float:
        """On average over the positions."""
        return self.own.bytes_per_token / self.ranks

    @property
    def bytes_held(self) -> int:
        return self.own.bytes_held


CACHES = {"contiguous": ContiguousCache, "paged": PagedCache}
