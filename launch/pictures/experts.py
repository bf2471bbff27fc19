"""The pictures of docs/experts.md: `python -m launch.pictures.experts` draws them again.

Which rows travel is what the layer's own dispatch says of a small choice; who holds what is what its layouts say.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launch.measure.experts import Job
from launch.pictures import again
from launch.pictures.columns import INK, RANKS, SENT
from launch.terminal.help import Parser
from layers.dispatch import by_expert, dispatched
from parallel.shard import even

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The two experts of each of the 4 tokens of each of 3 ranks; of 6 experts.
CHOICE = np.array([[[0, 3], [1, 0], [2, 5], [0, 1]], [[2, 3], [0, 4], [3, 1], [5, 3]], [[4, 5], [3, 4], [5, 0], [2, 4]]])
EXPERTS = 6
LAYOUTS = ((4, 1), (2, 2), (1, 4))
STAYS = "#9AA0A6"
# Of the first picture: between ranks, between tokens, between experts; where tokens, experts and results stand; a row's width.
RANK, TOKEN, EXPERT, AT, WIDTH = 5.2, 1.1, 1.9, (0.0, 6.2, 17.0), 1.0


def rows_of(choice_RTA: np.ndarray, experts: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Of each rank its experts, and each one's rows, in the order in which the layer has them: (rank of the token, token)."""
    ranks, _, A = choice_RTA.shape
    cut, found = even(experts, ranks), [by_expert(c_TA, experts) for c_TA in choice_RTA]
    for rank, (pairs_N, n_X) in enumerate(found):
        first, last = cut.bounds[rank]
        way = dispatched(pairs_N, n_X, np.stack([n for _, n in found])[:, first:last], cut, rank)
        came = []
        for other, (pairs, n) in enumerate(found):
            if other != rank:
                start = int(n[:first].sum())
                came += [(other, int(pair) // A) for pair in pairs[start : start + int(n[first:last].sum())]]
        for e, pairs, places in way.experts():
            yield rank, first + e, [*((rank, int(p) // A) for p in pairs), *(came[place] for place in places)]


def travel(axes: Axes) -> None:
    """Tokens, the rows of the experts that serve them, and what comes back."""
    ranks, T, _ = CHOICE.shape
    token = lambda r, t: -r * RANK - t * TOKEN  # noqa: E731
    for r in range(ranks):
        y = token(r, 0) + 0.95
        axes.text(AT[0], y, f"rank {r}", color=INK, weight="bold", ha="left")
        for t in range(T):
            _row(axes, AT[0], token(r, t), r, t)
            _row(axes, AT[2], token(r, t), r, t, "y")
    for rank, expert, rows in rows_of(CHOICE, EXPERTS):
        height = -rank * RANK - (expert % (EXPERTS // ranks)) * EXPERT - 0.7
        _frame(axes, AT[1] - 1.3, height - 0.5, WIDTH * 1.25 * 5 + 1.4, 1.3, rank)
        axes.text(AT[1] - 1.15, height + 0.15, f"e{expert}", color=INK, va="center", weight="bold")
        for n, (of, t) in enumerate(rows):
            x = AT[1] + n * WIDTH * 1.25
            _row(axes, x, height, of, t)
            style = {
                "color": SENT if of != rank else STAYS,
                "lw": 1.1 if of != rank else 0.8,
                "zorder": 0 if of != rank else -1,
            }
            axes.plot([AT[0] + WIDTH, AT[1] - 1.3], [token(of, t) + 0.2, height + 0.15], **style)
            axes.plot([AT[1] + WIDTH * 1.25 * 5 + 0.1, AT[2]], [height + 0.15, token(of, t) + 0.2], ls="--", **style)
    for x, text in (
        (AT[0] + 0.5, "x, own tokens"),
        (AT[1] - 2.9, "exchange [x|g]"),
        (AT[1] + 2.5, "experts: rows by expert"),
        (AT[2] - 2.4, "exchange y"),
        (AT[2] + 0.5, "y, summed"),
    ):
        axes.text(x, 2.0, text, ha="center", color=INK)
    axes.set(xlim=(-0.8, AT[2] + 2), ylim=(-ranks * RANK + 0.4, 2.6))


def held(axes: Axes) -> None:
    """The first matrices of 8 experts, by the rank that holds each part, in three layouts of 4 ranks."""
    for n, (ep, tp) in enumerate(LAYOUTS):
        left, job = n * 11.0, Job((1,), 1, 8, 8, 2, 0, {}, "float32", 0)
        axes.text(left, 1.3, f"ep={ep}, tp={tp}", color=INK, weight="bold")
        for rank in range(ep * tp):
            place = {"ep": rank // tp, "tp": rank % tp}
            layout = job.dry(ep, tp).W1_xD2f.parameters[0].layout
            (first, last), _, _, (start, stop) = layout.bounds(place)
            for e in range(first, last):
                x, y = left + e % 4 * 2.4, -(e // 4) * 2.2
                _box(axes, x + start / 4, y - 0.9, (stop - start) / 4, 1.5, RANKS[rank])
                if place["tp"] == 0:
                    axes.text(x + 1, y + 0.72, f"e{e}", ha="center", color=INK, fontsize=7)
    for rank, colour in enumerate(RANKS):
        _box(axes, rank * 4.0, -4.6, 0.7, 0.7, colour)
        axes.text(rank * 4.0 + 1, -4.25, f"rank {rank}", va="center", color=INK)
    axes.set(xlim=(-0.4, 33), ylim=(-5.0, 2.2))


PICTURES = {"experts-travel": (travel, (9, 6)), "experts-held": (held, (9, 2.2))}


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="0.35", linewidth=0.6, zorder=3))


def _frame(axes: Axes, x: float, y: float, width: float, height: float, rank: int) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor="#F6F6F6", edgecolor=RANKS[rank], linewidth=2, zorder=2))


def _row(axes: Axes, x: float, y: float, rank: int, token: int, letter: str = "x") -> None:
    """A token's row, in the colour of the rank whose token it is."""
    _box(axes, x, y - 0.25, WIDTH, 0.8, RANKS[rank])
    axes.text(x + WIDTH / 2, y + 0.14, f"{letter}{token}", ha="center", va="center", color=INK, fontsize=8, zorder=4)


def draw(path: Path, name: str) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    picture, size = PICTURES[name]
    with rc_context({"font.size": 9}):
        figure = Figure(figsize=size)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        picture(axes)
        # Without the library's version in it, the same picture is the same file.
        figure.savefig(path, dpi=80, metadata={"Software": None})


def pictures(folder: Path) -> list[Path]:
    """Draw them."""
    return again.each(folder, PICTURES, draw)


def options() -> Parser:
    return again.options("experts", "experts.md")


if __name__ == "__main__":
    again.main(options(), pictures)
