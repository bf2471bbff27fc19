"""The main job: a tensor-parallel two-layer MLP, compared with the reference, counted, timed, and taught to read digits.

T tokens   D model width   F hidden width   f, t this rank's share over tp of F and, with --sequence-parallel, of T
"""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from launch import report
from launch.explain import view
from launch.measure import products, step
from launch.options import UsageError, parser, positive
from launch.terminal import progress
from launch.terminal.lines import counted
from layers.batch import Batch
from layers.mlp import MLP
from layers.ops import ACTIVATIONS
from parallel.axis import Axis
from parallel.control import Control
from parallel.ledger import wire_bytes
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.parameter import drawn
from parallel.rows import cut_rows, own
from parallel.shard import Cut, even
from reference import mlp as reference
from reference.compare import Comparison, compare, tolerance
from training import digits

# Comparisons use biases of this spread: a bias of zero would be right wherever it is added.
SPREAD = 0.1


class Job(NamedTuple):
    """A step of an MLP: its sizes T, D and F, and what it is made of."""

    tokens: int
    d_model: int
    d_ff: int
    activation: str
    bias: bool
    dtype: str
    seed: int
    sequence_parallel: bool

    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """x and dy (T, D), the same on every rank and mesh."""
        random = np.random.default_rng(self.seed)
        return tuple(random.standard_normal((2, self.tokens, self.d_model)).astype(self.dtype))

    def build(self, tp: Axis) -> MLP:
        weights = drawn(self.seed, self.dtype, SPREAD)
        return MLP(tp, weights, self.d_model, self.d_ff, self.activation, self.bias, cuts_rows=self.sequence_parallel)

    def rows(self, tp: Axis) -> Cut | None:
        """How T is cut over tp; None where every rank has all of it."""
        return cut_rows(self.tokens, tp.size) if self.sequence_parallel else None

    def step(self, mesh: Mesh) -> tuple[MLP, Callable[[], None]]:
        """The MLP, and a step of it on this rank's rows, to be timed."""
        mlp, rows = self.build(mesh.tp), self.rows(mesh.tp)
        return mlp, step.of(mlp, mesh, *(own(a, rows, mesh.tp.rank) for a in self.inputs()), Batch([self.tokens], rows=rows))


def options() -> argparse.ArgumentParser:
    p = parser(
        "tp_mlp",
        "Run a tensor-parallel two-layer MLP, forward and backward, and compare it with a reference.",
        (
            "mpirun -n 4 python -m launch.tp_mlp",
            "mpirun -n 3 python -m launch.tp_mlp --activation swiglu --d-ff 1001",
            "mpirun -n 2 python -m launch.tp_mlp --data none --trace t.json",
            "mpirun -n 4 python -m launch.tp_mlp --explain --rank 1",
        ),
    )
    p.add_argument("--tokens", type=positive, default=48, help="T, rows of the input")
    p.add_argument("--d-model", type=positive, default=64, help="D, width of input and output")
    p.add_argument("--d-ff", type=positive, default=1024, help="F, hidden width, cut over the ranks, evenly or not")
    p.add_argument("--timed", type=_sizes, metavar="T,D,F", default="512,256,2048", help="sizes of the step that is timed")
    p.add_argument("--activation", choices=tuple(ACTIVATIONS), default="gelu", help="between the two layers")
    p.add_argument("--no-bias", action="store_true", help="leave the biases out")
    p.add_argument("--sequence-parallel", action="store_true", help="cut the tokens over the ranks outside the two layers")
    p.add_argument("--data", choices=("digits", "none"), default="digits", help="what to train on afterwards")
    view.add_options(p)
    return p


def _sizes(text: str) -> tuple[int, int, int]:
    """An argparse type: T,D,F."""
    sizes = tuple(positive(part) for part in text.split(","))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not T,D,F: use three sizes, such as 512,256,2048")
    return sizes


def check(args: argparse.Namespace, ranks: int) -> tuple[Job, Job]:
    """What is compared, and what is timed."""
    view.check(args, ranks)
    for option, d_ff in (("--d-ff", args.d_ff), ("--timed F", args.timed[2])):
        if ranks > d_ff:
            raise UsageError(f"cannot cut {option} {d_ff} over {ranks} ranks: use at most {d_ff} ranks or a larger {option}")
    sizes = (args.tokens, args.d_model, args.d_ff)
    settings = (args.activation, not args.no_bias, args.dtype, args.seed, args.sequence_parallel)
    compared, timed = (Job(*s, *settings) for s in (sizes, args.timed))
    return compared, timed


