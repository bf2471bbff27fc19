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

from inference.cache import BLOCK, Cache, ContiguousCache, PagedCache, Striped
from inference.generate import Generator, make_cache
from launch import report
from layers.rope import Rope, Yarn
from models.build import build
from models.config import Config, Experts, Latent, cache_entries, gpt2_like, llama_like
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.shard import covering, even

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BF16 = 2


def _llama3(d_model: int, layers: int, heads: int, d_ff: int) -> Config:
    return replace(llama_like(128256, d_model, layers, heads, 8, d_ff, 8192), rope=Rope(d_model // heads, 500000.0))


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
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK) or folder.is_file():
        raise start.UsageError(f"cannot write into --pictures {args.pictures}: use a folder that may be written")
    if find_spec("matplotlib") is None:
        raise start.UsageError("--pictures needs matplotlib, which is not installed: run `pip install matplotlib`")


def row(name: str, c: Config, args: argparse.Namespace) -> dict:
    """One model's line of the report. Null: by rank where there are more ranks than heads, the context where it is too long."""

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


def main(args: argparse.Namespace, comm: MPI.Intracomm) -> int:
    if comm.rank:
        return 0
    rows = [row(name, c, args) for name, c in PUBLISHED.items()]
    written = [] if args.pictures is None else pictures(args.pictures, rows)
    if args.json:
        asked = {"ranks": args.ranks, "tokens": args.tokens, "dtype": args.dtype}
        result = {"command": "kv_cache", "ok": True, **asked, "models": rows, "pictures": [str(path) for path in written]}
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
        yield f"{max(n['bfloat16'] for n in by_rank):,}" if by_rank else "-"
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
    print(f"{on_a_rank}: the one that keeps most; copies: what all {args.ranks} keep together, in whole caches.")
    for name, c in PUBLISHED.items():
        if args.ranks > c.heads:
            print(f"{name}: its {c.heads} heads cannot be cut over {args.ranks} ranks.")
        if args.tokens > c.context:
            print(f"{name}: its context is {c.context:,} tokens.")


# --- pictures: of caches that were used, not of numbers that were written down

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, SKY, GREEN, ORANGE, RED, PALE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#F4F4F4"
KINDS = {"mha": BLUE, "gqa": SKY, "mqa": GREEN, "mla": RED}


def pictures(folder: Path, rows: Sequence[dict]) -> list[Path]:
    """Draw all of them into `folder`; their files."""
    import matplotlib

    folder.mkdir(exist_ok=True)
    drawings = {"prefill-decode": draw_prefill_decode, "kinds": draw_kinds, "latent": draw_latent}
    drawings["bytes"] = partial(draw_bytes, rows)
    written = []
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "legend.frameon": False}):
        for name, draw in report.progress("drawing", True)(drawings.items()):
            written.append(folder / f"kv-{name}.png")
            # Without the library's version in it, the same picture is the same file.
            draw().savefig(written[-1], dpi=200, metadata={"Software": None})
    return written


