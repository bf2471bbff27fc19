"""Options that name what is to be written. Each is tried before any work, and one that cannot be written takes no result along.

An option becomes a target by its type, and owes nothing else: `p.add_argument("--logits", type=targets.File)`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from parallel.atomic import partial_of, write_atomically
from parallel.text import named

# Enough for a full disk to say so.
TRIAL = bytes(64 * 1024)


class Target(type(Path())):
    """A path that rank 0 writes to, or every rank (`everyone`). `new`: the folder to write in may be new, in one that is there.
    `drawn`: with matplotlib."""

    everyone = new = drawn = False

    def __repr__(self) -> str:
        return repr(str(self))


class File(Target):
    """A file, in a folder that is there."""


class Picture(File):
    """A file that is drawn, in a folder that may be new."""

    new = drawn = True


class Folder(Target):
    """A folder that may be new."""

    new = True


class PictureFolder(Folder):
    """A folder that may be new, for pictures."""

    drawn = True


class FolderOfAll(Folder):
    """A folder that may be new, in which every rank writes."""

    everyone = True


def names(args: argparse.Namespace) -> list[str]:
    """The options that name a target, as `args` has them."""
    return [name for name, value in vars(args).items() if isinstance(value, Target)]


def unwritable(args: argparse.Namespace, rank: int) -> str | None:
    """The first target that this rank is to write and cannot, and why; or two of one name. Trying leaves nothing behind."""
    taken: dict[str, str] = {}
    for name in names(args):
        path = getattr(args, name)
        if rank and not path.everyone:
            continue
        # What is given by its place is named in capitals.
        option = name if name.isupper() else f"--{name.replace('_', '-')}"
        if (why := problem(path)) is not None:
            return f"cannot write {option} {path}: {why}"
        if path.drawn and find_spec("matplotlib") is None:
            return f"{option} needs matplotlib, which is not installed: run `pip install matplotlib`"
        if (other := taken.setdefault(os.path.realpath(path), option)) != option:
            return f"{other} and {option} both name {path}: use two names"
    return None


def problem(path: Target) -> str | None:
    """Why it cannot be written, and what would be right; None if it can."""
    # Not the link, but what it leads to.
    path = type(path)(os.path.realpath(path))
    folder = path if isinstance(path, Folder) else path.parent
    try:
        if isinstance(path, File):
            if path.is_dir():
                return "it is a folder: use the name of a file"
            if path.exists() and not path.is_file():
                return "it is no ordinary file: use the name of one"
            with suppress(FileNotFoundError, NotADirectoryError):
                # A name may be too long, and with that of its partial file yet longer.
                partial_of(path).lstat()
        if folder.exists() and not folder.is_dir():
            return "it is a file: use a folder" if folder is path else f"{folder} is no folder"
        if not folder.exists() and path.new:
            folder = folder.parent
        if not folder.is_dir():
            return f"there is no folder {folder}"
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(TRIAL)
    except OSError as error:
        what = "a folder" if isinstance(path, Folder) else "a file in a folder"
        return f"{error.strerror or error}: use {what} that may be written"
    return None


def unshared(args: argparse.Namespace, rank: int, everyone: Callable[[object], list]) -> str | None:
    """What is wrong where not all ranks see one and the same folder, of one that all write in. All of several hosts call it
    together; `everyone`: what each passes, by rank. Nothing is left behind."""
    for name in names(args):
        folder = getattr(args, name)
        if not folder.everyone:
            continue
        beside = folder if folder.is_dir() else folder.parent
        mark = everyone(_marked(beside) if rank == 0 else None)[0]
        seen = everyone(mark is None or (beside / mark).exists())
        if rank == 0 and mark is not None:
            with suppress(OSError):
                (beside / mark).unlink()
        if blind := [r for r, sees in enumerate(seen) if not sees]:
            what = f"what rank 0 writes there is not seen by {named(blind)}"
            return f"--{name.replace('_', '-')} {folder}: {what}: use a folder that all hosts share"
    return None


def _marked(folder: Path) -> str | None:
    """The name of a file that this makes in the folder; None where that cannot be."""
    with suppress(OSError):
        descriptor, path = tempfile.mkstemp(prefix=".rankwise-", dir=folder)
        os.close(descriptor)
        return Path(path).name
    return None


def write(path: Path, put: Callable[[BinaryIO], object]) -> str | None:
    """Write a file whole or not at all. Returns why it could not be, to be told once the results are."""
    try:
        path.parent.mkdir(exist_ok=True)
        with write_atomically(path, "wb") as file:
            put(file)
    except Exception as error:  # whatever a library raises that draws
        return f"cannot write {path}: {getattr(error, 'strerror', None) or error or type(error).__name__}"
    return None
