"""`launch.bench mlp` and `attention`: a layer's step against its matrix products, and the memory that it needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from launch import report
from launch.bench import turns
from launch.bench.sizes import Sizes
from launch.bench.turns import ratio
from launch.measure import products, step
from launch.terminal.lines import BYTES, column
from layers.attention import Attention
from layers.batch import Batch
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


def subject(args: argparse.Namespace, sizes: Sizes, tp: Axis, tokens: int) -> Subject:
    x, dy = np.random.default_rng(args.seed).standard_normal((2, tokens, sizes.d_model)).astype(args.dtype)
    weights, bias = drawn(args.seed, args.dtype, 0.1), not args.no_bias
    if args.what == "mlp":
        mlp = MLP(tp, weights, sizes.d_model, sizes.d_ff, args.activation, bias)
        return Subject(mlp, x, dy, (), products.of(mlp.work(tokens), args.dtype))
    attention = Attention(tp, weights, sizes.d_model, sizes.heads, sizes.kv_heads, bias=bias, bias_out=bias)
    batch = Batch([tokens])
    return Subject(attention, x, dy, (batch,), products.of(attention.work(batch), args.dtype))


def measure(args: argparse.Namespace, sizes: Sizes, opened: None, comm: MPI.Intracomm, mesh: Mesh) -> dict:
    return memory(args, sizes, mesh) if args.memory else speed(args, sizes, comm, mesh)


def speed(args: argparse.Namespace, sizes: Sizes, comm: MPI.Intracomm, mesh: Mesh) -> dict:
    """Seconds and ratios of a step, its products alone, and the peer."""
    it = subject(args, sizes, mesh.tp, sizes.tokens)
    steps = {"matmul_only": it.products, "sharded": step.of(it.layer, mesh, it.x, it.dy, *it.more)}
    peer = nullcontext()
    if args.peer:
        from launch.bench.torch_layers import Peer

        peer = Peer(mesh, it.layer, Control(comm), args.threads)
    with threadpool_limits(args.threads, user_api="blas"), peer:
        if args.peer:
            # A ratio between two layers that compute different things would mean nothing.
            peer.require_same(it.x, it.dy, *it.more)
            steps |= {f"torch_{kind}": partial(peer.step, kind, it.x, it.dy) for kind in peer.layers}
        seconds = turns.in_turn(steps, sizes.rounds, comm)
    ratios = {"sharded_to_matmul_only": ratio(seconds["sharded"], seconds["matmul_only"])}
    if args.peer:
        ratios |= {f"{name}_to_sharded": ratio(s, seconds["sharded"]) for name, s in seconds.items() if "torch" in name}
    return turns.summary(seconds, dict.fromkeys(seconds, "matmul_only")) | {"ratios": ratios}


def memory(args: argparse.Namespace, sizes: Sizes, mesh: Mesh) -> dict:
    """The peak of what a step holds at once beside weights and input, on rank 0, as NumPy counts it."""
    peaks = []
    for tokens in (max(1, sizes.tokens * n // 8) for n in (1, 2, 4, 8)):
        it = subject(args, sizes, mesh.tp, tokens)
        once = step.of(it.layer, mesh, it.x, it.dy, *it.more)
        peaks.append(
            {"tokens": tokens, "peak_bytes": step.peak_bytes(once), "saved": it.layer.saved_bytes(*(it.more or (tokens,)))}
        )
    return {"memory": peaks}


def title(result: dict) -> str:
    c = result["config"]
    own = f"F {c['d_ff']}, {c['activation']}" if c["what"] == "mlp" else f"{c['heads']} heads, {c['kv_heads']} kv_heads, causal"
    sizes = f"T {c['tokens']}, D {c['d_model']}, {own}, {result['dtype']}"
    return f"{c['what']}, forward and backward: {sizes}, {result['ranks']} ranks"


def show(result: dict) -> None:
    show_memory(result) if "memory" in result else show_speed(result)


def show_speed(result: dict) -> None:
    labels = {"matmul_only": "its matrix products alone", "sharded": "rankwise"}
    labels |= {"torch_dtensor": "PyTorch, its tensor parallelism, gloo", "torch_functions": "PyTorch, sums by hand, gloo"}
    turns.show(title(result), labels, result)


def show_memory(result: dict) -> None:
    rows = result["memory"]
    columns = [
        column("peak", [m["peak_bytes"] for m in rows], BYTES),
        column("a token", [m["peak_bytes"] / m["tokens"] for m in rows], BYTES),
        column("saved for backward", [m["saved"] for m in rows], BYTES),
    ]
    report.table(
        f"{title(result)}: what a step holds at once on rank 0, beside weights and input",
        ("tokens", *(heading for heading, _ in columns)),
        [(f"{m['tokens']:,}", *cells) for m, *cells in zip(rows, *(cells for _, cells in columns), strict=True)],
    )
