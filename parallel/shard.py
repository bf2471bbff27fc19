"""How a dim is cut over the ranks of an axis, and put together again. The one place that knows.

A `Cut` says which indices of one dim each rank holds: a contiguous range a rank, even or not, overlapping where a part is
held on several ranks. A `Layout` says how a whole array is held: its shape, and over which axes which dims are cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Cut:
    """`bounds[r] = (start, stop)`: the indices of a dim of `length` that rank r holds."""

    length: int
    bounds: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        """The sizes of parts that follow one another, else where each starts and stops: (8, 7); (0:4 2:6)."""
        parts = ", ".join(map(str, self.sizes)) if self.is_partition else " ".join(f"{a}:{b}" for a, b in self.bounds)
        return f"({parts})"

    @property
    def ranks(self) -> int:
        return len(self.bounds)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.bounds)

    @property
    def is_partition(self) -> bool:
        """Whether the parts follow one another without gap or overlap, so that sizes alone put them together."""
        starts = [start for start, _ in self.bounds]
        stops = [stop for _, stop in self.bounds]
        return starts == [0, *stops[:-1]] and stops[-1] == self.length

    def size(self, rank: int) -> int:
        start, stop = self.bounds[rank]
        return stop - start

    def index(self, dim: int, rank: int) -> tuple[slice, ...]:
        """The index that takes this rank's part: `whole[cut.index(dim, rank)]`."""
        return (slice(None),) * dim + (slice(*self.bounds[rank]),)

    def take(self, whole: np.ndarray, dim: int, rank: int) -> np.ndarray:
        """This rank's part of `whole`, as a view."""
        if whole.shape[dim] != self.length:
            raise ValueError(f"cannot take a part of dim {dim}: it has {whole.shape[dim]} entries, the cut {self.length}")
        return whole[self.index(dim, rank)]

    def join(self, parts: Sequence[np.ndarray], dim: int) -> np.ndarray:
        """The whole array from every rank's part. Where parts overlap, the lowest rank's is taken."""
        if self.is_partition and dim == 0:
            return np.concatenate(parts)
        shape = list(parts[0].shape)
        shape[dim] = self.length
        whole = np.empty(shape, parts[0].dtype)
        for rank in reversed(range(self.ranks)):
            whole[self.index(dim, rank)] = parts[rank]
        return whole

    def first(self, rank: int) -> list[tuple[int, int]]:
        """The ranges of indices that this rank holds and no lower one does."""
        start, stop = self.bounds[rank]
        runs = [(start, stop)] if start < stop else []
        for a, b in self.bounds[:rank]:
            runs = [(s, e) for first, last in runs for s, e in ((first, min(last, a)), (max(first, b), last)) if s < e]
        return runs

    def shared(self) -> list[tuple[range, range]]:
        """What several ranks hold: (indices, the ranks that hold exactly these together), in ascending order."""
        runs: list[tuple[range, range]] = []
        for i in range(self.length):
            holders = [r for r, (start, stop) in enumerate(self.bounds) if start <= i < stop]
            ranks = range(holders[0], holders[-1] + 1)
            if len(ranks) == 1:
                continue
            if runs and runs[-1] == (range(runs[-1][0].start, i), ranks):
                runs[-1] = range(runs[-1][0].start, i + 1), ranks
            else:
                runs.append((range(i, i + 1), ranks))
        return runs

    def owner(self, index: int) -> int:
        """The lowest rank that holds `index`."""
        for rank, (start, stop) in enumerate(self.bounds):
            if start <= index < stop:
                return rank
        raise IndexError(f"index {index} is on no rank: the cut is of {self.length} entries, {self.bounds}")


def even(length: int, ranks: int, what: str = "entries") -> Cut:
    """Cut as evenly as it goes: the first `length % ranks` ranks hold one more. 9 on 2 ranks: 5 and 4.

    Raises ValueError when a rank would hold nothing.
    """
    if length < ranks:
        raise ValueError(f"cannot cut {length} {what} over {ranks} ranks: use at most {length} ranks")
    return as_even_as_it_goes(length, ranks)


def as_even_as_it_goes(length: int, ranks: int) -> Cut:
    """The same also of fewer entries than ranks: the last ranks hold nothing then."""
    base, more = divmod(length, ranks)
    starts = [r * base + min(r, more) for r in range(ranks + 1)]
    return Cut(length, tuple(itertools.pairwise(starts)))


