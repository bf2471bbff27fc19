"""Write a checkpoint of launch.train as a Hugging Face folder, which Transformers and our own commands open."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from launch import report
from launch.options import UsageError, parser
from launch.terminal import targets
from launch.terminal.lines import BYTES, column
from models import saved
from models.config import Config
from models.open import open_model
from models.piece import ModelError
from parallel.atomic import partial_of
from parallel.checkpoint import Checkpoint, CheckpointError, latest
from parallel.control import Control
from parallel.manifest import step_of
from parallel.shard import Layout

# What a checkpoint has beside the weights: AdamW's moments.
MOMENTS = ("m.", "v.")


def options() -> argparse.ArgumentParser:
    p = parser(
        "export",
        "Write a checkpoint of launch.train as a Hugging Face folder: config.json, model.safetensors and a tokenizer.",
        ("python -m launch.export kept published", "mpirun -n 2 python -m launch.export kept/step-00001000 published"),
        needs="CHECKPOINT FOLDER",
        without=("seed", "dtype"),
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="what launch.train --checkpoint names, or a step of it")
    p.add_argument("FOLDER", type=targets.Folder, help="a new folder to write, or an empty one")
    return p


def check(args: argparse.Namespace, ranks: int) -> Path:
    """The step to export."""
    if not args.checkpoint.is_dir():
        raise UsageError(f"{args.checkpoint}: no such folder: give what launch.train --checkpoint names")
    path = args.checkpoint if step_of(args.checkpoint) is not None else latest(args.checkpoint)
    if path is None:
        raise UsageError(f"{args.checkpoint} holds no checkpoint: give what launch.train --checkpoint names")
    if args.FOLDER.is_dir() and any(args.FOLDER.iterdir()):
        raise UsageError(f"{args.FOLDER} is not empty: give a new folder")
    return path


class Described(NamedTuple):
    """What a checkpoint says of its model: config.json and what that means, by which pairs its heads are rotated, and the model
    whose tokenizer it has (None: its tokens are bytes)."""

    settings: dict
    config: Config
    pairing: str
    beside: Path | None


def described(checkpoint: Checkpoint) -> Described:
    """Raises UsageError for a checkpoint that says nothing of it, or nothing that can be."""
    said = checkpoint.state.get("model")
    if said is None:
        why = "its layers are those of no published family that is written, or it was saved before this command was there"
        raise UsageError(f"{checkpoint.path} cannot be exported: {why}")
    try:
        settings, pairing, beside = said["config"], said["pairing"], said["beside"]
        config = saved.read_back(settings, f"{checkpoint.path}: config")
        if pairing not in ("half", "interleaved") or not isinstance(beside, str | None):
            raise TypeError(f"{pairing!r}, {beside!r}")
    except (TypeError, KeyError, ModelError) as error:
        raise UsageError(f"{checkpoint.path}: what it says of its model is not what launch.train saves: {error}") from None
    return Described(settings, config, pairing, None if beside is None else Path(beside))


def whole(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """All weights by our names, whole."""
    arrays = {}
    for name in checkpoint.names:
        if not name.startswith(MOMENTS):
            dtype = checkpoint.dtype(name)
            arrays[name] = checkpoint.read(name, Layout(checkpoint.shape(name)), {}, dtype)
    return arrays


def written(folder: Path, of: Described, checkpoint: Checkpoint) -> tuple[list[Path], int]:
    """The files, and how many weights they hold; the folder is there whole or not at all."""
    partial = partial_of(folder)
    try:
        beside = saved.beside(of.beside)
        tensors = saved.tensors(of.settings, of.config, whole(checkpoint), of.pairing)
        partial.mkdir()
        files = saved.write(partial, of.settings, tensors, beside)
        open_model(partial)
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except (ModelError, CheckpointError) as error:
        raise UsageError(f"{checkpoint.path}: {error}") from None
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror or error}: use a folder that may be written") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / file.name for file in files], sum(x.size for x in tensors.values())


def main(args: argparse.Namespace, comm: MPI.Intracomm, path: Path) -> int:
    control = Control(comm)
    try:
        checkpoint = Checkpoint(path, control)
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    of = described(checkpoint)
    problem = None
    if comm.rank == 0:
        try:
            files, weights = written(args.FOLDER, of, checkpoint)
        except UsageError as error:
            problem = str(error)
    if problem := control.from_first(problem):
        raise UsageError(problem)
    if comm.rank:
        return 0
    result = report.header("export") | {
        "checkpoint": str(path),
        "step": checkpoint.step,
        "folder": str(args.FOLDER),
        "family": of.settings["model_type"],
        "parameters": weights,
        "files": {file.name: file.stat().st_size for file in files},
    }
    return report.publish(args.json, result, lambda: show(result), agreed=None)


def show(result: dict) -> None:
    """The report for people."""
    title = f"Step {result['step']} as a {result['family']} of {result['parameters']:,} parameters in {result['folder']}"
    heading, sizes = column("size", list(result["files"].values()), BYTES)
    report.table(title, ("file", heading), zip(result["files"], sizes, strict=True))


if __name__ == "__main__":
    start.run(options(), check, main)
