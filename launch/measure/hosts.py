"""What joins ranks, measured: messages inside a host and between hosts, and sums over each, by size and way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import numpy as np
from mpi4py import MPI

from parallel.axis import Axis
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.round_trip import half_round_trips
from plan.calibrate import SIZES
from plan.wired import Link

SMALL = SIZES[0]
# Calls of a small message and of a large one, which is above so many bytes; of sums as many, and of large ones no more when so
# many seconds are over.
CALLS, LARGE_CALLS, LARGE, SECONDS = 40, 5, 2**16, 1.0

Make = Callable[..., Mesh]


def link(comm: MPI.Intracomm, control: Control, make: Make, a: int, b: int, largest: int) -> Link:
    """Between ranks a < b. `make(comm, **axes)`: a mesh of the ranks of a communicator. All ranks call it together, and get
    the same."""
    ours = comm.rank in (a, b)
    part, found = comm.Split(0 if ours else MPI.UNDEFINED), None
    if ours:
        pair = Control(part)
        with make(part, tp=2) as mesh:
            sizes = (SMALL, CALLS), (largest, LARGE_CALLS)
            took = [half_round_trips(mesh.tp, pair, np.zeros(n // 8), calls) for n, calls in sizes]
        pair.close()
        part.Free()
        found = Link(median(took[0]), largest / median(took[1]))
    return control.everyone(found)[a]


def all_reduce(axis: Axis, control: Control, largest: int) -> dict[int, float]:
    """Seconds by bytes of a sum over an axis, all such axes at once: the median of some calls, on the rank that takes longest.
    All ranks of `control` call it together, and get the same."""
    found = {}
    for size in [n for n in SIZES if n <= largest]:
        x, took = np.ones(size // 4, np.float32), []
        control.wait()
        with axis.ledger.phase("compare"):
            axis.all_reduce(x)
            begun = perf_counter()
            for _ in range(LARGE_CALLS if size > LARGE else CALLS):
                at = perf_counter()
                axis.all_reduce(x)
                took.append(perf_counter() - at)
                if size > LARGE and control.from_first(perf_counter() - begun) > SECONDS:
                    break
        found[size] = max(control.everyone(median(took)))
    return found


def bus(ranks: int, size: int, seconds: float) -> float:
    """Bytes a second that one rank sends in a sum of such a message on a ring."""
    return 2 * (ranks - 1) / ranks * size / seconds


def neighbours(hosts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """A pair of hosts for each link between one and the next, by their numbers; each pair once."""
    many = len(hosts)
    return [(h, (h + 1) % many) for h in range(many if many > 2 else many - 1)]
