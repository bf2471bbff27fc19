"""Verbs under way: what is started, and goes on while the rank computes."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np

from parallel.buffer import Held
from parallel.call import Call, Watched
from parallel.ledger import Row
from parallel.sums import Request


class Pending:
    """A verb under way: `wait` for its result; until then its buffers belong to it.

    `poke` it now and then while computing: some MPI libraries move data inside MPI calls only. The ledger's seconds are those
    spent in starting, poking and waiting; the rest of the verb's time was hidden behind computation. Without a request it is
    complete.
    """

    def __init__(
        self,
        result: np.ndarray | None,
        request: Request | None = None,
        row: Row | None = None,
        begun: float = 0.0,
        axis: Watched | None = None,
        call: Call | None = None,
        held: Held | None = None,
    ) -> None:
        self._result, self._request, self._row = result, request, row
        self._axis, self._call, self._held = axis, call, held
        self._begun, self._inside, self._done = begun, perf_counter() - begun, request is None

    def poke(self) -> bool:
        """Let it go on. Returns whether it is complete; of a send, nothing is left to do then."""
        if not self._done:
            self._timed(self._request.Test)
        if self._done and self._result is None:
            self._release()
        return self._done

    def wait(self) -> np.ndarray | None:
        """The result, once it is there; None of a send."""
        if not self._done:
            if self._call is not None:
                for watcher in self._axis.watchers:
                    watcher.wait(self._axis, self._call)
            self._timed(lambda: self._request.Wait() or True)
        self._release()
        return self._result

    def _timed(self, complete: Callable[[], bool]) -> None:
        entered = perf_counter()
        self._done = complete()
        left = perf_counter()
        self._inside += left - entered
        if self._done:
            self._row.seconds += self._inside
            self._row.crossed_bytes += getattr(self._request, "crossed", 0)
            self._row.hidden_seconds += left - self._begun - self._inside
            if self._call is not None:
                for watcher in self._axis.watchers:
                    watcher.end(self._axis, self._call, self._result, self._begun, left)

    def _release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.release(f"{self._call} at {self._call.site}")
