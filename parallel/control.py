"""Control messages: small Python objects between ranks, pickled. Arrays never travel here."""

from __future__ import annotations

from time import perf_counter, sleep

from mpi4py import MPI

from parallel.recorder import Recorder, Waiting


class Control:
    """Objects between all ranks of a communicator, on a duplicate of it, so that they never pair with arrays."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._recorder, self._places = Recorder.of(comm), Recorder.places(comm)
        self.rank, self.size = comm.rank, comm.size
        with self._waiting("Control"):
            self._comm = comm.Dup()

    def _waiting(self, what: str, patient: bool = False) -> Waiting:
        return Waiting(self._recorder, what, self._places, patient)

    def everyone(self, mine: object) -> list:
        """What every rank passed, by rank, on every rank."""
        with self._waiting("control.everyone"):
            return self._comm.allgather(mine)

    def from_first(self, mine: object) -> object:
        """What rank 0 passed, on every rank."""
        with self._waiting("control.from_first"):
            return self._comm.bcast(mine)

    def to_first(self, mine: object) -> list | None:
        """What every rank passed, by rank, on rank 0; None on the others."""
        with self._waiting("control.to_first"):
            return self._comm.gather(mine)

    def wait(self, patient: bool = False, eager: float = 0.0) -> None:
        """Until all ranks are here, asleep: a rank that waits in MPI burns the core that another may need.

        `patient`: one works, or waits for requests, for as long as it likes. `eager`: seconds in which to look again at once,
        where the others are likely to come soon.
        """
        with self._waiting("control.wait", patient):
            request, begun = self._comm.Ibarrier(), perf_counter()
            while not request.Test():
                sleep(0 if perf_counter() - begun < eager else 0.001)

    def close(self) -> None:
        self._comm.Free()