def compared(job: Job, mesh: Mesh, mlp: MLP, whole: dict[str, np.ndarray], x: np.ndarray, dy: np.ndarray) -> list[Comparison]:
    """Every tensor beside the reference: `whole` holds weights by name, and y, dx and gradients led by d."""
    layers = (x, whole["W1"], whole.get("b1"), whole["W2"], whole.get("b2"), job.activation)
    at = reference.grid(job.tokens, job.d_model, job.d_ff, job.d_model)
    wanted = {"dx" if n == "x" else f"d{n}": g for n, g in reference.gradients(*layers, dy, at).items()}
    sums = reference.sums(*layers, dy, np.finfo(job.dtype).eps / 2)
    layouts = {f"d{p.name}": p.layout for p in mlp.parameters if p.layout.cuts}
    gates = () if whole["W1"].ndim == 2 else (np.arange(2),)
    grids = {"dx": (at["T"], at["D"]), "dW1": (at["D"], *gates, at["F"]), "db1": (*gates, at["F"])}
    grids |= {"dW2": (at["F"], at["O"]), "db2": (at["O"],)}
    checks = [compare("y", "forward", whole["y"], reference.forward(*layers), tolerance(job.dtype, *sums["y"]))]
    for name, want in wanted.items():
        allowed = tolerance(job.dtype, *sums[name[1:]])
        owner = (lambda index, of=layouts[name]: mesh.rank_at(of.owner(index))) if name in layouts else lambda index: None
        checks.append(compare(name, "backward", whole[name], want, allowed, grids[name], owner))
    return checks


def trained(job: Job, tp: Axis, alone: Axis | None, control: Control) -> tuple[dict, list[Comparison]]:
    """The digits, sharded and (on rank 0) unsharded: the JSON block and the comparison of the two loss curves."""
    settings = (digits.load(job.dtype), job.d_ff, job.activation, job.bias, job.dtype, job.seed)
    curve = digits.train(tp, *settings, progress.items("digits, sharded", alone is not None))
    beside = digits.train(alone, *settings, progress.items("digits, unsharded", True)) if alone is not None else None
    control.wait(patient=True)
    if beside is None:
        return {}, []
    checks = [
        compare(f"loss, epoch {n + 1}", "train", np.array([a]), np.array([b]), tolerance(job.dtype, [terms]))
        for n, (a, b, terms) in enumerate(zip(curve.loss, beside.loss, beside.terms, strict=True))
    ]
    accuracy = {"test_accuracy": curve.test_accuracy, "test_accuracy_unsharded": beside.test_accuracy}
    return {"epochs": digits.EPOCHS, **accuracy, "loss": curve.loss, "loss_unsharded": beside.loss}, checks


def main(args: argparse.Namespace, comm: MPI.Intracomm, jobs: tuple[Job, Job]) -> int:
    job, larger = jobs
    control = Control(comm)
    mesh = start.make_mesh(args, comm, tp=comm.size)
    mlp, (x, dy), rows = job.build(mesh.tp), job.inputs(), job.rows(mesh.tp)
    batch = Batch([job.tokens], rows=rows)
    measured = step.run(mlp, x, dy, mesh, control, batch)
    first = comm.rank == 0
    checks = compared(job, mesh, mlp, measured.whole, x, dy) if first else []
    control.wait(patient=True)
    parts = tuple(own(a, rows, comm.rank) for a in (x, dy))
    explained = view.explained(args, control, mesh, mlp.parameters, lambda: step.phases(mlp, *parts, mesh, batch))
    alone = Mesh(MPI.COMM_SELF, tp=1) if first else None
    large, once = larger.step(mesh)
    seconds = step.seconds(once, products.of(large.work(larger.tokens), args.dtype), lambda: larger.step(alone)[1], comm)
    learnt, epochs = trained(job, mesh.tp, alone and alone.tp, control) if args.data == "digits" else ({}, [])
    if not first:
        return 0
    sizes = ("tokens", "d_model", "d_ff")
    result = report.header("tp_mlp", args, mesh) | {
        "config": {k: getattr(job, k) for k in (*sizes, "activation", "bias", "sequence_parallel")} | {"data": args.data},
        "checks": [c.as_json() for c in (*checks, *epochs)],
        "communication": measured.communication,
        "memory": measured.memory,
        "timed": {k: getattr(larger, k) for k in sizes},
        "seconds": seconds,
        **({"beside_whole_rows": beside_whole_rows(job, mesh, mlp)} if rows is not None else {}),
        **({"digits": learnt} if learnt else {}),
        **({"explain": explained} if explained else {}),
    }
    wrong = [*report.wrong((*checks, *epochs), result), *measured.wrong]
    if learnt and learnt["test_accuracy"] != learnt["test_accuracy_unsharded"]:
        wrong.append("test accuracy")
    shown = lambda: view.show(explained, lambda: show(result, checks, epochs))  # noqa: E731
    return report.publish(args.json, result, shown, wrong, checks=checks, unwritten=view.draw(args, explained))


