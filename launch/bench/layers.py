"""`launch.bench mlp` and `attention`: a layer's step against its matrix products, and the memory that it needs."""

from __future__ import annotations

import argparse
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import NamedTuple

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from launch import report
from launch.bench.turns import in_turn, ratio
from launch.measure import products, step
from layers.attention import Attention
from layers.mlp import MLP
from parallel.axis import Axis
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import drawn


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


def speed(args: argparse.Namespace, comm: MPI.Intracomm, mesh: Mesh) -> dict:
    """Seconds and ratios of a step, its products alone, and the peer."""
    it = subject(args, mesh.tp, args.tokens)
    steps = {"matmul_only": it.products, "sharded": partial(step.once, it.layer, it.x, it.dy, *it.more)}
    peer = nullcontext()
    if args.peer:
        from launch.bench.torch_layers import Peer

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
