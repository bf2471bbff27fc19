"""`launch.bench plan`: the step that is planned on these ranks beside the step that they take, by turns."""

from __future__ import annotations

import argparse
from math import lcm
from statistics import median
from time import perf_counter

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from launch import report, start
from launch.bench.sizes import Sizes
from launch.options import UsageError
from launch.planning import here
from launch.terminal import progress
from models.config import llama_like
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.shard import AXES
from plan import ours
from plan.strategy import Strategy
from training.text import VOCABULARY, MicroBatch
from training.trainer import Trainer

# Micro-batches along pp; steps of a turn, after one that warms up.
MICRO_BATCHES, STEPS = 4, 3
# What a prediction may be off, of a step.
MOST = 0.10


def check(args: argparse.Namespace, sizes: Sizes, ranks: int) -> None:
    """Whether all cases can be: sequences are dealt to all ranks, and to micro-batches, evenly."""
    sequences = sizes.tokens // sizes.sequence_length
    if sequences % ranks or sequences % max(1, sequences // MICRO_BATCHES):
        raise UsageError(
            f"cannot deal {sequences} sequences to {ranks} ranks, and to {MICRO_BATCHES} micro-batches, evenly: "
            f"use --tokens {lcm(ranks, MICRO_BATCHES) * sizes.sequence_length}"
        )


def measure(args: argparse.Namespace, sizes: Sizes, opened: None, comm: MPI.Intracomm, mesh: Mesh) -> dict:
    """Of each case predicted and measured seconds by round: these ranks measured, the step planned, and then taken. Cases: one
    rank, and all ranks along dp, tp and pp; each with a model of width D / 2 and of D."""
    control, alone = Control(comm), Control(MPI.COMM_SELF)
    along = ("alone", *(("dp", "tp", "pp") if comm.size > 1 else ()))
    cases = [(name, D) for name in along for D in (sizes.d_model // 2, sizes.d_model)]
    rows: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
    with threadpool_limits(args.threads, user_api="blas"):
        for _ in progress.items("round", comm.rank == 0)(range(sizes.rounds)):
            for name, D in cases:
                strategy = _strategy(sizes, D, name, comm.size)
                if name != "alone":
                    rows[name, D].append(_turn(args, strategy, comm, control))
                elif comm.rank == 0:
                    rows[name, D].append(_turn(args, strategy, MPI.COMM_SELF, alone))
                control.wait(patient=True)
    if comm.rank:
        return {}
    found = [{"along": name, "d_model": D, "ranks": 1 if name == "alone" else comm.size,
              "predicted": [p for p, _ in of], "measured": [m for _, m in of], "ratio": median(p / m for p, m in of)}
             for (name, D), of in rows.items()]  # fmt: skip
    return {"cases": found, "most": MOST}


def _strategy(sizes: Sizes, D: int, along: str, ranks: int) -> Strategy:
    config = llama_like(VOCABULARY, D, sizes.layers, sizes.heads, sizes.heads, 4 * D, sizes.sequence_length)
    axes = {} if along == "alone" else {along: ranks}
    batch, data = sizes.tokens // sizes.sequence_length, axes.get("dp", 1)
    micro = batch // (data * (MICRO_BATCHES if along == "pp" else 1))
    return Strategy(config, sizes.sequence_length, batch, max(1, micro), **axes, attention="unfused", p2p="delay",
                    scatter_gather=False, dtype=here.DTYPE)  # fmt: skip


def _turn(args: argparse.Namespace, s: Strategy, comm: MPI.Intracomm, control: Control) -> tuple[float, float]:
    predicted = here.seconds(args, control, comm, s)
    training = ours.training(s)
    with start.make_mesh(args, comm, **dict.fromkeys(AXES, 1) | s.mesh) as mesh:
        trainer = Trainer(training.stages(mesh, drawn(args.seed, training.dtype)), mesh, training.recipe)
        ids = np.random.default_rng(args.seed).integers(0, VOCABULARY, s.sequence_length + 1)
        parts = [MicroBatch(*(np.tile(a, len(n)) for a in (ids[:-1], ids[1:])), list(n)) for n in training.lengths(mesh)]
        took = []
        for _ in range(STEPS + 1):
            control.wait()
            begun = perf_counter()
            trainer.step(parts, training.tokens, 1e-3)
            took.append(perf_counter() - begun)
    every = control.everyone(took[1:])
    return predicted, median(max(of) for of in zip(*every, strict=True))


def show(result: dict) -> None:
    c, rows = result["config"], result["cases"]
    report.table(
        f"A training step of {c['layers']} layers, {c['heads']} heads, {c['tokens']} tokens in sequences of "
        f"{c['sequence_length']}, planned on these ranks and taken, {c['rounds']} rounds in turn",
        ("ranks", "D", "planned ms", "taken ms", "ratio", ""),
        [
            ("one" if r["along"] == "alone" else f"{r['along']}={r['ranks']}", r["d_model"],
             *(f"{1e3 * median(r[kind]):.1f}" for kind in ("predicted", "measured")), f"{r['ratio']:.3f}",
             "" if abs(r["ratio"] - 1) <= result["most"] else f"off by more than {100 * result['most']:.0f} %")
            for r in rows
        ],
    )  # fmt: skip
