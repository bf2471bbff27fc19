"""The main job: a tensor-parallel two-layer MLP, compared with the reference, counted, timed, and taught to read digits.

T tokens   D model width   F hidden width   f this rank's share of F over tp
"""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
import json
from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from launch import digits, report
from layers.mlp import MLP
from layers.ops import ACTIVATIONS
from parallel import threads
from parallel.control import Control
from parallel.ledger import agrees, message
from parallel.mesh import Axis, Mesh
from parallel.parameter import drawn
from parallel.shard import even
from reference import mlp as reference
from reference.compare import Comparison, compare, tolerance

REPEATS = 5
# Comparisons use biases of this spread: a bias of zero would be right wherever it is added.
SPREAD = 0.1


def options() -> argparse.ArgumentParser:
    p = start.parser("tp_mlp", "Run a tensor-parallel two-layer MLP, forward and backward, and compare it with a reference.")
    p.add_argument("--tokens", type=start.positive, default=48, help="T, rows of the input")
    p.add_argument("--d-model", type=start.positive, default=64, help="D, width of input and output")
    p.add_argument("--d-ff", type=start.positive, default=1024, help="F, hidden width, cut over the ranks, evenly or not")
    p.add_argument("--activation", choices=tuple(ACTIVATIONS), default="gelu", help="between the two layers")
    p.add_argument("--no-bias", action="store_true", help="leave the biases out")
    p.add_argument("--data", choices=("digits", "none"), default="digits", help="what to train on afterwards")
    return p


def check(args: argparse.Namespace, ranks: int) -> None:
    if ranks > args.d_ff:
        raise start.UsageError(
            f"cannot cut --d-ff {args.d_ff} over {ranks} ranks: use at most {args.d_ff} ranks or a larger --d-ff"
        )


def inputs(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """x and dy (T, D), the same on every rank and mesh."""
    random = np.random.default_rng(args.seed)
    return tuple(random.standard_normal((2, args.tokens, args.d_model)).astype(args.dtype))


def build(args: argparse.Namespace, tp: Axis) -> MLP:
    return MLP(tp, drawn(args.seed, args.dtype, SPREAD), args.d_model, args.d_ff, args.activation, not args.no_bias)


def nbytes(saved: object) -> int:
    """Bytes of the arrays in a layer's saved value, each counted once."""
    arrays: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, tuple):
            for part in value:
                visit(part)
        else:
            arrays[id(value)] = value.nbytes

    visit(saved)
    return sum(arrays.values())


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


def timed(step: Callable[[], object], comm: MPI.Intracomm) -> list[float]:
    """Seconds of each of REPEATS calls, after one to warm up; all ranks start together."""
    seconds = []
    for _ in range(REPEATS + 1):
        comm.Barrier()
        begun = perf_counter()
        step()
        seconds.append(perf_counter() - begun)
    return seconds[1:]


def forward_backward(mlp: MLP, x: np.ndarray, dy: np.ndarray) -> None:
    for p in mlp.parameters:
        p.zero_grad()
    _, saved = mlp.forward(x)
    mlp.backward(dy, saved)


def products(mlp: MLP, x: np.ndarray, dy: np.ndarray) -> Callable[[], None]:
    """The matrix products of a step, alone, into buffers that are kept."""
    W1 = mlp.up.W_Io.data.reshape(len(mlp.up.W_Io.data), -1)
    W2 = mlp.down.W_iO.data
    z, h = (np.ones((len(x), n), x.dtype) for n in (W1.shape[1], len(W2)))
    dW1, dW2, dx, y = np.empty_like(W1), np.empty_like(W2), np.empty_like(x), np.empty_like(dy)

    def run() -> None:
        np.matmul(x, W1, out=z)
        np.matmul(h, W2, out=y)
        np.matmul(h.T, dy, out=dW2)
        np.matmul(dy, W2.T, out=h)
        np.matmul(x.T, z, out=dW1)
        np.matmul(z, W1.T, out=dx)

    return run


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
        compare(f"loss, epoch {n + 1}", "train", np.array([a]), np.array([b]), allowed)
        for n, (a, b, allowed) in enumerate(zip(curve.loss, beside.loss, beside.tolerance, strict=True))
    ]
    accuracy = {"test_accuracy": curve.test_accuracy, "test_accuracy_unsharded": beside.test_accuracy}
    return {"epochs": digits.EPOCHS, **accuracy, "loss": curve.loss, "loss_unsharded": beside.loss}, checks


