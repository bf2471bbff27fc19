"""What is compared takes turns, so that a busy machine slows all of it alike."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

from mpi4py import MPI

from parallel.control import Control


def in_turn(steps: dict[str, Callable[[], object]], rounds: int, comm: MPI.Intracomm) -> dict[str, list[float]]:
    """Seconds of each step by round, the slowest rank's; one round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, run in steps.items():
            comm.Barrier()
            begun = perf_counter()
            run()
            seconds[name].append(perf_counter() - begun)
    control = Control(comm)
    every = control.everyone(seconds)
    control.close()
    return {name: [max(s) for s in zip(*(e[name][1:] for e in every), strict=True)] for name in steps}


def ratio(a: list[float], b: list[float]) -> float:
    """The median of a's turns over b's turns of the same round."""
    return median(x / y for x, y in zip(a, b, strict=True))
