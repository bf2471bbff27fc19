"""What each rank was given, for all to compare before any work: options, the files that these name, and what runs them.

Ranks that were told different things would compute different things, and agree on the sum.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import mpi4py
import numpy as np

from parallel.call import ROOT
from parallel.text import named

OWN = "rankwise itself"
SAME_VERSION = "install the same on all hosts"
SAME_OPTION = "give all ranks the same"


class File(NamedTuple):
    """A file as its host knows it: two that are alike in this are one, and need not be read to know it."""

    host: str
    device: int
    inode: int
    size: int
    changed: int


@dataclass(frozen=True)
class Given:
    """What one rank was given. `versions`, `options`: by name, as text. `files`: those that an option names, by option."""

    versions: dict[str, str]
    options: dict[str, str]
    files: dict[str, list[File]]
    paths: dict[str, list[Path]]

    @classmethod
    def of(cls, args: argparse.Namespace | None, written: Sequence[str] = ()) -> Given:
        """`args`: the options, as parsed; None of a rank that was asked for help. `written`: the options that name a target."""
        typed = {} if args is None else vars(args)
        options = {"the command": Path(sys.argv[0]).stem, "--help": repr(args is None)}
        options |= {_option(name): repr(value) for name, value in typed.items()}
        paths = {_option(n): found for n, value in typed.items() if n not in written and (found := list(_files(value)))}
        paths[OWN] = [Path(ROOT, "launch", "__init__.py")]
        files = {name: list(map(_file, found)) for name, found in paths.items()}
        versions = {"Python": platform.python_version(), "NumPy": np.__version__, "mpi4py": mpi4py.__version__}
        return cls(versions, options, files, paths)

    def digest(self, name: str) -> str:
        """Of the content of the files that an option names."""
        paths = sorted(Path(ROOT).glob("[a-z]*/**/*.py")) if name == OWN else self.paths[name]
        content = blake2b(digest_size=6)
        for path in paths:
            content.update(path.read_bytes())
        return content.hexdigest()


def difference(every: Sequence[Given], digests: Callable[[list[str]], list[dict[str, str]]]) -> str | None:
    """The first thing in which ranks differ, in one line; None where all were given the same.

    `digests`: what every rank has as digests of the files of these names; all ranks call it together.
    """
    found = _first([g.versions for g in every], SAME_VERSION) or _first([g.options for g in every], SAME_OPTION)
    if found:
        return found
    apart = [name for name in every[0].files if any(g.files.get(name) != every[0].files[name] for g in every)]
    return _first(digests(apart), SAME_OPTION, "the content of ") if apart else None


def _first(every: Sequence[Mapping[str, str]], advice: str, of: str = "") -> str | None:
    """The first name of which not all ranks have the same value: what each has, led by the fewest ranks."""
    for name in dict.fromkeys(name for values in every for name in values):
        groups: dict[str | None, list[int]] = {}
        for rank, values in enumerate(every):
            groups.setdefault(values.get(name), []).append(rank)
        if len(groups) > 1:
            said = [
                f"{named(ranks)} {'has' if len(ranks) == 1 else 'have'} {'none' if value is None else value}"
                for value, ranks in sorted(groups.items(), key=lambda group: (len(group[1]), -group[1][0]))
            ]
            return f"{of}{name}: {', '.join(said)}: {advice}"
    return None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _files(value: object) -> Iterator[Path]:
    """The files that the value of an option names, and those in the folders that it names."""
    for each in value if isinstance(value, list | tuple) else [value]:
        # A text that is too long for a path, or that holds a zero byte, is none.
        with suppress(OSError, ValueError):
            if isinstance(each, str | Path) and str(each):
                path = Path(each)
                yield from (file for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file())


def _file(path: Path) -> File:
    found = path.stat()
    return File(platform.node(), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
