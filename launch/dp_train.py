"""Data parallelism of a small language model: gradients averaged by tokens against the reference, and weights after some steps
against the same steps on one process.

T tokens   D model width   V vocabulary
"""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from launch import report
from launch.explain import view
from launch.measure import small
from launch.measure.small import VOCABULARY, joined, ragged, reference_loss
from launch.options import UsageError, add_replicas, add_zero, amount, parser, positive
from launch.terminal import progress
from models.build import build
from models.config import Config
from parallel.control import Control
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.replicas import Copy, Replicas
from parallel.shard import even
from reference.compare import Comparison, compare
from reference.layer import compared
from reference.rounding import bounds
from training.text import MicroBatch
from training.trainer import Recipe, Trainer

RATE = 1e-2
# Comparisons use weights and biases of this spread at least.
SPREAD = 0.1


def options() -> argparse.ArgumentParser:
    p = parser(
        "dp_train",
        "Train a small model data-parallel, and compare with a reference and with one process.",
        (
            "mpirun -n 4 python -m launch.dp_train",
            "mpirun -n 3 python -m launch.dp_train --zero 3 --micro-batches 2",
        ),
    )
    p.add_argument("--family", choices=("llama", "gpt2"), default="llama", help="what the model is like")
    p.add_argument("--layers", type=positive, default=1, help="blocks")
    p.add_argument("--d-model", type=positive, default=24, help="D")
    p.add_argument("--heads", type=positive, default=3, help="query heads, a divisor of D")
    p.add_argument("--d-ff", type=positive, default=40, help="hidden width of the MLP")
    p.add_argument("--sequences", type=positive, default=9, help="of a step, dealt out over the ranks, evenly or not")
    p.add_argument("--sequence-length", type=positive, default=12, help="tokens of the longest; the others are shorter")
    p.add_argument("--steps", type=positive, default=5, help="of AdamW")
    p.add_argument("--micro-batches", type=positive, default=1, help="parts in which a rank takes its sequences")
    add_zero(p, "the ranks")
    p.add_argument("--recompute", action="store_true", help="keep only the inputs of blocks for backward")
    p.add_argument("--overlap", choices=("on", "off"), default="on", help="send gradients while backward goes on")
    p.add_argument("--bucket-mib", type=amount, default=0.01, help="MiB of gradients sent at once")
    add_replicas(p, "steps")
    view.add_options(p)
    return p


class Task(NamedTuple):
    """The model, and the batch that every step takes: one part a sequence."""

    config: Config
    batch: list[MicroBatch]


def check(args: argparse.Namespace, ranks: int) -> Task:
    view.check(args, ranks)
    # GPT-2 has one table for embedding and output.
    sizes = (args.layers, args.d_model, args.heads, args.d_ff, args.sequence_length)
    config = small.model(args.family, *sizes, tied=args.family == "gpt2")
    least = ranks * args.micro_batches
    if args.sequences < least:
        raise UsageError(
            f"cannot deal --sequences {args.sequences} to {ranks} ranks in {args.micro_batches} micro-batches: "
            f"use {least} or more"
        )
    return Task(config, ragged(args.sequences, args.sequence_length, args.seed))


def share(parts: list[MicroBatch], ranks: int, rank: int, micro_batches: int) -> list[MicroBatch]:
    """This rank's sequences, in micro-batches."""
    first, last = even(len(parts), ranks, "sequences").bounds[rank]
    cut = even(last - first, micro_batches, "sequences")
    return [joined(parts[first + a : first + b]) for a, b in cut.bounds]


class Steps:
    """Steps of a trainer, taken: the `loss` and the gradients of each, and the weights `before` and `after` all, by name."""

    def __init__(self, args: argparse.Namespace, task: Task, mesh: Mesh, control: Control, micro_batches: int) -> None:
        overlap, bucket = args.overlap == "on", max(1, int(args.bucket_mib * 2**20))
        model = build(task.config, mesh.tp, drawn(args.seed, args.dtype, SPREAD), args.recompute)
        self.trainer = Trainer({0: model}, mesh, Recipe(clip=1.0, zero=args.zero, overlap=overlap, bucket_bytes=bucket))
        self.parts = share(task.batch, mesh.dp.size, mesh.dp.rank, micro_batches)
        tokens = sum(len(p.ids) for p in task.batch)
        self.step = lambda: self.trainer.step(self.parts, tokens, RATE)
        self.before = self._named("data")
        replicas = Replicas(mesh, control, args.check_replicas)
        self.loss, self.gradients = [], []
        for _ in range(args.steps):
            self.loss.append(self.trainer.gradients(self.parts, tokens))
            self.gradients.append(self._named("grad"))
            self.trainer.update(RATE)
            replicas.check(len(self.loss), lambda: [*self.trainer.copies(), Copy("the losses", self.loss)])
        self.after = self._named("data")

    def _named(self, what: str) -> dict[str, np.ndarray]:
        with self.trainer.mesh.phase("compare"):
            return self.trainer.holder.wholes(what)


