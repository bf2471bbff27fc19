"""`launch.bench decode`: tokens a second of a pretrained model against the bound that memory's bandwidth sets."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter, sleep

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from inference.generate import Generator, make_cache
from inference.sampling import Sampling
from launch import pretrained, report, start
from launch.measure import products
from models.build import build
from parallel.control import Control

PROMPT = "The capital of France is"


def check(args: argparse.Namespace, ranks: int) -> None:
    args.source = pretrained.opened(args.model, ranks)
    known = pretrained.tokenizer(args.source)
    args.prompt_ids = [1, 2, 3] if known is None else known.encode(PROMPT)


def measure(args: argparse.Namespace, comm: MPI.Intracomm, in_turn: Callable, ratio: Callable) -> dict:
    """By round: seconds a token of decoding, the seconds in which memory could give the weights, and the peer's."""
    control = Control(comm)
    mesh = start.make_mesh(args, comm, tp=comm.size)
    with threadpool_limits(args.threads, user_api="blas"):
        begun = perf_counter()
        model = build(args.source.config, mesh.tp, args.source.weights(args.dtype))
        load = perf_counter() - begun
        generator = Generator(model, mesh, make_cache(model, "contiguous"))
        read = model.read_bytes
        peer = None
        if args.peer and comm.rank == 0:
            from launch.bench.torch_decode import Peer

            peer = Peer(args.source, args.dtype, args.threads * comm.size)
        seconds: dict[str, list[float]] = {"bound": [], "decode": [], **({"torch": []} if args.peer else {})}
        for _ in range(args.rounds + 1):
            control.wait()
            seconds["bound"].append(read / products.read_bandwidth(comm))
            control.wait()
            timings = generator.timings = type(generator.timings)()
            tokens = [s.token for s in generator.tokens(args.prompt_ids, Sampling(), args.tokens)]
            seconds["decode"].append(timings.decode_seconds / timings.decode_tokens)
            control.wait()
            if args.peer:
                if peer is not None:
                    seconds["torch"].append(peer.seconds_per_token(args.prompt_ids, tokens))
                else:
                    seconds["torch"].append(0.0)
                _wait_asleep(comm)
    every = control.everyone((seconds, load))
    turns = {name: [max(s) for s in zip(*(e[name][1:] for e, _ in every), strict=True)] for name in seconds}
    ratios = {"decode_to_bound": ratio(turns["bound"], turns["decode"])}
    if args.peer:
        ratios["decode_to_torch"] = ratio(turns["torch"], turns["decode"])
    return {
        "model": str(args.source.path),
        "seconds": {name: median(s) for name, s in turns.items()},
        "tokens_per_second": {name: 1 / median(s) for name, s in turns.items()},
        "turns": turns,
        "ratios": ratios,
        "load_seconds": max(load for _, load in every),
    }


def _wait_asleep(comm: MPI.Intracomm) -> None:
    """While rank 0 measures the peer with all cores, the others must not poll."""
    request = comm.Ibarrier()
    while not request.Test():
        sleep(0.005)


def show(result: dict) -> None:
    labels = {"bound": "bound: reading the weights", "decode": "rankwise", "torch": "Transformers, generate"}
    c = result["config"]
    report.table(
        f"Decoding {result['model']}, {result['dtype']}, {c['tokens']} tokens, {result['ranks']} ranks of {c['threads']} BLAS "
        f"thread(s), {c['rounds']} rounds in turn",
        ("", "tokens/s", "fastest", "slowest", "of the bound"),
        [
            (
                labels[name],
                f"{1 / s:.1f}",
                f"{1 / min(result['turns'][name]):.1f}",
                f"{1 / max(result['turns'][name]):.1f}",
                f"{np.median(np.array(result['turns']['bound']) / np.array(result['turns'][name])):.1%}",
            )
            for name, s in result["seconds"].items()
        ],
    )
    print(f"loading took {result['load_seconds']:.2f} s")
    if "decode_to_torch" in result["ratios"]:
        print(f"rankwise is {result['ratios']['decode_to_torch']:.2f} times as fast as Transformers on the same cores")
