"""Ranks as a grid of named axes: who is where, and who is on an axis with whom. It knows nothing of how ranks talk."""

from __future__ import annotations

from math import prod
from typing import Generic, TypeVar

import numpy as np

from parallel.shard import AXES, Place

A = TypeVar("A")


class Grid(Generic[A]):
    """`sizes`: ranks along each axis, slowest first; an axis of AXES that is not given has one rank. `rank`: this one of them.

    grid.tp                  # the axis along tp
    grid.over("dp", "cp")    # these joined to one
    grid.place               # {"pp": 0, "dp": 1, ...}
    """

    def __init__(self, sizes: dict[str, int], rank: int) -> None:
        self.sizes, self.rank, self.size = sizes, rank, prod(sizes.values())
        self.place = self.place_of(rank)
        self._axes: dict[str, A] = {}
        self._joined: dict[tuple[str, ...], A] = {}

    def _axis(self, name: str, members: tuple[int, ...]) -> A:
        """An axis of these ranks of the grid, this one among them."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> A:
        axes = self.__dict__.get("_axes", {})
        if name not in axes and (name in AXES or name in self.__dict__.get("sizes", ())):
            axes[name] = self._axis(name, self.members(name))
        try:
            return axes[name]
        except KeyError:
            raise AttributeError(f"this mesh has no axis {name!r}, only {', '.join(self.sizes)}") from None

    def over(self, *names: str) -> A:
        """These axes joined to one: all ranks that differ from this one in no other coordinate, in the order of the mesh.

        All ranks of the mesh call it together; the first call makes it. In the ledger it is called like `dp*tp`: an axis of one
        rank adds nothing, and is not named. Of no axes it is this rank alone.
        """
        known = [name for name in self.sizes if name in names]
        several = tuple(name for name in known if self.sizes[name] > 1)
        if names and len(several) < 2:
            return getattr(self, (*several, *known, *names)[0])
        if several not in self._joined:
            self._joined[several] = self._axis("*".join(several) or "alone", self.members(*several))
        return self._joined[several]

    def members(self, *names: str) -> tuple[int, ...]:
        """The ranks of the grid that differ from this one on these axes alone, ascending."""
        line = tuple(slice(None) if name in names else self.place[name] for name in self.sizes)
        return tuple(np.arange(self.size).reshape(tuple(self.sizes.values()))[line].reshape(-1).tolist())

    def place_of(self, rank: int) -> dict[str, int]:
        """Where a rank of the mesh stands, on every axis; on one that is not given, at 0."""
        return dict.fromkeys(AXES, 0) | {
            name: int(at) for name, at in zip(self.sizes, np.unravel_index(rank, tuple(self.sizes.values())), strict=True)
        }

    def rank_at(self, place: Place) -> int:
        """The lowest rank of the mesh at this place; of an axis that is not named, the first."""
        return int(np.ravel_multi_index([place.get(name, 0) for name in self.sizes], tuple(self.sizes.values())))
