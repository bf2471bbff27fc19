"""`launch.bench decode`: tokens a second of a pretrained model against the bound that memory's bandwidth sets."""

from __future__ import annotations

import argparse
from statistics import median

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from inference.generate import Generator, make_cache
from inference.sampling import Sampling
from launch import pretrained, report
from launch.bench.sizes import Sizes
from launch.bench.turns import ratio
from launch.measure import products
from launch.terminal import progress
from models.source import Source
from parallel.control import Control
from parallel.mesh import Mesh

PROMPT = "The capital of France is"


def check(args: argparse.Namespace, sizes: Sizes, ranks: int) -> tuple[Source, list[int]]:
    """The model and the ids of a prompt."""
    source = pretrained.opened(args.model, ranks)
    known = pretrained.tokenizer(source)
    return source, [1, 2, 3] if known is None else known.encode(PROMPT)


def measure(args: argparse.Namespace, sizes: Sizes, opened: tuple[Source, list[int]], comm: MPI.Intracomm, mesh: Mesh) -> dict:
    """By round: seconds of decoding a token, seconds in which memory could deliver the weights, and the peer's seconds."""
    (source, prompt), control = opened, Control(comm)
    with threadpool_limits(args.threads, user_api="blas"):
        model, load = pretrained.load(source, mesh.tp, args.dtype, comm.rank == 0)
        generator = Generator(model, mesh, make_cache(model, "contiguous"))
        read = model.read_bytes
        peer = None
        if args.peer and comm.rank == 0:
            from launch.bench.torch_decode import Peer

            peer = Peer(source, args.dtype, args.threads * comm.size)
        seconds: dict[str, list[float]] = {"bound": [], "decode": [], **({"torch": []} if args.peer else {})}
        for _ in progress.items("round", comm.rank == 0)(range(sizes.rounds + 1)):
            control.wait(patient=True)
            seconds["bound"].append(read / products.read_bandwidth(comm))
            control.wait(patient=True)
            timings = generator.timings = type(generator.timings)()
            tokens = [s.token for s in generator.tokens(prompt, Sampling(), sizes.tokens)]
            seconds["decode"].append(timings.decode_seconds / timings.decode_tokens)
            control.wait(patient=True)
            if args.peer:
                seconds["torch"].append(0.0 if peer is None else peer.seconds_per_token(prompt, tokens))
                # Asleep: while rank 0 measures the peer with all cores, the others must not poll.
                control.wait(patient=True)
    every = control.everyone((seconds, load))
    turns = {name: [max(s) for s in zip(*(e[name][1:] for e, _ in every), strict=True)] for name in seconds}
    ratios = {"decode_to_bound": ratio(turns["bound"], turns["decode"])}
    if args.peer:
        ratios["decode_to_torch"] = ratio(turns["torch"], turns["decode"])
    return {
        "model": str(source.path),
        "seconds": {name: median(s) for name, s in turns.items()},
        "tokens_per_second": {name: 1 / median(s) for name, s in turns.items()},
        "turns": turns,
        "ratios": ratios,
        "load_seconds": max(load for _, load in every),
    }


def show(result: dict) -> None:
    labels = {"bound": "bound: reading the weights", "decode": "rankwise", "torch": "Transformers, generate"}
    c, turns = result["config"], result["turns"]
    report.table(
        f"Decoding {result['model']}, {result['dtype']}, {c['tokens']} tokens, {result['ranks']} ranks of {c['threads']} BLAS "
        f"thread(s), {c['rounds']} rounds in turn",
        ("", "tokens/s", "fastest", "slowest", "of the bound"),
        [
            (
                labels[name],
                *(f"{1 / t:.1f}" for t in (s, min(turns[name]), max(turns[name]))),
                f"{np.median(np.array(turns['bound']) / np.array(turns[name])):.1%}",
            )
            for name, s in result["seconds"].items()
        ],
    )
    report.say(f"loading took {result['load_seconds']:.2f} s")
    if "decode_to_torch" in result["ratios"]:
        report.say(f"rankwise is {result['ratios']['decode_to_torch']:.2f} times as fast as Transformers on the same cores")