def beside_whole_rows(job: Job, mesh: Mesh, mlp: MLP) -> dict[str, list[int]]:
    """Of a step on this rank, by the closed forms, with rows cut and with whole rows: what it keeps, and what it sends."""
    found: dict[str, list[int]] = {"saved_bytes": [], "wire_bytes": []}
    for rows in (job.rows(mesh.tp), None):
        sent = mlp.traffic(job.tokens, rows) + (Owed(mesh, mlp.parameters).traffic() if rows else [])
        found["saved_bytes"].append(mlp.saved_bytes(job.tokens, rows))
        found["wire_bytes"].append(sum(wire_bytes(t.verb, t.message_bytes, mesh.tp.size) for t in sent))
    return found


def show(result: dict, checks: list[Comparison], epochs: list[Comparison]) -> None:
    """The report for people."""
    ranks, c = result["ranks"], result["config"]
    cut = even(c["d_ff"], ranks).sizes
    widths = f"{cut[0]}" if len(set(cut)) == 1 else f"{cut[0]} or {cut[-1]}"
    report.say(
        f"Tensor-parallel MLP on tp={ranks}: T {counted(c['tokens'], 'token')}, D {c['d_model']}, F {c['d_ff']} "
        f"({widths} a rank), {c['activation']}, {'biases' if c['bias'] else 'no bias'}, {result['dtype']}, "
        f"seed {result['seed']}",
        "",
    )
    report.comparisons("Sharded result against the whole-array reference, entry by entry", checks)
    report.communication(result["communication"])
    report.memory(result["memory"])
    if beside := result.get("beside_whole_rows"):
        (kept, kept_whole), (sent, sent_whole) = beside["saved_bytes"], beside["wire_bytes"]
        report.say(
            f"Rows are cut: rank 0 keeps {kept:,.0f} bytes for backward, where whole rows would keep {kept_whole:,.0f}, "
            f"and sends {sent:,.0f} bytes over the wire, where whole rows would send {sent_whole:,.0f}.",
            "",
        )
    T, D, F = result["timed"].values()
    report.seconds(result["seconds"], step.REPEATS, ranks, f" at T {T}, D {D}, F {F}")
    if epochs:
        learnt = result["digits"]
        worst = max(epochs, key=lambda c: c.max_abs_error / c.tolerance)
        report.table(
            "Handwritten digits, the same MLP trained sharded and unsharded",
            ("epoch", "loss", "unsharded", "difference", "tolerance", ""),
            [
                (n + 1, f"{a:.6f}", f"{b:.6f}", f"{c.max_abs_error:.1e}", f"{c.tolerance:.1e}", "ok" if c.ok else "WRONG")
                for n, (a, b, c) in enumerate(zip(learnt["loss"], learnt["loss_unsharded"], epochs, strict=True))
                if n in (0, 1, 3, 7, len(epochs) - 1) or not c.ok or c is worst
            ],
        )
        report.say(
            f"held-out images read right: {learnt['test_accuracy']:.2%}, "
            f"{learnt['test_accuracy_unsharded']:.2%} unsharded ({learnt['epochs']} epochs)",
            "",
        )


if __name__ == "__main__":
    start.run(options(), check, main)
