"""The pictures of docs/tensor-parallel.md: `python -m launch.pictures.columns` draws them again.

A picture is what a rank reads, holds and makes, from left to right, and where it meets the other ranks. Every rectangle has the
proportions of its array, and the cuts are those that the layers make.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launch.terminal.help import Parser
from parallel.shard import even

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: a rank has one, what is whole is grey, what crosses between ranks is green.
RANKS = ("#56B4E9", "#E69F00", "#CC79A7", "#0072B2")
WHOLE, OTHERS, SENT, INK = "#C9CDD2", "#F6F6F6", "#009E73", "#222222"
# In units of the canvas, of which an inch has so many: tokens, model and hidden width, vocabulary; one number a token.
INCH, T, D, F, V, ONE = 2.58, 2.6, 1.8, 4.8, 3.6, 0.42
# What is cut has so many hidden units, tokens or rows of the table; a rank's row is so high; a line of text in a bar so wide.
UNITS, ROW, LINE = 8, 6.5, 0.8
# Between two steps, and beside a bar, where arrows are; the width of a letter.
GAP, BESIDE, LETTER = 0.4, 1.05, 0.235
# The id of each token, and of the one that follows it.
IDS = (5, 0, 3, 6, 1, 7, 2, 4)
TARGETS = (*IDS[1:], IDS[0])


class Array(NamedTuple):
    """An array by its name in the layers, its width and height, and what of it a rank has: it all ("whole"), some "columns" or
    "rows" of it, nothing else being there for the others' ("share"), a term of each entry's sum ("partial"); of "ids", each
    belongs to the rank that has its row of the table: what a rank has of its ids is "found", of its targets "picked"."""

    name: str
    width: float
    height: float
    has: str = "whole"


class Bar(NamedTuple):
    """Where all ranks meet, and what they do there in forward and in backward."""

    forward: str
    backward: str


class Picture(NamedTuple):
    """`steps`: arrays, bars, and signs between them. `notes`: texts, each below the arrays from one name to another."""

    steps: Sequence[Array | Bar | str]
    notes: Sequence[tuple[str, str, str]]


# What stands in more than one picture, or would make a line too long.
PAIR = ("@", Array("W1_Df", F, D, "columns"), "act", Array("h_Tf", F, T, "share"), "@", Array("W2_fD", D, F, "rows"), "=")
PARTIAL = Array("partial_TD", D, T, "partial")
LOOKED_UP = (Array("Wte_vD", D, V, "rows"), "[", Array("ids_T", ONE, T, "ids"), "] =", Array("partial_TD", D, T, "found"))
HEAD = ("@", Array("Whead_Dv", V, D, "columns"), "=", Array("logits_Tv", V, T, "share"), "→")
OF_A_TOKEN = (Array("top_T", ONE, T, "partial"), Array("sum_T", ONE, T, "partial"), Array("picked_T", ONE, T, "picked"))
PICTURES = {
    "column-row": Picture(
        (
            Bar("", "all_reduce dx"),
            *(Array("x_TD", D, T), *PAIR, PARTIAL),
            Bar("all_reduce y", ""),
            Array("y_TD", D, T),
        ),
        (
            ("W1_Df", "W1_Df", "columns: a rank reads all of x\nand owns some hidden units"),
            ("h_Tf", "h_Tf", "entry by entry:\nnothing to send"),
            ("W2_fD", "partial_TD", "rows: a rank's product\nis a partial sum of y"),
        ),
    ),
    "vocabulary": Picture(
        (
            *LOOKED_UP,
            Bar("all_reduce x", ""),
            *(Array("x_TD", D, T), "blocks"),
            Bar("", "all_reduce dh"),
            *(Array("h_TD", D, T), *HEAD, *OF_A_TOKEN),
            Bar("all_reduce top, then sum and picked", ""),
            Array("nll_T", ONE, T),
        ),
        (
            ("Wte_vD", "partial_TD", "rows of the table: a rank looks up\nits own ids; the others are zero"),
            ("Whead_Dv", "logits_Tv", "columns of the head: a rank\nhas the logits of its own ids"),
            ("top_T", "nll_T", "three numbers a token meet,\nlogits never do"),
        ),
    ),
    "sequence-parallel": Picture(
        (
            *(Array("x_tD", D, T, "rows"), "norm", Array("n_tD", D, T, "rows")),
            Bar("all_gather n", "all_gather n, reduce_scatter dn"),
            *(Array("n_TD", D, T), *PAIR, PARTIAL),
            Bar("reduce_scatter y", "all_gather dy"),
            Array("y_tD", D, T, "rows"),
        ),
        (
            ("x_tD", "n_tD", "rows are cut: a rank keeps\nand norms its own tokens"),
            ("n_TD", "partial_TD", "rows are whole, hidden units are cut"),
            ("y_tD", "y_tD", "rows\nare cut"),
        ),
    ),
}


def draw(path: Path, picture: Picture, ranks: int) -> None:
    """What tp=`ranks` do, a row a rank. Raises ValueError for one rank, or more than there are colours."""
    if not 2 <= ranks <= len(RANKS):
        raise ValueError(f"cannot draw {ranks} ranks: use 2 to {len(RANKS)}")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    top, bottom = ROW / 2 - 0.2, -ROW * (ranks - 0.5) + 0.2
    placed = _placed(picture.steps, ranks)
    width, height = placed[-1].right + GAP, top - bottom + 4.0
    with rc_context({"font.size": 11}):
        figure = Figure(figsize=(width / INCH, height / INCH))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(bottom - 2.5, top + 1.5))
        axes.axis("off")
        for rank in range(ranks):
            _row(axes, placed, rank, ranks)
        for place in placed:
            if isinstance(place.step, Bar):
                _bar(axes, place, top, bottom)
        _notes(axes, placed, picture.notes, top, bottom)
        # Without the library's version in it, the same picture is the same file.
        figure.savefig(path, dpi=110, metadata={"Software": None})


class Place(NamedTuple):
    """A step between two edges of the canvas."""

    step: Array | Bar | str
    left: float
    right: float

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2


def _placed(steps: Sequence[Array | Bar | str], ranks: int) -> list[Place]:
    """The steps side by side."""
    placed: list[Place] = []
    for step in steps:
        if isinstance(step, Array):
            most = even(UNITS, ranks).sizes[0] / UNITS if step.has == "share" else 1
            width = max(step.width * most, len(step.name) * LETTER)
        else:
            width = LINE * len(_said(step)) + 0.2 if isinstance(step, Bar) else len(step) * LETTER
        beside = placed and Bar in (type(step), type(placed[-1].step))
        left = (placed[-1].right if placed else 0) + (BESIDE if beside else GAP)
        placed.append(Place(step, left, left + width))
    return placed


def _row(axes: Axes, placed: Sequence[Place], rank: int, ranks: int) -> None:
    """What one rank reads, holds and makes, around the height of its row."""
    y = -ROW * rank
    for place in placed:
        if isinstance(place.step, Array):
            _array(axes, place, y, rank, ranks)
        elif isinstance(place.step, str):
            axes.text(place.middle, y, place.step, ha="center", va="center", color=INK, family="monospace")
    for before, after in pairwise(placed):
        bar = next((p.step for p in (before, after) if isinstance(p.step, Bar)), Bar("", ""))
        aside = 0.4 if bar.forward and bar.backward else 0
        if bar.forward:
            _arrow(axes, before.right + 0.1, after.left - 0.1, y + aside)
        if bar.backward:
            _arrow(axes, after.left - 0.1, before.right + 0.1, y - aside, style="--")
    first = next(p for p in placed if isinstance(p.step, Array))
    axes.text(first.left, y + ROW / 2 - 0.75, f"rank {rank}", color=INK, weight="bold", fontsize=12)


def _array(axes: Axes, place: Place, y: float, rank: int, ranks: int) -> None:
    array, cut = place.step, even(UNITS, ranks)
    own, colour = range(*cut.bounds[rank]), RANKS[rank]
    width = array.width * len(own) / UNITS if array.has == "share" else array.width
    left, top = place.middle - width / 2, y + array.height / 2
    back = {"whole": WHOLE, "share": colour, "partial": colour}.get(array.has, OTHERS)
    _box(axes, left, top - array.height, width, array.height, back, hatched=array.has == "partial")
    if array.has == "columns":
        for unit in own:
            _box(axes, left + unit * width / UNITS, top - array.height, width / UNITS, array.height, colour)
    elif array.has in ("rows", "ids", "found", "picked"):
        at = {"rows": own, "ids": range(UNITS), "found": map(IDS.index, own), "picked": map(TARGETS.index, own)}[array.has]
        for unit in at:
            its = RANKS[cut.owner(IDS[unit])] if array.has == "ids" else colour
            height = array.height / UNITS
            _box(axes, left, top - (unit + 1) * height, width, height, its, hatched=array.has in ("found", "picked"))
        # The hatched have covered it here and there.
        _box(axes, left, top - array.height, width, array.height, "none")
    axes.text(place.middle, top + 0.14, array.name, ha="center", va="bottom", color=INK, family="monospace", fontsize=10.5)


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, hatched: bool = False) -> None:
    from matplotlib.patches import Rectangle

    style = {"edgecolor": "white", "hatch": "////"} if hatched else {"edgecolor": "0.35"}
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, linewidth=0.6, **style))


def _arrow(axes: Axes, begin: float, end: float, y: float, style: str = "-", colour: str = SENT, width: float = 1.6) -> None:
    axes.annotate("", (end, y), (begin, y), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": width, "ls": style})


def _said(bar: Bar) -> list[str]:
    return [f"{phase}:  {verbs}" for phase, verbs in bar._asdict().items() if verbs]


def _bar(axes: Axes, place: Place, top: float, bottom: float) -> None:
    """Through the rows of all ranks."""
    from matplotlib.patches import FancyBboxPatch

    shape, width = "round,pad=0,rounding_size=0.3", place.right - place.left
    axes.add_patch(FancyBboxPatch((place.left, bottom), width, top - bottom, boxstyle=shape, facecolor=SENT, linewidth=0))
    style = {"rotation": 90, "ha": "center", "va": "center", "color": "white", "weight": "bold"}
    axes.text(place.middle, (top + bottom) / 2, "\n".join(_said(place.step)), **style)


def _notes(axes: Axes, placed: Sequence[Place], notes: Iterable[tuple[str, str, str]], top: float, bottom: float) -> None:
    arrays = {p.step.name: p for p in placed if isinstance(p.step, Array)}
    left, *_, right = arrays.values()
    for begin, end, y, text, style in (
        (left.left, right.right, top + 0.75, "forward", "-"),
        (right.right, left.left, bottom - 0.5, "backward, the same way back", "--"),
    ):
        _arrow(axes, begin, end, y, style, INK, 1.0)
        axes.text((begin + end) / 2, y, text, ha="center", va="center", color=INK, backgroundcolor="white")
    for first, last, text in notes:
        middle = (arrays[first].left + arrays[last].right) / 2
        axes.text(middle, bottom - 1.7, text, ha="center", va="center", color=INK, fontsize=10.5)


def options() -> Parser:
    p = Parser(prog="python -m launch.pictures.columns", description="Draw the pictures of docs/tensor-parallel.md.")
    names = ", ".join(PICTURES)
    p.add_argument("what", nargs="?", metavar="WHAT", choices=tuple(PICTURES), help=f"one of {names} (default: all)")
    p.add_argument("--into", type=Path, default=Path("docs"), metavar="DIR", help="the folder")
    p.add_argument("--ranks", type=int, default=2, choices=range(2, len(RANKS) + 1), help="of the tp axis")
    return p


def main() -> None:
    p = options()
    args = p.parse_args()
    for name in PICTURES if args.what is None else [args.what]:
        path = args.into / f"{name}.png"
        try:
            draw(path, PICTURES[name], args.ranks)
        except OSError as error:
            p.error(f"cannot draw {path}: {error}")
        print(path)


if __name__ == "__main__":
    main()
