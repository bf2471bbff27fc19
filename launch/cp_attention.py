"""Context-parallel attention (tokens cut over ranks; ring, Ulysses or gather), compared with the reference, counted, timed."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from launch import report
from launch.explain import view
from launch.measure import attention, step
from launch.measure.attention import Layer
from launch.options import UsageError, axis_sizes, parser, settled
from launch.terminal.lines import BYTES, column
from layers import pieces
from layers.batch import Batch
from layers.context import KINDS, Local, all_spans
from layers.latent_attention import LatentAttention
from layers.pieces import LAYOUTS
from parallel.control import Control
from parallel.ledger import wire_bytes
from parallel.mesh import Mesh
from plan.dry import DryAxis, dry_weights
from reference.compare import Comparison


def options() -> argparse.ArgumentParser:
    p = parser(
        "cp_attention",
        "Run context-parallel attention, forward and backward, and compare it with a reference.",
        (
            "mpirun -n 4 python -m launch.cp_attention --kind ring --sequences 1,7,64,129",
            "mpirun -n 4 python -m launch.cp_attention --mesh cp=2,tp=2 --attention mha",
            "mpirun -n 4 python -m launch.cp_attention --kind ulysses --layout contiguous",
        ),
    )
    p.add_argument("--kind", choices=KINDS, default="ring", help="how tokens that are cut over cp attend to one another")
    p.add_argument("--layout", choices=LAYOUTS, default="zigzag", help="which tokens of a sequence each rank of cp has")
    p.add_argument("--mesh", type=axis_sizes, help="ranks along cp and tp, as in cp=2,tp=2 (default: all along cp)")
    attention.add_options(p, "--attention")
    view.add_options(p)
    return p


class Task(NamedTuple):
    """Ranks along each axis, and the sizes."""

    axes: dict[str, int]
    sizes: attention.Sizes


def check(args: argparse.Namespace, ranks: int) -> Task:
    view.check(args, ranks)
    axes = settled(args.mesh, ranks, rest="cp", along=("cp", "tp"))
    sizes = attention.check(args, "--attention")
    H, tp, cp = args.heads, axes["tp"], axes["cp"]
    if tp > H:
        raise UsageError(f"cannot cut --heads {H} over tp={tp}: use at most tp={H}")
    if args.kind == "ulysses" and cp > H // tp and sizes.d_latent is None:
        of = f"{H // tp} of {H} heads" if tp > 1 else f"{H} heads"
        raise UsageError(f"cannot cut {of} over cp={cp}: use --kind ring")
    return Task(axes, sizes)


def compared_kinds(args: argparse.Namespace, sizes: attention.Sizes, mesh: Mesh, control: Control) -> list[dict]:
    """What each kind would send, keep and compute for these sizes, by the layers' closed forms; None where it cannot serve."""
    tp, cp = (DryAxis(axis.name, axis.size, axis.rank) for axis in (mesh.tp, mesh.cp))
    batch, b = attention.batch(args, sizes, mesh, args.layout), np.dtype(args.dtype).itemsize
    rows = []
    for kind, of in KINDS.items():
        # Latents are gathered, whatever the kind.
        most = args.heads // tp.size if kind == "ulysses" and sizes.d_latent is None else None
        row = {"kind": kind, "most_ranks": most}
        if most is None or cp.size <= most:
            layer = attention.build(args, sizes, tp, of(cp), dry_weights(args.dtype))
            sent = [t for t in layer.traffic(batch) if t.axis == cp.name]
            pairs, heads = work(layer, of(cp), batch)
            here = {
                "message_bytes": sum(t.message_bytes for t in sent),
                "wire_bytes": sum(wire_bytes(t.verb, t.message_bytes, cp.size) for t in sent),
                "saved_bytes": layer.saved_bytes(batch),
                "key_bytes": keys_held(layer, of(cp), batch) * b,
                "work": pairs * heads,
            }
            every = control.everyone(here)
            row |= {f"{name}_per_rank": [rank[name] for rank in every] for name in here if name != "work"}
            row["balance"] = balance([rank["work"] for rank in every])
        rows.append(row)
    return rows


