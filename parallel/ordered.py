"""Sums in rank order, ((x0 + x1) + x2) + ..., whatever algorithm the MPI library would choose: the same bits on every MPI.

    mesh = Mesh(comm, sums=in_rank_order, dp=2, tp=2)

Each rank has a part of the array to add. It gets that part from every rank, adds in rank order, and gives the sum back: an
all-to-all, an addition, an all-gather. A ring's all-reduce sends as many bytes. Maxima and minima do not depend on the order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from mpi4py import MPI

from parallel.shard import as_even_as_it_goes
from parallel.sums import Sums


class OrderedSums(Sums):
    """Sums in rank order. The ledger counts its verbs as any others."""

    def all_reduce(self, x: np.ndarray, y: np.ndarray, op: str, mpi_op: MPI.Op) -> int:
        if op != "sum":
            return super().all_reduce(x, y, op, mpi_op)
        counts = dealt(x.size, self.comm.size)
        pieces = self._room(x, counts)
        self.comm.Alltoallv([x, counts], [pieces, [counts[self.comm.rank]] * self.comm.size])
        self.comm.Allgatherv(added(pieces), [y, counts])
        return 0

    def start_all_reduce(self, x: np.ndarray) -> OrderedRequest:
        counts = dealt(x.size, self.comm.size)
        pieces = self._room(x, counts)
        request = self.comm.Ialltoallv([x, counts], [pieces, [counts[self.comm.rank]] * self.comm.size])
        return OrderedRequest(request, lambda: self.comm.Allgatherv(added(pieces), [x, counts]))

    def reduce_scatter(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> int:
        pieces = self._room(x, counts)
        self.comm.Alltoallv([x, counts], [pieces, [counts[self.comm.rank]] * self.comm.size])
        y.reshape(-1)[...] = added(pieces)
        return 0

    def start_reduce_scatter(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> OrderedRequest:
        pieces = self._room(x, counts)
        request = self.comm.Ialltoallv([x, counts], [pieces, [counts[self.comm.rank]] * self.comm.size])

        def add() -> None:
            y.reshape(-1)[...] = added(pieces)

        return OrderedRequest(request, add)

    def _room(self, x: np.ndarray, counts: list[int]) -> np.ndarray:
        """Room for what every rank holds of this rank's part."""
        return np.empty((self.comm.size, counts[self.comm.rank]), x.dtype)


def in_rank_order(comm: MPI.Intracomm, hosts: Sequence[int]) -> OrderedSums:
    return OrderedSums(comm)


def dealt(entries: int, ranks: int) -> list[int]:
    """How many of the entries each rank adds: as even as it goes, none where there are fewer entries than ranks."""
    return list(as_even_as_it_goes(entries, ranks).sizes)


def added(pieces: np.ndarray, add: np.ufunc = np.add) -> np.ndarray:
    """The sum over ranks of (ranks, entries), in rank order, in the memory of the first."""
    total = pieces[0]
    for piece in pieces[1:]:
        add(total, piece, out=total)
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
