"""Tensor-parallel attention of every kind, compared with the reference, counted and timed.

T tokens   D model width   H heads   K key/value heads   E head width   C latent width   R rotated width, beside a latent
"""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse

import numpy as np
from mpi4py import MPI

from launch import report
from launch.explain import view
from launch.measure import attention, step
from launch.measure.attention import Sizes
from launch.options import UsageError, parser, positive
from parallel.shard import covering, even
from reference.compare import Comparison


def options() -> argparse.ArgumentParser:
    p = parser(
        "tp_attention",
        "Run tensor-parallel attention, forward and backward, and compare it with a reference.",
        (
            "mpirun -n 4 python -m launch.tp_attention --heads 9 --d-model 144",
            "mpirun -n 2 python -m launch.tp_attention --sequences 1,7,64,129",
            "mpirun -n 3 python -m launch.tp_attention --kind mla --rope interleaved",
        ),
    )
    attention.add_options(p, "--kind")
    p.add_argument("--layers", type=positive, default=1, help="L, for the table of the KV cache")
    view.add_options(p)
    return p


def check(args: argparse.Namespace, ranks: int) -> Sizes:
    view.check(args, ranks)
    sizes = attention.check(args, "--kind")
    if ranks > args.heads:
        raise UsageError(f"cannot cut --heads {args.heads} over {ranks} ranks: use at most {args.heads} ranks or more --heads")
    return sizes


def cache(args: argparse.Namespace, sizes: Sizes, ranks: int) -> list[dict]:
    """What each kind of attention would keep of a token in a KV cache: elements, in all layers and on the fullest rank."""
    H, E, L = args.heads, sizes.d_head, args.layers
    grouped = sizes.kv_heads if args.attention == "gqa" else attention.largest_group(H)
    latent, rotated = sizes.d_latent or 4 * E, sizes.d_rope or max(2, E // 4 * 2)
    held = lambda kv_heads: max(covering(even(H, ranks), H // kv_heads).sizes)  # noqa: E731
    rows = [(kind, f"2 {n} E L", 2 * kv * E * L, 2 * held(kv) * E * L) for kind, n, kv in
            (("mha", "H", H), ("gqa", "K", grouped), ("mqa", "1", 1))]  # fmt: skip
    rows.append(("mla", "(C + R) L", (latent + rotated) * L, (latent + rotated) * L))
    size = np.dtype(args.dtype).itemsize
    return [
        {"kind": kind, "formula": formula, "elements": n, "elements_per_rank": here, "bytes": n * size}
        for kind, formula, n, here in rows
    ]


def main(args: argparse.Namespace, comm: MPI.Intracomm, sizes: Sizes) -> int:
    mesh = start.make_mesh(args, comm, tp=comm.size)
    layer, batch = attention.build(args, sizes, mesh.tp), attention.batch(args, sizes, mesh)
    ran = attention.run(args, comm, sizes, mesh, layer, batch)
    if ran is None:
        return 0
    config = {"kind": args.attention} | {k: v for k, v in ran.told["config"].items() if k != "attention"}
    result = report.header("tp_attention", args, mesh) | ran.told | {"config": config}
    result["kv_cache_per_token"] = cache(args, sizes, comm.size)
    return attention.published(args, result, ran, lambda: show(result, ran.checks))


def show(result: dict, checks: list[Comparison]) -> None:
    """The report for people."""
    ranks, c = result["ranks"], result["config"]
    cut = even(c["heads"], ranks)
    kv = covering(cut, c["heads"] // c["kv_heads"])
    dealt, read = (", ".join(f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in heads.bounds) for heads in (cut, kv))
    report.say(
        f"Tensor-parallel attention ({c['kind']}) on tp={ranks}: {attention.said(result, c['kind'])}",
        f"Heads by rank: {dealt}" + ("" if c["kind"] == "mla" else f"; key/value heads: {read}"),
        "",
    )
    attention.show(result, checks)
    report.table(
        "KV cache a token, by kind of attention",
        ("kind", "elements", "", "bytes", "elements on the fullest rank"),
        [(r["kind"], r["formula"], f"{r['elements']:,}", f"{r['bytes']:,}", f"{r['elements_per_rank']:,}") for r in
         result["kv_cache_per_token"]],
    )  # fmt: skip
    report.seconds(result["seconds"], step.REPEATS, ranks)


if __name__ == "__main__":
    start.run(options(), check, main)
