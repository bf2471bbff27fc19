"""The entries of a rank's parameters, one after another: numbered, and in two flat arrays."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from parallel.parameter import Fused, Parameter
from parallel.shard import Layout, Place


class Owned(NamedTuple):
    """Entries that this rank updates. `at`: which they are, by number; `data`, `grad`: these weights and their gradients."""

    at: slice
    data: np.ndarray
    grad: np.ndarray


class Numbering:
    """Every entry of these parameters has a number, in the order given. Parameters that share memory (`Fused`) follow one
    another. Nothing is allocated. `dtype`: needed where there may be no parameters."""

    def __init__(self, parameters: Iterable[Parameter], dtype: np.dtype | str | None = None) -> None:
        self.homes: list[Parameter | Fused] = list(dict.fromkeys(p.home for p in parameters))
        self.dtype = np.dtype(dtype or self.homes[0].data.dtype)
        self.ends = np.cumsum([home.data.size for home in self.homes], dtype=np.int64)
        self.size = int(self.ends[-1]) if self.homes else 0

    @property
    def nbytes(self) -> int:
        """Of an array of all entries."""
        return self.size * self.dtype.itemsize

    @property
    def parameters(self) -> list[Parameter]:
        return [p for home in self.homes for p, _ in home.parts]

    def places(self) -> Iterator[tuple[Parameter | Fused, slice]]:
        """Each home with the numbers of its entries."""
        return zip(
            self.homes, (slice(int(e) - h.data.size, int(e)) for e, h in zip(self.ends, self.homes, strict=True)), strict=True
        )

    def mask(self, holds: dict[str, np.ndarray | bool]) -> np.ndarray:
        """True and False for each entry, from what `holds` says of each parameter by name (of its shape, or one)."""
        found = np.empty(self.size, bool)
        for home, at in self.places():
            part = found[at].reshape(home.data.shape)
            for p, index in home.parts:
                part[index] = holds[p.name]
        return found

    def counted_once(self, place: Place, split: Collection[str] = ()) -> np.ndarray:
        """Which entries this rank counts in a sum over all weights and over the axes of `place`: those that it is the first to
        hold. Axes of `split` are left out where they do not cut: what is split over them is counted wherever it lies."""
        of = lambda cuts: {axis: at for axis, at in place.items() if axis in cuts or axis not in split}  # noqa: E731
        return self.mask({p.name: _first(p.layout, of(p.layout.cuts)) for p in self.parameters})


class Flat(Numbering):
    """Every parameter in one array `data`, every gradient in one array `grad`: from here on those of each are views."""

    def __init__(self, parameters: Iterable[Parameter], dtype: np.dtype | str | None = None) -> None:
        super().__init__(parameters, dtype)
        self.data, self.grad = np.empty(self.size, self.dtype), np.zeros(self.size, self.dtype)
        for home, at in self.places():
            home.move(self.data[at].reshape(home.data.shape), self.grad[at].reshape(home.data.shape))

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.zero_grad()

    def owned(self, ranges: Sequence[slice]) -> list[Owned]:
        return [Owned(at, self.data[at], self.grad[at]) for at in ranges]


def _first(layout: Layout, place: Place) -> np.ndarray:
    """Of this rank's part, the entries that no lower rank holds."""
    found = np.array(True)
    for (start, stop), runs in zip(layout.bounds(place), layout.first(place), strict=True):
        here = np.zeros(stop - start, bool)
        for a, b in runs:
            here[a - start : b - start] = True
        found = found[..., None] & here
    return found
