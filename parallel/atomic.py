"""Files that are there whole or not at all, whatever is killed and when; and what outlasts a power cut."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def partial_of(path: Path) -> Path:
    """The name that a file has until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def write_atomically(path: Path, mode: str = "w", flushed: bool = False) -> Iterator[IO]:
    """Write a file that becomes `path` at the end of the block, unless the block raises. `mode`: w (in UTF-8) or wb.

    `flushed`: at the end it is on the disk. A link stays, and what it leads to is written. Raises OSError.
    """
    path = Path(os.path.realpath(path))
    partial = partial_of(path)
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            if flushed:
                flush_file(file)
        partial.replace(path)
        if flushed:
            flush_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def flush_file(file: IO) -> None:
    """What was written to the file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """What was made, renamed or removed in the folder is on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
