"""`launch.bench context`: causal attention over one long sequence that is cut over cp, against one process with all of it.

Measured is what lies between the projections: q, k, v -> o, and back. No projection, so no other collective, hides a hop.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from launch import report, start
from launch.bench import turns
from launch.bench.sizes import Sizes
from launch.bench.turns import ratio
from launch.measure import step
from launch.terminal.lines import BYTES, column, say
from layers.batch import Batch
from layers.context import KINDS, Core, Local, Ring, runs_of
from layers.pieces import zigzag
from parallel.axis import Axis
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.pending import Pending


class Still:
    """An axis on which nothing travels: what a rank gets is there already. Of a ring it leaves the computation alone."""

    def __init__(self, axis: Axis) -> None:
        self.name, self.size, self.rank = axis.name, axis.size, axis.rank

    def start_shift(self, x: np.ndarray, counts: Sequence[int]) -> Pending:
        coming = counts[(self.rank - 1) % self.size]
        return Pending(x if coming == len(x) else np.ones((coming, *x.shape[1:]), x.dtype))


def subject(args: argparse.Namespace, sizes: Sizes, batch: Batch, around: Local) -> Callable[[], None]:
    """Forward and backward on this rank's tokens."""
    H, K = sizes.heads, sizes.kv_heads
    E, T, core = sizes.d_model // H, batch.tokens, Core(runs_of([H // K] * K), (sizes.d_model // H) ** -0.5, True)
    random = np.random.default_rng(args.seed)
    q, do = random.standard_normal((2, T, H, E)).astype(args.dtype)
    k, v = random.standard_normal((2, T, K, E)).astype(args.dtype)
    into = tuple(np.zeros_like(a) for a in (q, k, v))

    def run() -> None:
        o, kept = around.forward(q, k, v, core, batch)
        around.backward(do, o, (q, k, v), into, core, batch, kept)

    return run


def cut(tokens: int, cp: Axis) -> Batch:
    return Batch([tokens], None, None, zigzag([tokens], cp.size), cp.rank)


def measure(args: argparse.Namespace, sizes: Sizes, opened: None, comm: MPI.Intracomm, mesh: Mesh) -> dict:
    mesh = start.make_mesh(args, comm, cp=comm.size, tp=1)
    with threadpool_limits(args.threads, user_api="blas"):
        return {"mesh": mesh.sizes} | (memory(args, sizes, mesh) if args.memory else speed(args, sizes, comm, mesh))


def speed(args: argparse.Namespace, sizes: Sizes, comm: MPI.Intracomm, mesh: Mesh) -> dict:
    """Seconds and ratios: one process with the whole sequence, while the others wait, and every rank with all of it at once, as
    cores that work together may each be slower; the ring's computation; each kind."""
    batch, p = cut(sizes.tokens, mesh.cp), mesh.cp.size
    whole = subject(args, sizes, Batch([sizes.tokens]), Local())
    steps = {"alone": whole if comm.rank == 0 else lambda: None, "each": whole}
    around = {"blocks": Ring(Still(mesh.cp))} | {kind: of(mesh.cp) for kind, of in KINDS.items()}
    if p > sizes.heads:
        del around["ulysses"]
    steps |= {name: subject(args, sizes, batch, it) for name, it in around.items()}
    seconds = turns.in_turn(steps, sizes.rounds, comm)
    rows = [row for (verb, *_), row in mesh.ledger.rows.items() if verb == "shift"]
    hidden = [(sum(row.seconds for row in rows), sum(row.hidden_seconds for row in rows))]
    shares = [gone / (inside + gone) if gone else 0.0 for every in Control(comm).everyone(hidden) for inside, gone in every]
    ratios = {f"{name}_to_share_of_{of}": p * ratio(seconds[name], seconds[of]) for name in around for of in ("alone", "each")}
    ratios["ring_to_blocks"] = ratio(seconds["ring"], seconds["blocks"])
    return turns.summary(seconds, dict.fromkeys(seconds, "alone")) | {"ratios": ratios, "hidden_share_per_rank": shares}


def memory(args: argparse.Namespace, sizes: Sizes, mesh: Mesh) -> dict:
    """The most that a step holds at once beside q, k, v and their gradients, on rank 0, as NumPy counts it."""
    rows = []
    for tokens in (max(1, sizes.tokens * n // 8) for n in (1, 2, 4, 8)):
        batch = cut(tokens, mesh.cp)
        held = {kind: step.peak_bytes(subject(args, sizes, batch, KINDS[kind](mesh.cp))) for kind in ("ring", "gather")}
        alone = step.peak_bytes(subject(args, sizes, Batch([tokens]), Local()))
        rows.append({"tokens": tokens, "alone_bytes": alone, **{f"{kind}_bytes": n for kind, n in held.items()}})
    return {"memory": rows}


LABELS = {
    "alone": "one process, all tokens",
    "each": "every rank at once, all tokens",
    "blocks": "the ring's computation alone",
    "ring": "ring",
    "ulysses": "Ulysses",
    "gather": "gather",
}


def title(result: dict) -> str:
    c = result["config"]
    width = c["d_model"] // c["heads"]
    sizes = f"T {c['tokens']}, {c['heads']} heads, {c['kv_heads']} kv_heads, E {width}, {result['dtype']}"
    return f"Causal attention between the projections, forward and backward, zigzag: {sizes}, cp={result['ranks']}"


def show(result: dict) -> None:
    if "memory" in result:
        rows = result["memory"]
        columns = [column(name, [row[f"{name}_bytes"] for row in rows], BYTES) for name in ("alone", "ring", "gather")]
        report.table(
            f"{title(result)}: what a step holds at once on rank 0, beside q, k, v and their gradients",
            ("tokens", *(heading for heading, _ in columns)),
            [(f"{row['tokens']:,}", *(cells[n] for _, cells in columns)) for n, row in enumerate(rows)],
        )
        return
    turns.show(title(result), LABELS, result, "to one process")
    r = result["ratios"]
    times = lambda name: f"{r[f'{name}_to_share_of_alone']:.3f} times ({r[f'{name}_to_share_of_each']:.3f} beside others)"  # noqa: E731
    say(
        f"Of its share of one process' time, the ring takes {times('ring')}, its computation alone {times('blocks')}. Of "
        f"the time that hops are on their way, {100 * min(result['hidden_share_per_rank']):.1f} % or more is hidden."
    )
