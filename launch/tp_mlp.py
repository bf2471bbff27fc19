"""The main job: a tensor-parallel two-layer MLP, compared with the reference, counted, timed, and taught to read digits.

T tokens   D model width   F hidden width   f this rank's share of F over tp
"""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from functools import partial

import numpy as np
from mpi4py import MPI

from launch import report
from launch.measure import products, step
from launch.options import UsageError, parser, positive
from layers.mlp import MLP
from layers.ops import ACTIVATIONS
from parallel.axis import Axis
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.shard import even
from reference import mlp as reference
from reference.compare import Comparison, compare, tolerance
from training import digits

# Comparisons use biases of this spread: a bias of zero would be right wherever it is added.
SPREAD = 0.1


def options() -> argparse.ArgumentParser:
    p = parser("tp_mlp", "Run a tensor-parallel two-layer MLP, forward and backward, and compare it with a reference.")
    p.add_argument("--tokens", type=positive, default=48, help="T, rows of the input")
    p.add_argument("--d-model", type=positive, default=64, help="D, width of input and output")
    p.add_argument("--d-ff", type=positive, default=1024, help="F, hidden width, cut over the ranks, evenly or not")
    p.add_argument("--activation", choices=tuple(ACTIVATIONS), default="gelu", help="between the two layers")
    p.add_argument("--no-bias", action="store_true", help="leave the biases out")
    p.add_argument("--data", choices=("digits", "none"), default="digits", help="what to train on afterwards")
    return p


def check(args: argparse.Namespace, ranks: int) -> None:
    if ranks > args.d_ff:
        raise UsageError(f"cannot cut --d-ff {args.d_ff} over {ranks} ranks: use at most {args.d_ff} ranks or a larger --d-ff")


