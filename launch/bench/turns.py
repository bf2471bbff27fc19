"""What is compared takes turns, so that a busy machine slows all of it alike."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

from mpi4py import MPI

from launch import report
from launch.terminal import progress
from parallel.control import Control


def in_turn(steps: dict[str, Callable[[], object]], rounds: int, comm: MPI.Intracomm) -> dict[str, list[float]]:
    """Seconds of each step by round, the slowest rank's; one round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in progress.items("round", comm.rank == 0)(range(rounds + 1)):
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


def summary(turns: dict[str, list[float]], limits: dict[str, str]) -> dict:
    """Medians, spread, and the ratio to what each is compared with, for JSON."""
    to = {name: ratio(s, turns[limits[name]]) for name, s in turns.items()}
    spread = {name: {"fastest": min(s), "slowest": max(s), "to_products": to[name]} for name, s in turns.items()}
    return {"seconds": {name: median(s) for name, s in turns.items()}, "spread": spread}


def show(title: str, labels: dict[str, str], result: dict, compared: str = "to products") -> None:
    """A summary, for people, and how we compare with the peer."""
    c, spread = result["config"], result["spread"]
    report.table(
        f"{title} of {c['threads']} BLAS thread(s), {c['rounds']} rounds in turn",
        ("", "median ms", "fastest", "slowest", compared),
        [
            (labels[name], *(f"{1e3 * t:.1f}" for t in (s, of["fastest"], of["slowest"])), f"{of['to_products']:.3f}")
            for (name, s), of in zip(result["seconds"].items(), spread.values(), strict=True)
        ],
    )
    for name, r in result["ratios"].items():
        if name.startswith("torch"):
            report.say(f"rankwise is {r:.2f} times as fast as {labels[name.removesuffix('_to_sharded')]}")
