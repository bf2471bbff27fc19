"""What ranks need not do alike: work that one does for all, and comparisons that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mpi4py import MPI

from parallel.control import Control
from reference.compare import Comparison


def on_first(comm: MPI.Intracomm, work: Callable[[], object]) -> object:
    """What `work` returns, on every rank: rank 0 does it, and the others sleep, so that it takes one core and no more."""
    done = work() if comm.rank == 0 else None
    control = Control(comm)
    control.wait(patient=True)
    control.close()
    return comm.bcast(done)


def shared(comm: MPI.Intracomm, checks: Callable[[tuple[int, int]], Iterable[Comparison]]) -> dict[str, Comparison]:
    """Comparisons by tensor, on every rank, of which each makes its share: `checks` is called with (rank, ranks)."""
    mine = {c.tensor: c for c in checks((comm.rank, comm.size))}
    return {name: c for part in comm.allgather(mine) for name, c in part.items()}
