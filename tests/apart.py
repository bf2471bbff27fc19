"""What ranks need not do alike: work that one does for all, and comparisons that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from mpi4py import MPI

from parallel.control import Control
from reference import layer
from reference.compare import Comparison


def on_first(comm: MPI.Intracomm, work: Callable[[], object]) -> object:
    """What `work` returns, on every rank: rank 0 does it, and the others sleep, so that it takes one core and no more."""
    done = work() if comm.rank == 0 else None
    control = Control(comm)
    control.wait(patient=True)
    control.close()
    return comm.bcast(done)


def shared(comm: MPI.Intracomm, checks: Callable[[tuple[int, int]], Iterable[Comparison]]) -> dict[str, Comparison]:
    """Comparisons by tensor, on every rank, of which each makes its share: `checks` is called with (rank, ranks).

    So are their tolerances: variances add up, so that each rank derives those of its share of the programs.
    """
    alone = layer.bounds

    def summed(parts: list, *of: object) -> dict[str, np.ndarray]:
        every = comm.allgather(alone(parts[comm.rank :: comm.size], *of))
        return {name: np.sqrt(sum(mine[name] ** 2 for mine in every)) for name in every[0]}

    layer.bounds = summed
    try:
        mine = {c.tensor: c for c in checks((comm.rank, comm.size))}
    finally:
        layer.bounds = alone
    return {name: c for part in comm.allgather(mine) for name, c in part.items()}
