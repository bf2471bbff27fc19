"""Column and row parallel as a picture: `python -m launch.pictures.columns` draws docs/column-row.png again.

Every rectangle has the proportions of its array, and the cuts are those that `layers/mlp.py` makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from launch.help import Parser
from parallel.shard import even

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: a rank has one, what is whole is grey, what crosses between ranks is green.
RANKS = ("#56B4E9", "#E69F00", "#CC79A7", "#0072B2")
WHOLE, OTHERS, SENT, INK = "#C9CDD2", "#F6F6F6", "#009E73", "#222222"
# Tokens, model width and hidden width, in units of the canvas; the hidden units that are drawn.
T, D, F, UNITS = 2.6, 1.8, 4.8, 8
# Left edges of the arrays of a rank's row, and of the two sums; a row's height.
AT = {"x": 2.6, "W1": 5.7, "h": 12.0, "W2": 15.9, "partial": 19.2, "y": 24.2}
SUM = {"backward": 0.35, "forward": 22.0}
ROW = 6.5


def draw(path: Path, ranks: int) -> None:
    """The MLP on tp=`ranks`, a row a rank. Raises ValueError for more ranks than there are colours."""
    if not 1 <= ranks <= len(RANKS):
        raise ValueError(f"cannot draw {ranks} ranks: use 1 to {len(RANKS)}")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 11}):
        figure = Figure(figsize=(10.4, 1.15 + 2.45 * ranks), layout="constrained")
        axes = figure.subplots()
        for rank in range(ranks):
            _row(axes, rank, ranks)
        top, bottom = ROW / 2 - 0.2, -ROW * (ranks - 0.5) + 0.2
        _sum(axes, SUM["backward"], top, bottom, "backward:  all_reduce  dx")
        _sum(axes, SUM["forward"], top, bottom, "forward:  all_reduce  y")
        _notes(axes, top, bottom)
        axes.set(xlim=(-0.2, 26.6), ylim=(bottom - 2.3, top + 1.5), aspect="equal")
        axes.axis("off")
        # Without the library's version in it, the same picture is the same file.
        figure.savefig(path, dpi=110, metadata={"Software": None})


def _row(axes: Axes, rank: int, ranks: int) -> None:
    """What one rank reads, holds and makes, around the height of its row."""
    y, colour, cut = -ROW * rank, RANKS[rank], even(UNITS, ranks)
    own = F * cut.size(rank) / UNITS
    _array(axes, "x", y, (D, T), WHOLE, "x_TD")
    _array(axes, "W1", y, (F, D), OTHERS, "W1_Df")
    _array(axes, "W2", y, (D, F), OTHERS, "W2_fD")
    for unit in range(*cut.bounds[rank]):
        step = F / UNITS
        _box(axes, AT["W1"] + unit * step, y - D / 2, step, D, colour)
        _box(axes, AT["W2"], y + F / 2 - (unit + 1) * step, D, step, colour)
    middle = AT["h"] + (F / 2 - own) / 2
    _box(axes, middle, y - T / 2, own, T, colour)
    _name(axes, middle + own / 2, y + T / 2, "h_Tf")
    _array(axes, "partial", y, (D, T), colour, "partial_TD", hatch="////")
    _array(axes, "y", y, (D, T), WHOLE, "y_TD")
    for at, sign in ((5.05, "@"), (11.2, "act"), (15.1, "@"), (18.45, "=")):
        axes.text(at, y, sign, ha="center", va="center", color=INK, family="monospace")
    axes.text(AT["x"] - 0.1, y + ROW / 2 - 0.75, f"rank {rank}", color=INK, weight="bold", fontsize=12)
    _arrow(axes, AT["partial"] + D + 0.1, SUM["forward"] - 0.05, y)
    _arrow(axes, SUM["forward"] + 1.05, AT["y"] - 0.1, y)
    _arrow(axes, AT["x"] - 0.1, SUM["backward"] + 1.05, y, style="--")


def _array(axes: Axes, what: str, y: float, size: tuple[float, float], colour: str, name: str, **style: object) -> None:
    _box(axes, AT[what], y - size[1] / 2, *size, colour, **style)
    _name(axes, AT[what] + size[0] / 2, y + size[1] / 2, name)


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, **style: object) -> None:
    from matplotlib.patches import Rectangle

    style = {"edgecolor": "white" if "hatch" in style else "0.35", "linewidth": 0.6} | style
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, **style))


def _name(axes: Axes, x: float, y: float, name: str) -> None:
    axes.text(x, y + 0.14, name, ha="center", va="bottom", color=INK, family="monospace", fontsize=10.5)


def _arrow(axes: Axes, begin: float, end: float, y: float, style: str = "-") -> None:
    axes.annotate("", (end, y), (begin, y), arrowprops={"arrowstyle": "-|>", "color": SENT, "lw": 1.6, "ls": style})


def _sum(axes: Axes, x: float, top: float, bottom: float, text: str) -> None:
    """A sum over all ranks: a bar through all rows."""
    from matplotlib.patches import FancyBboxPatch

    shape = "round,pad=0,rounding_size=0.3"
    axes.add_patch(FancyBboxPatch((x, bottom), 1.0, top - bottom, boxstyle=shape, facecolor=SENT, linewidth=0))
    axes.text(x + 0.5, (top + bottom) / 2, text, rotation=90, ha="center", va="center", color="white", weight="bold")


def _notes(axes: Axes, top: float, bottom: float) -> None:
    for begin, end, text in (
        (AT["x"], AT["partial"] + D, "forward"),
        (AT["partial"] + D, AT["x"], "backward, the same way back"),
    ):
        y, style = (top + 0.75, "-") if begin < end else (bottom - 0.3, "--")
        axes.annotate("", (end, y), (begin, y), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.0, "ls": style})
        axes.text((AT["x"] + AT["partial"] + D) / 2, y, text, ha="center", va="center", color=INK, backgroundcolor="white")
    for left, width, text in (
        (AT["W1"], F, "columns: a rank reads all of x\nand owns some hidden units"),
        (AT["h"], F / 2, "entry by entry:\nnothing to send"),
        (AT["W2"], AT["partial"] + D - AT["W2"], "rows: a rank's product\nis a partial sum of y"),
    ):
        axes.text(left + width / 2, bottom - 1.45, text, ha="center", va="center", color=INK, fontsize=10.5)


def options() -> Parser:
    p = Parser(prog="python -m launch.pictures.columns", description="Draw column and row parallel.")
    p.add_argument("file", nargs="?", type=Path, default=Path("docs/column-row.png"), help="where")
    p.add_argument("--ranks", type=int, default=2, choices=range(1, len(RANKS) + 1), help="of the tp axis")
    return p


def main() -> None:
    p = options()
    args = p.parse_args()
    try:
        draw(args.file, args.ranks)
    except (OSError, ValueError) as error:
        p.error(f"cannot draw {args.file}: {error}")
    print(args.file)


if __name__ == "__main__":
    main()
