"""What becomes of messages: those that were sent and never received, and buffers that are changed while they are under way.

MPI says nothing of either. A small message that nobody receives is copied and forgotten; a buffer that is written to before
its verb is complete gives a sum that depends on the moment.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from parallel.call import Call, Watched, Watcher


class NeverReceived(RuntimeError):
    """A message was sent and not received until its axis was closed. Raised on all ranks of the axis."""


class Messages(Watcher):
    """Counts, on every axis, what each rank sends to each other and receives; compares that when the axis is closed. On a mesh
    that it watches, the buffers of what is started are held: `parallel.buffer.Held`."""

    holds_buffers = True

    def __init__(self) -> None:
        self._sent: dict[Watched, Counter[int]] = {}
        self._received: dict[Watched, Counter[int]] = {}
        self._last: dict[tuple[Watched, int], str] = {}

    def begin(self, axis: Watched, call: Call, x: np.ndarray | None) -> None:
        # One that was started and that nobody receives may never end.
        if call.verb == "send":
            self._sent.setdefault(axis, Counter())[call.peer] += 1
            self._last[axis, call.peer] = f"{call} at {call.site} in {call.function}"

    def end(self, axis: Watched, call: Call, y: np.ndarray | None, entered: float, left: float) -> None:
        if call.verb == "receive":
            self._received.setdefault(axis, Counter())[call.peer] += 1

    def close(self, axis: Watched) -> None:
        comm = axis.duplicate()
        sent, received = self._sent.pop(axis, Counter()), self._received.pop(axis, Counter())
        every = comm.allgather((sent, received, {to: self._last[axis, to] for to in sent}))
        comm.Free()
        for rank, (sent, _, last) in enumerate(every):
            for to, number in sorted(sent.items()):
                missing = number - every[to][1][rank]
                if missing:
                    raise NeverReceived(
                        f"on {axis.name}, {missing} of {number} messages from rank {rank} to rank {to} "
                        f"{'was' if missing == 1 else 'were'} never received: the last is {last[to]}"
                    )
