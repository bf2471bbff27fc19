"""NumPy as a learner's file sees it: floating-point errors are noted with their line, silenced ones too, and memory that
has not been written is NaN."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np


def line_of(source: str, line: int) -> str:
    lines = source.splitlines()
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


class Noted:
    """A log of NumPy's floating-point errors: what happened in which function, and at which line of the learner's file."""

    hushed = False

    def __init__(self, file: str, source: str) -> None:
        self.file, self.source, self.events, self.silenced = file, source, [], []

    def write(self, message: str) -> None:
        """Called by NumPy: `Warning: overflow encountered in exp`."""
        what, _, function = message.removeprefix("Warning: ").strip().partition(" encountered in ")
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        line = frame.f_lineno if frame else 0
        event = {"what": what, "in": function, "line": line, "text": line_of(self.source, line), "hushed": self.hushed}
        if line and event not in self.events and len(self.events) < 20:
            self.events.append(event)


class Silenced(Noted):
    """The same of what the learner's own np.errstate passes over in silence: they are told where nothing else explains it."""

    hushed = True

    def __init__(self, noted: Noted) -> None:
        super().__init__(noted.file, noted.source)
        self.events = noted.silenced


class Watched(np.errstate):
    """np.errstate as a learner's file sees it: what it ignores is noted all the same, and does not show."""

    def __enter__(self) -> None:
        super().__enter__()
        noted = np.geterrcall()
        ignored = [k for k, how in np.geterr().items() if how in ("ignore", "warn", "print") and k != "under"]
        if isinstance(noted, Noted) and ignored:
            np.seterrcall(noted if isinstance(noted, Silenced) else Silenced(noted))
            np.seterr(**dict.fromkeys(ignored, "log"))


_empty, _empty_like = np.empty, np.empty_like


@wraps(_empty)
def empty(*args: Any, **kwargs: Any) -> np.ndarray:
    return _unwritten(_empty(*args, **kwargs))


@wraps(_empty_like)
def empty_like(*args: Any, **kwargs: Any) -> np.ndarray:
    return _unwritten(_empty_like(*args, **kwargs))


def _unwritten(x: np.ndarray) -> np.ndarray:
    """New memory, of NaN: what it happens to hold may be right by luck, or be taken for an array that was let go."""
    if x.dtype.kind in "fc":
        x.fill(np.nan)
    return x


SEEN = {"errstate": Watched, "empty": empty, "empty_like": empty_like}
USUAL = {name: getattr(np, name) for name in SEEN}
# How many cases run: simulated ranks do at the same time.
_running = 0


@contextmanager
def watched() -> Iterator[None]:
    """Within, np has what SEEN has."""
    global _running
    _running += 1
    vars(np).update(SEEN)
    try:
        yield
    finally:
        _running -= 1
        if not _running:
            vars(np).update(USUAL)
