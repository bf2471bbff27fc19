"""The manifest of a checkpoint: its state, its files, and where each array's pieces are. Sealed, so that a flipped bit is seen.

A seal proves no origin, as anybody can compute one. So everything that a manifest says is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from itertools import combinations
from math import prod
from pathlib import Path

import numpy as np

from parallel.json_text import parsed
from parallel.shard_file import DTYPES, FORMAT, VERSION, Box, CheckpointError, file_name, key_of

MANIFEST = "manifest.json"
# The manifest's last entry: the SHA-256 of all bytes before it.
SEAL = b',\n "sha256": '


def sealed(manifest: dict) -> list[bytes]:
    """The text of the file."""
    body = json.dumps(manifest, indent=1).removesuffix("\n}").encode()
    return [body, SEAL, _seal(body)]


def _seal(body: bytes) -> bytes:
    return f'"{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def step_of(path: Path) -> int | None:
    """The step that a folder is named for, if any."""
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else None


def read(path: Path) -> dict:
    """The manifest of the checkpoint at `path`. Raises CheckpointError when it is not sound in itself."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{MANIFEST} is missing: this is no complete checkpoint")
    require_own(file)
    body, _, seal = file.read_bytes().rpartition(SEAL)
    if seal != _seal(body):
        raise CheckpointError(f"{MANIFEST} is not what was saved: the SHA-256 at its end is not that of what precedes")
    manifest = parsed(body + b"}")
    kind = manifest.get("format"), manifest.get("version")
    if kind not in ((FORMAT, 1), (FORMAT, VERSION)):
        known = f"{FORMAT}, versions 1 to {VERSION}"
        raise CheckpointError(f"{MANIFEST} is of {kind[0]}, version {kind[1]}: this program reads {known}")
    if kind[1] == 1:
        _take_boxes(manifest)
    _require_sound(manifest)
    if step_of(path) not in (None, manifest["step"]):
        raise CheckpointError(f"{MANIFEST} is of step {manifest['step']}, its folder of step {step_of(path)}")
    foreign = sorted({p.name for p in path.glob("*.safetensors")} - manifest["files"].keys())
    if foreign:
        raise CheckpointError(f"{', '.join(foreign)} is not in {MANIFEST}: it belongs to another checkpoint")
    require_covered(manifest["tensors"])
    return manifest


def require_own(file: Path) -> None:
    """Raises CheckpointError for a link: what it leads to is no part of the checkpoint."""
    if file.is_symlink():
        raise CheckpointError(f"{file.name} is a link, which leads out of the checkpoint: put the file itself there")


def require_covered(tensors: dict[str, dict]) -> None:
    """Raises CheckpointError unless the pieces are each array exactly once."""
    for name, t in tensors.items():
        boxes = [p["box"] for p in t["pieces"]]
        held = sum(prod(stop - start for start, stop in box) for box in boxes)
        if held != prod(t["shape"]) or any(_meet(a, b) for a, b in combinations(boxes, 2)):
            there = ", ".join(f"{p['key']} in {p['file']}" for p in t["pieces"])
            raise CheckpointError(f"{name} {t['shape']} must be there exactly once; there is {there}")


def _meet(a: Box, b: Box) -> bool:
    """Whether two boxes have an entry in common."""
    return all(max(s, t) < min(e, f) for (s, e), (t, f) in zip(a, b, strict=True))


def _take_boxes(manifest: dict) -> None:
    """Version 1 said of each piece along which one dim it was cut, and where it starts and stops there."""
    with suppress(AttributeError, KeyError, TypeError, IndexError):
        for t in manifest["tensors"].values():
            for p in t["pieces"]:
                box = [[0, n] for n in t["shape"]]
                box[p.pop("dim")] = [p.pop("start"), p.pop("stop")]
                p["box"] = box


def _require_sound(manifest: dict) -> None:
    """Raises CheckpointError unless every entry is of its type, the files are the folder's own, and pieces lie within them."""
    files, tensors = manifest.get("files"), manifest.get("tensors")
    entries = isinstance(files, dict) and isinstance(tensors, dict) and isinstance(manifest.get("state"), dict)
    if not entries or not _whole(manifest.get("step")):
        raise CheckpointError(f"{MANIFEST} is damaged: it should have a step, a state, files and tensors")
    for rank, (file, of) in enumerate(files.items()):
        own = file_name(rank, len(files))
        if file != own:
            raise CheckpointError(f"{MANIFEST} names {file!r} for rank {rank}: the file should be {own}, in its own folder")
        if not isinstance(of, dict) or not _whole(of.get("size")) or not isinstance(of.get("sha256"), str):
            raise CheckpointError(f"{MANIFEST} is damaged: {file} should have a size and its SHA-256")
    for name, t in tensors.items():
        if not _is_tensor(name, t, files):
            raise CheckpointError(f"{MANIFEST} is damaged: {name} is not in pieces that lie in its files")


def _is_tensor(name: str, t: object, files: dict) -> bool:
    if not isinstance(t, dict) or not isinstance(t.get("dtype"), str) or t["dtype"] not in DTYPES:
        return False
    shape, pieces = t.get("shape"), t.get("pieces")
    if not isinstance(shape, list) or not shape or not all(map(_whole, shape)) or not isinstance(pieces, list) or not pieces:
        return False
    return all(isinstance(p, dict) and _is_piece(name, t["dtype"], shape, p, files) for p in pieces)


def _is_piece(name: str, dtype: str, shape: list[int], p: dict, files: dict) -> bool:
    box, at = p.get("box"), p.get("bytes")
    if not isinstance(p.get("file"), str) or p["file"] not in files or not isinstance(p.get("sha256"), str):
        return False
    if not isinstance(box, list) or len(box) != len(shape) or not _is_range(at) or not all(map(_is_range, box)):
        return False
    inside = all(stop <= n for (_, stop), n in zip(box, shape, strict=True))
    if not inside or p.get("key") != key_of(name, shape, [*map(tuple, box)]):
        return False
    size = np.dtype(DTYPES[dtype]).itemsize * prod(stop - start for start, stop in box)
    return at[1] - at[0] == size and at[1] <= files[p["file"]]["size"]


def _is_range(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_whole, value)) and value[0] <= value[1]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
