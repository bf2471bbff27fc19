"""Ranks as threads of one process, one at a time: for mistakes, other right solutions and mutants, which need no mpirun.

A rank runs until it waits in a verb; then the next that can go on does. So a run is the same each time, and when no rank can go
on, that is a deadlock, found at once.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from practice.axis import Axis, Place, collective, disagreement
from practice.part import Case, Outcome, Part
from practice.perform import Stop, perform


class Stage:
    """The ranks of one run, and what each of them waits for."""

    def __init__(self, size: int) -> None:
        self.size = size
        # Plain locks pass the turn from rank to rank, in a fifth of a Semaphore's time.
        self.turn = [_thread.allocate_lock() for _ in range(size)]
        self.back = _thread.allocate_lock()
        for baton in (*self.turn, self.back):
            baton.acquire()
        self.waits: list[dict | None] = [None] * size
        self.done = [False] * size
        self.hung = self.over = False

    def wait(self, rank: int, **what: Any) -> Any:
        """Called by a rank: wait until its verb can complete. Returns the verb's result."""
        if self.over:
            # Nobody would ever answer.
            raise ValueError("the axis is that of an earlier call")
        self.waits[rank] = what
        self.back.release()
        self.turn[rank].acquire()
        if self.hung:
            raise Stop
        self.waits[rank] = None
        if "problem" in what:
            raise ValueError(what["problem"])
        return what.get("result")

    def run(self, bodies: Sequence[Callable[[], None]]) -> list[str]:
        """Run all ranks to their end. Returns for each what it waits for when no rank can go on, or ''."""

        def body(rank: int) -> None:
            self.turn[rank].acquire()
            try:
                bodies[rank]()
            except Stop:
                pass
            finally:
                self.done[rank] = True
                self.back.release()

        for rank in range(self.size):
            _thread.start_new_thread(body, (rank,))
        ready = list(range(self.size))
        while ready:
            for rank in ready:
                self.turn[rank].release()
                self.back.acquire()
            ready = self._matched()
        stuck = ["" if w is None else w["what"] for w in self.waits]
        self.hung = True
        for rank in range(self.size):
            if not self.done[rank]:
                self.turn[rank].release()
                self.back.acquire()
        self.over = True
        return stuck

    def _matched(self) -> list[int]:
        """Complete the verbs that can complete. Returns the ranks that can go on."""
        live = [r for r in range(self.size) if not self.done[r]]
        w = self.waits
        if len(live) == self.size and all("call" in w[r] for r in live):
            calls = [w[r]["call"] for r in live]
            problem, arrays = disagreement(calls), [w[r]["x"] for r in live]
            for rank in live:
                if not problem:
                    try:
                        w[rank]["result"] = collective(arrays, calls, Place(rank, self.size))
                    except (ValueError, IndexError, TypeError) as error:
                        w[rank]["problem"] = str(error)
                else:
                    w[rank]["problem"] = problem
            return live
        for a in live:
            b = w[a].get("to")
            if b is not None and w[b] is not None and not self.done[b] and w[b].get("source") == a:
                w[b]["result"], w[b]["source"], w[a]["to"] = w[a]["x"], None, None
        return [r for r in live if "call" not in w[r] and w[r]["to"] is None and w[r]["source"] is None]


class SimulatedAxis(Axis):
    def __init__(self, stage: Stage, rank: int, allow: Sequence[str], file: str) -> None:
        super().__init__(rank, stage.size, allow, file)
        self._stage = stage

    def _meet(self, x: np.ndarray, verb: str, option: object, what: str) -> np.ndarray | list[np.ndarray]:
        return self._stage.wait(self.rank, call=(verb, x.shape, str(x.dtype), option), x=x, what=what)

    def _transfer(self, to: int | None, x: np.ndarray | None, source: int | None, what: str) -> np.ndarray | None:
        return self._stage.wait(self.rank, to=to, x=x, source=source, what=what)


def simulate(
    part: Part,
    case: Case,
    spaces: Sequence[dict[str, Any]],
    allow: Sequence[str],
    file: str,
    given: dict[str, Any] | None = None,
) -> list[Outcome]:
    """The Outcome of each rank; `spaces`: the functions, a namespace a rank (so that ranks share no globals).

    given: inputs in place of the case's.
    """
    size = len(spaces)
    if size == 1:
        return [perform(part, case, spaces[0], Place(0, 1), file, given)]
    stage = Stage(size)
    outcomes: list[Outcome | None] = [None] * size

    def body(rank: int) -> None:
        outcomes[rank] = perform(part, case, spaces[rank], SimulatedAxis(stage, rank, allow, file), file, given)

    stuck = stage.run([lambda rank=rank: body(rank) for rank in range(size)])
    return [o or Outcome("hang", waits=w) for o, w in zip(outcomes, stuck, strict=True)]
