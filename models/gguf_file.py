"""A GGUF file: its header, and its tensors dequantised as they are read."""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.quants import dequantize

from models import gguf_keys
from models.families.table import ARCHITECTURES
from models.piece import ModelError
from models.roles import pieces
from models.settings import Settings
from models.source import Source
from models.wishes import of_gguf

_PLAIN = {GGMLQuantizationType.F32: np.dtype("<f4"), GGMLQuantizationType.F16: np.dtype("<f2")}
# How values are stored, by the number of their type; 8 is a string and 9 an array.
_VALUES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# How the files of a split model are called.
SPLIT_NAME = "NAME-00001-of-00003.gguf"
SPLIT = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class _Header:
    """Reads a header from its first byte on. Past the end of the file it raises struct.error or ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 0

    def number(self, code: str) -> int | float | bool | bytes:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length, start = self.number("Q"), self.position
        self.position += length
        if self.position > len(self.data):
            raise ValueError("a string goes beyond the end")
        return self.data[start : self.position].decode()

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_VALUES[kind])
        inside, length = self.number("I"), self.number("Q")
        if inside in (_STRING, _ARRAY):
            return [self.value(inside) for _ in range(length)]
        dtype = np.dtype(f"<{_VALUES[inside]}")
        start, self.position = self.position, self.position + length * dtype.itemsize
        return np.frombuffer(self.data, dtype, length, start).tolist()


class GGUF:
    """The tensors and the keys and values of a GGUF file, version 2 or 3, little-endian
    (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    The gguf package knows the types and dequantises them. Its reader is not used: it makes some hundred thousand arrays of a
    vocabulary of 49152, which takes 4 s and 150 MB on every rank. Raises ModelError for a file that is broken or cut short.
    """

    def __init__(self, file: Path) -> None:
        self.path = file
        self.metadata: dict[str, object] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.nbytes = 0
        self._at: dict[str, tuple[GGMLQuantizationType, int]] = {}
        try:
            with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._read_header(_Header(data))
        except ModelError:
            raise
        except OSError as e:
            raise ModelError(f"{file}: {e.strerror}") from None
        except (struct.error, ValueError, KeyError, OverflowError, RecursionError) as e:
            raise ModelError(f"{file}: not a whole GGUF file: its header is cut short or damaged ({e})") from None

    def _read_header(self, header: _Header) -> None:
        magic, version = header.number("4s"), header.number("I")
        if magic != b"GGUF" or version not in (2, 3):
            begins = header.data[:8]
            raise ModelError(f"{self.path}: not a little-endian GGUF file of version 2 or 3: it begins with {begins!r}")
        tensors, keys = header.number("Q"), header.number("Q")
        for _ in range(keys):
            key = header.string()
            self.metadata[key] = header.value(header.number("I"))
        for _ in range(tensors):
            name = header.string()
            shape = [header.number("Q") for _ in range(header.number("I"))]
            if name in self._at:
                raise ModelError(f"{self.path}: tensor {name!r} is there twice")
            self._at[name] = GGMLQuantizationType(header.number("I")), header.number("Q")
            self.shapes[name] = tuple(reversed(shape))
        alignment = self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-header.position // alignment) * alignment
        for name, (kind, offset) in self._at.items():
            rows, row = self._rows(name, kind)
            self._at[name] = kind, start + offset
            self.nbytes += prod(rows) * row
            if start + offset + prod(rows) * row > len(header.data):
                raise ModelError(
                    f"{self.path}: cut short: tensor {name!r} ends at byte {start + offset + prod(rows) * row}, "
                    f"the file at {len(header.data)}"
                )

    def _rows(self, name: str, kind: GGMLQuantizationType) -> tuple[tuple[int, ...], int]:
        """All dims but the fastest, and the bytes of a row along that one."""
        block, size = GGML_QUANT_SIZES[kind]
        *rows, width = self.shapes[name]
        if width % block:
            raise ModelError(f"{self.path}: tensor {name!r} has rows of {width}, {kind.name} is in blocks of {block}")
        return tuple(rows), width // block * size

    def read(self, name: str, at: tuple[slice, ...]) -> np.ndarray:
        kind, offset = self._at[name]
        if kind in _PLAIN:
            return np.array(np.memmap(self.path, _PLAIN[kind], "r", offset, self.shapes[name])[at], order="C")
        rows, row = self._rows(name, kind)
        block, size = GGML_QUANT_SIZES[kind]
        *outer, inner = at
        # Whole blocks of the fastest dim: all that the range touches.
        first, last = inner.start // block, -(-inner.stop // block)
        stored = np.memmap(self.path, np.uint8, "r", offset, (*rows, row))[(*outer, slice(first * size, last * size))]
        # They become one row, as gguf takes 16 rows at a time, and these may be too few entries for NumPy to be fast.
        values = dequantize(np.array(stored, order="C").reshape(1, -1), kind).reshape(*stored.shape[:-1], -1)
        return values[..., inner.start - first * block : inner.stop - first * block]

    def file(self, name: str) -> Path:
        return self.path

    def unreadable(self, name: str) -> str | None:
        kind = self._at[name][0]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            return f"{kind.name}, which the gguf package cannot dequantise: use F32, F16, BF16, Q8_0 or another of its types"
        return None


class Split:
    """The tensors of several GGUF files as one (llama.cpp's gguf-split): the first has the keys."""

    def __init__(self, files: Sequence[Path]) -> None:
        parts = [GGUF(file) for file in files]
        self.metadata = parts[0].metadata
        self.nbytes = sum(part.nbytes for part in parts)
        self._of: dict[str, GGUF] = {}
        for part in parts:
            twice = next((name for name in part.shapes if name in self._of), None)
            if twice is not None:
                raise ModelError(f"{part.path}: tensor {twice!r} is in {self._of[twice].path.name} too")
            self._of |= dict.fromkeys(part.shapes, part)
        self.shapes = {name: part.shapes[name] for name, part in self._of.items()}
        told = self.metadata.get("split.tensors.count", len(self.shapes))
        if told != len(self.shapes):
            raise ModelError(f"{files[0]}: its {len(files)} files have {len(self.shapes)} tensors, it says {told}")

    def read(self, name: str, at: tuple[slice, ...]) -> np.ndarray:
        return self._of[name].read(name, at)

    def file(self, name: str) -> Path:
        return self._of[name].path

    def unreadable(self, name: str) -> str | None:
        return self._of[name].unreadable(name)


def siblings(file: Path) -> list[Path]:
    """All files of the set that a GGUF file belongs to, by its name NAME-00001-of-00003.gguf; itself if it is alone. Raises
    ModelError for one that is missing."""
    said = SPLIT.fullmatch(file.name)
    if said is None:
        return [file]
    count = int(said["count"])
    files = [file.with_name(f"{said['name']}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    for part in files:
        if not part.exists():
            raise ModelError(f"{part}: no such file: it is one of {count} with {file.name}")
    return files


def open_file(file: Path) -> Source:
    """The model in a GGUF file, or in the set of files that it is one of. Reads headers only; its tensors are yet to be
    checked."""
    files = siblings(file)
    gguf, file = GGUF(file) if len(files) == 1 else Split(files), files[0]
    architecture = gguf.metadata.get("general.architecture")
    # In a list, as what the file says may be of a type that a dict cannot look up.
    if architecture not in list(ARCHITECTURES):
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{file}: general.architecture is {architecture!r}: unknown family, use one of {known}")
    if gguf.metadata.get("split.count", 1) not in (0, 1, len(files)):
        raise ModelError(
            f"{file}: one of {gguf.metadata['split.count']} files: keep all in one folder and call them {SPLIT_NAME}"
        )
    table = gguf_keys.ENDS["wte"]
    if table not in gguf.shapes:
        raise ModelError(f"{file}: tensor {table!r} is missing: a {architecture} needs it")
    lead = f"{architecture}."
    inside = {key.removeprefix(lead): value for key, value in gguf.metadata.items() if key.startswith(lead)}
    s = Settings(inside, f"{file}: {architecture}")
    config = ARCHITECTURES[architecture](s, gguf)
    # A setting that nobody has asked for may change the mathematics.
    idle = {*gguf_keys.IDLE, *(key for key, value in gguf_keys.NEUTRAL.items() if inside.get(key) == value)}
    further = sorted(inside.keys() - s.taken - idle)
    if further:
        raise s.refuse(further[0], "not supported, such a setting is not known for this family")
    wishes = of_gguf(gguf.metadata, str(file))
    return Source(
        file,
        architecture,
        config,
        gguf,
        pieces(config, gguf_keys.names(gguf.shapes), len(gguf.shapes)),
        harmless=lambda name: name == gguf_keys.DIVISORS and config.rope is not None,
        metadata=gguf.metadata,
        wishes=wishes,
        notes=list(wishes.unread),
    )
