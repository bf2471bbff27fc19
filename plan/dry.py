"""Meshes without MPI and weights without memory: a model that is built on them knows its sizes, and is never run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from parallel.axis import group_name
from parallel.grid import Grid
from parallel.parameter import Weights


class DryAxis:
    """The place of one rank on an axis: what of `parallel.axis.Axis` a layer asks before it runs. It has no verbs.

    `members`: the axis' ranks as the mesh numbers them, 0, 1, ... unless given.
    """

    def __init__(self, name: str, size: int, rank: int = 0, members: tuple[int, ...] | None = None) -> None:
        self.name, self.size, self.rank = name, size, rank
        self.members = tuple(range(size)) if members is None else members

    @property
    def place(self) -> dict[str, int]:
        return {self.name: self.rank}

    def group(self, ranks: Sequence[int]) -> DryAxis:
        """The axis of some ranks of this one. Raises ValueError where this rank is none of them."""
        members = tuple(self.members[r] for r in ranks)
        return DryAxis(group_name(self.name, ranks), len(ranks), ranks.index(self.rank), members)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name}: nothing can be sent along {self.name}, a dry axis")


class DryMesh(Grid[DryAxis]):
    """The place of one rank in a mesh of any size: what of `parallel.mesh.Mesh` is asked before something runs.

    DryMesh({"pp": 16, "dp": 128, "tp": 8}, rank)
    """

    def _axis(self, name: str, members: tuple[int, ...]) -> DryAxis:
        return DryAxis(name, len(members), members.index(self.rank), members)


def dry_weights(dtype: np.dtype | str) -> Weights:
    """Zeros of every shape, in the memory of one."""
    return Weights(lambda name, shape: np.broadcast_to(np.zeros((), dtype), shape), lambda *asked: None)
