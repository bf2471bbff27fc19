"""Sequences cut over cp as pictures: who holds which tokens, and who compares which queries with which keys, hop by hop.

`python -m launch.pictures.context` draws the pictures of docs/context-parallel.md again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from launch.pictures import again
from launch.pictures.columns import INK, OTHERS, RANKS, WHOLE
from launch.terminal.help import Parser
from layers.pieces import LAYOUTS, Pieces, own_spans, places, seen_spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The pictures of docs/context-parallel.md: sequences over as many ranks as there are colours; one sequence, hop by hop.
BATCH, ONE = (3, 6, 16), (16,)
LAID = ("contiguous", "zigzag")
# The rank whose colour wants white letters.
DARK = 3
# In inches: a token of a strip, a token's side of a square, what stands left of a strip or square, and above it.
TOKEN, SIDE, LEFT, ABOVE = 0.34, 0.12, 0.95, 0.34


def pairs(lengths: Sequence[int], every: Sequence[Pieces], rank: int, hop: int) -> Iterator[tuple[int, int]]:
    """The (query, key) that a rank compares once it has the block of `hop` ranks before it, causal, as places among all."""
    theirs = every[(rank - hop) % len(every)]
    queries, keys = places(lengths, every[rank]), places(lengths, theirs)
    for q, k in own_spans(every[rank], True) if hop == 0 else seen_spans(every[rank], theirs, True):
        yield from ((int(a), int(b)) for a in queries[q] for b in keys[k] if b <= a)


def rows(file: Path | BinaryIO, lengths: Sequence[int] = BATCH) -> None:
    """Who holds which tokens of a batch: a strip a layout, sequences one after another, the tokens numbered in theirs."""
    _picture(file, LEFT + TOKEN * (sum(lengths) + len(lengths) - 0.6), len(LAID) * (TOKEN + ABOVE) + 0.35, _strips, lengths)


def tiles(file: Path | BinaryIO, lengths: Sequence[int] = ONE) -> None:
    """Who compares which queries with which keys: a row a layout, a square a hop. What was compared before is grey."""
    side = SIDE * sum(lengths)
    width = LEFT + len(RANKS) * (side + 0.35)
    _picture(file, width, len(LAID) * (side + ABOVE + 0.38) + 0.3, _squares, lengths)


def _picture(
    file: Path | BinaryIO, width: float, height: float, draw: Callable[[Axes, Sequence[int]], None], lengths: Sequence[int]
) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 8, "font.family": "sans-serif"}):
        figure: Figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(-height, 0))
        axes.axis("off")
        draw(axes, lengths)
        for rank, colour in enumerate(RANKS):
            _box(axes, LEFT + 0.85 * rank, -height + 0.12, 0.2, 0.14, colour)
            axes.text(LEFT + 0.85 * rank + 0.27, -height + 0.19, f"rank {rank}", color=INK, va="center")
        # Without the library's version in it, the same picture is the same file.
        figure.savefig(file, dpi=110, format="png", metadata={"Software": None})


def _strips(axes: Axes, lengths: Sequence[int]) -> None:
    top = 0.0
    for layout in LAID:
        top -= ABOVE
        axes.text(0.1, top - TOKEN / 2, layout, color=INK, weight="bold", va="center")
        every = LAYOUTS[layout](lengths, len(RANKS))
        holder = {(p.sequence, t): rank for rank, own in enumerate(every) for p in own for t in range(p.start, p.stop)}
        x = LEFT
        for s, n in enumerate(lengths):
            axes.text(x, top + 0.06, f"sequence {s}", color=INK, fontsize=7)
            for t in range(n):
                _box(axes, x, top - TOKEN, TOKEN, TOKEN, RANKS[holder[s, t]])
                ink = "white" if holder[s, t] == DARK else INK
                axes.text(x + TOKEN / 2, top - TOKEN / 2, f"{t}", ha="center", va="center", color=ink, fontsize=7)
                x += TOKEN
            # Room for its name.
            x += TOKEN
        top -= TOKEN


def _squares(axes: Axes, lengths: Sequence[int]) -> None:
    top, S, p = 0.0, sum(lengths), len(RANKS)
    side = SIDE * S
    for layout in LAID:
        top -= ABOVE
        every = LAYOUTS[layout](lengths, p)
        axes.text(0.1, top - side / 2, layout, color=INK, weight="bold", va="center")
        before: list[tuple[int, int]] = []
        for hop in range(p):
            x = LEFT + hop * (side + 0.35)
            axes.text(x, top + 0.06, "own block" if hop == 0 else f"hop {hop}", color=INK, fontsize=8)
            _box(axes, x, top - side, side, side, OTHERS)
            for q, k in before:
                _box(axes, x + SIDE * k, top - SIDE * (q + 1), SIDE, SIDE, WHOLE)
            now = [[*pairs(lengths, every, rank, hop)] for rank in range(p)]
            for rank, found in enumerate(now):
                for q, k in found:
                    _box(axes, x + SIDE * k, top - SIDE * (q + 1), SIDE, SIDE, RANKS[rank])
            before += [pair for found in now for pair in found]
            said = "pairs: " + " ".join(f"{len(found)}" for found in now)
            axes.text(x, top - side - 0.14, said, color=INK, va="center", fontsize=7.5)
        top -= side + 0.38
    axes.annotate(
        "", (LEFT - 0.08, -ABOVE - side), (LEFT - 0.08, -ABOVE), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 0.7}
    )
    axes.text(LEFT - 0.14, -ABOVE - 0.02, "queries", rotation=90, ha="right", va="top", color=INK, fontsize=7)
    axes.text(LEFT + side, -ABOVE + 0.06, "keys →", ha="right", color=INK, fontsize=7)


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="0.35", linewidth=0.4))


def pictures(folder: Path) -> list[Path]:
    """Draw them."""
    drawn = {"context-rows.png": rows, "context-tiles.png": tiles}
    for name, draw in drawn.items():
        draw(folder / name)
    return [folder / name for name in drawn]


def options() -> Parser:
    return again.options("context", "context-parallel.md")


if __name__ == "__main__":
    again.main(options(), pictures)
