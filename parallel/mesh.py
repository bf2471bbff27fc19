"""A mesh of ranks: one axis a name.

mesh = Mesh(comm, dp=2, tp=2)      # 4 ranks; the last axis varies fastest: ranks 0 and 1 are one tp group
y_TD = mesh.tp.all_reduce(partial_TD)
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cached_property
from math import prod

import numpy as np
from mpi4py import MPI

from parallel.axis import Axis
from parallel.call import Watcher
from parallel.control import Control
from parallel.guard import Agreement, require_same_layout
from parallel.ledger import Ledger
from parallel.recorder import Recorder, Waiting
from parallel.shard import AXES, Place


class Mesh:
    """The ranks of `comm` as a grid of named axes; `mesh.tp` is the Axis of this rank along tp. An axis of AXES that is not
    given has one rank.

    `watchers` hear of every verb on any of its axes, in this order. Before them come the flight recorder, where the process has
    attached one to `comm`, and with `check` an `Agreement`, which raises CollectiveMismatch on all ranks of an axis unless they
    mean the same collective. `axis`: the class of the axes. Raises ValueError when the product of the axes is not the number of
    ranks.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        *,
        check: bool = False,
        watchers: Iterable[Watcher] = (),
        axis: type[Axis] = Axis,
        **axes: int,
    ) -> None:
        if not axes or min(axes.values()) < 1 or prod(axes.values()) != comm.size:
            named = " x ".join(f"{name}={n}" for name, n in axes.items()) or "no axes"
            raise ValueError(f"cannot lay {comm.size} ranks out as {named}: the product must be {comm.size}")
        self.sizes = dict(axes)
        self.ledger = Ledger()
        recorder = Recorder.of(comm)
        self.watchers = [*([] if recorder is None else [recorder]), *([Agreement()] if check else []), *watchers]
        with Waiting(recorder, f"laying out {self.sizes}", Recorder.places(comm)):
            require_same_layout(comm, self.sizes)
        grid = np.arange(comm.size).reshape(tuple(axes.values()))
        self.place = self.place_of(comm.rank)
        place = tuple(self.place[name] for name in axes)
        self._comm, self._axis, self._joined = comm, axis, {}
        self._axes = {}
        for i, name in enumerate(axes):
            line = grid[tuple(slice(None) if j == i else p for j, p in enumerate(place))]
            own = comm.Split(int(line[0]), place[i])
            self._axes[name] = axis(name, own, self.ledger, self.watchers, tuple(line.tolist()))

    def __getattr__(self, name: str) -> Axis:
        axes = self.__dict__.get("_axes", {})
        if name not in axes and name in AXES:
            # One rank along it, this one.
            axes[name] = self._axis(name, MPI.COMM_SELF.Dup(), self.ledger, self.watchers, (self._comm.rank,))
        try:
            return axes[name]
        except KeyError:
            raise AttributeError(f"this mesh has no axis {name!r}, only {', '.join(self.sizes)}") from None

    def over(self, *names: str) -> Axis:
        """These axes joined to one: all ranks that differ from this one in no other coordinate, in the order of the mesh.

        All ranks of the mesh call it together; the first call makes it. In the ledger it is called like `dp*tp`: an axis of one
        rank adds nothing, and is not named. Of no axes it is this rank alone.
        """
        if not names:
            if () not in self._joined:
                self._joined[()] = self._axis("alone", MPI.COMM_SELF.Dup(), self.ledger, self.watchers, (self._comm.rank,))
            return self._joined[()]
        known = [name for name in self.sizes if name in names]
        several = tuple(name for name in known if self.sizes[name] > 1)
        if len(several) < 2:
            return getattr(self, (*several, *known, *names)[0])
        names = several
        if names not in self._joined:
            fixed = {name: at for name, at in self.place.items() if name not in names}
            places = map(self.place_of, range(self._comm.size))
            members = tuple(r for r, place in enumerate(places) if fixed.items() <= place.items())
            own = self._comm.Split(members[0], self._comm.rank)
            self._joined[names] = self._axis("*".join(names), own, self.ledger, self.watchers, members)
        return self._joined[names]

    def place_of(self, rank: int) -> dict[str, int]:
        """Where a rank of the mesh stands, on every axis; on one that is not given, at 0."""
        return dict.fromkeys(AXES, 0) | {
            name: int(at) for name, at in zip(self.sizes, np.unravel_index(rank, tuple(self.sizes.values())), strict=True)
        }

    def rank_at(self, place: Place) -> int:
        """The lowest rank of the mesh at this place; of an axis that is not named, the first."""
        return int(np.ravel_multi_index([place.get(name, 0) for name in self.sizes], tuple(self.sizes.values())))

    @cached_property
    def control(self) -> Control:
        """For control messages between all ranks of the mesh. All of them ask for it together."""
        return Control(self._comm)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Enter all that is sent inside under this phase: forward, backward, step, decode."""
        return self.ledger.phase(name)

    def close(self) -> None:
        """Free the communicators, if that is not done yet. All ranks call it together."""
        axes = [*self._axes.values(), *self._joined.values()]
        self._axes, self._joined = {}, {}
        for axis in axes:
            axis.close()
        if (control := self.__dict__.pop("control", None)) is not None:
            control.close()

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # After an exception the other ranks may not come, and freeing is a collective: it is left to the end of the process.
        if kind is None:
            self.close()
