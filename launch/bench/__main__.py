"""Speed, measured in one run: what is compared takes turns, so that a busy machine slows all of it alike."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from importlib.util import find_spec

from mpi4py import MPI

from launch import pretrained, report
from launch.bench import context, decode, layers, plan, serving, speculate, trace, train
from launch.bench.sizes import Sizes, settled
from launch.options import UsageError, add_zero, only_with, parser, positive
from layers.ops import ACTIVATIONS

# What measures a subject, and the options that are its own.
SUBJECTS = {
    "mlp": (layers, ("d_ff", "activation")),
    "attention": (layers, ("heads", "kv_heads")),
    "context": (context, ("heads", "kv_heads")),
    "train": (train, ("d_ff", "heads", "layers", "sequence_length")),
    "decode": (decode, ()),
    "speculate": (speculate, ()),
    "serving": (serving, ()),
    "trace": (trace, ("d_ff", "heads", "layers", "sequence_length")),
    "plan": (plan, ("heads", "layers", "sequence_length")),
}


def options() -> argparse.ArgumentParser:
    p = parser(
        "bench",
        "Measure a step against its matrix products alone, and against a peer. 2 ranks unless under mpirun.",
        (
            "python -m launch.bench mlp",
            "mpirun -n 4 python -m launch.bench attention --heads 32 --tokens 4096",
            "python -m launch.bench mlp --memory",
        ),
        needs="WHAT",
        check_collectives="off",
    )
    p.add_argument(
        "what",
        metavar="WHAT",
        choices=tuple(SUBJECTS),
        help="a layer: mlp, or attention, causal, over one sequence, which context cuts over cp; a training step: train; "
        "SmolLM2, or --model: decode, speculate, serving; what a trace costs: trace; a step beside what is planned of it: plan",
    )
    p.add_argument(
        "--tokens",
        type=positive,
        help="T (default: 2048; context 8192; train 4096; new ones: decode 64, speculate 128, serving 32)",
    )
    p.add_argument("--d-model", type=positive, help="D (default: 1024; context 256; train 512)")
    p.add_argument("--d-ff", type=positive, help="mlp, train: F, cut over the ranks (default: 4096; train 2048)")
    p.add_argument("--activation", choices=tuple(ACTIVATIONS), default="gelu", help="mlp: between the two layers")
    p.add_argument(
        "--heads",
        type=positive,
        help="attention, context, train: H, a divisor of D; cut over ranks, not by context (default: 16; context 4; train 8)",
    )
    p.add_argument("--kv-heads", type=positive, help="attention, context: K, a divisor of H (default: H)")
    p.add_argument("--layers", type=positive, default=4, help="train: blocks")
    p.add_argument("--sequence-length", type=positive, default=256, help="train: tokens of a sequence")
    p.add_argument("--no-bias", action="store_true", help="mlp, attention: leave the biases out")
    p.add_argument(
        "--rounds",
        type=positive,
        help="turns that each gets; medians are reported (default: 11; context, decode 7, train, speculate 5, serving 3)",
    )
    p.add_argument("--sequence-parallel", action="store_true", help="train: also with tokens cut over tp: time and memory")
    add_zero(p, "dp, beside dp alone: train")
    p.add_argument("--threads", type=positive, default=1, help="BLAS threads of each rank")
    p.add_argument("--peer", choices=("torch",), help="time the same layer in this library too, on the same ranks")
    pretrained.add_model(p)
    p.add_argument("--memory", action="store_true", help="instead of time: the peak of a step's memory, for T/8 to T tokens")
    for name in dict.fromkeys(option for _, own in SUBJECTS.values() for option in own):
        only_with(p, f"--{name.replace('_', '-')}", what=tuple(w for w, (_, own) in SUBJECTS.items() if name in own))
    only_with(p, "--d-model", what=("mlp", "attention", "context", "train", "trace", "plan"))
    only_with(p, "--no-bias", what=("mlp", "attention"))
    only_with(p, "--memory", what=("mlp", "attention", "context"))
    only_with(p, "--sequence-parallel", "--zero", what=("train",))
    only_with(p, "--model", what=("decode", "speculate", "serving"))
    only_with(p, "--rounds", "--peer", memory=False)
    return p


def check(args: argparse.Namespace, ranks: int) -> tuple[Sizes, object]:
    """The sizes, and what the subject has opened."""
    what, s, (module, _) = args.what, settled(args), SUBJECTS[args.what]
    if what in ("mlp", "train", "trace") and ranks > s.d_ff:
        raise UsageError(f"cannot cut --d-ff {s.d_ff} over {ranks} ranks: use at most {s.d_ff} ranks")
    if what in ("train", "trace", "plan") and (s.tokens % s.sequence_length or s.tokens // s.sequence_length < ranks):
        raise UsageError(
            f"--tokens {s.tokens} is no multiple of --sequence-length {s.sequence_length} that {ranks} ranks can share: "
            f"use {ranks * s.sequence_length}"
        )
    opened = module.check(args, s, ranks) if what in ("decode", "speculate", "serving", "plan") else None
    alone = {
        "trace": "compares a step traced and untraced",
        "plan": "compares a step planned and taken",
        "context": "compares with one process",
        "speculate": "compares with plain decoding",
    }
    if args.peer and what in alone:
        raise UsageError(f"--peer torch has no part in {what}, which {alone[what]}: leave it out")
    if what in ("attention", "context", "train", "trace", "plan"):
        if s.d_model % s.heads:
            raise UsageError(f"--heads {s.heads} does not divide --d-model {s.d_model}: use a divisor")
        if s.heads % s.kv_heads:
            raise UsageError(f"--kv-heads {s.kv_heads} does not divide --heads {s.heads}: use a divisor")
        if ranks > s.heads and what != "context":
            raise UsageError(f"cannot cut --heads {s.heads} over {ranks} ranks: use at most {s.heads} ranks")
    if what == "plan" and ranks > s.layers:
        raise UsageError(f"cannot put --layers {s.layers} on pp={ranks}: use --layers {ranks} or more")
    if args.peer and find_spec(args.peer) is None:
        raise UsageError("--peer torch needs PyTorch, which this environment has not: see docs/performance.md for one that has")
    if args.peer and what == "mlp" and args.activation != "gelu":
        raise UsageError(f"--peer torch times --activation gelu, not {args.activation}")
    if args.peer and what in ("attention", "train") and (s.heads % ranks or s.kv_heads % ranks):
        raise UsageError(f"--peer torch needs heads and kv-heads that {ranks} ranks divide: use for instance {8 * ranks}")
    return s, opened


def main(args: argparse.Namespace, comm: MPI.Intracomm, task: tuple[Sizes, object]) -> int:
    (sizes, opened), (module, own) = task, SUBJECTS[args.what]
    mesh = start.make_mesh(args, comm, tp=comm.size)
    said = vars(args) | sizes._asdict()
    config = {k: said[k] for k in ("what", "tokens", "d_model", *own, "rounds", "threads", "peer")}
    if module is layers:
        config["bias"] = not args.no_bias
    measured = module.measure(args, sizes, opened, comm, mesh)
    if comm.rank:
        return 0
    result = report.header("bench", args, mesh) | {"config": config} | measured
    return report.publish(args.json, result, lambda: module.show(result), agreed=None)


if __name__ == "__main__":
    start.under_mpirun(options(), "bench", 2)
    start.run(options(), check, main)
