"""`launch.bench train`: a training step, data- and tensor-parallel, against its matrix products; AdamW against a copy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from launch import report, start
from launch.measure import products
from layers.attention import Attention
from models.build import build
from models.config import gpt2_like
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import drawn
from training.text import VOCABULARY, dealt
from training.trainer import Plan, Trainer

KINDS = ("dp", "tp")
# What a step of AdamW reads and writes of each weight: w, g, m, v in, w, m, v out. A copy: one in, one out.
ADAMW_ARRAYS, COPY_ARRAYS = 7, 2


def trainer(args: argparse.Namespace, mesh: Mesh) -> Trainer:
    sizes = (VOCABULARY, args.d_model, args.layers, args.heads, args.d_ff, args.sequence_length)
    return Trainer(build(gpt2_like(*sizes, tied=False), mesh.tp, drawn(args.seed, args.dtype)), mesh, Plan())


def step_products(it: Trainer, tokens: int, sequence_length: int) -> Callable[[], None]:
    """The matrix products of a step on this rank's tokens, alone."""
    model = it.model
    table = model.embedding.table_vD
    x = np.ones((tokens, table.data.shape[1]), table.data.dtype)
    lengths = [sequence_length] * (tokens // sequence_length)
    steps = []
    for block in model.blocks:
        assert isinstance(block.attention, Attention)
        steps += [products.attention(block.attention, x, lengths), products.mlp(block.mlp, x)]
    return products.together(*steps, products.linear(x, model.head.W_Io.data))


def measure(args: argparse.Namespace, comm: MPI.Intracomm, in_turn: Callable, ratio: Callable) -> dict:
    """Seconds and ratios of steps on dp=N and on tp=N, of their products, of AdamW and a copy, and of the peer."""
    S = args.sequence_length
    sequences = args.tokens // S
    data = np.random.default_rng(args.seed).integers(0, VOCABULARY, args.tokens + 1)
    steps: dict[str, Callable[[], object]] = {}
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(args.threads, user_api="blas"))
        control = Control(comm)
        for kind in KINDS:
            mesh = start.make_mesh(args, comm, **{"dp": 1, "tp": 1, kind: comm.size})
            it = trainer(args, mesh)
            parts = dealt(data, np.arange(sequences), S, mesh.dp.size, mesh.dp.rank, 1)
            steps[f"matmul_only_{kind}"] = step_products(it, len(parts[0].ids), S)
            steps[f"sharded_{kind}"] = lambda it=it, parts=parts: it.step(parts, args.tokens, 1e-3)
            if args.peer:
                from launch.bench.torch_train import TrainPeer

                sizes = {"d_model": args.d_model, "d_ff": args.d_ff, "layers": args.layers, "heads": args.heads}
                peer = TrainPeer(
                    kind, comm.rank, comm.size, control, args.threads, vocab=VOCABULARY, sequence_length=S, **sizes
                )
                stack.enter_context(peer)
                ids, targets = data[:-1].reshape(sequences, S), data[1:].reshape(sequences, S)
                steps[f"torch_{kind}"] = lambda peer=peer, ids=ids, targets=targets: peer.step(ids, targets)
            if kind == "dp":
                steps["adamw"] = lambda it=it: it.optimizer.step(1e-3)
                flat, room = it.flat.data, np.empty_like(it.flat.data)
                steps["copy"] = lambda flat=flat, room=room: np.copyto(room, flat)
        turns = in_turn(steps, args.rounds, comm)
    ratios = {f"sharded_to_matmul_only_{k}": ratio(turns[f"sharded_{k}"], turns[f"matmul_only_{k}"]) for k in KINDS}
    ratios["adamw_bandwidth_to_copy"] = ratio(turns["copy"], turns["adamw"]) * ADAMW_ARRAYS / COPY_ARRAYS
    if args.peer:
        ratios |= {f"torch_{k}_to_sharded": ratio(turns[f"torch_{k}"], turns[f"sharded_{k}"]) for k in KINDS}
    against = {name: f"matmul_only_{name[-2:]}" if name[-2:] in KINDS else "copy" for name in turns}
    spread = {
        name: {"fastest": min(s), "slowest": max(s), "to_products": ratio(s, turns[against[name]])} for name, s in turns.items()
    }
    return {"seconds": {name: float(np.median(s)) for name, s in turns.items()}, "spread": spread, "ratios": ratios}


LABELS = {
    "matmul_only_dp": "dp: the products of a rank's tokens alone",
    "sharded_dp": "dp: rankwise",
    "torch_dp": "dp: PyTorch, DistributedDataParallel, gloo",
    "matmul_only_tp": "tp: the products of a rank's shards alone",
    "sharded_tp": "tp: rankwise",
    "torch_tp": "tp: PyTorch, its tensor parallelism, gloo",
    "adamw": "AdamW alone, all weights",
    "copy": "a copy of the weights",
}


def show(result: dict) -> None:
    c = result["config"]
    report.table(
        f"A training step: {c['layers']} layers, D {c['d_model']}, F {c['d_ff']}, {c['heads']} heads, {c['tokens']} tokens in "
        f"sequences of {c['sequence_length']}, {result['dtype']}, {result['ranks']} ranks of {c['threads']} BLAS thread(s), "
        f"{c['rounds']} rounds in turn",
        ("", "median ms", "fastest", "slowest", "to products (or copy)"),
        [
            (
                LABELS[name],
                f"{1e3 * s:.1f}",
                *(f"{1e3 * result['spread'][name][k]:.1f}" for k in ("fastest", "slowest")),
                f"{result['spread'][name]['to_products']:.3f}",
            )
            for name, s in result["seconds"].items()
        ],
    )
    print(f"AdamW moves {result['ratios']['adamw_bandwidth_to_copy']:.2f} times the bytes a second that a copy does")
    for name, r in result["ratios"].items():
        if name.startswith("torch"):
            print(f"rankwise is {r:.2f} times as fast as {LABELS[name.removesuffix('_to_sharded')]}")
