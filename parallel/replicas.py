"""What must be the same on several ranks, compared by its hash.

    replicas = Replicas(mesh, control, every=20)
    replicas.check(step, lambda: [*copies(p.name, p.layout, mesh.place, p.data), Copy("random state", state)])

Ranks that hold the same weights and add the same gradients to them stay the same to the bit. Where a bit has flipped in a
rank's memory, or a sum was left out, the rank goes on to train another model. Nothing else would say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from parallel.control import Control
from parallel.mesh import Mesh
from parallel.shard import Layout, Place
from parallel.text import named


class Diverged(RuntimeError):
    """Ranks hold different values of what must be the same. Raised on all ranks, with the same text."""


class Copy(NamedTuple):
    """A value that must be the same along every axis of the mesh, except those that it is cut along: an array by its bits,
    anything else by its repr."""

    name: str
    value: object
    cut_along: tuple[str, ...] = ()


def copies(name: str, layout: Layout, place: Place, part: np.ndarray) -> Iterator[Copy]:
    """This rank's part of an array that is held as `layout` says, and what of it other ranks of a named axis hold too."""
    yield Copy(name, part, tuple(layout.cuts))
    for axis, (dim, cut) in layout.cuts.items():
        start, _ = cut.bounds[place[axis]]
        for indices, ranks in cut.shared():
            if place[axis] in ranks:
                here = (slice(None),) * dim + (slice(indices.start - start, indices.stop - start),)
                others = tuple(other for other in layout.cuts if other != axis)
                yield Copy(f"{name}[{':, ' * dim}{indices.start}:{indices.stop}]", part[here], others)


class Replicas:
    """Compares what is the same by intention, every `every` steps (0: never)."""

    def __init__(self, mesh: Mesh, control: Control, every: int) -> None:
        self.control, self.every = control, every
        self.sizes = mesh.sizes
        self._places: list[dict[str, int]] = control.everyone(mesh.place) if every else []

    def check(self, step: int, held: Callable[[], Iterable[Copy]]) -> None:
        """Compare what `held` returns, if it is this step's turn. All ranks call it together.

        Where anything differs, raises Diverged on every rank. It names the first difference and the ranks alone with it.
        """
        if not self.every or step % self.every:
            return
        mine = {(c.name, c.cut_along): _hash(c.value) for c in [Copy("the step number", step), *held()]}
        every = self.control.everyone(mine)
        keys = dict.fromkeys(key for hashes in every for key in hashes)
        differences = [d for key in keys for d in self._differences(key, every)]
        if differences:
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise Diverged(f"{differences[0]} at step {step}{more}")

    def _differences(self, key: tuple[str, tuple[str, ...]], every: list[dict]) -> Iterator[str]:
        """A sentence for each set of ranks that should hold the same of this key and do not."""
        name, cut_along = key
        along = [axis for axis, size in self.sizes.items() if size > 1 and axis not in cut_along]
        together: dict[tuple, list[int]] = {}
        for rank, hashes in enumerate(every):
            if key in hashes:
                together.setdefault(tuple(self._places[rank][axis] for axis in cut_along), []).append(rank)
        for ranks in together.values():
            by_hash: dict[bytes, list[int]] = {}
            for rank in ranks:
                by_hash.setdefault(every[rank][key], []).append(rank)
            if len(by_hash) > 1:
                # Nobody knows who is right: the most are taken to be, and where there are as many, the lowest.
                right, *wrong = sorted(by_hash.values(), key=len, reverse=True)
                yield self._sentence(name, along, sorted(r for group in wrong for r in group), right)

    def _sentence(self, name: str, along: list[str], wrong: list[int], right: list[int]) -> str:
        place = (lambda r: self._places[r][along[0]]) if len(along) == 1 else lambda r: r
        where = f" of {along[0]}" if len(along) == 1 else ""
        if where and len(self._places) > self.sizes[along[0]]:
            where += f" (rank {', '.join(map(str, wrong))} in all)"
        verb = "differs" if len(wrong) == 1 else "differ"
        return f"{named([*map(place, wrong)])}{where}: {name} {verb} from {named([*map(place, right)])}"


def _hash(value: object) -> bytes:
    if not isinstance(value, np.ndarray):
        return blake2b(repr(value).encode(), digest_size=16).digest()
    h = blake2b(f"{value.dtype.str}{value.shape}".encode(), digest_size=16)
    h.update(np.ascontiguousarray(value).data)
    return h.digest()
