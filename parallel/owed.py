"""Sums that gradients are owed: once a step, after the last backward.

    owed = Owed(mesh, parameters)
    owed.sum()

A gradient is owed a sum over an axis where what the parameter was multiplied with differs from rank to rank although they hold
the same of it: the weights of a norm that is shared by heads, key/value heads that the query heads of several ranks read, a
table that the first and the last stage of a pipeline use.
The layer says so in `Parameter.owed`. Data axes are not named there: `GradientSums` sums over them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from parallel.axis import Axis
from parallel.ledger import Traffic
from parallel.mesh import Mesh
from parallel.parameter import Fused, Parameter


class Owed:
    """Each entry is summed over exactly the ranks of the axis that hold it: over the whole axis, or over a group of it where
    the cut overlaps. What is summed over the same ranks travels as one message."""

    def __init__(self, mesh: Mesh, parameters: Iterable[Parameter]) -> None:
        found: dict[tuple[str, tuple[int, ...]], list[tuple[Parameter, tuple[slice, ...]]]] = {}
        for p in parameters:
            for name in p.owed:
                axis: Axis = getattr(mesh, name)
                for ranks, at in _shared(p, axis):
                    found.setdefault((name, ranks), []).append((p, at))
        self._sums: list[tuple[Axis, list[tuple[Parameter, tuple[slice, ...]]]]] = []
        # In ascending order, as a rank of several groups makes them.
        for (name, ranks), parts in sorted(found.items(), key=lambda item: item[0]):
            axis = getattr(mesh, name)
            self._sums.append((axis if len(ranks) == axis.size else axis.group(ranks), parts))

    @property
    def homes(self) -> list[Parameter | Fused]:
        """What owns the memory of gradients that are summed here."""
        return list(dict.fromkeys(p.home for _, parts in self._sums for p, _ in parts))

    def sum(self) -> None:
        """Add up what the ranks hold of each gradient, on all of them. A parameter without a gradient counts as zero."""
        for axis, parts in self._sums:
            held = [_gradient(p)[at] for p, at in parts]
            whole = axis.all_reduce(np.concatenate([h.reshape(-1) for h in held]))
            for h, total in zip(held, np.split(whole, np.cumsum([h.size for h in held])[:-1]), strict=True):
                h[...] = total.reshape(h.shape)

    def traffic(self) -> list[Traffic]:
        """What one call of `sum` sends, on this rank."""
        size = lambda p, at: p.data[at].nbytes  # noqa: E731
        return [Traffic("all_reduce", axis.name, "backward", sum(size(*part) for part in parts)) for axis, parts in self._sums]


def _shared(p: Parameter, axis: Axis) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """What of this rank's part other ranks of the axis hold too: (the ranks that do, where it is in the part)."""
    if axis.name not in p.layout.cuts:
        return [(p.layout.held.get(axis.name, tuple(range(axis.size))), (slice(None),))]
    dim, cut = p.layout.cuts[axis.name]
    start = cut.bounds[axis.rank][0]
    return [
        (tuple(ranks), (slice(None),) * dim + (slice(indices.start - start, indices.stop - start),))
        for indices, ranks in cut.shared()
        if axis.rank in ranks
    ]


def _gradient(p: Parameter) -> np.ndarray:
    if p.grad is None:
        p.add_grad(np.zeros_like(p.data))
    return p.grad
