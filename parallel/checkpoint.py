"""Checkpoints: written by all ranks at once, complete or not there, checked to the bit when read, and for any mesh.

    save(folder, step, mine, state, control)               # mine: the pieces of whole arrays that this rank writes
    checkpoint = Checkpoint(latest(folder), control)       # on any number of ranks
    part = checkpoint.read(name, layout, place, dtype)

    folder/step-00000123/rank-0000-of-0002.safetensors     # one ordinary safetensors file a rank
                         rank-0001-of-0002.safetensors
                         manifest.json                     # state; SHA-256 of each file; where each array's pieces are

A step is written into a folder with a leading dot, flushed, and renamed: a folder `step-...` is complete, whatever was killed
and when. All ranks must see the same folder, and only one job at a time may write to it. In the files a piece is named like an
index in NumPy, `W1[:, 4:8]`, or `W1` where it is the whole array.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from operator import index
from pathlib import Path

import numpy as np

from parallel.atomic import flush_folder
from parallel.control import Control
from parallel.manifest import MANIFEST, read, require_covered, require_own, sealed, step_of
from parallel.shard import Layout, Place
from parallel.shard_file import (
    DTYPES,
    FORMAT,
    VERSION,
    Box,
    CheckpointError,
    Piece,
    ShardFile,
    metadata,
    origin_of,
    pieces,
    write_flushed,
)

__all__ = ["Checkpoint", "CheckpointError", "Piece", "latest", "pieces", "save"]


def _on_all(control: Control, what: str, work: Callable[[], object]) -> list:
    """work() on every rank, then what each returned, by rank. All ranks call it together.

    Raises CheckpointError on every rank, with the same text, when work raises on any.
    """
    error = result = None
    try:
        result = work()
    except Exception as e:
        error = e
    kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
    # Asleep: one rank's disk may be slower than another's.
    control.wait()
    outcomes = control.everyone((result, error and f"{what}: {kind}{error}"))
    failed = [text for _, text in outcomes if text]
    if failed:
        raise CheckpointError("\n".join(failed)) from error
    return [returned for returned, _ in outcomes]


def _on_first(control: Control, what: str, work: Callable, *args: object) -> object:
    """What work(*args) returned on rank 0, where alone it is done; else as _on_all."""
    return _on_all(control, what, lambda: work(*args) if control.rank == 0 else None)[0]


# --- writing


def save(folder: Path, step: int, mine: Iterable[Piece], state: dict, control: Control, keep: int = 2) -> Path:
    """Write all ranks' pieces into folder/step-... and return it; then remove what is older than the newest `keep` steps.

    All ranks call it together, with the same step and the same state (what JSON holds, integers of any size): a checkpoint
    knows nothing of the mesh. The ranks' pieces must together be every array exactly once. `mine` is gone through before
    anything is written, so it may call collectives; its data must stay as it is until save returns (views cost nothing).

    Raises CheckpointError on every rank when anything fails on any: then no step has been added or removed. One failure is not
    heard of: where `mine` fails on one rank, a rank that waits for it in a collective of its own `mine` goes on waiting. Steps
    later than this one are never removed.
    """
    step = index(step)
    if step < 0 or keep < 1:
        raise ValueError(f"cannot save step {step} and keep {keep} steps: use a step of 0 or more, and keep 1 or more")
    path = Path(folder) / f"step-{step:08d}"
    partial = path.with_name(f".{path.name}.partial")
    shard = ShardFile(step, control.rank, control.size)
    ours = f"rank {control.rank}, {path}/{shard.file}"
    try:
        plans = _on_all(control, ours, lambda: (step, _json(state), shard.plan(mine)))
        if any(plan[:2] != plans[0][:2] for plan in plans):
            raise CheckpointError(f"{path}: step and state must be the same on every rank")
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "ranks": control.size, "state": state}
        manifest |= {"files": {}, "tensors": _tensors([entry for *_, entries in plans for entry in entries])}
        _on_first(control, f"{path}", _make_room, path, partial)
        written = _on_all(control, ours, lambda: shard.write(partial))
        for (*_, entries), (file, should, hashes) in zip(plans, written, strict=True):
            manifest["files"][file] = should
            for entry, piece_hash in zip(entries, hashes, strict=True):
                entry["piece"]["sha256"] = piece_hash
        _on_first(control, f"{path}/{MANIFEST}", _commit, manifest, partial, path)
    except CheckpointError:
        # Raised on all ranks, so none is writing any more.
        if control.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        control.wait()
        raise
    _on_first(control, f"{path} is saved, but an older one could not be removed", _remove_older, path, keep)
    return path


def _json(state: dict) -> str:
    """The state as text. Raises CheckpointError when it would not come back the same."""
    try:
        text = json.dumps(state, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state must be what JSON holds: {error}") from error
    if json.loads(text) != state:
        raise CheckpointError("the state must be what JSON holds: use lists for tuples, and text for keys")
    return text


def _tensors(entries: list[dict]) -> dict[str, dict]:
    """The arrays by name, with their pieces. Raises CheckpointError unless these are each array exactly once."""
    tensors: dict[str, dict] = {}
    for e in entries:
        t = tensors.setdefault(e["name"], {"dtype": e["dtype"], "shape": e["shape"], "pieces": []})
        if (t["dtype"], t["shape"]) != (e["dtype"], e["shape"]):
            both = f"{t['dtype']} {t['shape']} in {t['pieces'][0]['file']}, {e['dtype']} {e['shape']} in {e['piece']['file']}"
            raise CheckpointError(f"{e['name']} must be one array, it is {both}")
        t["pieces"].append(e["piece"])
    require_covered(tensors)
    return tensors


def _make_room(path: Path, partial: Path) -> None:
    """An empty folder `partial`, beside `path`, which must not be there."""
    if os.path.lexists(path):
        raise CheckpointError("it is already there: remove it, or save in another folder")
    folder = path.parent
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    # What a kill has left, of any step.
    for left in [*folder.glob(".step-*.partial"), *folder.glob(".step-*.removed")]:
        shutil.rmtree(left)
    partial.mkdir()
    for p in made:
        flush_folder(p.parent)


def _commit(manifest: dict, partial: Path, path: Path) -> None:
    write_flushed(partial / MANIFEST, sealed(manifest))
    flush_folder(partial)
    partial.rename(path)
    flush_folder(path.parent)


def _remove_older(path: Path, keep: int) -> None:
    older = [p for p in _steps(path.parent) if step_of(p) < step_of(path)]
    for old in older[: max(0, len(older) - keep + 1)]:
        # Under its own name it would look complete while it is being removed.
        gone = old.rename(old.with_name(f".{old.name}.removed"))
        flush_folder(path.parent)
        shutil.rmtree(gone)


# --- reading


def latest(folder: Path) -> Path | None:
    """The newest step in the folder, or None. What a kill has left is passed over."""
    steps = _steps(Path(folder))
    return steps[-1] if steps else None


def _steps(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if step_of(p) is not None and p.is_dir()), key=step_of)


class Checkpoint:
    """A checkpoint that is to the bit what was saved; it gives parts of its arrays on any mesh.

    All ranks make it together: the files are dealt out over them, and each file is read and hashed once. Raises CheckpointError
    with the same text on every rank: it names each file that is missing, changed or foreign, and the tensors in it.
    """

    def __init__(self, path: Path, control: Control) -> None:
        self.path = Path(path)
        manifest = _on_first(control, f"{path}", read, self.path)
        self.step: int = manifest["step"]
        self.state: dict = manifest["state"]
        self._tensors: dict[str, dict] = manifest["tensors"]
        files = list(manifest["files"].items())
        mine = range(control.rank, len(files), control.size)
        by_rank = _on_all(control, f"{path}", lambda: [self._fault(*files[r], r, len(files)) for r in mine])
        faults = [fault for of_rank in by_rank for fault in of_rank if fault]
        if faults:
            raise CheckpointError("\n".join(f"{path}: {fault}" for fault in faults))

    def _fault(self, file: str, should: dict, rank: int, ranks: int) -> str:
        """What is wrong with the file that rank `rank` of `ranks` wrote, or nothing."""
        path = self.path / file
        held = [p for t in self._tensors.values() for p in t["pieces"] if p["file"] == file]
        keys = _listed(p["key"] for p in held)
        if not path.is_file():
            return f"{file} is missing: {keys} should be in it"
        require_own(path)
        size = path.stat().st_size
        with open(path, "rb") as f:
            if size == should["size"] and hashlib.file_digest(f, "sha256").hexdigest() == should["sha256"]:
                return ""
            changed = []
            for p in held:
                start, end = p["bytes"]
                f.seek(start)
                if hashlib.sha256(f.read(end - start)).hexdigest() != p["sha256"]:
                    changed.append(p["key"])
        what = f"{_listed(changed)} changed" if changed else f"{keys} did not change, what is around did"
        if size != should["size"]:
            what += f"; it should have {should['size']} bytes and has {size}"
        origin = origin_of(path)
        if origin not in (None, metadata(self.step, rank, ranks)):
            what += "; it calls itself " + ", ".join(f"{key} {value}" for key, value in origin.items())
        return f"{file} is not what was saved: {what}"

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name)["shape"])

    def dtype(self, name: str) -> np.dtype:
        """In which a tensor is stored."""
        return np.dtype(DTYPES[self._tensor(name)["dtype"]])

    def _tensor(self, name: str) -> dict:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}: it has {_listed(self.names)}")
        return self._tensors[name]

    def read(self, name: str, layout: Layout, place: Place, dtype: np.dtype | type | str) -> np.ndarray:
        """The part of `name` that the rank at `place` holds by `layout`, from whichever files have it; nothing else is read.

        Raises CheckpointError when there is no such tensor, or one of another shape or dtype.
        """
        tensor, dtype = self._tensor(name), np.dtype(dtype)
        stored = np.dtype(DTYPES[tensor["dtype"]])
        if self.shape(name) != layout.shape:
            raise CheckpointError(f"{self.path}: {name} is of shape {self.shape(name)}, it should be {layout.shape}")
        if (stored.kind, stored.itemsize) != (dtype.kind, dtype.itemsize):
            raise CheckpointError(f"{self.path}: {name} is {stored}, not {dtype}: read it as {stored}, then convert it")
        wanted = layout.bounds(place)
        part = np.empty(layout.local_shape(place), dtype)
        for p in tensor["pieces"]:
            held = p["box"]
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, held, strict=True)]
            if all(start < stop for start, stop in both):
                shape = tuple(stop - start for start, stop in held)
                there = np.memmap(self.path / p["file"], stored, "r", p["bytes"][0], shape)
                part[_within(wanted, both)] = there[_within(held, both)]
        return part


def _within(box: Box, part: Box) -> tuple[slice, ...]:
    """The index that takes what lies at `part` from an array that lies at `box`."""
    return tuple(slice(start - origin, stop - origin) for (origin, _), (start, stop) in zip(box, part, strict=True))


def _listed(names: Iterable[str]) -> str:
    first = list(names)
    return (", ".join(first[:4]) or "no tensor") + (f" and {len(first) - 4} more" if len(first) > 4 else "")
