"""One clock for all ranks: each rank's own, and how far it is from rank 0's.

A reading is by ping-pong (Cristian, 1989). A rank asks rank 0 for its time, and takes it that the answer was given half-way
between asking and hearing. The offset is wrong by half the round trip at most. Of many round trips the shortest counts. Two
readings, at the start and at the end, show how the clocks drift; between them the offset is interpolated.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

ROUNDS = 40


class Reading(NamedTuple):
    """Seconds. `at`: on this rank's clock. `offset`: this clock minus rank 0's, wrong by `uncertainty` at most."""

    at: float
    offset: float
    uncertainty: float


def read(comm: MPI.Intracomm, clock: Callable[[], float] = perf_counter) -> Reading:
    """This rank's clock beside rank 0's. All ranks call it together; rank 0 answers them one after another."""
    if comm.rank:
        return min((_asked(comm, clock) for _ in range(ROUNDS)), key=lambda r: r.uncertainty)
    message = np.empty(1)
    for rank in range(1, comm.size):
        for _ in range(ROUNDS):
            comm.Recv(message, rank)
            message[0] = clock()
            comm.Send(message, rank)
    return Reading(clock(), 0.0, 0.0)


def _asked(comm: MPI.Intracomm, clock: Callable[[], float]) -> Reading:
    message = np.zeros(1)
    asked = clock()
    comm.Send(message, 0)
    comm.Recv(message, 0)
    heard = clock()
    middle = (asked + heard) / 2
    return Reading(middle, middle - float(message[0]), (heard - asked) / 2)


class Clock(NamedTuple):
    """A rank's clock between two readings; with one reading alone it is taken not to drift."""

    start: Reading
    end: Reading | None = None

    def on_first(self, at: float) -> float:
        """A moment of this rank's clock, on rank 0's."""
        start, end = self
        if end is None or end.at <= start.at:
            return at - start.offset
        share = (at - start.at) / (end.at - start.at)
        return at - (start.offset + share * (end.offset - start.offset))

    @property
    def uncertainty(self) -> float:
        return max(r.uncertainty for r in self if r is not None)

    @property
    def drift(self) -> float:
        """Seconds a second by which this clock runs faster than rank 0's."""
        start, end = self
        return 0.0 if end is None or end.at <= start.at else (end.offset - start.offset) / (end.at - start.at)
