"""Pictures of caches that were used, not of numbers that were written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from inference.cache import BLOCK, Cache, ContiguousCache, PagedCache, Striped
from inference.generate import Generator, make_cache
from launch.terminal import progress, targets
from models.build import build
from models.config import cache_entries, llama_like
from models.published import BF16, PUBLISHED
from parallel.mesh import Mesh
from parallel.parameter import drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, SKY, GREEN, ORANGE, RED, PALE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#F4F4F4"
KINDS = {"mha": BLUE, "gqa": SKY, "mqa": GREEN, "mla": RED}


def pictures(folder: Path, rows: Sequence[dict]) -> tuple[list[Path], list[str]]:
    """Draw all of them into `folder`: the files, and why others could not be written."""
    import matplotlib

    drawings = {"prefill-decode": draw_prefill_decode, "kinds": draw_kinds, "latent": draw_latent}
    drawings["bytes"] = lambda: draw_bytes(rows)
    written, unwritten = [], []
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "legend.frameon": False}):
        for name, draw in progress.items("drawing", True)(drawings.items()):
            path = folder / f"kv-{name}.png"
            # Without the library's version in it, the same picture is the same file.
            why = targets.write(path, lambda file, draw=draw: draw().savefig(file, dpi=200, metadata={"Software": None}))
            written += [path] * (why is None)
            unwritten += [why] * (why is not None)
    return written, unwritten


def _figure(height: float, heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Plots without frames, one above another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    axes = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    for a in axes:
        a.axis("off")
    return figure, axes


def _cells(axes: Axes, x: float, y: float, colours: Sequence[str], size: tuple = (1, 0.9), **style: object) -> None:
    """A row of cells from x on; y is their middle."""
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
    """Use a cache: three sequences, of which 1 branches off 0. What is kept of a token is the sequence that wrote it. Returns
    the copies on write: by which sequence, from which block, to which."""
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

    users, wide = paged.blocks.users, BLOCK + 2
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
