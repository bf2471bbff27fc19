"""launch.train --mesh auto: the mesh of these ranks that the planner thinks fastest, of those that fit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mpi4py import MPI

from launch import report
from launch.measure.equal import meshes, said
from launch.measure.training import Task
from launch.options import UsageError
from launch.planning import here
from launch.terminal.lines import size
from parallel.control import Control
from plan.ours import How
from plan.strategy import Strategy
from plan.training import Training


class Candidate(NamedTuple):
    """A mesh that the model and the options allow: what would be trained on it, the same in the planner's words, and the bytes
    of its fullest rank."""

    task: Task
    strategy: Strategy
    fullest: int

    @property
    def named(self) -> str:
        axes = {name: n for name, n in self.task.axes.items() if n > 1}
        return said(axes) if axes else "dp=1"


class Choice(NamedTuple):
    """Those that fit, of `possible` that there are."""

    candidates: Sequence[Candidate]
    possible: int

    def made(self, args: argparse.Namespace, comm: MPI.Intracomm) -> tuple[Task, dict]:
        """The fastest, and what is told of it in JSON. All ranks call it together, and get the same."""
        if len(self.candidates) == 1:
            only = self.candidates[0]
            self._say(args, comm, f"--mesh {only.named}: of {self.possible} possible the only one that fits")
            return only.task, _told(only, None, None)
        every = [candidate.strategy for candidate in self.candidates]
        how = How(args.context, args.layout, max(1, int(args.bucket_mib * 2**20)), args.zero_over, args.clip)
        seconds = here.estimates(args, Control(comm), comm, every, how)
        order = sorted(range(len(every)), key=lambda n: seconds[n])
        best, second = (self.candidates[n] for n in order[:2])
        fit = f", {len(every)} of them in --memory-mib {args.memory_mib:g}" if args.memory_mib is not None else ""
        took = [f"{1e3 * seconds[n]:,.1f} ms" for n in order[:2]]
        self._say(
            args,
            comm,
            f"--mesh {best.named}: of {self.possible} possible{fit} the fastest by the plan, {took[0]} a step and "
            f"{size(best.fullest)} a rank; next {second.named}, {took[1]}, {size(second.fullest)}",
        )
        return best.task, _told(best, seconds[order[0]], (second, seconds[order[1]]))

    @staticmethod
    def _say(args: argparse.Namespace, comm: MPI.Intracomm, line: str) -> None:
        if comm.rank == 0 and args.json:
            print(line, file=sys.stderr, flush=True)
        elif comm.rank == 0:
            report.say(line, "")


def _told(best: Candidate, seconds: float | None, second: tuple[Candidate, float] | None) -> dict:
    about = lambda c, s: {"mesh": c.task.axes, "predicted_seconds": s, "predicted_bytes": c.fullest}  # noqa: E731
    return about(best, seconds) | {"next": None if second is None else about(*second)}


def choice(args: argparse.Namespace, ranks: int, on: Callable[[Mapping[str, int]], Task]) -> Choice:
    """What there is to choose from. `on`: what would be trained on a mesh; raises UsageError where it cannot be.

    Raises UsageError where no mesh is possible, with the last reason, or none fits, with the least memory that any needs.
    """
    found, why = [], None
    for axes in meshes(ranks):
        if axes["ep"] > 1 and not (args.experts or args.model):
            continue
        try:
            task = on(axes)
            found.append(Candidate(task, _strategy(args, task), fullest(task.training(args))))
        except (UsageError, ValueError) as error:
            why = error if why is None or axes["dp"] == ranks else why
    if not found:
        raise UsageError(f"--mesh auto: no mesh of {ranks} ranks is possible; dp={ranks}: {why}")
    fit = [c for c in found if args.memory_mib is None or c.fullest <= args.memory_mib * 2**20]
    if not fit:
        least = min(found, key=lambda c: c.fullest)
        raise UsageError(
            f"--memory-mib {args.memory_mib:g} is too little for all of {len(found)} meshes: use "
            f"{-(-least.fullest // 2**20)} or more, which {least.named} needs, or --zero 3, or --recompute"
        )
    return Choice(fit, len(found))


def fullest(training: Training) -> int:
    """Bytes of the rank that has the most: of tp, dp, ep and cp the first have, where not all have as much."""
    inside = training.axes["dp"] * training.axes["ep"] * training.axes["cp"] * training.axes["tp"]
    uneven = training.config.heads % training.axes["tp"]
    ranks = [pp * inside + tp for pp in range(training.axes["pp"]) for tp in range(training.axes["tp"] if uneven else 1)]
    most = 0
    for rank in ranks:
        step = training.step(rank)
        most = max(most, sum(step.memory(training.plan, training.batches(step)).values()))
    return most


def _strategy(args: argparse.Namespace, task: Task) -> Strategy:
    """Where sequences do not divide, as if every rank and micro-batch had as many as the fullest; and every rank of cp as many
    tokens."""
    axes, S = task.axes, args.sequence_length
    data = axes["dp"] * axes["ep"]
    micro = -(-(args.batch_tokens // S) // (data * args.micro_batches))
    layers = tuple(len(blocks) for blocks in task.blocks)
    return Strategy(
        task.config,
        -(-S // (2 * axes["cp"])) * 2 * axes["cp"],
        micro * data * args.micro_batches,
        micro,
        **axes,
        schedule=args.schedule,
        chunks=task.plan.stages // axes["pp"],
        stage_layers=layers,
        recompute="full" if args.recompute else "none",
        sequence_parallel=args.sequence_parallel,
        zero=args.zero,
        attention="unfused",
        p2p="delay",
        scatter_gather=False,
        dtype=here.DTYPE,
    )
