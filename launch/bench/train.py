"""`launch.bench train`: a training step, data- and tensor-parallel, against its matrix products; AdamW against a copy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from launch import report, start
from launch.bench import turns
from launch.bench.sizes import Sizes
from launch.bench.turns import ratio
from launch.measure import products, step
from launch.terminal.lines import BYTES, column, say
from models.build import build
from models.config import gpt2_like
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import drawn
from training.text import VOCABULARY, MicroBatch, dealt
from training.trainer import Recipe, Trainer

KINDS = ("dp", "tp")
LR = 1e-3
# What a step of AdamW reads and writes of each weight: w, g, m, v in, w, m, v out. A copy: one in, one out.
ADAMW_ARRAYS, COPY_ARRAYS = 7, 2


def trainer(sizes: Sizes, mesh: Mesh, dtype: str, seed: int, cuts_rows: bool = False, zero: int = 0) -> Trainer:
    config = gpt2_like(VOCABULARY, sizes.d_model, sizes.layers, sizes.heads, sizes.d_ff, sizes.sequence_length, tied=False)
    return Trainer({0: build(config, mesh.tp, drawn(seed, dtype), cuts_rows=cuts_rows)}, mesh, Recipe(zero=zero))


def measure(args: argparse.Namespace, sizes: Sizes, opened: None, comm: MPI.Intracomm, mesh: Mesh) -> dict:
    """Seconds and ratios of steps on dp=N, perhaps with ZeRO too, and on tp=N, of their products, of AdamW and a copy, and of
    the peer."""
    S, tokens, sequences = sizes.sequence_length, sizes.tokens, sizes.tokens // sizes.sequence_length
    data = np.random.default_rng(args.seed).integers(0, VOCABULARY, tokens + 1)
    whole = data[:-1].reshape(sequences, S), data[1:].reshape(sequences, S)
    kinds = (*KINDS, "zero") if args.zero else KINDS
    steps: dict[str, Callable[[], object]] = {}
    # What stays, or is kept for backward, by name; and how the peak of a step is measured.
    held: dict[str, tuple[Callable[[], dict[str, int]], Callable[[Callable], int]]] = {}
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(args.threads, user_api="blas"))
        control = Control(comm)
        for kind in kinds:
            mesh = start.make_mesh(args, comm, **{"dp": 1, "tp": 1, "tp" if kind == "tp" else "dp": comm.size})
            it = trainer(sizes, mesh, args.dtype, args.seed, zero=args.zero if kind == "zero" else 0)
            parts = dealt(data, np.arange(sequences), S, mesh.dp.size, mesh.dp.rank, 1)
            if kind in KINDS:
                model = it.stages[0]
                steps[f"matmul_only_{kind}"] = products.of(model.work(model.batch(parts[0].lengths)), args.dtype)
            steps[f"sharded_{kind}"] = partial(it.step, parts, tokens, LR)
            if kind in KINDS and args.sums != "mpi":
                by_mpi = start.make_mesh(args, comm, sums="mpi", **mesh.sizes)
                steps[f"mpi_{kind}"] = partial(trainer(sizes, by_mpi, args.dtype, args.seed).step, parts, tokens, LR)
            if kind == "tp" and args.sequence_parallel:
                cut = trainer(sizes, start.make_mesh(args, comm, dp=1, tp=comm.size), args.dtype, args.seed, True)
                steps["rows_tp"] = partial(cut.step, parts, tokens, LR)
                for name, of in (("sharded_tp", it), ("rows_tp", cut)):
                    held[name] = partial(kept, of, parts), step.peak_bytes
            if kind != "tp" and args.zero:
                held[f"sharded_{kind}"] = partial(stays, it, parts), step.peak_bytes
            if args.peer:
                from launch.bench.torch_train import TrainPeer

                peer = TrainPeer(kind, control, args.threads, VOCABULARY, sizes, gathers=args.zero == 3)
                stack.enter_context(peer)
                steps[f"torch_{kind}"] = partial(peer.step, *whole)
                if kind != "tp" and args.zero:
                    held[f"torch_{kind}"] = peer.stays, peer.peak_bytes
            if kind == "dp":
                steps["adamw"] = partial(it.optimizer.step, LR)
                flat, room = (np.ones(it.numbering.size, it.dtype) for _ in range(2))
                steps["copy"] = partial(np.copyto, room, flat)
        seconds = turns.in_turn(steps, sizes.rounds, comm)
        # Apart from what is timed, which it would slow down.
        memory = {
            name: report.by_rank(control.everyone(of() | {"peak": peak(steps[name])})) for name, (of, peak) in held.items()
        }
    ratios = {f"sharded_to_matmul_only_{k}": ratio(seconds[f"sharded_{k}"], seconds[f"matmul_only_{k}"]) for k in KINDS}
    ratios["adamw_bandwidth_to_copy"] = ratio(seconds["copy"], seconds["adamw"]) * ADAMW_ARRAYS / COPY_ARRAYS
    if args.sums != "mpi":
        ratios |= {f"mpi_to_sharded_{k}": ratio(seconds[f"mpi_{k}"], seconds[f"sharded_{k}"]) for k in KINDS}
    if args.zero:
        ratios["sharded_zero_to_sharded_dp"] = ratio(seconds["sharded_zero"], seconds["sharded_dp"])
    if args.sequence_parallel:
        ratios["rows_tp_to_sharded_tp"] = ratio(seconds["rows_tp"], seconds["sharded_tp"])
    if args.peer:
        ratios |= {f"torch_{k}_to_sharded": ratio(seconds[f"torch_{k}"], seconds[f"sharded_{k}"]) for k in kinds}
    limits = {name: LIMITS.get(name.split("_")[-1], "copy") for name in seconds}
    return turns.summary(seconds, limits) | {"ratios": ratios, "memory": memory}


def kept(it: Trainer, parts: Sequence[MicroBatch]) -> dict[str, int]:
    return {"kept": it.memory(parts)["predicted_saved"]}


def stays(it: Trainer, parts: Sequence[MicroBatch]) -> dict[str, int]:
    memory = it.memory(parts)
    return {"stays": sum(memory[kind] for kind in ("weights", "gradients", "optimizer"))}


# What is compared with what, by the end of its name.
LIMITS = {"dp": "matmul_only_dp", "zero": "matmul_only_dp", "tp": "matmul_only_tp"}
LABELS = {
    "matmul_only_dp": "dp: the products of a rank's tokens alone",
    "sharded_dp": "dp: rankwise",
    "mpi_dp": "dp: rankwise, sums by MPI alone",
    "torch_dp": "dp: PyTorch, DistributedDataParallel, gloo",
    "sharded_zero": "dp with ZeRO: rankwise",
    "torch_zero": "dp: PyTorch, fully_shard (FSDP), gloo",
    "matmul_only_tp": "tp: the products of a rank's shards alone",
    "sharded_tp": "tp: rankwise",
    "rows_tp": "tp: rankwise, tokens cut between products",
    "mpi_tp": "tp: rankwise, sums by MPI alone",
    "torch_tp": "tp: PyTorch, its tensor parallelism, gloo",
    "adamw": "AdamW alone, all weights",
    "copy": "a copy of the weights",
}


# What a rank holds, as JSON and people name it.
HELD = {"kept": "kept for backward", "stays": "weights, gradients, state"}


def show(result: dict) -> None:
    c = result["config"]
    turns.show(
        f"A training step: {c['layers']} layers, D {c['d_model']}, F {c['d_ff']}, {c['heads']} heads, {c['tokens']} tokens in "
        f"sequences of {c['sequence_length']}, {result['dtype']}, {result['ranks']} ranks",
        LABELS,
        result,
        "to products (or copy)",
    )
    for what, title in HELD.items():
        if rows := {name: m for name, m in result["memory"].items() if f"{what}_bytes_per_rank" in m}:
            most = {key: [max(m[f"{key}_bytes_per_rank"]) for m in rows.values()] for key in (what, "peak")}
            own, peak = column(title, most[what], BYTES), column("peak of a step beside it", most["peak"], BYTES)
            report.table(
                "Memory of the rank that holds most",
                ("", own[0], peak[0]),
                zip((LABELS[name] for name in rows), own[1], peak[1], strict=True),
            )
    for kind in KINDS:
        if gained := result["ratios"].get(f"mpi_to_sharded_{kind}"):
            say(f"{kind}: with sums by MPI alone a step takes {gained:.3f} times as long")
    say(f"AdamW moves {result['ratios']['adamw_bandwidth_to_copy']:.2f} times the bytes a second that a copy does")
