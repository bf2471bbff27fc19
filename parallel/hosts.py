"""Who shares a host with whom."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache, cached_property

from mpi4py import MPI


def numbered(hosts: Sequence[Hashable]) -> tuple[int, ...]:
    """The host of each rank, whatever it is called, as a number: from 0, in the order of their first ranks."""
    order = {host: n for n, host in enumerate(dict.fromkeys(hosts))}
    return tuple(order[host] for host in hosts)


@cache
def _attribute() -> int:
    return MPI.Comm.Create_keyval(copy_fn=lambda comm, key, hosts: hosts)


def of(comm: MPI.Intracomm) -> tuple[int, ...]:
    """The host of each rank of `comm`: those that can share memory. All ranks call it together; the first call finds out, and
    what is duplicated of `comm` knows."""
    known = comm.Get_attr(_attribute())
    if known is None:
        host = MPI.Intracomm(comm).Split_type(MPI.COMM_TYPE_SHARED)
        known = numbered(comm.allgather(host.bcast(comm.rank)))
        host.Free()
        comm.Set_attr(_attribute(), known)
    return known


class Hosts:
    """The ranks of an axis by host. `of`: of each rank its host, as `numbered` has them. `rank`: this one.

    A rank's *number* is its place among those of its host. Ranks whose number every host has are *leaders*: those of one number
    speak for their hosts, each for one part of what is sent. `most`: ranks of one host.
    """

    def __init__(self, of: Sequence[int], rank: int) -> None:
        self.of, self.rank, self.host = tuple(of), rank, of[rank]
        self.count = max(of) + 1
        # The ranks of each host, ascending.
        self.ranks = [[r for r, at in enumerate(of) if at == host] for host in range(self.count)]
        self.number = self.ranks[self.host].index(rank)
        self.leaders, self.most = min(map(len, self.ranks)), max(map(len, self.ranks))

    @property
    def here(self) -> list[int]:
        """The ranks of this host."""
        return self.ranks[self.host]

    @property
    def leads(self) -> bool:
        return self.number < self.leaders

    @property
    def shares(self) -> bool:
        """Whether any two ranks share a host."""
        return self.count < len(self.of)

    @cached_property
    def led(self) -> list[list[list[int]]]:
        """By leader and host: the ranks there that the leader of this number speaks for, itself first."""
        return [[ranks[j :: self.leaders] for ranks in self.ranks] for j in range(self.leaders)]