def against_the_reference(loss: Callable[[dict], complex], dtype: str, ours: Steps) -> Iterator[Comparison]:
    """The first step's loss and gradients."""
    whole = {"y": np.array(ours.loss[0], dtype)} | ours.before | {f"d{n}": g for n, g in ours.gradients[0].items()}
    yield from compared([loss], lambda W, name, index: loss(W), whole, np.array(1.0), lambda name: 4)


def against_one_process(loss: Callable[[dict], complex], dtype: str, ours: Steps, alone: Steps) -> Iterator[Comparison]:
    """Weights after all steps.

    Rounding may change a gradient g by d. AdamW divides by the gradient's own size, so that moves its step of this entry by
    at most 4 d / |g| of the rate; and by no more than twice the rate, whatever g is.
    """
    steps = len(ours.loss)
    before = {n: a.astype(np.float64) for n, a in ours.before.items()}
    off = bounds([loss], before, np.array(1.0), dtype)
    u = np.finfo(dtype).eps / 2
    for name, got in ours.after.items():
        size = np.sqrt(np.mean([g[name].astype(np.float64) ** 2 for g in alone.gradients], axis=0)) + 1e-8
        allowed = steps * (RATE * np.minimum(2, 4 * off[name].max() / size) + 8 * u * np.abs(got))
        yield compare(f"{name}, step {steps}", "step", got, alone.after[name].astype(np.float64), allowed)


def main(args: argparse.Namespace, comm: MPI.Intracomm, task: Task) -> int:
    control = Control(comm)
    mesh = start.make_mesh(args, comm, dp=comm.size, tp=1)
    ours = Steps(args, task, mesh, control, args.micro_batches)
    predicted = [t for t in ours.trainer.traffic(ours.parts) for _ in range(args.steps)]
    rows = [r for r in mesh.ledger.report(predicted) if r["phase"] != "compare"]
    mine = (len(joined(ours.parts).ids), agrees(rows), ours.trainer.memory(ours.parts), ours.loss, ours.after)
    tokens, sent, memory, losses, weights = zip(*control.everyone(mine), strict=True)
    first, checks = comm.rank == 0, []
    if first:
        alone = Steps(args, task, Mesh(MPI.COMM_SELF, dp=1, tp=1), Control(MPI.COMM_SELF), 1)
        shown = progress.items("the reference, tensor by tensor", True, 2 + 2 * len(ours.before) + len(ours.after))
        about = (reference_loss(task.config, task.batch), args.dtype, ours)
        checks = list(shown(chain(against_the_reference(*about), against_one_process(*about, alone))))
    control.wait(patient=True)
    explained = view.explained(args, control, mesh, ours.trainer.parameters, ours.step)
    if not first:
        return 0
    same = [all(np.array_equal(after[n], a) for n, a in ours.after.items()) for after in weights]
    wrong = [c.tensor for c in checks if not c.ok]
    wrong += report.of_ranks("communication", sent)
    wrong += report.of_ranks("memory", map(report.as_predicted, memory))
    wrong += [f"weights of rank {r}, unlike rank 0's" for r, loss in enumerate(losses) if loss != ours.loss or not same[r]]
    result = report.header("dp_train", args, mesh) | {
        "config": {k: v for k, v in vars(args).items() if k not in ("json", "dtype", "seed", "trace", *view.OPTIONS)},
        "tokens_per_rank": list(tokens),
        "loss": ours.loss,
        "checks": [c.as_json() for c in checks],
        "communication": rows,
        "memory": report.by_rank(memory),
        **({"explain": explained} if explained else {}),
    }
    first_step = [c for c in checks if c.phase != "step"]
    shown = lambda: view.show(explained, lambda: show(result, checks))  # noqa: E731
    return report.publish(args.json, result, shown, wrong, checks=first_step, unwritten=view.draw(args, explained))


def show(result: dict, checks: list[Comparison]) -> None:
    """The report for people."""
    c = result["config"]
    report.say(
        f"Data parallelism on dp={result['ranks']}: a {c['family']}-like model, {c['layers']} layer(s), D {c['d_model']}, "
        f"V {VOCABULARY}; a step's tokens by rank: {', '.join(map(str, result['tokens_per_rank']))}; {result['dtype']}, "
        f"seed {result['seed']}",
        "",
    )
    report.table("Loss, the mean over the tokens of all ranks", ("step", "nats a token"),
                 [(n + 1, f"{loss:.6f}") for n, loss in enumerate(result["loss"])])  # fmt: skip
    titles = {
        "forward": "First step: loss and averaged gradients against the reference, on the whole batch",
        "step": f"After {c['steps']} steps of AdamW: weights against the same steps on one process",
    }
    report.comparisons(titles["forward"], [c for c in checks if c.phase != "step"])
    report.comparisons(titles["step"], [c for c in checks if c.phase == "step"])
    report.communication(result["communication"], f"{c['steps']} steps on rank 0")
    report.memory(result["memory"])


if __name__ == "__main__":
    start.run(options(), check, main)
