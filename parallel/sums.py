"""How the ranks of an axis add and gather: here, as the MPI library chooses. Others do it in another order, or another way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from mpi4py import MPI


class Request(Protocol):
    """What goes on beside computation, as MPI's own requests do."""

    def Test(self) -> bool: ...

    def Wait(self) -> object: ...


class Sums:
    """Of the ranks of `comm`, which call every method together, those that start something in one order.

    x, y: C-contiguous. `counts`: entries of each rank's part, one part after another. What is not started returns how many
    bytes this rank is known to have sent to other hosts; of what is started the request may say it, as `crossed`.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm

    def all_reduce(self, x: np.ndarray, y: np.ndarray, op: str, mpi_op: MPI.Op) -> int:
        self.comm.Allreduce(x, y, mpi_op)
        return 0

    def start_all_reduce(self, x: np.ndarray) -> Request:
        """In place."""
        return self.comm.Iallreduce(MPI.IN_PLACE, x, MPI.SUM)

    def reduce_scatter(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> int:
        self.comm.Reduce_scatter(x, y, counts, MPI.SUM)
        return 0

    def start_reduce_scatter(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> Request:
        return self.comm.Ireduce_scatter(x, y, counts, MPI.SUM)

    def all_gather(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> int:
        self.comm.Allgatherv(x, [y, counts])
        return 0

    def start_all_gather(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> Request:
        return self.comm.Iallgatherv(x, [y, counts])

    def close(self) -> None:
        """All ranks call it together. The communicator is the axis' own."""


class BySize(Sums):
    """Messages of `least` bytes or more as `large` does it, others as `small` does, on one communicator."""

    def __init__(self, small: Sums, large: Sums, least: int) -> None:
        super().__init__(small.comm)
        self.small, self.large, self._least = small, large, least

    def _of(self, message: np.ndarray) -> Sums:
        return self.small if message.nbytes < self._least else self.large

    def all_reduce(self, x: np.ndarray, y: np.ndarray, op: str, mpi_op: MPI.Op) -> int:
        return self._of(x).all_reduce(x, y, op, mpi_op)

    def start_all_reduce(self, x: np.ndarray) -> Request:
        return self._of(x).start_all_reduce(x)

    def reduce_scatter(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> int:
        return self._of(x).reduce_scatter(x, y, counts)

    def start_reduce_scatter(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> Request:
        return self._of(x).start_reduce_scatter(x, y, counts)

    def all_gather(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> int:
        return self._of(y).all_gather(x, y, counts)

    def start_all_gather(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> Request:
        return self._of(y).start_all_gather(x, y, counts)

    def close(self) -> None:
        self.large.close()
        self.small.close()


# Makes the sums of an axis, of its communicator and of the host of each of its ranks, as `parallel.hosts` numbers them.
Maker = Callable[[MPI.Intracomm, Sequence[int]], Sums]


def of_mpi(comm: MPI.Intracomm, hosts: Sequence[int]) -> Sums:
    """As the MPI library adds, whoever shares a host."""
    return Sums(comm)