def work(layer: Layer, around: Local, batch: Batch) -> tuple[int, int]:
    """The pairs of a query and a key that this rank computes, and the heads for which it does."""
    if isinstance(layer, LatentAttention):
        return pieces.pairs(all_spans(batch, layer.causal), layer.causal), layer.h
    inside = around.inside(layer.core)
    return sum(pieces.pairs(*block) for block in around.blocks(inside, batch)), inside.heads


def keys_held(layer: Layer, around: Local, batch: Batch) -> int:
    """Numbers of the keys and values that forward has in memory at a time."""
    if isinstance(layer, LatentAttention):
        return sum(batch.lengths) * layer.h * (layer.N + layer.R + layer.V)
    return around.held(layer.core, batch) * 2 * layer.E


def balance(of_ranks: Sequence[int]) -> float:
    """The most over the mean."""
    return max(of_ranks) / mean(of_ranks)


def main(args: argparse.Namespace, comm: MPI.Intracomm, task: Task) -> int:
    mesh, sizes = start.make_mesh(args, comm, **task.axes), task.sizes
    around = KINDS[args.kind](mesh.cp)
    layer, batch = attention.build(args, sizes, mesh.tp, around), attention.batch(args, sizes, mesh, args.layout)
    for p in layer.parameters:
        # Each rank has the gradient by its own tokens.
        p.owed = (*p.owed, mesh.cp.name)
    control = Control(comm)
    kinds = compared_kinds(args, sizes, mesh, control)
    shares = control.everyone((batch.tokens, *work(layer, around, batch)))
    ran = attention.run(args, comm, sizes, mesh, layer, batch)
    if ran is None:
        return 0
    tokens, pairs, heads = map(list, zip(*shares, strict=True))
    config = {k: v for k, v in ran.told["config"].items() if k != "mesh"}
    result = report.header("cp_attention", args, mesh) | ran.told | {"config": config}
    result |= {"tokens_per_rank": tokens, "pairs_per_rank": pairs, "heads_per_rank": heads, "kinds": kinds}
    result["balance"] = balance([p * h for p, h in zip(pairs, heads, strict=True)])
    return attention.published(args, result, ran, lambda: show(result, ran.checks))


def show(result: dict, checks: list[Comparison]) -> None:
    """The report for people."""
    c = result["config"]
    mesh = ", ".join(f"{axis}={n}" for axis, n in result["mesh"].items())
    report.say(
        f"Context-parallel attention ({c['attention']}) by {c['kind']}, {c['layout']}, on {mesh}: "
        f"{attention.said(result, c['attention'])}",
        "",
    )
    attention.show(result, checks)
    by_rank = [*zip(*(result[f"{what}_per_rank"] for what in ("tokens", "heads", "pairs")), strict=True)]
    report.table(
        f"Work by rank: worst over mean {result['balance']:.3f}",
        ("rank", "tokens", "heads it attends with", "pairs (query, key) a head"),
        [(report.said(ranks), *(f"{n:,}" for n in by_rank[ranks[0]])) for ranks in report.runs(by_rank)],
    )
    _show_kinds(result)
    report.seconds(result["seconds"], step.REPEATS, result["ranks"])


def _show_kinds(result: dict) -> None:
    """What each kind would cost, on the rank where it costs most."""
    rows = result["kinds"]
    most = lambda row, what: max(row[f"{what}_bytes_per_rank"]) if "balance" in row else None  # noqa: E731
    wire = [most(row, "wire") for row in rows]
    columns = [column(name, [most(row, what) for row in rows], BYTES) for name, what in
               (("kept for backward", "saved"), ("keys and values at a time", "key"))]  # fmt: skip
    report.table(
        f"The kinds for these sequences, {result['config']['layout']}, on the rank where each costs most (over cp, forward and "
        "backward)",
        ("kind", "wire bytes", *(heading for heading, _ in columns), "balance", "limit"),
        [
            (
                row["kind"],
                "-" if wire[n] is None else f"{wire[n]:,.0f}",
                *(cells[n] for _, cells in columns),
                f"{row['balance']:.3f}" if "balance" in row else "-",
                "none" if row["most_ranks"] is None else f"at most cp={row['most_ranks']}",
            )
            for n, row in enumerate(rows)
        ],
    )
    if result["config"]["attention"] == "mla":
        report.say("Latents are gathered, whatever the kind.", "")


if __name__ == "__main__":
    start.run(options(), check, main)
