"""--machine here: these ranks as the machine that is planned for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from math import prod

from mpi4py import MPI

from launch import start
from launch.options import UsageError
from launch.planning import question
from launch.process.memory import available, ranks_here
from launch.terminal import targets
from models.config import Config
from parallel.control import Control
from parallel.shard import AXES
from plan.calibrate import Needs, calibrated, needs
from plan.here import Here, written
from plan.here import here as made
from plan.ours import AS_USUAL, How, Ours
from plan.search import Space
from plan.step import Planner
from plan.strategy import Strategy

NAME = "here"
DTYPE = "float32"
# Of a search so many layouts' operations are measured; those of the others are scaled.
MEASURED = 8


def usual(values: Mapping[str, object]) -> dict[str, object]:
    """With what launch.train does where nothing else is given: ranks of tp each send what they have, and nobody waits."""
    return {"scatter_gather": False, "p2p": "delay", "dtype": DTYPE, **values}


def memory_gib(ranks: int) -> float:
    """Of one rank: what this host still gives, shared by those that are on it."""
    free = available()
    return 2.0**20 if free is None else free / ranks_here(ranks) / 2**30


def require(args: argparse.Namespace, values: Mapping[str, object], ranks: int) -> None:
    """Raises UsageError where more ranks are asked about than there are to measure."""
    asked = args.group if args.collective else args.ranks or prod(values.get(name) or 1 for name in AXES)
    if asked > ranks:
        there = f"{ranks} rank{'s' * (ranks > 1)}"
        raise UsageError(
            f"--machine here measures the ranks that run this, {there}, and {asked} are asked about: use mpirun -n {asked}, or "
            "--machine with a GPU's name"
        )


def unmeasured(values: Mapping[str, object], ranks: int) -> Here:
    """Such a machine before anything was measured: what is wrong with a question shows on it."""
    gib = values.get("memory_gib") or memory_gib(ranks)
    return made(ranks, gib, DTYPE, rate=1e11, bandwidth=1e10, call=1e-6)


def strategy(values: Mapping[str, object], config: Config) -> Strategy:
    return question.strategy_of(usual(values), config, unmeasured(values, 1))


def needs_of(values: Mapping[str, object], ranks: int) -> Needs:
    """What the layout that is asked for needs, or some of those that are searched."""
    _, config = question.config_of(values)
    if any(values.get(name) for name in AXES):
        return needs(Ours(), [strategy(values, config)])
    options = question.options_of(usual(values), config, unmeasured(values, ranks))
    options = {name: value for name, value in options.items() if name not in ("schedule", "chunks", "recompute", "zero")}
    every = [s for s in Space(ranks, options, {"recompute": ("none",), "zero": (0,), "schedule": ("1f1b",)}).layouts()
             if isinstance(s, Strategy)]  # fmt: skip
    return needs(Ours(), every[:: max(1, len(every) // MEASURED)])


def measured(args: argparse.Namespace, values: Mapping[str, object], comm: MPI.Intracomm) -> tuple[Here, str | None]:
    """The machine, and why it could not be written, if it should. All ranks call it together."""
    control = Control(comm)
    if args.collective:
        wanted = Needs({}, {(args.collective, min(args.group, comm.size)): max(args.bytes)})
    else:
        wanted = needs_of(values, args.ranks or comm.size)
    machine = _measured(args, control, comm, wanted, values.get("memory_gib") or memory_gib(comm.size))
    why = None
    if args.write_machine is not None and comm.rank == 0:
        why = targets.write(args.write_machine, lambda file: file.write(written(machine).encode()))
    return machine, why


def _measured(args: argparse.Namespace, control: Control, comm: MPI.Intracomm, wanted: Needs, gib: float) -> Here:
    axes = lambda sizes: dict.fromkeys(AXES, 1) | sizes  # noqa: E731
    return calibrated(lambda **sizes: start.make_mesh(args, comm, **axes(sizes)), control, wanted, gib, DTYPE)


def seconds(args: argparse.Namespace, control: Control, comm: MPI.Intracomm, s: Strategy) -> float:
    """Of a step of this layout by what these ranks reach now. All of them call it together."""
    return estimates(args, control, comm, [s])[0]


def estimates(
    args: argparse.Namespace, control: Control, comm: MPI.Intracomm, every: Sequence[Strategy], how: How = AS_USUAL
) -> list[float]:
    """Of each layout, from one calibration by some of them; the same on all ranks."""
    account = Ours(how)
    some = every[:: max(1, len(every) // MEASURED)]
    machine = _measured(args, control, comm, needs(account, some), memory_gib(comm.size))
    planner = Planner(account, machine)
    return control.from_first([planner.estimate(s).iteration for s in every] if comm.rank == 0 else None)
