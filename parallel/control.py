"""Control messages: small Python objects between ranks, pickled. Arrays never travel here."""

from __future__ import annotations

from time import sleep

from mpi4py import MPI


class Control:
    """Objects between all ranks of a communicator, on a duplicate of it, so that they never pair with arrays."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm.Dup()
        self.rank, self.size = comm.rank, comm.size

    def everyone(self, mine: object) -> list:
        """What every rank passed, by rank, on every rank."""
        return self._comm.allgather(mine)

    def from_first(self, mine: object) -> object:
        """What rank 0 passed, on every rank."""
        return self._comm.bcast(mine)

    def wait(self) -> None:
        """Until all ranks are here, asleep: a rank that waits in MPI burns the core that another may need."""
        request = self._comm.Ibarrier()
        while not request.Test():
            sleep(0.001)

    def close(self) -> None:
        self._comm.Free()
