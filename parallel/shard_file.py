"""One file of a checkpoint: pieces of arrays, in the safetensors format, hashed as they are written.

https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from parallel.atomic import flush_file
from parallel.json_text import parsed
from parallel.shard import Layout, Place

FORMAT, VERSION = "rankwise checkpoint", 2
# Where a piece lies in its array: start and stop in each dim.
Box = Sequence[tuple[int, int]]
# What safetensors calls NumPy's dtypes. Its files are little-endian.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1"}
DTYPES |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1"}
CODES = {np.dtype(d): code for code, d in DTYPES.items()}
# Bytes hashed and written at a time: they stay in the cache between the two hashes and the write.
BLOCK = 2**18


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or not be trusted. The text names the file, the tensor, and what would be right."""


@dataclass(frozen=True)
class Piece:
    """A part of a whole array of `shape`, for this rank to write: a box of it, `data`, in any memory order, which begins at the
    index `start`. Raises CheckpointError where it is no such part, or where safetensors does not have the dtype or the name."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    data: np.ndarray

    def __post_init__(self) -> None:
        if self.name in ("", "__metadata__"):
            raise CheckpointError(f"{self.name!r} cannot be the name of a tensor in safetensors: use another")
        if not self.shape:
            raise CheckpointError(f"{self.name} has no dims: keep single numbers in the state")
        if self.data.dtype.newbyteorder("<") not in CODES:
            raise CheckpointError(
                f"{self.name} is of dtype {self.data.dtype}: use one that safetensors has, {', '.join(DTYPES)}"
            )
        fits = len(self.start) == len(self.shape) == self.data.ndim
        if not fits or not all(0 <= a <= b <= n for (a, b), n in zip(self.box, self.shape, strict=True)):
            raise CheckpointError(f"{self.name}: {self.data.shape} from {self.start} on is no part of {self.shape}")

    @property
    def box(self) -> Box:
        return [(int(at), int(at) + n) for at, n in zip(self.start, self.data.shape, strict=True)]

    @property
    def key(self) -> str:
        """Its name in the file."""
        return key_of(self.name, self.shape, self.box)

    @property
    def code(self) -> str:
        """Its dtype, as safetensors calls it."""
        return CODES[self.data.dtype.newbyteorder("<")]


def key_of(name: str, shape: Sequence[int], box: Box) -> str:
    """What a piece is called in its file."""
    parts = [":" if (a, b) == (0, n) else f"{a}:{b}" for (a, b), n in zip(box, shape, strict=True)]
    while parts and parts[-1] == ":":
        parts.pop()
    return f"{name}[{', '.join(parts)}]" if parts else name


def file_name(rank: int, ranks: int) -> str:
    return f"rank-{rank:04d}-of-{ranks:04d}.safetensors"


def pieces(name: str, layout: Layout, place: Place, data: np.ndarray) -> list[Piece]:
    """What a rank writes of its part `data`: that which no lower rank holds, on any axis of `place`.

    [] where lower ranks hold all of it. Rank 0 writes what every rank holds whole.
    """
    if data.shape != layout.local_shape(place):
        raise CheckpointError(f"{name}: the part of {_at(place)} should be {layout.local_shape(place)}, it is {data.shape}")
    begin = [start for start, _ in layout.bounds(place)]
    boxes = product(*layout.first(place))
    within = lambda box: tuple(slice(a - at, b - at) for (a, b), at in zip(box, begin, strict=True))  # noqa: E731
    return [Piece(name, layout.shape, tuple(a for a, _ in box), data[within(box)]) for box in boxes]


def _at(place: Place) -> str:
    return ", ".join(f"{axis} {rank}" for axis, rank in place.items())


class ShardFile:
    """The file of one rank."""

    def __init__(self, step: int, rank: int, ranks: int) -> None:
        self.file = file_name(rank, ranks)
        self._metadata = metadata(step, rank, ranks)
        self._header, self._held = b"", []

    def plan(self, mine: Iterable[Piece]) -> list[dict]:
        """Lay the pieces out in the file. For each: name, shape and dtype of its array, and what the manifest says of it."""
        # Wide dtypes first: then each piece is aligned in the file, as other tools want it.
        self._held = sorted(mine, key=lambda p: -p.data.itemsize)
        content: dict[str, dict] = {"__metadata__": self._metadata}
        end = 0
        for p in self._held:
            if p.key in content:
                raise CheckpointError(f"{p.key} is there twice")
            start, end = end, end + p.data.nbytes
            content[p.key] = {"dtype": p.code, "shape": p.data.shape, "data_offsets": (start, end)}
        text = json.dumps(content).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        entries = []
        for p in self._held:
            at = [len(self._header) + offset for offset in content[p.key]["data_offsets"]]
            piece = {"file": self.file, "key": p.key, "box": p.box, "bytes": at}
            entries.append({"name": p.name, "dtype": p.code, "shape": [int(n) for n in p.shape], "piece": piece})
        return entries

    def write(self, folder: Path) -> tuple[str, dict, list[str]]:
        """Write and flush the file. Its name, its size and SHA-256, and each piece's SHA-256: of what is in memory."""
        hashes: list[str] = []

        def blocks() -> Iterator[bytes | np.ndarray]:
            yield self._header
            for p in self._held:
                flat = np.ascontiguousarray(p.data, DTYPES[p.code]).reshape(-1).view(np.uint8)
                piece_hash = hashlib.sha256()
                for at in range(0, flat.size, BLOCK):
                    piece_hash.update(flat[at : at + BLOCK])
                    yield flat[at : at + BLOCK]
                hashes.append(piece_hash.hexdigest())

        return self.file, write_flushed(folder / self.file, blocks()), hashes


def metadata(step: int, rank: int, ranks: int) -> dict[str, str]:
    return {"checkpoint": f"{FORMAT} {VERSION}", "step": f"{step}", "rank": f"{rank}", "ranks": f"{ranks}"}


def write_flushed(path: Path, blocks: Iterable[bytes | np.ndarray]) -> dict:
    """Write a new file and flush it. Its size and its SHA-256."""
    whole = hashlib.sha256()
    with open(path, "xb") as f:
        for block in blocks:
            whole.update(block)
            f.write(block)
        flush_file(f)
        return {"size": f.tell(), "sha256": whole.hexdigest()}


def origin_of(path: Path) -> dict[str, str] | None:
    """What a file says itself of the checkpoint that it belongs to; None where that cannot be read."""
    try:
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            return dict(parsed(f.read(min(length, path.stat().st_size)))["__metadata__"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