def inputs(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """x and dy (T, D), the same on every rank and mesh."""
    random = np.random.default_rng(args.seed)
    return tuple(random.standard_normal((2, args.tokens, args.d_model)).astype(args.dtype))


def build(args: argparse.Namespace, tp: Axis) -> MLP:
    return MLP(tp, drawn(args.seed, args.dtype, SPREAD), args.d_model, args.d_ff, args.activation, not args.no_bias)


def compared(
    args: argparse.Namespace, mlp: MLP, whole: dict[str, np.ndarray], x: np.ndarray, dy: np.ndarray
) -> list[Comparison]:
    """Every tensor beside the reference: `whole` holds weights by name, and y, dx and gradients led by d."""
    layers = (x, whole["W1"], whole.get("b1"), whole["W2"], whole.get("b2"), args.activation)
    at = reference.grid(args.tokens, args.d_model, args.d_ff, args.d_model)
    wanted = {"dx" if n == "x" else f"d{n}": g for n, g in reference.gradients(*layers, dy, at).items()}
    sums = reference.sums(*layers, dy, np.finfo(args.dtype).eps / 2)
    layouts = {f"d{p.name}": p.layout for p in mlp.parameters}
    gates = () if whole["W1"].ndim == 2 else (np.arange(2),)
    grids = {"dx": (at["T"], at["D"]), "dW1": (at["D"], *gates, at["F"]), "db1": (*gates, at["F"])}
    grids |= {"dW2": (at["F"], at["O"]), "db2": (at["O"],)}
    checks = [compare("y", "forward", whole["y"], reference.forward(*layers), tolerance(args.dtype, *sums["y"]))]
    for name, want in wanted.items():
        allowed = tolerance(args.dtype, *sums[name[1:]])
        owner = layouts[name].owner if name in layouts else lambda index: None
        checks.append(compare(name, "backward", whole[name], want, allowed, grids[name], owner))
    return checks


def trained(args: argparse.Namespace, tp: Axis, alone: Axis | None, control: Control) -> tuple[dict, list[Comparison]] | None:
    """The digits, sharded and (on rank 0) unsharded: the JSON block and the comparison of the two loss curves."""
    data = digits.load(args.dtype)
    task = (data, args.d_ff, args.activation, not args.no_bias, args.dtype, args.seed)
    curve = digits.train(tp, *task, report.progress("digits, sharded", alone is not None))
    beside = digits.train(alone, *task, report.progress("digits, unsharded", True)) if alone is not None else None
    control.wait()
    if beside is None:
        return None
    checks = [
        compare(f"loss, epoch {n + 1}", "train", np.array([a]), np.array([b]), tolerance(args.dtype, [terms]))
        for n, (a, b, terms) in enumerate(zip(curve.loss, beside.loss, beside.terms, strict=True))
    ]
    accuracy = {"test_accuracy": curve.test_accuracy, "test_accuracy_unsharded": beside.test_accuracy}
    return {"epochs": digits.EPOCHS, **accuracy, "loss": curve.loss, "loss_unsharded": beside.loss}, checks


def main(args: argparse.Namespace, comm: MPI.Intracomm, opened: None) -> int:
    control = Control(comm)
    mesh = start.make_mesh(args, comm, tp=comm.size)
    mlp = build(args, mesh.tp)
    x, dy = inputs(args)
    ran = step.run(mlp, x, dy, mesh, control)
    first = comm.rank == 0
    checks = compared(args, mlp, ran.whole, x, dy) if first else []
    control.wait()
    alone = Mesh(MPI.COMM_SELF, tp=1).tp if first else None
    seconds = step.seconds(
        partial(step.once, mlp, x, dy), products.mlp(mlp, x), lambda: partial(step.once, build(args, alone), x, dy), comm
    )
    learnt = trained(args, mesh.tp, alone, control) if args.data == "digits" else None
    if not first:
        return 0
    result = {
        "command": "tp_mlp",
        "ok": True,
        "ranks": comm.size,
        "mesh": mesh.sizes,
        "dtype": args.dtype,
        "seed": args.seed,
        "config": {
            "tokens": args.tokens,
            "d_model": args.d_model,
            "d_ff": args.d_ff,
            "activation": args.activation,
            "bias": not args.no_bias,
            "data": args.data,
        },
        "checks": [],
        "communication": ran.communication,
        "memory": ran.memory,
        "seconds": seconds,
    }
    epochs: list[Comparison] = []
    if learnt is not None:
        result["digits"], epochs = learnt
    wrong = [*report.wrong((*checks, *epochs), result), *ran.apart]
    if learnt and result["digits"]["test_accuracy"] != result["digits"]["test_accuracy_unsharded"]:
        wrong.append("test accuracy")
    return report.publish(args.json, result, (*checks, *epochs), wrong, lambda: show(args, result, checks, epochs))


def show(args: argparse.Namespace, result: dict, checks: list[Comparison], epochs: list[Comparison]) -> None:
    """The report for people."""
    ranks = result["ranks"]
    cut = even(args.d_ff, ranks).sizes
    widths = f"{cut[0]}" if len(set(cut)) == 1 else f"{cut[0]} or {cut[-1]}"
    print(
        f"Tensor-parallel MLP on tp={ranks}: T {args.tokens} tokens, D {args.d_model}, F {args.d_ff} "
        f"({widths} a rank), {args.activation}, {'no bias' if args.no_bias else 'biases'}, {args.dtype}, seed {args.seed}\n"
    )
    report.comparisons("Sharded result against the whole-array reference, entry by entry", checks)
    report.communication(result["communication"])
    report.memory(result["memory"])
    report.seconds(result["seconds"], step.REPEATS, ranks)
    if epochs:
        learnt = result["digits"]
        worst = max(epochs, key=lambda c: c.max_abs_error / c.tolerance)
        report.table(
            "Handwritten digits, the same MLP trained sharded and unsharded",
            ("epoch", "loss", "unsharded", "difference", "tolerance", ""),
            [
                (
                    n + 1,
                    f"{a:.6f}",
                    f"{b:.6f}",
                    f"{c.max_abs_error:.1e}",
                    f"{c.tolerance:.1e}",
                    "ok" if c.ok else "WRONG",
                )
                for n, (a, b, c) in enumerate(zip(learnt["loss"], learnt["loss_unsharded"], epochs, strict=True))
                if n in (0, 1, 3, 7, len(epochs) - 1) or not c.ok or c is worst
            ],
        )
        print(
            f"held-out images read right: {learnt['test_accuracy']:.2%}, "
            f"{learnt['test_accuracy_unsharded']:.2%} unsharded ({learnt['epochs']} epochs)\n"
        )


if __name__ == "__main__":
    start.run(options(), check, main)