def _figure(height: float, heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Plots without frames, one above another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    axes = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    for a in axes:
        a.axis("off")
    return figure, axes


def _cells(axes: Axes, x: float, y: float, colours: Sequence[str], size: tuple = (1, 0.9), **style: object) -> None:
    """A row of cells from x on, y their middle."""
    style = {"edgecolor": "0.45", "linewidth": 0.5} | style
    spans = [(x + i * size[0], size[0]) for i in range(len(colours))]
    axes.broken_barh(spans, (y - size[1] / 2, size[1]), facecolors=colours, **style)


def _legend(axes: Axes, named: dict[str, str], **where: object) -> None:
    handles = [axes.fill_between([], [], facecolor=c, edgecolor="0.45", linewidth=0.5, label=n) for n, c in named.items()]
    axes.legend(handles=handles, ncols=len(named), fontsize=9, handlelength=1, handleheight=1, borderpad=0, **where)


def draw_prefill_decode(prompt: int = 14, chunk: int = 6, tokens: int = 3) -> Figure:
    """A small model takes in a prompt, `chunk` tokens at a time, then some tokens one at a time: its cache after each step."""
    chunks, most = -(-prompt // chunk), prompt + tokens + 1
    sizes = [min(chunk, prompt - n * chunk) for n in range(chunks)] + [1] * tokens
    figure, axes = _figure(5.6, [1] * len(sizes))
    with Mesh(MPI.COMM_SELF, tp=1) as mesh:
        model = build(llama_like(31, 16, 3, 4, 2, 24, 32), mesh.tp, drawn(0, "float32"))
        generator = Generator(model, mesh, make_cache(model, "contiguous"))
        generator.cache.open(0)
        for n, (a, size) in enumerate(zip(axes, sizes, strict=True)):
            before = generator.cache.lengths[0]
            generator.forward([(0, range(size))])
            after = generator.cache.lengths[0]
            for layer in range(len(model.blocks)):
                _cells(a, 0, -layer, [SKY] * before + [ORANGE] * (after - before) + [PALE] * (most - after))
                a.text(-0.3, -layer, f"layer {layer}", ha="right", va="center", fontsize=8)
            what = f"prefill,\nchunk {n + 1} of {chunks}" if n < chunks else f"decode,\ntoken {n - chunks + 1}"
            a.text(-6, -1, what, va="center", fontweight="bold")
            a.text(most + 0.4, -1, f"writes {after - before},\nreads {after}", va="center")
            a.set(xlim=(-6.1, most + 3.3), ylim=(-2.6, 0.6))
    for position in range(most):
        axes[0].text(position + 0.5, 0.65, str(position), ha="center", va="bottom", fontsize=8)
    axes[0].text(-0.3, 0.65, "position", ha="right", va="bottom", fontsize=8)
    named = {"there before, read": SKY, "written in this step, then read": ORANGE, "not there yet": PALE}
    _legend(axes[-1], named, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    return figure


def _used(cache: Cache) -> list[tuple[int, int, int]]:
    """A use of a cache: three sequences, 1 branches off 0; what is kept of a token is who wrote it. Returns copies on write:
    by which sequence, from which block to which."""
    copied = []

    def write(sequence: int, tokens: int) -> None:
        tables = getattr(cache, "tables", {})
        before = list(tables.get(sequence, []))
        cache.extend(sequence, tokens)
        copied.extend((sequence, a, b) for a, b in zip(before, tables.get(sequence, []), strict=False) if a != b)
        for _ in cache.stores([(sequence, tokens)])[0](np.full((tokens, 1), sequence, np.int8)):
            pass

    cache.open(0)
    write(0, 37)
    cache.branch(0, 1)
    write(1, 9)
    write(0, 1)
    cache.open(2)
    write(2, 20)
    write(2, 1)
    return copied


def _kept(cache: Cache, sequence: int) -> list[int]:
    """Who wrote each token that is kept of a sequence."""
    ((_, _, held),) = cache.stores([(sequence, 0)])[0](np.empty((0, 1), np.int8))
    return held[0, :, 0].tolist()


def draw_kinds() -> Figure:
    """The same use of both kinds of cache, one entry of one byte a token, so that bytes are tokens."""
    figure, (a, b) = _figure(5.2, [1.0, 1.8])
    who = [BLUE, ORANGE, GREEN]
    contiguous, paged = ContiguousCache([[(1,)]], "int8"), PagedCache([[(1,)]], "int8")
    _used(contiguous)
    copied = _used(paged)

    held, total = contiguous.bytes_held, sum(contiguous.lengths.values())
    a.set_title(f"contiguous: an array a sequence, doubled when it is full. Room for {held} tokens, {total} in it")
    for sequence in list(contiguous.lengths):
        kept, before = _kept(contiguous, sequence), contiguous.bytes_held
        contiguous.free(sequence)
        room = before - contiguous.bytes_held
        colours = [who[writer] for writer in kept] + [PALE] * (room - len(kept))
        _cells(a, 0, -sequence, colours, (1, 0.6), linewidth=0.3)
        others = sum(writer != sequence for writer in kept)
        copies = f", {others} copied when it branched off" if others else ""
        a.text(-2, -sequence, f"sequence {sequence}", ha="right", va="center")
        a.text(room + 2, -sequence, f"{len(kept)} of {room}{copies}", va="center")
    a.set(xlim=(-20, 144), ylim=(-2.5, 0.5))

    users, wide = paged.users, BLOCK + 2
    slots = [[PALE] * BLOCK for _ in users]
    x = 0.0
    for sequence, table in paged.tables.items():
        kept = _kept(paged, sequence)
        b.text(x, 3.75, f"sequence {sequence}, {len(kept)} tokens: its table")
        for n, block in enumerate(table):
            for slot, writer in enumerate(kept[n * BLOCK : (n + 1) * BLOCK]):
                slots[block][slot] = who[writer]
            _cells(b, x, 3.2, ["white"], (13, 0.75), edgecolor=who[sequence], linewidth=1.5)
            b.text(x + 6.5, 3.2, str(block), ha="center", va="center")
            b.plot([x + 6.5, block * wide + BLOCK / 2], [2.78, 0.55], color=who[sequence], linewidth=1.3)
            x += 14.5
        x += 8
    for block, (colours, n) in enumerate(zip(slots, users, strict=True)):
        _cells(b, block * wide, 0, colours, linewidth=0.3)
        label = f"block {block}\n" + (f"{n} user{'s' if n > 1 else ''}" if n else "free")
        b.text(block * wide + BLOCK / 2, -0.6, label, ha="center", va="top", fontweight="bold" if n > 1 else None)
    total = sum(colour != PALE for colours in slots for colour in colours)
    b.set_title(
        f"paged: a pool of blocks of {BLOCK} tokens, a table a sequence. Room for {paged.bytes_held} tokens, {total} in it"
    )
    for sequence, of, to in copied:
        ends = ((to * wide + 5, -1.75), (of * wide + BLOCK / 2, -1.75))
        b.annotate("", *ends, arrowprops={"arrowstyle": "-|>", "connectionstyle": "arc3,rad=0.3", "color": "black"})
        b.text(to * wide + 7, -1.95, f"copied: block {of} had two users when sequence {sequence} wrote", va="center")
    b.set(xlim=(-1, len(users) * wide), ylim=(-2.6, 4.2))
    named = {f"written by sequence {n}": c for n, c in enumerate(who)} | {"room": PALE}
    _legend(b, named, loc="upper center", bbox_to_anchor=(0.5, 0.02))
    return figure


def draw_latent(ranks: int = 4, tokens: int = 12) -> Figure:
    """One layer of DeepSeek-V2 as it is, and with keys and values instead; then its two layouts over the ranks."""
    name, c = "DeepSeek-V2", PUBLISHED["DeepSeek-V2"]
    width, across = c.latent.d_nope, 64
    figure, (a, b) = _figure(5.2, [1.6, 1.0])
    a.set_title(f"{name}: a token in one layer, with its own MLA and with others. A cell is {width} numbers")
    y = 0.0
    for kind, kv_heads in (("mha", c.heads), ("gqa", 8), ("mqa", 1)):
        entries = cache_entries(replace(c, layers=1, latent=None, kv_heads=kv_heads, d_head=width))
        of = f"{kv_heads} keys, {kv_heads} values" if kv_heads > 1 else "1 key, 1 value"
        a.text(0, y, f"{kind.upper()}, {of}: {entries:,} numbers", va="bottom")
        for _ in ("keys", "values"):
            for first in range(0, kv_heads, across):
                _cells(a, 0, y - 0.75, [KINDS[kind]] * min(across, kv_heads - first))
                y -= 1
            y -= 0.2
        y -= 1.7
    latent, rotated = c.latent.d_latent, c.latent.d_rope
    a.text(
        0,
        y,
        f"MLA, a latent of {latent}, a rotated key of {rotated}: {cache_entries(replace(c, layers=1))} numbers",
        va="bottom",
    )
    _cells(a, 0, y - 0.75, [RED] * (latent // width))
    _cells(a, latent / width, y - 0.75, [ORANGE], (rotated / width, 0.9))
    a.set(xlim=(-0.2, across + 0.2), ylim=(y - 1.5, 1.2))

    caches = [Striped(ContiguousCache([[(1,)]], "int8"), ranks, rank) for rank in range(ranks)]
    layouts = ("replicated, every token on every rank", 1), (f"striped, token n on rank n mod {ranks}", ranks)
    for x, (layout, parts) in zip((0, tokens + 4.2), layouts, strict=True):
        each = BF16 * cache_entries(c) // parts
        b.text(x, 0.65, f"{layout}:\n{each:,} bytes a token on each (all layers, bf16)", va="bottom")
        for rank, cache in enumerate(caches):
            cache.open(0)
            b.text(x - 0.25, -rank, f"rank {rank}", ha="right", va="center")
            for n in range(tokens):
                before = cache.own.lengths[0]
                cache.extend(0, 1)
                mine = parts == 1 or cache.own.lengths[0] > before
                _cells(b, x + n, -rank, [RED if mine else PALE])
                b.text(x + n + 0.5, -rank, str(n), ha="center", va="center", color="white" if mine else "0.5", fontsize=8)
            cache.free(0)
    b.set(xlim=(-2.2, 2 * tokens + 4.4), ylim=(-ranks + 0.4, 2.4))
    return figure


def draw_bytes(rows: Sequence[dict]) -> Figure:
    """The table's bytes of bf16."""
    figure, (a,) = _figure(3.0, [1])
    a.axis("on")
    ordered = sorted(rows, key=lambda r: -r["elements_per_token"])
    sizes = [r["bytes_per_token"]["bfloat16"] for r in ordered]
    bars = a.barh([r["model"] for r in ordered], sizes, color=[KINDS[r["attention"]] for r in ordered], height=0.7)
    a.bar_label(bars, [f"{n:,}" for n in sizes], padding=3)
    a.set(xlim=(0, 1.12 * max(sizes)), xlabel="bytes that a cache keeps of a token, bf16")
    a.xaxis.set_major_formatter("{x:,.0f}")
    a.invert_yaxis()
    a.spines[["top", "right"]].set_visible(False)
    _legend(a, {k.upper(): KINDS[k] for k in dict.fromkeys(r["attention"] for r in rows)}, loc="lower right")
    return figure


if __name__ == "__main__":
    start.run(options(), check, main)
