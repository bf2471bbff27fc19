"""The line of a learner's file at which most memory is held, and the arrays that hold it."""

from __future__ import annotations

import sys
import tracemalloc
from types import FrameType

import numpy as np

from practice.exercise import bounded, load
from practice.guarded import apart
from practice.part import Case
from practice.repairs import close
from practice.simulate import simulate
from practice.truth import FILE, Truth

SECONDS = 2.0
TURNS = 20_000
# How many arrays are named, and how much of all that is held one of them must be.
NAMED, SHARE = 3, 0.15


def found(truth: Truth, case: Case) -> list[str]:
    """What is said of it; [] where it is not seen. On one rank: threads are not followed."""
    one = len(truth.places) == 1 and truth.answer
    return (one and apart(lambda: _found(truth, case), SECONDS)) or []


def _found(truth: Truth, case: Case) -> list[str]:
    close(truth, case)
    space = load("", FILE, {"__source__": truth.answer})
    exec(compile(bounded(truth.answer, TURNS), FILE, "exec", dont_inherit=True), space)
    held = _Held()
    sys.settrace(held.trace)
    try:
        simulate(truth.parts[case.part], case, [space], truth.exercise.facts["allow"], FILE)
    finally:
        sys.settrace(None)
    if not held.line:
        return []
    text = truth.answer.splitlines()[held.line - 1].strip()
    large = sorted(held.arrays.items(), key=lambda a: -a[1][1])
    named = [f"{name} {shape}" for name, (shape, size) in large if size >= SHARE * held.most][:NAMED]
    return [f"Most is held at line {held.line}: {text}", *([f"There are by then: {', '.join(named)}."] if named else [])]


class _Held:
    def __init__(self) -> None:
        self.most, self.line, self.arrays = 0, 0, {}
        self._at: dict[FrameType, int] = {}

    def trace(self, frame: FrameType, event: str, value: object) -> object:
        if frame.f_code.co_filename != FILE or not tracemalloc.is_tracing():
            return None
        peak = tracemalloc.get_traced_memory()[1]
        # What has been held at most since the line before began.
        if (line := self._at.get(frame, 0)) and peak > self.most:
            own = {n: x for n, x in frame.f_locals.items() if isinstance(x, np.ndarray) and x.flags.writeable}
            self.most, self.line, self.arrays = peak, line, {n: (x.shape, x.nbytes) for n, x in own.items()}
        tracemalloc.reset_peak()
        if event == "return":
            self._at.pop(frame, None)
        else:
            self._at[frame] = frame.f_lineno
        return self.trace
