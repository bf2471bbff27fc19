"""What a KV cache keeps of a token: published models side by side, on one rank and on several, and pictures of it."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from inference.cache import BLOCK, Batch, Cache, ContiguousCache, PagedCache, Striped
from inference.generate import Generator
from launch import report
from layers.rope import Rope, Yarn
from models.config import Config, Experts, Latent, build, cache_entries, gpt2_like, llama_like
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.shard import covering, even

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BF16 = 2


def _llama3(d_model: int, layers: int, heads: int, d_ff: int) -> Config:
    rope = Rope(d_model // heads, 500000.0)
    return replace(llama_like(128256, d_model, layers, heads, 8, d_ff, 8192), rope=rope)


def _deepseek(vocabulary: int, d_model: int, layers: int, d_ff: int, mscale: float, experts: Experts) -> Config:
    rope = Rope(64, pairing="interleaved", scaling=Yarn(40.0, 4096, mscale=mscale, mscale_all_dim=mscale))
    latent = Latent(512, 128, 64, 128, 1536)
    return Config(vocabulary, d_model, layers, 128, 128, d_ff, 163840, eps=1e-6, rope=rope, latent=latent, experts=experts)


# As their authors' config.json files say.
PUBLISHED = {
    "GPT-2 124M": gpt2_like(50257, 768, 12, 12, 3072, 1024),
    "SmolLM2-135M": replace(llama_like(49152, 576, 30, 9, 3, 1536, 8192, tied=True), rope=Rope(64, 100000.0)),
    "Qwen3-0.6B": replace(
        llama_like(151936, 1024, 28, 16, 8, 3072, 40960, tied=True), d_head=128, eps=1e-6, qk_norm=True, rope=Rope(128, 1e6)
    ),
    "Llama-2-7B": llama_like(32000, 4096, 32, 32, 32, 11008, 4096),
    "Llama-3-8B": _llama3(4096, 32, 32, 14336),
    "Llama-3-70B": _llama3(8192, 80, 64, 28672),
    "DeepSeek-V2": _deepseek(
        *(102400, 5120, 60, 12288, 0.707),
        Experts(160, 6, 1536, 2 * 1536, first=1, normed=False, scale=16.0, groups=8, active_groups=3),
    ),
    "DeepSeek-V3": _deepseek(
        *(129280, 7168, 61, 18432, 1.0),
        Experts(256, 8, 2048, 2048, 3, "sigmoid", scale=2.5, groups=8, active_groups=4, group_top=2, correction=True),
    ),
}


def attention_of(c: Config) -> str:
    """The kind of attention, as `launch.tp_attention` calls it."""
    if c.latent is not None:
        return "mla"
    return "mha" if c.kv_heads == c.heads else "mqa" if c.kv_heads == 1 else "gqa"


def entries_by_rank(c: Config, ranks: int) -> list[int]:
    """What each rank keeps of a token, in entries: the key/value heads that its query heads read, or the whole latent.

    Raises ValueError for more ranks than heads.
    """
    cut = even(c.heads, ranks, "heads")
    if c.latent is not None:
        return [cache_entries(c)] * ranks
    return [cache_entries(c) // c.kv_heads * n for n in covering(cut, c.heads // c.kv_heads).sizes]


def options() -> argparse.ArgumentParser:
    p = start.parser("kv_cache", "What a KV cache keeps of a token, in published models. Needs no ranks.")
    p.add_argument("--ranks", type=start.positive, default=4, help="over how many tensor-parallel ranks to cut the heads")
    p.add_argument("--tokens", type=start.positive, default=4096, help="of the whole context in the last column")
    p.add_argument("--pictures", metavar="DIR", type=Path, help="also write the pictures of docs/kv-cache.md into DIR")
    return p


def check(args: argparse.Namespace, ranks: int) -> None:
    most = max(c.heads for c in PUBLISHED.values())
    if args.ranks > most:
        raise start.UsageError(f"--ranks {args.ranks} is more than the heads of any of these models: use at most {most}")
    if args.pictures is None:
        return
    folder = args.pictures.absolute()
    if not folder.parent.is_dir():
        raise start.UsageError(f"cannot make --pictures {args.pictures}: there is no folder {folder.parent}")
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise start.UsageError(f"cannot write into --pictures {args.pictures}: use a folder that may be written")
    if find_spec("matplotlib") is None:
        raise start.UsageError("--pictures needs matplotlib, which is not installed: run `pip install matplotlib`")


def row(name: str, c: Config, args: argparse.Namespace) -> dict:
    """One model's line of the report. Null: by rank where there are more ranks than heads, the context where it is too long."""
    whole, itemsizes = cache_entries(c), {"bfloat16": BF16, args.dtype: np.dtype(args.dtype).itemsize}
    by_rank = entries_by_rank(c, args.ranks) if args.ranks <= c.heads else None
    kept = {"latent": c.latent.d_latent, "rotated": c.latent.d_rope} if c.latent is not None else None
    return {
        "model": name,
        "attention": attention_of(c),
        "layers": c.layers,
        "heads": c.heads,
        "of_a_layer": kept or {"kv_heads": c.kv_heads, "width": c.d_head or c.d_model // c.heads},
        "elements_per_token": whole,
        "bytes_per_token": {name: whole * b for name, b in itemsizes.items()},
        "bytes_per_token_per_rank": by_rank and {name: [n * b for n in by_rank] for name, b in itemsizes.items()},
        "copies": by_rank and sum(by_rank) / whole,
        "striped_bytes_per_token_per_rank": (
            {name: whole * b / args.ranks for name, b in itemsizes.items()} if by_rank and c.latent is not None else None
        ),
        "context_bytes": {n: whole * b * args.tokens for n, b in itemsizes.items()} if args.tokens <= c.context else None,
    }


def main(args: argparse.Namespace, comm: MPI.Intracomm) -> int:
    if comm.rank:
        return 0
    rows = [row(name, c, args) for name, c in PUBLISHED.items()]
    written = [] if args.pictures is None else pictures(args.pictures, rows)
    result = {
        "command": "kv_cache",
        "ok": True,
        "ranks": args.ranks,
        "tokens": args.tokens,
        "dtype": args.dtype,
        "models": rows,
        "pictures": [str(path) for path in written],
    }
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(args, rows)
        for path in written:
            print(f"wrote {path}")
    return 0


def show(args: argparse.Namespace, rows: Sequence[dict]) -> None:
    """The report for people."""

    def cells(r: dict) -> Iterator[object]:
        yield from (r["model"], r["attention"], r["layers"])
        a, b = r["of_a_layer"].values()
        yield f"{a} + {b}" if r["attention"] == "mla" else f"2 x {a} x {b}"
        yield from (f"{n:,}" for n in (r["elements_per_token"], *r["bytes_per_token"].values()))
        by_rank, striped, context = r["bytes_per_token_per_rank"], r["striped_bytes_per_token_per_rank"], r["context_bytes"]
        yield f"{max(by_rank['bfloat16']):,}" if by_rank else "-"
        yield f"{r['copies']:.2f}" if by_rank else "-"
        yield f"{striped['bfloat16']:,.0f}" if striped else ""
        yield report.size(context["bfloat16"]) if context else "-"

    on_a_rank = f"a rank of {args.ranks}" if args.ranks > 1 else "one rank"
    report.table(
        "What a KV cache keeps of a token (bytes of bf16 where nothing else is said)",
        ("model", "kind", "layers", "a layer", "elements", "bf16", args.dtype, on_a_rank, "copies", "striped",
         f"{args.tokens:,} tokens"),
        [list(cells(r)) for r in rows],
    )  # fmt: skip
    print(f"{on_a_rank}: the one that keeps most; copies: what all {args.ranks} keep, by what one alone would.")
    for name, c in PUBLISHED.items():
        if args.ranks > c.heads:
            print(f"{name}: its {c.heads} heads cannot be cut over {args.ranks} ranks.")
        if args.tokens > c.context:
            print(f"{name}: its context is {c.context:,} tokens.")


# --- pictures: of caches that were used, not of numbers that were written down

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, SKY, GREEN, ORANGE, RED = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00"
KINDS = {"mha": BLUE, "gqa": SKY, "mqa": GREEN, "mla": RED}


def pictures(folder: Path, rows: Sequence[dict]) -> list[Path]:
    """Draw all of them into `folder`; their files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(exist_ok=True)
    drawings = {
        "kv-prefill-decode": draw_prefill_decode,
        "kv-kinds": draw_kinds,
        "kv-latent": draw_latent,
        "kv-bytes": partial(draw_bytes, rows),
    }
    written = []
    with plt.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "hatch.linewidth": 0.4}):
        for name, draw in report.progress("drawing", True)(drawings.items()):
            figure = draw(plt.figure)
            written.append(folder / f"{name}.png")
            # Without the library's name in it, the same picture is the same file.
            figure.savefig(written[-1], dpi=200, metadata={"Software": None})
            plt.close(figure)
    return written
