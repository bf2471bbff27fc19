"""The gate of every verb: what a call is, and what a watcher hears of it.

A mesh without watchers describes no calls, so that watching costs nothing where nobody does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from mpi4py import MPI

from parallel.verbs import VERBS, method_name

_HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(_HERE)
_INSIDE = frozenset(os.path.join(folder, name) for folder, _, names in os.walk(_HERE) for name in names)


# How many rows go to each rank, and come from each.
Rows = tuple[tuple[int, ...], ...]


@dataclass(slots=True, eq=False)
class Call:
    """One rank's call of one verb.

    `axis`: its name; of a group with its ranks, tp[0..1]. `number`: from 0 on this axis. Collectives have one row of numbers,
    the same on every rank; the messages from one rank to another have their own, the same for both. `verb`: its name in VERBS.
    `started`: it goes on while the rank computes. `shape`: of the whole array, where the argument is a part; of one row,
    where each rank has as many rows as it likes. `how`: by the names in VERBS. `phase`: the ledger's. `site`: file:line of the
    innermost frame outside parallel/; `function`: the name of the function there. `what`: what a message is meant to be, as its
    caller says; or "". `rows`: of an exchange, how many go to each rank and how many come from each.
    """

    axis: str
    number: int
    verb: str
    started: bool
    shape: tuple[int, ...]
    dtype: np.dtype
    how: tuple[Hashable, ...]
    message_bytes: int
    phase: str
    site: str
    function: str
    what: str = ""
    rows: Rows = ()

    @property
    def peer(self) -> int | None:
        """The other rank's place on the axis, where the verb is between two."""
        return int(self.how[0]) if VERBS[self.verb].partner else None

    def __str__(self) -> str:
        how = (f"{name} {value}" for name, value in zip(VERBS[self.verb].how, self.how, strict=True))
        of = ["of", self.what] if self.what else []
        return " ".join([method_name(self.verb, self.started), *of, str(self.shape), str(self.dtype), *how])


class Watched(Protocol):
    """What a watcher may ask of an axis: `parallel.axis.Axis` says what each is."""

    name: str
    size: int
    rank: int
    members: tuple[int, ...]
    watchers: list[Watcher]

    def duplicate(self) -> MPI.Intracomm: ...


class Watcher:
    """Hears of every call on a mesh that has it in `mesh.watchers`, in the order of that list. `axis`: the one called.
    A subclass overrides what it wants to know.

    A watcher leaves arrays alone, and sends nothing on the axis' own communicator. `holds_buffers`: the axis sees to it that
    the buffers of what is started stay as they are until it is complete. `labels_messages`: that a message says what it is.
    """

    holds_buffers = labels_messages = False

    def begin(self, axis: Watched, call: Call, x: np.ndarray | None) -> None:
        """Before MPI is entered. `x`: what this rank sends, in any memory order; None where it sends nothing (receive, and
        broadcast but for its root). May raise, on all ranks alike."""

    def started(self, axis: Watched, call: Call) -> None:
        """A verb that goes on beside computation is under way: until here the rank may have waited for the others' `begin`."""

    def wait(self, axis: Watched, call: Call) -> None:
        """The rank now waits for a verb that it started."""

    def end(self, axis: Watched, call: Call, y: np.ndarray | None, entered: float, left: float) -> None:
        """MPI has been left; for a started verb, when it is complete. `y`: what was received, in the order it came over the
        wire (an all_gather's parts one after another); None for send and where an exception ended the verb.
        `entered`, `left`: perf_counter seconds; equal where a watcher's `begin` raised."""

    def operation(self, axis: Watched, what: str) -> None:
        """What the rank does from here on, as an operation of a plan; "": nothing that has a name."""

    def close(self, axis: Watched) -> None:
        """The axis is closed: all its ranks come here together."""


_sites: dict[tuple[int, int], tuple[str, str]] = {}
_known: list[object] = []


def path_in_project(path: str) -> str:
    """The path within the project of a file that lies there; of any other file its name alone."""
    inside = os.path.relpath(path, ROOT) if os.path.isabs(path) else path
    return os.path.basename(path) if inside.startswith("..") else inside


def site() -> tuple[str, str]:
    """file:line of the innermost frame outside parallel/, and the name of its function, for a caller inside."""
    # The caller is inside: the look begins with what called it. Each frame that is looked at costs a verb about 0.1 us.
    frame = sys._getframe(2)
    while (code := frame.f_code).co_filename in _INSIDE:
        frame = frame.f_back
    key = id(code), frame.f_lasti
    known = _sites.get(key)
    if known is None:
        known = _sites[key] = f"{path_in_project(code.co_filename)}:{frame.f_lineno}", code.co_qualname
        # A code object that is kept keeps its id.
        _known.append(code)
    return known
