"""Speed, measured in one run: what is compared takes turns, so that a busy machine slows all of it alike."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from statistics import median
from time import perf_counter

from mpi4py import MPI
from threadpoolctl import threadpool_limits

from launch import products, report, step
from launch.tp_mlp import build, inputs
from layers.ops import ACTIVATIONS
from parallel.control import Control
from parallel.mesh import Mesh


def options() -> argparse.ArgumentParser:
    p = start.parser(
        "bench", "Measure a step against its matrix products alone, and against a peer. 2 ranks unless under mpirun."
    )
    p.add_argument("what", choices=("mlp",), help="the layer to measure")
    p.add_argument("--tokens", type=start.positive, default=2048, help="T")
    p.add_argument("--d-model", type=start.positive, default=1024, help="D")
    p.add_argument("--d-ff", type=start.positive, default=4096, help="F, cut over the ranks")
    p.add_argument("--activation", choices=tuple(ACTIVATIONS), default="gelu", help="between the two layers")
    p.add_argument("--no-bias", action="store_true", help="leave the biases out")
    p.add_argument("--rounds", type=start.positive, default=11, help="turns that each gets; medians are reported")
    p.add_argument("--threads", type=start.positive, default=1, help="BLAS threads of each rank")
    p.add_argument("--peer", choices=("torch",), help="time the same layer in this library too, on the same ranks")
    return p


def check(args: argparse.Namespace, ranks: int) -> None:
    if ranks > args.d_ff:
        raise start.UsageError(f"cannot cut --d-ff {args.d_ff} over {ranks} ranks: use at most {args.d_ff} ranks")
    if args.peer and find_spec(args.peer) is None:
        raise start.UsageError(
            "--peer torch needs PyTorch, which this environment has not: see docs/performance.md for one that has"
        )
    if args.peer and args.activation != "gelu":
        raise start.UsageError(f"--peer torch times --activation gelu, not {args.activation}")


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


def main(args: argparse.Namespace, comm: MPI.Intracomm) -> int:
    mesh = Mesh(comm, tp=comm.size)
    mlp = build(args, mesh.tp)
    x, dy = inputs(args)
    steps = {"matmul_only": products.mlp(mlp, x), "sharded": partial(step.once, mlp, x, dy)}
    peer = nullcontext()
    if args.peer:
        from launch.bench_torch import TorchMLP

        peer = TorchMLP(mesh.tp, mlp, Control(comm), args.threads)
    with threadpool_limits(args.threads, user_api="blas"), peer:
        if args.peer:
            # A ratio between two layers that compute different things would mean nothing.
            peer.require_same(x, dy)
            steps |= {f"torch_{kind}": partial(peer.step, kind, x, dy) for kind in peer.layers}
        seconds = in_turn(steps, args.rounds, comm)
    if comm.rank:
        return 0
    ratios = {"sharded_to_matmul_only": ratio(seconds["sharded"], seconds["matmul_only"])}
    if args.peer:
        ratios |= {f"{name}_to_sharded": ratio(s, seconds["sharded"]) for name, s in seconds.items() if "torch" in name}
    config = {k: getattr(args, k) for k in ("what", "tokens", "d_model", "d_ff", "activation", "rounds", "threads", "peer")}
    result = {
        "command": "bench",
        "ok": True,
        "ranks": comm.size,
        "mesh": mesh.sizes,
        "dtype": args.dtype,
        "seed": args.seed,
        "config": config | {"bias": not args.no_bias},
        "seconds": {name: median(s) for name, s in seconds.items()},
        "ratios": ratios,
    }
    if args.json:
        print(json.dumps(result))
        return 0
    labels = {"matmul_only": "its matrix products alone", "sharded": "rankwise"}
    labels |= {"torch_dtensor": "PyTorch, its tensor parallelism, gloo", "torch_functions": "PyTorch, sums by hand, gloo"}
    report.table(
        f"MLP, forward and backward: T {args.tokens}, D {args.d_model}, F {args.d_ff}, {args.activation}, {args.dtype}, "
        f"{comm.size} ranks of {args.threads} BLAS thread(s), {args.rounds} rounds in turn",
        ("", "median ms", "fastest", "slowest", "to products"),
        [
            (
                labels[name],
                f"{1e3 * median(s):.1f}",
                f"{1e3 * min(s):.1f}",
                f"{1e3 * max(s):.1f}",
                f"{ratio(s, seconds['matmul_only']):.3f}",
            )
            for name, s in seconds.items()
        ],
    )
    if args.peer:
        print(
            f"rankwise is {ratios['torch_dtensor_to_sharded']:.2f} times as fast as PyTorch's tensor parallelism, "
            f"{ratios['torch_functions_to_sharded']:.2f} times as PyTorch with sums by hand"
        )
    return 0


if __name__ == "__main__":
    start.under_mpirun(options(), "bench", 2)
    start.run(options(), check, main)
