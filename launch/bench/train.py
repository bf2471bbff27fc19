"""`launch.bench train`: a training step, data- and tensor-parallel, against its matrix products; AdamW against a copy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from launch import report, start
from launch.bench import turns
from launch.bench.sizes import Sizes
from launch.bench.turns import ratio
from launch.measure import products, step
from launch.terminal.lines import BYTES, column, say
from layers.stage import Stage
from models.build import build
from models.config import gpt2_like
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import drawn
from training.text import VOCABULARY, dealt
from training.trainer import Recipe, Trainer

KINDS = ("dp", "tp")
# What a step of AdamW reads and writes of each weight: w, g, m, v in, w, m, v out. A copy: one in, one out.
ADAMW_ARRAYS, COPY_ARRAYS = 7, 2


def trainer(sizes: Sizes, mesh: Mesh, dtype: str, seed: int, cuts_rows: bool = False) -> Trainer:
    config = gpt2_like(VOCABULARY, sizes.d_model, sizes.layers, sizes.heads, sizes.d_ff, sizes.sequence_length, tied=False)
    return Trainer({0: build(config, mesh.tp, drawn(seed, dtype), cuts_rows=cuts_rows)}, mesh, Recipe())


def measure(args: argparse.Namespace, sizes: Sizes, opened: None, comm: MPI.Intracomm, mesh: Mesh) -> dict:
    """Seconds and ratios of steps on dp=N and on tp=N, of their products, of AdamW and a copy, and of the peer."""
    S, tokens = sizes.sequence_length, sizes.tokens
    sequences = tokens // S
    data = np.random.default_rng(args.seed).integers(0, VOCABULARY, tokens + 1)
    steps: dict[str, Callable[[], object]] = {}
    held: dict[str, Stage] = {}
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(args.threads, user_api="blas"))
        control = Control(comm)
        for kind in KINDS:
            mesh = start.make_mesh(args, comm, **{"dp": 1, "tp": 1, kind: comm.size})
            it = trainer(sizes, mesh, args.dtype, args.seed)
            parts = dealt(data, np.arange(sequences), S, mesh.dp.size, mesh.dp.rank, 1)
            model = it.stages[0]
            steps[f"matmul_only_{kind}"] = products.of(model.work(model.batch(parts[0].lengths)), args.dtype)
            steps[f"sharded_{kind}"] = lambda it=it, parts=parts: it.step(parts, tokens, 1e-3)
            if kind == "tp" and args.sequence_parallel:
                cut = trainer(sizes, start.make_mesh(args, comm, dp=1, tp=comm.size), args.dtype, args.seed, True)
                steps["rows_tp"] = lambda cut=cut, parts=parts: cut.step(parts, tokens, 1e-3)
                held = {"sharded_tp": it.stages[0], "rows_tp": cut.stages[0]}
            if args.peer:
                from launch.bench.torch_train import TrainPeer

                peer = TrainPeer(kind, control, args.threads, VOCABULARY, sizes)
                stack.enter_context(peer)
                ids, targets = data[:-1].reshape(sequences, S), data[1:].reshape(sequences, S)
                steps[f"torch_{kind}"] = lambda peer=peer, ids=ids, targets=targets: peer.step(ids, targets)
            if kind == "dp":
                steps["adamw"] = lambda it=it: it.optimizer.step(1e-3)
                flat, room = it.flat.data, np.empty_like(it.flat.data)
                steps["copy"] = lambda flat=flat, room=room: np.copyto(room, flat)
        seconds = turns.in_turn(steps, sizes.rounds, comm)
        # Apart from what is timed, which it would slow down.
        memory = {
            name: {
                "kept_bytes_per_rank": control.everyone(model.saved_bytes(model.batch([S] * sequences))),
                "peak_bytes_per_rank": control.everyone(step.peak_bytes(steps[name])),
            }
            for name, model in held.items()
        }
    ratios = {f"sharded_to_matmul_only_{k}": ratio(seconds[f"sharded_{k}"], seconds[f"matmul_only_{k}"]) for k in KINDS}
    ratios["adamw_bandwidth_to_copy"] = ratio(seconds["copy"], seconds["adamw"]) * ADAMW_ARRAYS / COPY_ARRAYS
    if args.peer:
        ratios |= {f"torch_{k}_to_sharded": ratio(seconds[f"torch_{k}"], seconds[f"sharded_{k}"]) for k in KINDS}
    limits = {name: f"matmul_only_{name[-2:]}" if name[-2:] in KINDS else "copy" for name in seconds}
    if args.sequence_parallel:
        ratios["rows_tp_to_sharded_tp"] = ratio(seconds["rows_tp"], seconds["sharded_tp"])
    return turns.summary(seconds, limits) | {"ratios": ratios, "memory": memory}


LABELS = {
    "matmul_only_dp": "dp: the products of a rank's tokens alone",
    "sharded_dp": "dp: rankwise",
    "torch_dp": "dp: PyTorch, DistributedDataParallel, gloo",
    "matmul_only_tp": "tp: the products of a rank's shards alone",
    "sharded_tp": "tp: rankwise",
    "rows_tp": "tp: rankwise, tokens cut between products",
    "torch_tp": "tp: PyTorch, its tensor parallelism, gloo",
    "adamw": "AdamW alone, all weights",
    "copy": "a copy of the weights",
}


def show(result: dict) -> None:
    c = result["config"]
    turns.show(
        f"A training step: {c['layers']} layers, D {c['d_model']}, F {c['d_ff']}, {c['heads']} heads, {c['tokens']} tokens in "
        f"sequences of {c['sequence_length']}, {result['dtype']}, {result['ranks']} ranks",
        LABELS,
        result,
        "to products (or copy)",
    )
    if memory := result["memory"]:
        most = lambda key: [max(m[key]) for m in memory.values()]  # noqa: E731
        kept = column("kept for backward", most("kept_bytes_per_rank"), BYTES)
        peak = column("peak", most("peak_bytes_per_rank"), BYTES)
        report.table(
            "What a step holds on the rank that holds most, beside weights, gradients and optimizer state",
            ("", kept[0], peak[0]),
            zip((LABELS[name] for name in memory), kept[1], peak[1], strict=True),
        )
    say(f"AdamW moves {result['ratios']['adamw_bandwidth_to_copy']:.2f} times the bytes a second that a copy does")
