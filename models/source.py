"""A pretrained model in its files: its configuration, and its weights, of which every rank reads its own slices only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from models.config import Config
from parallel.parameter import Weights
from parallel.shard import Layout

# Entries read at a time: 1 MiB of float32, so that what is read, decoded and turned round stays in the cache.
BLOCK = 256 * 1024


class ModelError(ValueError):
    """A model's files cannot be used. Names the file, the tensor or the value, and what would be right."""


class Tensors(Protocol):
    """The tensors of a model's files by the names that the files give them. Only headers have been read.

    `shapes`: of every tensor, slowest dim first. `nbytes`: of all of them, as stored.
    """

    shapes: dict[str, tuple[int, ...]]
    nbytes: int

    def read(self, name: str, at: tuple[slice, ...]) -> np.ndarray:
        """The entries at these ranges, one a dim, as float16, float32 or float64."""

    def file(self, name: str) -> Path:
        """Where the tensor is."""

    def unreadable(self, name: str) -> str | None:
        """None, or what of the way in which it is stored cannot be read, and what could."""


@dataclass(frozen=True)
class Piece:
    """A part of one of our arrays, and the tensor of theirs that it is in: `ours[at] = tensor.reshape(dims).transpose(order)`.

    `dims`: the tensor's dims, each as those of ours that are joined in it: ((H, E), (D,)) is a matrix of H E rows.
    `order`: of these dims in ours. `at`: where in ours, an index or a range a dim; what is not said is all. `within`: where
    the tensor holds more than this along one of its dims, (that dim, where this begins, the tensor's length).
    """

    tensor: str
    dims: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    at: tuple[int | slice, ...] = ()
    within: tuple[int, int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        shape = [prod(joined) for joined in self.dims]
        if self.within is not None:
            shape[self.within[0]] = self.within[2]
        return tuple(shape)

    @property
    def size(self) -> int:
        return prod(prod(joined) for joined in self.dims)

    def read(self, tensors: Tensors, part: np.ndarray, layout: Layout, rank: int) -> None:
        """Fill `part`, this rank's of an array of ours, with what of it is in this piece: a block at a time."""
        at = [*self.at, *[slice(None)] * (part.ndim - len(self.at))]
        begin = [0] * len(self.order)
        if layout.cut is not None:
            start, stop = layout.cut.bounds[rank]
            index = at[layout.dim]
            if isinstance(index, slice):
                begin[self.order[sum(isinstance(a, slice) for a in at[: layout.dim])]] = start
            elif start <= index < stop:
                at[layout.dim] = index - start
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
        """Put this piece of a whole array of ours to where it stands in the whole tensor."""
        if self.within is not None:
            d, first, _ = self.within
            tensor = tensor[(slice(None),) * d + (slice(first, first + prod(self.dims[d])),)]
        flat = [n for joined in self.dims for n in joined]
        tensor.reshape(flat, copy=False)[...] = ours[self.at].transpose(np.argsort(self.order))


def blocks(shape: tuple[int, ...], most: int = BLOCK) -> Iterator[tuple[slice, ...]]:
    """Consecutive blocks of an array of `shape`, of at most `most` entries, as indices: one step of each of the slowest dims, a
    range of the next, and all of the others."""
    dim = next((d for d in range(len(shape)) if prod(shape[d + 1 :]) <= most), 0)
    step = max(1, most // max(1, prod(shape[dim + 1 :])))
    rest = [slice(0, n) for n in shape[dim + 1 :]]
    for outer in product(*(range(n) for n in shape[:dim])):
        for start in range(0, shape[dim], step):
            yield (*(slice(i, i + 1) for i in outer), slice(start, min(start + step, shape[dim])), *rest)


@dataclass
class Source:
    """A pretrained model. `config`: what it is made of. `family`: its model_type or general.architecture. `pieces`: which
    parts of which tensors each of our parameters is. `metadata`: GGUF's keys and values, tokenizer.* among them, else empty.

    `harmless`: whether a tensor that the model does not need is known, and may be there. `copies`: tensors that may be there
    and then are another's equal, tied to it: {"lm_head.weight": "model.embed_tokens.weight"}.
    """

    path: Path
    family: str
    config: Config
    tensors: Tensors
    pieces: dict[str, list[Piece]]
    harmless: Callable[[str], bool] = lambda name: False
    copies: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, object] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all tensors, as stored."""
        return self.tensors.nbytes

    def weights(self, dtype: np.dtype | str) -> Weights:
        """Weights for `build`: each call reads this rank's part of one array from the files, and no more."""

        def read(name: str, layout: Layout, rank: int, mean: float, std: float) -> np.ndarray:
            self._require(name, layout.shape)
            part = np.empty(layout.local_shape(rank), dtype)
            for piece in self.pieces[name]:
                piece.read(self.tensors, part, layout, rank)
            return part

        return read

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
        if sum(p.size for p in self.pieces.get(name, [])) != prod(shape):
            raise ModelError(f"{self.path}: a {self.family} of its configuration has no {name} of shape {shape}")

    def exported(self, ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Whole arrays by our names, weights or gradients, to the tensors that they are in the files, by the files' names.

        Tensors none of whose parts are given are left out. A tied head is there if it is in the files. Raises ModelError for a
        name that the model does not have, or not in this size, and for a tensor of which only a part is given.
        """
        for name, x in ours.items():
            self._require(name, x.shape)
        inside: dict[str, list[tuple[str, Piece]]] = {}
        for name, pieces in self.pieces.items():
            for piece in pieces:
                inside.setdefault(piece.tensor, []).append((name, piece))
        theirs = {}
        for tensor, parts in inside.items():
            absent = [name for name, _ in parts if name not in ours]
            if len(absent) == len(parts):
                continue
            if absent:
                raise ModelError(f"{self.path}: tensor {tensor!r} cannot be put together without {absent[0]}{_more(absent)}")
            theirs[tensor] = np.empty(parts[0][1].shape, ours[parts[0][0]].dtype)
            for name, piece in parts:
                piece.write(ours[name], theirs[tensor])
        stored = {copy: of for copy, of in self.copies.items() if copy in self.tensors.shapes and of in theirs}
        return theirs | {copy: theirs[of] for copy, of in stored.items()}

    def check(self) -> None:
        """Raises ModelError for a tensor that is missing, surplus, misshapen or stored as what we cannot read, by name. Of the
        files, only the headers have been read."""
        wanted = {p.tensor: p.shape for pieces in self.pieces.values() for p in pieces}
        shapes = self.tensors.shapes
        missing = [name for name in wanted if name not in shapes]
        if missing:
            raise ModelError(
                f"{self.path}: tensor {missing[0]!r} of shape {wanted[missing[0]]} is missing{_more(missing)}: "
                f"a {self.family} of {self.config.layers} layers needs it"
            )
        wanted |= {copy: wanted[of] for copy, of in self.copies.items() if copy in shapes}
        surplus = [name for name in shapes if name not in wanted and not self.harmless(name)]
        if surplus:
            raise ModelError(
                f"{self.tensors.file(surplus[0])}: tensor {surplus[0]!r}{_more(surplus)} has no place in "
                f"a {self.family} of {self.config.layers} layers and its configuration"
            )
        for name, shape in wanted.items():
            if shapes[name] != shape:
                raise ModelError(
                    f"{self.tensors.file(name)}: tensor {name!r} has shape {shapes[name]}, the configuration wants {shape}"
                )
            why = self.tensors.unreadable(name)
            if why is not None:
                raise ModelError(f"{self.tensors.file(name)}: tensor {name!r} is stored as {why}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def open_model(path: Path | str) -> Source:
    """The model at `path`: a folder with config.json and safetensors files, a .gguf file, or a folder with just one of these.

    Reads headers only. Raises ModelError for files that are absent, broken, of an unknown family, with settings that we do not
    have, or with tensors that are missing, surplus or misshapen.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder: give a folder with config.json, or a .gguf file")
    file = path
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            found = f"{len(files)} .gguf files" if files else "no config.json and no .gguf file"
            raise ModelError(f"{path}: {found}: give a folder with config.json, or one .gguf file")
        file = files[0]
    # Imported here, as both are made of what this module has; and whoever reads safetensors need not wait for gguf.
    if file.is_dir():
        from models.huggingface import open_folder

        source = open_folder(file)
    elif file.suffix == ".gguf":
        from models.gguf_file import open_file

        source = open_file(file)
    else:
        raise ModelError(f"{path}: neither a folder nor a .gguf file: give the folder with config.json, or a .gguf file")
    source.check()
    return source
