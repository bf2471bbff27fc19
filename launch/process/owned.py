"""A communicator that knows what was made of it, so that a command leaves none behind in the ranks that it ran in."""

from __future__ import annotations

from mpi4py import MPI


class Owned(MPI.Intracomm):
    """The ranks of `comm`. `close` frees all that was duplicated or cut from it, and from those, and was not freed before."""

    made: list[MPI.Intracomm]

    @classmethod
    def of(cls, comm: MPI.Intracomm) -> Owned:
        """A duplicate of `comm`. All ranks call it together."""
        own = cls(comm.Dup())
        own.made = [own]
        return own

    def _kept(self, comm: MPI.Intracomm) -> Owned:
        own = type(self)(comm)
        own.made = self.made
        self.made.append(own)
        return own

    def Dup(self, info: MPI.Info | None = None) -> Owned:
        return self._kept(MPI.Intracomm(self).Dup(info))

    def Split(self, color: int = 0, key: int = 0) -> Owned:
        return self._kept(super().Split(color, key))

    def Create_group(self, group: MPI.Group, tag: int = 0) -> Owned:
        return self._kept(super().Create_group(group, tag))

    def close(self) -> None:
        """All ranks call it together, and have made what they share in the same order."""
        for comm in reversed(self.made):
            if comm != MPI.COMM_NULL:
                comm.Free()
