"""Sums in rank order, ((x0 + x1) + x2) + ..., whatever algorithm the MPI library would choose: the same bits on every MPI.

    mesh = Mesh(comm, axis=OrderedAxis, dp=2, tp=2)

Each rank has a part of the array to add. It gets that part from every rank, adds in rank order, and gives the sum back: an
all-to-all, an addition, an all-gather. A ring's all-reduce sends as many bytes. Maxima and minima do not depend on the order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from parallel.axis import Axis


class OrderedAxis(Axis):
    """An axis whose sums are in rank order. The ledger counts its verbs as any axis does."""

    def _reduced(self, x: np.ndarray, y: np.ndarray, op: MPI.Op) -> None:
        if op != MPI.SUM:
            return super()._reduced(x, y, op)
        counts = self._counts(x)
        pieces = self._room(x, counts)
        self._comm.Alltoallv([x, counts], [pieces, [counts[self.rank]] * self.size])
        self._comm.Allgatherv(_added(pieces), [y, counts])

    def _start_sum(self, x: np.ndarray) -> OrderedRequest:
        counts = self._counts(x)
        pieces = self._room(x, counts)
        request = self._comm.Ialltoallv([x, counts], [pieces, [counts[self.rank]] * self.size])
        return OrderedRequest(request, lambda: self._comm.Allgatherv(_added(pieces), [x, counts]))

    def _sum_parts(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> None:
        pieces = self._room(x, counts)
        self._comm.Alltoallv([x, counts], [pieces, [counts[self.rank]] * self.size])
        y.reshape(-1)[...] = _added(pieces)

    def _start_sum_parts(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> OrderedRequest:
        pieces = self._room(x, counts)
        request = self._comm.Ialltoallv([x, counts], [pieces, [counts[self.rank]] * self.size])

        def add() -> None:
            y.reshape(-1)[...] = _added(pieces)

        return OrderedRequest(request, add)

    def _counts(self, x: np.ndarray) -> list[int]:
        """How many entries of x each rank adds: as even as it goes, none where there are fewer entries than ranks."""
        base, more = divmod(x.size, self.size)
        return [base + (r < more) for r in range(self.size)]

    def _room(self, x: np.ndarray, counts: list[int]) -> np.ndarray:
        """Room for what every rank holds of this rank's part."""
        return np.empty((self.size, counts[self.rank]), x.dtype)


def _added(pieces: np.ndarray) -> np.ndarray:
    """The sum over ranks of (ranks, entries), in rank order, in the memory of the first."""
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    return total


class OrderedRequest:
    """Stands for an MPI request: the exchange goes on beside computation, and Wait does the rest.

    Test never does it: ranks test whenever they like, but must enter the second exchange in one order.
    """

    def __init__(self, exchange: MPI.Request, rest: Callable[[], object]) -> None:
        self._exchange, self._rest = exchange, rest

    def Test(self) -> bool:
        self._exchange.Test()
        return False

    def Wait(self) -> None:
        self._exchange.Wait()
        self._rest()
