"""Speed, measured in one run: what is compared takes turns, so that a busy machine slows all of it alike."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
import json
from importlib.util import find_spec

from mpi4py import MPI

from launch import pretrained
from launch.bench import decode, serving, speculate, trace, train
from launch.bench.layers import memory, show_memory, show_speed, speed
from launch.bench.turns import in_turn, ratio
from launch.options import UsageError, parser, positive
from layers.ops import ACTIVATIONS

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
    "train": train,
    "decode": decode,
    "speculate": speculate,
    "serving": serving,
    "trace": trace,
}


def options() -> argparse.ArgumentParser:
    p = parser(
        "bench",
        "Measure a step against its matrix products alone, and against a peer. 2 ranks unless under mpirun.",
        check_collectives="off",
    )
    p.add_argument(
        "what", choices=tuple(OWN), help="the layer to measure (attention: causal, over one sequence), or a training step"
    )
    p.add_argument("--tokens", type=positive, help="T (2048; train 4096; new ones: decode 64, speculate 128, serving 32)")
    p.add_argument("--d-model", type=positive, help="D (1024; train 512)")
    p.add_argument("--d-ff", type=positive, help="mlp, train: F, cut over the ranks (4096; train 2048)")
    p.add_argument("--activation", choices=tuple(ACTIVATIONS), default="gelu", help="mlp: between the two layers")
    p.add_argument("--heads", type=positive, help="attention, train: H, cut over the ranks; a divisor of D (16; train 8)")
    p.add_argument("--kv-heads", type=positive, help="attention: K, a divisor of H (H)")
    p.add_argument("--layers", type=positive, default=4, help="train: blocks")
    p.add_argument("--sequence-length", type=positive, default=256, help="train: tokens of a sequence")
    p.add_argument("--no-bias", action="store_true", help="mlp, attention: leave the biases out")
    p.add_argument(
        "--rounds",
        type=positive,
        help="turns that each gets; medians are reported (11; train, speculate 5, decode 7, serving 3)",
    )
    p.add_argument("--threads", type=positive, default=1, help="BLAS threads of each rank")
    p.add_argument("--peer", choices=("torch",), help="time the same layer in this library too, on the same ranks")
    pretrained.add_model(p)
    p.add_argument("--memory", action="store_true", help="instead of time: the peak of a step's memory, for T/8 to T tokens")
    return p


def check(args: argparse.Namespace, ranks: int) -> None:
    for name, value in DEFAULTS[args.what].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.what in ("mlp", "train", "trace") and ranks > args.d_ff:
        raise UsageError(f"cannot cut --d-ff {args.d_ff} over {ranks} ranks: use at most {args.d_ff} ranks")
    if args.what in ("train", "trace") and (args.tokens % args.sequence_length or args.tokens // args.sequence_length < ranks):
        least = ranks * args.sequence_length
        raise UsageError(
            f"--tokens {args.tokens} is no multiple of --sequence-length {args.sequence_length} that {ranks} ranks can share: "
            f"use {least}"
        )
    if args.memory and args.what in MODULES:
        raise UsageError(f"--memory is for mlp and attention: launch.bench {args.what} measures time")
    if args.what in ("decode", "speculate", "serving"):
        MODULES[args.what].check(args, ranks)
    if args.peer and args.what == "trace":
        raise UsageError("--peer torch has no part in trace, which compares a step traced and untraced: leave it out")
    if args.peer and args.what == "speculate":
        raise UsageError("--peer torch has no part in speculate, which compares with plain decoding: leave it out")
    if args.what in ("attention", "train", "trace"):
        args.kv_heads = args.kv_heads or args.heads
        if args.d_model % args.heads:
            raise UsageError(f"--heads {args.heads} does not divide --d-model {args.d_model}: use a divisor")
        if args.heads % args.kv_heads:
            raise UsageError(f"--kv-heads {args.kv_heads} does not divide --heads {args.heads}: use a divisor")
        if ranks > args.heads:
            raise UsageError(f"cannot cut --heads {args.heads} over {ranks} ranks: use at most {args.heads} ranks")
    if args.peer and find_spec(args.peer) is None:
        raise UsageError("--peer torch needs PyTorch, which this environment has not: see docs/performance.md for one that has")
    if args.peer and args.what == "mlp" and args.activation != "gelu":
        raise UsageError(f"--peer torch times --activation gelu, not {args.activation}")
    if args.peer and args.what in ("attention", "train") and (args.heads % ranks or args.kv_heads % ranks):
        raise UsageError(f"--peer torch needs heads and kv-heads that {ranks} ranks divide: use for instance {8 * ranks}")


def main(args: argparse.Namespace, comm: MPI.Intracomm, opened: None) -> int:
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


if __name__ == "__main__":
    start.under_mpirun(options(), "bench", 2)
    start.run(options(), check, main)
