"""`launch.bench trace`: a training step traced and untraced, by turns."""

from __future__ import annotations

import argparse
from time import perf_counter

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from launch import report, start
from launch.bench import train
from launch.bench.sizes import Sizes
from launch.bench.turns import in_turn, ratio
from launch.process import traced
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.watch.trace import Trace
from training.text import VOCABULARY, dealt

BATCHES, CALLS = 60, 200
# What an overhead may be, of a step (issue 8).
MOST = 0.03


def measure(args: argparse.Namespace, sizes: Sizes, opened: None, comm: MPI.Intracomm, mesh: Mesh) -> dict:
    """Seconds and ratios of a step on tp=N: untraced, untraced again (which shows the scatter), and traced.

    The overhead is also worked out: what it costs alone to see a call and a verb, times how many of them a step has.
    """
    S, tokens = sizes.sequence_length, sizes.tokens
    data = np.random.default_rng(args.seed).integers(0, VOCABULARY, tokens + 1)
    control = Control(comm)
    with threadpool_limits(args.threads, user_api="blas"):
        mesh = start.make_mesh(args, comm, dp=1, tp=comm.size)
        it = train.trainer(sizes, mesh, args.dtype, args.seed)
        parts = dealt(data, np.arange(tokens // S), S, 1, 0, 1)
        step = lambda: it.step(parts, tokens, 1e-3)  # noqa: E731
        trace = Trace(comm)

        def seen() -> None:
            traced.see(trace)
            trace.watch(mesh)
            step()
            trace.stop()

        turns = in_turn({"untraced": step, "untraced_again": step, "traced": seen}, sizes.rounds, comm)
    records = trace.finish()
    call, verb = (max(cost) for cost in zip(*control.everyone(_costs()), strict=True))
    ratios = {f"{name}_to_untraced": ratio(turns[name], turns["untraced"]) for name in ("untraced_again", "traced")}
    if records is None:
        return {}
    calls, verbs = (max(len(getattr(r, kind)) for r in records) / (sizes.rounds + 1) for kind in ("spans", "verbs"))
    seconds = {name: float(np.median(s)) for name, s in turns.items()}
    return {
        "seconds": seconds,
        "ratios": ratios,
        "call_seconds": call,
        "verb_seconds": verb,
        "calls_a_step": calls,
        "verbs_a_step": verbs,
        "most": MOST,
        "worked_out": (calls * call + verbs * verb) / seconds["untraced"],
    }


def _costs() -> tuple[float, float]:
    """Seconds that seeing a layer's call and a verb add to them, on this rank alone."""
    room = type("Room", (), {"forward": lambda self: None})
    it, mesh, trace = room(), Mesh(MPI.COMM_SELF, tp=1), Trace(MPI.COMM_SELF)
    x, y = np.ones(1), np.empty(1)

    def fastest() -> tuple[float, float]:
        """The least of many batches: other work of the machine only adds."""
        seconds = []
        for _ in range(BATCHES):
            begun = perf_counter()
            for _ in range(CALLS):
                it.forward()
            middle = perf_counter()
            for _ in range(CALLS):
                mesh.tp.all_reduce(x, out=y)
            seconds.append((middle - begun, perf_counter() - middle))
        return min(s for s, _ in seconds) / CALLS, min(s for _, s in seconds) / CALLS

    bare = fastest()
    trace.watch_layers([room])
    trace.watch(mesh)
    seen = fastest()
    trace.stop()
    return seen[0] - bare[0], seen[1] - bare[1]


def show(result: dict) -> None:
    c, ratios = result["config"], result["ratios"]
    report.table(
        f"A training step: {c['layers']} layers, D {c['d_model']}, F {c['d_ff']}, {c['heads']} heads, {c['tokens']} tokens, "
        f"{result['dtype']}, tp={result['ranks']} of {c['threads']} BLAS thread(s), {c['rounds']} rounds in turn",
        ("", "median ms", "to untraced"),
        [
            ("untraced", f"{1e3 * result['seconds']['untraced']:.2f}", "1.000"),
            *(
                (name, f"{1e3 * result['seconds'][key]:.2f}", f"{ratios[f'{key}_to_untraced']:.3f}")
                for name, key in (("untraced once more", "untraced_again"), ("traced", "traced"))
            ),
        ],
    )
    report.say(
        f"worked out: {result['calls_a_step']:.0f} calls of {1e6 * result['call_seconds']:.2f} us and "
        f"{result['verbs_a_step']:.0f} verbs of {1e6 * result['verb_seconds']:.2f} us more are "
        f"{100 * result['worked_out']:.2f} % of a step; at most {100 * result['most']:.0f} % are promised"
    )
