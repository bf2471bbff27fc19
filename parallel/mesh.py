"""A mesh of ranks: one axis a name.

mesh = Mesh(comm, dp=2, tp=2)      # 4 ranks; the last axis varies fastest: ranks 0 and 1 are one tp group
y_TD = mesh.tp.all_reduce(partial_TD)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from math import prod

from mpi4py import MPI

from parallel.axis import Axis
from parallel.call import Watcher
from parallel.control import Control
from parallel.grid import Grid
from parallel.guard import Agreement, require_same_layout
from parallel.hosts import of as host_of_each
from parallel.ledger import Ledger
from parallel.recorder import Recorder, Waiting
from parallel.sums import Maker, of_mpi


class Mesh(Grid[Axis]):
    """The ranks of `comm` as a grid of named axes; `mesh.tp` is the Axis of this rank along tp.

    `watchers` hear of every verb on any of its axes, in this order. Before them come the flight recorder, where the process
    has attached one to `comm`, and with `check` an `Agreement`, which raises CollectiveMismatch on all ranks of an axis unless
    they mean the same collective. `sums`: makes what adds and gathers on an axis. `hosts`: of each rank of `comm`, a number,
    in place of those that MPI tells. Raises ValueError when the product of the axes is not the number of ranks.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        *,
        check: bool = False,
        watchers: Iterable[Watcher] = (),
        sums: Maker = of_mpi,
        hosts: Sequence[int] | None = None,
        **axes: int,
    ) -> None:
        if not axes or min(axes.values()) < 1 or prod(axes.values()) != comm.size:
            named = " x ".join(f"{name}={n}" for name, n in axes.items()) or "no axes"
            raise ValueError(f"cannot lay {comm.size} ranks out as {named}: the product must be {comm.size}")
        super().__init__(axes, comm.rank)
        self.ledger = Ledger()
        recorder = Recorder.of(comm)
        self.watchers = [*([] if recorder is None else [recorder]), *([Agreement()] if check else []), *watchers]
        with Waiting(recorder, f"laying out {self.sizes}", Recorder.places(comm)):
            require_same_layout(comm, self.sizes)
            self.hosts = host_of_each(comm) if hosts is None else tuple(hosts)
        self._comm, self._sums, self._closed = comm, sums, False
        for name in axes:
            getattr(self, name)

    def _axis(self, name: str, members: tuple[int, ...]) -> Axis:
        # All ranks together make the axes that are given, and those of several ranks.
        together = name in self.sizes or len(members) > 1
        own = self._comm.Split(members[0], self.rank) if together else MPI.COMM_SELF.Dup()
        return Axis(name, own, self.ledger, self.watchers, members, self.hosts, self._sums)

    @cached_property
    def control(self) -> Control:
        """For control messages between all ranks of the mesh. All of them ask for it together."""
        return Control(self._comm)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Enter all that is sent inside under this phase: forward, backward, step, decode."""
        return self.ledger.phase(name)

    def close(self) -> None:
        """Free the communicators, if that is not done yet. All ranks call it together."""
        if self._closed:
            return
        self._closed = True
        for axis in (*self._axes.values(), *self._joined.values()):
            axis.close()
        if "control" in self.__dict__:
            self.control.close()

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # After an exception the other ranks may not come, and freeing is a collective: it is left to the end of the process.
        if kind is None:
            self.close()
