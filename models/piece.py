"""The tensors of a model's files, and the parts of them that our arrays are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

# So many entries are read at a time: 1 MiB of float32 stays in the cache while it is read, decoded and turned round.
BLOCK = 256 * 1024


class ModelError(ValueError):
    """A model's files cannot be used. Names the file, the tensor or the value, and what would be right."""


class Tensors(Protocol):
    """The tensors of a model's files by the names that the files give them. Only headers have been read.

    `shapes`: of every tensor, slowest dim first. `nbytes`: the bytes of all tensors, as stored.
    """

    shapes: dict[str, tuple[int, ...]]
    nbytes: int

    def read(self, name: str, at: tuple[slice, ...]) -> np.ndarray:
        """The entries at these ranges, one a dim, as float16, float32 or float64."""

    def file(self, name: str) -> Path:
        """The file that holds the tensor."""

    def unreadable(self, name: str) -> str | None:
        """None; or, for a tensor that cannot be read, its stored type and the types that can."""


def differ(tensors: Tensors, name: str, other: str) -> bool:
    """Whether two tensors of one shape, both of which are there and can be read, have different entries. They are read block by
    block."""
    shapes = tensors.shapes
    if name not in shapes or shapes[name] != shapes.get(other) or tensors.unreadable(name) or tensors.unreadable(other):
        return False
    return any(
        not np.array_equal(tensors.read(name, at), tensors.read(other, at), equal_nan=True) for at in blocks(shapes[name])
    )


@dataclass(frozen=True)
class Piece:
    """A part of one of our arrays, and the files' tensor that holds it: `ours[at] = tensor.reshape(dims).transpose(order)`.

    `dims`: for each of the tensor's dims, the dims of ours that it joins: ((H, E), (D,)) is a matrix of H E rows. `order`:
    how these dims follow each other in ours. `at`: which part of ours, an index or a range for each of its first dims, all of
    the others. `within`: where the tensor is longer than this piece along a dim: (that dim, the piece's first index there,
    the tensor's length there).
    """

    tensor: str
    dims: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    at: tuple[int | slice, ...] = ()
    within: tuple[int, int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        shape = [prod(joined) for joined in self.dims]
        if self.within is not None:
            shape[self.within[0]] = self.within[2]
        return tuple(shape)

    @property
    def size(self) -> int:
        return prod(prod(joined) for joined in self.dims)

    def read(self, tensors: Tensors, part: np.ndarray, box: Sequence[tuple[int, int]]) -> None:
        """Fill what this piece holds of `part`, which lies at `box` of an array of ours, block by block."""
        at = [*self.at, *[slice(None)] * (part.ndim - len(self.at))]
        begin = [0] * len(self.order)
        for dim, (start, stop) in enumerate(box):
            index = at[dim]
            if isinstance(index, slice):
                begin[self.order[sum(isinstance(a, slice) for a in at[:dim])]] = start
            elif start <= index < stop:
                at[dim] = index - start
            else:
                return
        target = part[tuple(at)].transpose(np.argsort(self.order))
        for block in blocks(target.shape):
            room = target[block]
            room[...] = tensors.read(self.tensor, self._ranges(block, begin)).reshape(room.shape)

    def _ranges(self, block: tuple[slice, ...], begin: list[int]) -> tuple[slice, ...]:
        """The tensor's ranges that hold a block, which is consecutive in each of the tensor's dims."""
        ranges, dim = [], 0
        for joined in self.dims:
            start, length = 0, 1
            for n in joined:
                start, length = start * n + block[dim].start + begin[dim], length * (block[dim].stop - block[dim].start)
                dim += 1
            ranges.append(slice(start, start + length))
        if self.within is not None:
            d, first, _ = self.within
            ranges[d] = slice(ranges[d].start + first, ranges[d].stop + first)
        return tuple(ranges)

    def write(self, ours: np.ndarray, tensor: np.ndarray) -> None:
        """Copy this piece of our whole array to its place in the whole tensor."""
        if self.within is not None:
            d, first, _ = self.within
            tensor = tensor[(slice(None),) * d + (slice(first, first + prod(self.dims[d])),)]
        flat = [n for joined in self.dims for n in joined]
        tensor.reshape(flat, copy=False)[...] = ours[self.at].transpose(np.argsort(self.order))


def blocks(shape: tuple[int, ...], most: int = BLOCK) -> Iterator[tuple[slice, ...]]:
    """Consecutive blocks of an array of `shape`, as indices, each of at most `most` entries: one index of each of the slowest
    dims, a range of the next dim, and all of the others."""
    dim = next((d for d in range(len(shape)) if prod(shape[d + 1 :]) <= most), 0)
    step = max(1, most // max(1, prod(shape[dim + 1 :])))
    rest = [slice(0, n) for n in shape[dim + 1 :]]
    for outer in product(*(range(n) for n in shape[:dim])):
        for start in range(0, shape[dim], step):
            yield (*(slice(i, i + 1) for i in outer), slice(start, min(start + step, shape[dim])), *rest)
