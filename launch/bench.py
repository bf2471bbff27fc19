"""Speed, measured in one run: what is compared takes turns, so that a busy machine slows all of it alike."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
import json
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from launch import bench_decode, bench_serving, bench_speculate, bench_trace, bench_train, pretrained, products, report, step
from layers.attention import Attention
from layers.mlp import MLP
from layers.ops import ACTIVATIONS
from parallel.axis import Axis
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import drawn

# Options that belong to one of the layers.
OWN = {
    "mlp": ("d_ff", "activation"),
    "attention": ("heads", "kv_heads"),
    "train": ("d_ff", "heads", "layers", "sequence_length"),
    "decode": (),
    "speculate": (),
    "serving": (),
    "trace": ("d_ff", "heads", "layers", "sequence_length"),
}
# Where a subject means other sizes than the parser's own.
DEFAULTS = {
    "mlp": {"tokens": 2048, "d_model": 1024, "d_ff": 4096, "rounds": 11},
    "attention": {"tokens": 2048, "d_model": 1024, "heads": 16, "rounds": 11},
    "train": {"tokens": 4096, "d_model": 512, "d_ff": 2048, "heads": 8, "rounds": 5},
    "decode": {"tokens": 64, "rounds": 7},
    "speculate": {"tokens": 128, "rounds": 5},
    "serving": {"tokens": 32, "rounds": 3},
    "trace": {"tokens": 1024, "d_model": 512, "d_ff": 2048, "heads": 8, "rounds": 15},
}
# Subjects with a module of their own.
MODULES = {
    "train": bench_train,
    "decode": bench_decode,
    "speculate": bench_speculate,
    "serving": bench_serving,
    "trace": bench_trace,
}


def options() -> argparse.ArgumentParser:
    p = start.parser(
        "bench",
        "Measure a step against its matrix products alone, and against a peer. 2 ranks unless under mpirun.",
        check_collectives="off",
    )
    p.add_argument(
        "what", choices=tuple(OWN), help="the layer to measure (attention: causal, over one sequence), or a training step"
    )
    p.add_argument("--tokens", type=start.positive, help="T (2048; train 4096; new ones: decode 64, speculate 128, serving 32)")
    p.add_argument("--d-model", type=start.positive, help="D (1024; train 512)")
    p.add_argument("--d-ff", type=start.positive, help="mlp, train: F, cut over the ranks (4096; train 2048)")
    p.add_argument("--activation", choices=tuple(ACTIVATIONS), default="gelu", help="mlp: between the two layers")
    p.add_argument("--heads", type=start.positive, help="attention, train: H, cut over the ranks; a divisor of D (16; train 8)")
    p.add_argument("--kv-heads", type=start.positive, help="attention: K, a divisor of H (H)")
    p.add_argument("--layers", type=start.positive, default=4, help="train: blocks")
    p.add_argument("--sequence-length", type=start.positive, default=256, help="train: tokens of a sequence")
    p.add_argument("--no-bias", action="store_true", help="mlp, attention: leave the biases out")
    p.add_argument(
        "--rounds",
        type=start.positive,
        help="turns that each gets; medians are reported (11; train, speculate 5, decode 7, serving 3)",
    )
    p.add_argument("--threads", type=start.positive, default=1, help="BLAS threads of each rank")
    p.add_argument("--peer", choices=("torch",), help="time the same layer in this library too, on the same ranks")
    pretrained.add_model(p)
    p.add_argument("--memory", action="store_true", help="instead of time: the peak of a step's memory, for T/8 to T tokens")
    return p


def check(args: argparse.Namespace, ranks: int) -> None:
    for name, value in DEFAULTS[args.what].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.what in ("mlp", "train", "trace") and ranks > args.d_ff:
        raise start.UsageError(f"cannot cut --d-ff {args.d_ff} over {ranks} ranks: use at most {args.d_ff} ranks")
    if args.what in ("train", "trace") and (args.tokens % args.sequence_length or args.tokens // args.sequence_length < ranks):
        least = ranks * args.sequence_length
        raise start.UsageError(
            f"--tokens {args.tokens} is no multiple of --sequence-length {args.sequence_length} that {ranks} ranks can share: "
            f"use {least}"
        )
    if args.memory and args.what in MODULES:
        raise start.UsageError(f"--memory is for mlp and attention: launch.bench {args.what} measures time")
    if args.what in ("decode", "speculate", "serving"):
        MODULES[args.what].check(args, ranks)
    if args.peer and args.what == "trace":
        raise start.UsageError("--peer torch has no part in trace, which compares a step traced and untraced: leave it out")
    if args.peer and args.what == "speculate":
        raise start.UsageError("--peer torch has no part in speculate, which compares with plain decoding: leave it out")
    if args.what in ("attention", "train", "trace"):
        args.kv_heads = args.kv_heads or args.heads
        if args.d_model % args.heads:
            raise start.UsageError(f"--heads {args.heads} does not divide --d-model {args.d_model}: use a divisor")
        if args.heads % args.kv_heads:
            raise start.UsageError(f"--kv-heads {args.kv_heads} does not divide --heads {args.heads}: use a divisor")
        if ranks > args.heads:
            raise start.UsageError(f"cannot cut --heads {args.heads} over {ranks} ranks: use at most {args.heads} ranks")
    if args.peer and find_spec(args.peer) is None:
        raise start.UsageError(
            "--peer torch needs PyTorch, which this environment has not: see docs/performance.md for one that has"
        )
    if args.peer and args.what == "mlp" and args.activation != "gelu":
        raise start.UsageError(f"--peer torch times --activation gelu, not {args.activation}")
    if args.peer and args.what in ("attention", "train") and (args.heads % ranks or args.kv_heads % ranks):
        raise start.UsageError(f"--peer torch needs heads and kv-heads that {ranks} ranks divide: use for instance {8 * ranks}")


class Subject(NamedTuple):
    """A layer with what its forward takes after x, its input and output gradient, and its matrix products alone."""

    layer: MLP | Attention
    x: np.ndarray
    dy: np.ndarray
    more: tuple
    products: Callable[[], None]


def subject(args: argparse.Namespace, tp: Axis, tokens: int) -> Subject:
    x, dy = np.random.default_rng(args.seed).standard_normal((2, tokens, args.d_model)).astype(args.dtype)
    weights, bias = drawn(args.seed, args.dtype, 0.1), not args.no_bias
    if args.what == "mlp":
        mlp = MLP(tp, weights, args.d_model, args.d_ff, args.activation, bias)
        return Subject(mlp, x, dy, (), products.mlp(mlp, x))
    attention = Attention(tp, weights, args.d_model, args.heads, args.kv_heads, bias=bias, bias_out=bias)
    return Subject(attention, x, dy, ([tokens],), products.attention(attention, x, [tokens]))


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
    mesh = start.make_mesh(args, comm, tp=comm.size)
    result = {
        "command": "bench",
        "ok": True,
        "ranks": comm.size,
        "mesh": mesh.sizes,
        "dtype": args.dtype,
        "seed": args.seed,
        "config": {
            **({} if args.what in MODULES else {"bias": not args.no_bias}),
            **{k: getattr(args, k) for k in ("what", "tokens", "d_model", *OWN[args.what], "rounds", "threads", "peer")},
        },
    }
    if args.what in MODULES:
        result |= MODULES[args.what].measure(args, comm, in_turn, ratio)
        show = MODULES[args.what].show
    else:
        measure, show = (memory, show_memory) if args.memory else (speed, show_speed)
        result |= measure(args, comm, mesh)
    if comm.rank == 0:
        if args.json:
            print(json.dumps(result))
        else:
            show(result)
    return 0


def speed(args: argparse.Namespace, comm: MPI.Intracomm, mesh: Mesh) -> dict:
    """Seconds and ratios of a step, its products alone, and the peer."""
    it = subject(args, mesh.tp, args.tokens)
    steps = {"matmul_only": it.products, "sharded": partial(step.once, it.layer, it.x, it.dy, *it.more)}
    peer = nullcontext()
    if args.peer:
        from launch.bench_torch import Peer

        peer = Peer(mesh.tp, it.layer, Control(comm), args.threads)
    with threadpool_limits(args.threads, user_api="blas"), peer:
        if args.peer:
            # A ratio between two layers that compute different things would mean nothing.
            peer.require_same(it.x, it.dy, *it.more)
            steps |= {f"torch_{kind}": partial(peer.step, kind, it.x, it.dy) for kind in peer.layers}
        turns = in_turn(steps, args.rounds, comm)
    ratios = {"sharded_to_matmul_only": ratio(turns["sharded"], turns["matmul_only"])}
    if args.peer:
        ratios |= {f"{name}_to_sharded": ratio(s, turns["sharded"]) for name, s in turns.items() if "torch" in name}
    to_products = {name: ratio(s, turns["matmul_only"]) for name, s in turns.items()}
    spread = {name: {"fastest": min(s), "slowest": max(s), "to_products": to_products[name]} for name, s in turns.items()}
    return {"seconds": {name: median(s) for name, s in turns.items()}, "spread": spread, "ratios": ratios}


def memory(args: argparse.Namespace, comm: MPI.Intracomm, mesh: Mesh) -> dict:
    """The peak of what a step holds at once beside weights and input, on rank 0, as NumPy counts it."""
    peaks = []
    for tokens in (max(1, args.tokens * n // 8) for n in (1, 2, 4, 8)):
        it = subject(args, mesh.tp, tokens)
        tracemalloc.start()
        step.once(it.layer, it.x, it.dy, *it.more)
        peaks.append(
            {"tokens": tokens, "peak_bytes": tracemalloc.get_traced_memory()[1], "saved": it.layer.saved_bytes(tokens)}
        )
        tracemalloc.stop()
    return {"memory": peaks}


def title(result: dict) -> str:
    c = result["config"]
    own = f"F {c['d_ff']}, {c['activation']}" if c["what"] == "mlp" else f"{c['heads']} heads, {c['kv_heads']} kv_heads, causal"
    sizes = f"T {c['tokens']}, D {c['d_model']}, {own}, {result['dtype']}"
    return f"{c['what']}, forward and backward: {sizes}, {result['ranks']} ranks"


def show_speed(result: dict) -> None:
    labels = {"matmul_only": "its matrix products alone", "sharded": "rankwise"}
    labels |= {"torch_dtensor": "PyTorch, its tensor parallelism, gloo", "torch_functions": "PyTorch, sums by hand, gloo"}
    report.table(
        f"{title(result)} of {result['config']['threads']} BLAS thread(s), {result['config']['rounds']} rounds in turn",
        ("", "median ms", "fastest", "slowest", "to products"),
        [
            (
                labels[name],
                f"{1e3 * s:.1f}",
                *(f"{1e3 * result['spread'][name][k]:.1f}" for k in ("fastest", "slowest")),
                f"{result['spread'][name]['to_products']:.3f}",
            )
            for name, s in result["seconds"].items()
        ],
    )
    for name, r in result["ratios"].items():
        if name.startswith("torch"):
            print(f"rankwise is {r:.2f} times as fast as {labels[name.removesuffix('_to_sharded')]}")


def show_memory(result: dict) -> None:
    report.table(
        f"{title(result)}: what a step holds at once on rank 0, beside weights and input",
        ("tokens", "peak", "a token", "saved for backward"),
        [
            (
                f"{m['tokens']:,}",
                report.size(m["peak_bytes"]),
                report.size(m["peak_bytes"] / m["tokens"]),
                report.size(m["saved"]),
            )
            for m in result["memory"]
        ],
    )


if __name__ == "__main__":
    start.under_mpirun(options(), "bench", 2)
    start.run(options(), check, main)
