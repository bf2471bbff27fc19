"""What a KV cache keeps of a token: published models side by side, on one rank and on several, and pictures of it."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from collections.abc import Iterator

import numpy as np
from mpi4py import MPI

from launch import report
from launch.options import UsageError, parser, positive
from launch.pictures.cache import pictures
from launch.terminal import targets
from launch.terminal.lines import BYTES, column
from models.config import Config, cache_entries
from models.published import BF16, PUBLISHED, attention_of, entries_by_rank


def options() -> argparse.ArgumentParser:
    p = parser(
        "kv_cache",
        "What a KV cache keeps of a token, in published models. Needs no ranks.",
        ("python -m launch.kv_cache", "python -m launch.kv_cache --ranks 8 --tokens 131072"),
        without=("seed", "ranks"),
    )
    p.add_argument("--ranks", type=positive, default=4, help="over how many tensor-parallel ranks to cut the heads")
    p.add_argument("--tokens", type=positive, default=4096, help="of the whole context in the last column")
    p.add_argument(
        "--pictures", metavar="DIR", type=targets.PictureFolder, help="also write the pictures of docs/kv-cache.md into DIR"
    )
    return p


def check(args: argparse.Namespace, ranks: int) -> None:
    most = max(c.heads for c in PUBLISHED.values())
    if args.ranks > most:
        raise UsageError(f"--ranks {args.ranks} is more than the heads of any of these models: use at most {most}")


def row(name: str, c: Config, args: argparse.Namespace) -> dict:
    """One model's line of the report. What is kept by rank is null where there are more ranks than heads, what is kept of the
    context where that is longer than the model's."""

    def in_bytes(entries: float) -> dict[str, float]:
        return {"bfloat16": entries * BF16, args.dtype: entries * np.dtype(args.dtype).itemsize}

    whole, latent = cache_entries(c), c.latent
    kept = {"kv_heads": c.kv_heads, "width": c.d_head or c.d_model // c.heads}
    by_rank = entries_by_rank(c, args.ranks) if args.ranks <= c.heads else None
    return {
        "model": name,
        "attention": attention_of(c),
        "layers": c.layers,
        "heads": c.heads,
        "of_a_layer": kept if latent is None else {"latent": latent.d_latent, "rotated": latent.d_rope},
        "elements_per_token": whole,
        "bytes_per_token": in_bytes(whole),
        "bytes_per_token_per_rank": by_rank and [in_bytes(n) for n in by_rank],
        "copies": by_rank and sum(by_rank) / whole,
        "striped_bytes_per_token_per_rank": in_bytes(whole / args.ranks) if by_rank and latent is not None else None,
        "context_bytes": in_bytes(whole * args.tokens) if args.tokens <= c.context else None,
    }


def main(args: argparse.Namespace, comm: MPI.Intracomm, opened: None) -> int:
    if comm.rank:
        return 0
    rows = [row(name, c, args) for name, c in PUBLISHED.items()]
    written, unwritten = ([], []) if args.pictures is None else pictures(args.pictures, rows)
    result = report.header("kv_cache") | {"ranks": args.ranks, "tokens": args.tokens, "dtype": args.dtype}
    result |= {"models": rows, "pictures": [str(path) for path in written]}
    return report.publish(args.json, result, lambda: show(args, result), agreed=None, unwritten=unwritten)


def show(args: argparse.Namespace, result: dict) -> None:
    """The report for people."""

    def cells(r: dict) -> Iterator[object]:
        yield from (r["model"], r["attention"], r["layers"])
        a, b = r["of_a_layer"].values()
        yield f"{a} + {b}" if r["attention"] == "mla" else f"2 x {a} x {b}"
        yield from (f"{n:,}" for n in (r["elements_per_token"], *r["bytes_per_token"].values()))
        by_rank, striped = r["bytes_per_token_per_rank"], r["striped_bytes_per_token_per_rank"]
        yield f"{max(n['bfloat16'] for n in by_rank):,}" if by_rank else "-"
        yield f"{r['copies']:.2f}" if by_rank else "-"
        yield f"{striped['bfloat16']:,.0f}" if striped else ""

    contexts = [r["context_bytes"] and r["context_bytes"]["bfloat16"] for r in result["models"]]
    whole, of_context = column(f"{args.tokens:,} tokens", contexts, BYTES)
    on_a_rank = f"a rank of {args.ranks}" if args.ranks > 1 else "one rank"
    report.table(
        "What a KV cache keeps of a token (bytes of bf16 where nothing else is said)",
        ("model", "kind", "layers", "a layer", "elements", "bf16", args.dtype, on_a_rank, "copies", "striped", whole),
        [[*cells(r), size] for r, size in zip(result["models"], of_context, strict=True)],
    )
    report.say(f"{on_a_rank}: the one that keeps most; copies: what all {args.ranks} keep together, in whole caches.")
    for name, c in PUBLISHED.items():
        if args.ranks > c.heads:
            report.say(f"{name}: its {c.heads} heads cannot be cut over {args.ranks} ranks.")
        if args.tokens > c.context:
            report.say(f"{name}: its context is {c.context:,} tokens.")
    for path in result["pictures"]:
        report.say(f"wrote {path}")


if __name__ == "__main__":
    start.run(options(), check, main)
