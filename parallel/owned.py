"""A communicator whose waits are seen, and that knows what was made of it, so that a command leaves none behind."""

from __future__ import annotations

from collections.abc import Callable

from mpi4py import MPI

from parallel.recorder import Recorder, Waiting


class Owned(MPI.Intracomm):
    """The ranks of `comm`. `close` frees all that was duplicated or cut from it, and from those, and was not freed before.

    What makes a communicator waits for all its ranks: the flight recorder hears of it, as of a verb.
    """

    made: list[MPI.Intracomm]
    # What is to be closed before.
    closing: list[Callable[[], None]]

    @classmethod
    def of(cls, comm: MPI.Intracomm) -> Owned:
        """A duplicate of `comm`. All ranks call it together."""
        with waiting(comm, "Dup"):
            own = cls(comm.Dup())
        own.made, own.closing = [own], []
        return own

    def _kept(self, comm: MPI.Intracomm) -> Owned:
        own = type(self)(comm)
        own.made, own.closing = self.made, self.closing
        self.made.append(own)
        return own

    def Dup(self, info: MPI.Info | None = None) -> Owned:
        with waiting(self, "Dup"):
            return self._kept(MPI.Intracomm(self).Dup(info))

    def Split(self, color: int = 0, key: int = 0) -> Owned:
        with waiting(self, "Split"):
            return self._kept(super().Split(color, key))

    def Create_group(self, group: MPI.Group, tag: int = 0) -> Owned:
        with waiting(self, "Create_group", group):
            return self._kept(super().Create_group(group, tag))

    def Barrier(self) -> None:
        with waiting(self, "Barrier"):
            super().Barrier()

    def close(self) -> None:
        """All ranks call it together, and have made what they share in the same order."""
        for close in reversed(self.closing):
            close()
        for comm in reversed(self.made):
            if comm != MPI.COMM_NULL:
                comm.Free()


def waiting(comm: MPI.Intracomm, what: str, group: MPI.Group | None = None) -> Waiting:
    """`with waiting(comm, what):` this rank waits for all others of `comm`, or of the group."""
    return Waiting(Recorder.of(comm), what, Recorder.places(comm, group))