def main(args: argparse.Namespace, comm: MPI.Intracomm) -> int:
    control = Control(comm)
    mesh = Mesh(comm, check=True, tp=comm.size)
    mlp = build(args, mesh.tp)
    x, dy = inputs(args)

    with mesh.phase("forward"):
        y, saved = mlp.forward(x)
    with mesh.phase("backward"):
        dx = mlp.backward(dy, saved)
    communication = mesh.ledger.report(mlp.traffic(args.tokens))
    weights = sum(p.data.nbytes for p in mlp.parameters)
    memory = control.everyone((weights, nbytes(saved), mlp.saved_bytes(args.tokens)))

    with mesh.phase("compare"):
        whole = {"y": y, "dx": dx}
        for p in mlp.parameters:
            whole |= {p.name: p.whole(mesh.tp, p.data), f"d{p.name}": p.whole(mesh.tp, p.grad)}
    first = comm.rank == 0
    checks = compared(args, mlp, whole, x, dy) if first else []
    control.wait()

    steps = control.everyone(
        {
            "sharded": timed(lambda: forward_backward(mlp, x, dy), comm),
            "matmul_only": timed(products(mlp, x, dy), comm),
        }
    )
    seconds = {kind: median(max(run) for run in zip(*(s[kind] for s in steps), strict=True)) for kind in steps[0]}
    alone = Mesh(MPI.COMM_SELF, tp=1).tp if first else None
    if first:
        single = build(args, alone)
        with threadpool_limits(threads.cores(), user_api="blas"):
            seconds["unsharded"] = median(timed(lambda: forward_backward(single, x, dy), MPI.COMM_SELF))
    control.wait()
    learnt = trained(args, mesh.tp, alone, control) if args.data == "digits" else None
    if not first:
        return 0

    layouts = [p.layout for p in mlp.parameters]
    bytes_per_entry = np.dtype(args.dtype).itemsize
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
        "communication": communication,
        "memory": {
            "weights_bytes_per_rank": [weights for weights, _, _ in memory],
            "predicted_weights_bytes_per_rank": [
                sum(message(layout.local_shape(rank), bytes_per_entry) for layout in layouts) for rank in range(comm.size)
            ],
            "saved_bytes_per_rank": [saved for _, saved, _ in memory],
            "predicted_saved_bytes_per_rank": [predicted for _, _, predicted in memory],
        },
        "seconds": seconds,
    }
    epochs: list[Comparison] = []
    if learnt is not None:
        result["digits"], epochs = learnt
    return publish(args, result, checks, epochs)


def publish(args: argparse.Namespace, result: dict, checks: list[Comparison], epochs: list[Comparison]) -> int:
    """Settle `ok`, print the report or the JSON, and return the exit status."""
    memory, learnt = result["memory"], result.get("digits")
    wrong = [c.tensor for c in (*checks, *epochs) if not c.ok]
    if not agrees(result["communication"]):
        wrong.append("communication")
    wrong += [
        kind for kind in ("weights", "saved") if memory[f"{kind}_bytes_per_rank"] != memory[f"predicted_{kind}_bytes_per_rank"]
    ]
    if learnt and learnt["test_accuracy"] != learnt["test_accuracy_unsharded"]:
        wrong.append("test accuracy")
    result["ok"] = not wrong
    result["checks"] = [c.as_json() for c in (*checks, *epochs)]
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(args, result, checks, epochs)
        print("all agreed" if result["ok"] else f"NOT ALL AGREED: {', '.join(wrong)}")
    return 0 if result["ok"] else 1


def show(args: argparse.Namespace, result: dict, checks: list[Comparison], epochs: list[Comparison]) -> None:
    """The report for people."""
    ranks, seconds, memory = result["ranks"], result["seconds"], result["memory"]
    cut = even(args.d_ff, ranks).sizes
    widths = f"{cut[0]}" if len(set(cut)) == 1 else f"{cut[0]} or {cut[-1]}"
    print(
        f"Tensor-parallel MLP on tp={ranks}: T {args.tokens} tokens, D {args.d_model}, F {args.d_ff} "
        f"({widths} a rank), {args.activation}, {'no bias' if args.no_bias else 'biases'}, {args.dtype}, seed {args.seed}\n"
    )
    report.comparisons("Sharded result against the whole-array reference, entry by entry", checks)
    report.communication(result["communication"])
    report.table(
        "Memory by rank, counted beside predicted",
        ("", *(f"rank {r}" for r in range(ranks))),
        [
            (label, *(report.size(n) for n in memory[key]))
            for label, key in (
                ("weights", "weights_bytes_per_rank"),
                ("  predicted", "predicted_weights_bytes_per_rank"),
                ("saved for backward", "saved_bytes_per_rank"),
                ("  predicted", "predicted_saved_bytes_per_rank"),
            )
        ],
    )
    report.table(
        f"Seconds of forward and backward, median of {REPEATS}",
        ("", "ms", "of the products"),
        [
            (label, f"{1e3 * seconds[key]:.2f}", f"{seconds[key] / seconds['matmul_only']:.2f}")
            for label, key in (
                (f"sharded over {ranks} rank{'s' if ranks > 1 else ''}", "sharded"),
                ("its matrix products alone", "matmul_only"),
                ("unsharded, one process", "unsharded"),
            )
        ],
    )
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