def covering(cut: Cut, group: int) -> Cut:
    """The cut of the groups that `cut` touches, `group` of its indices each: a rank holds every group that it has a part of.

    9 query heads on 2 ranks, 5 and 4, read 3 key/value heads, 3 each: heads 0 and 1 on rank 0, 1 and 2 on rank 1.
    """
    if cut.length % group:
        raise ValueError(f"cannot group {cut.length} entries by {group}: use a divisor of {cut.length}")
    return Cut(cut.length // group, tuple((start // group, -(-stop // group)) for start, stop in cut.bounds))


def group_sizes(cut: Cut, group: int, rank: int) -> list[int]:
    """How many of the rank's indices lie in each of the groups that it holds by `covering`. 5 of 9 by 3: [3, 2]."""
    start, stop = cut.bounds[rank]
    first, last = covering(cut, group).bounds[rank]
    return [min(stop, (j + 1) * group) - max(start, j * group) for j in range(first, last)]


def replicated(length: int, ranks: int) -> Cut:
    """Every rank holds all of it."""
    return Cut(length, ((0, length),) * ranks)


# The axes that meshes have, slowest first: stages, data, experts, context, tensors.
AXES = ("pp", "dp", "ep", "cp", "tp")
# Those over which ranks see different tokens.
DATA = ("dp", "ep", "cp")
# Where a rank stands: its place on each axis, by the axis' name.
Place = Mapping[str, int]


@dataclass(frozen=True)
class Layout:
    """How a whole array of `shape` is held: by axis, which dim is cut over it, and how. Over an axis that is not named every
    rank holds all of it; or, where `held` names the axis, these ranks of it do, in ascending order, and the others nothing.

        Layout((X, D, F), {"ep": (0, by_expert), "tp": (2, cut)})
        Layout((V, D), {"tp": (0, cut)}, held={"pp": (0, 3)})

    Where a method takes a `place`, it needs this rank's place on the axes that are named.
    """

    shape: tuple[int, ...]
    cuts: Mapping[str, tuple[int, Cut]] = field(default_factory=dict)
    held: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for dim, cut in self.cuts.values():
            if self.shape[dim] != cut.length:
                raise ValueError(f"dim {dim} of shape {self.shape} is not the cut's length {cut.length}")
        if len({dim for dim, _ in self.cuts.values()}) < len(self.cuts):
            raise ValueError(f"each dim of {self.shape} can be cut over one axis, not {self.cuts}")

    def bounds(self, place: Place) -> tuple[tuple[int, int], ...]:
        """The box of this rank's part: where it starts and stops, in each dim."""
        box = [(0, n) for n in self.shape]
        for axis, (dim, cut) in self.cuts.items():
            box[dim] = cut.bounds[place[axis]]
        return tuple(box)

    def local_shape(self, place: Place) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.bounds(place))

    def take(self, whole: np.ndarray, place: Place) -> np.ndarray:
        """This rank's part of `whole`, contiguous and its own."""
        if whole.shape != self.shape:
            raise ValueError(f"expected an array of shape {self.shape}, got {whole.shape}")
        return np.array(whole[tuple(slice(*b) for b in self.bounds(place))], order="C")

    def owner(self, index: Sequence[int]) -> dict[str, int]:
        """The place of the lowest rank that holds the entry at the global `index`, on the axes that are named."""
        cut = {axis: cut.owner(index[dim]) for axis, (dim, cut) in self.cuts.items()}
        return cut | {axis: ranks[0] for axis, ranks in self.held.items()}

    def first(self, place: Place) -> list[list[tuple[int, int]]]:
        """What this rank is the first to hold, on every axis of `place`: in each dim the ranges of indices that no lower rank
        has. Over an axis that does not cut, only the first rank that holds the array is the first.

        Together these boxes are the whole array, once.
        """
        runs = [[(0, n)] for n in self.shape]
        for axis, rank in place.items():
            if axis in self.cuts:
                dim, cut = self.cuts[axis]
                runs[dim] = cut.first(rank)
            elif rank != self.held.get(axis, (0,))[0]:
                return [[] for _ in self.shape]
        return runs
