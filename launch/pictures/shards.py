"""One rank's view of a step as a picture: who holds which part of the weights, and the arrays and verbs of the step in order.

Sides of a rectangle are as the roots of the lengths, so that 64 x 1024 can be drawn beside 48 x 64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from launch.explain import boxes
from launch.explain.boxes import Box, Piece
from launch.explain.text import Node, repeats, tree
from launch.pictures.columns import INK, OTHERS, RANKS, SENT, WHOLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of the canvas, in inches: its width, the longest and the shortest side of an array, the gap between two, the width of a verb.
WIDTH, LONGEST, LEAST, GAP, BAR = 10.0, 1.15, 0.16, 0.34, 0.48
# Rows of a phase; what comes after is counted.
MOST = 4


def draw(file: Path | BinaryIO, view: dict) -> None:
    """Draw it as a PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = boxes.cut(view)
    steps = {phase: [*_told(nodes)] for phase, nodes in _phases(view).items()}
    arrays = [a["shape"] for told in steps.values() for a in told if "verb" not in a]
    longest = max([1, *(n for shape in [*(b.shape for b in shown), *arrays] for n in shape)])
    rows = {phase: _rows(told, longest) for phase, told in steps.items() if told}
    height = (2.6 if shown else 1.2) + sum(0.45 + sum(_height(line, longest) for line in r[:MOST]) for r in rows.values()) + 0.1
    with rc_context({"font.size": 8, "font.family": "sans-serif"}):
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(-height, 0))
        axes.axis("off")
        y = _head(axes, view, shown, longest)
        for phase, lines in rows.items():
            axes.text(0.3, y, phase, color=INK, weight="bold", fontsize=10, va="center")
            y -= 0.2
            for n, line in enumerate(lines[:MOST]):
                left = sum(map(len, lines[MOST:])) if n == MOST - 1 else 0
                _row(axes, line, y, longest, view["rank"], left)
                y -= _height(line, longest)
            y -= 0.25
        # Without the library's version in it, the same picture is the same file.
        figure.savefig(file, dpi=110, format="png", metadata={"Software": None})


def _head(axes: Axes, view: dict, shown: Sequence[Box], longest: int) -> float:
    """Title, legend and weights. Returns where the step begins."""
    mesh = " x ".join(f"{axis}={n}" for axis, n in view["mesh"].items())
    axes.text(0.3, -0.35, f"Rank {view['rank']} of {mesh}", color=INK, weight="bold", fontsize=13, va="center")
    x = 4.2
    own = RANKS[view["rank"] % len(RANKS)]
    for colour, said in ((own, "this rank's part"), (WHOLE, "whole"), (SENT, "a verb, and the ranks it meets")):
        _box(axes, x, -0.42, 0.2, 0.14, colour)
        axes.text(x + 0.27, -0.35, said, color=INK, va="center")
        x += 0.6 + 0.075 * len(said)
    x, whole = 0.3, boxes.whole(view)
    for box in shown:
        width, height = _size([prod(box.shape[: box.split]), prod(box.shape[box.split :])], longest, 2.0)
        if x + width > WIDTH - 0.3:
            axes.text(x, -1.4, "...", color=INK)
            break
        _cut(axes, box, view["rank"], x, -0.9, width, height)
        x += max(width, 0.075 * len(box.title)) + GAP
    if whole:
        names = ", ".join(whole[:6]) + (f" and {len(whole) - 6} more" if len(whole) > 6 else "")
        axes.text(0.3, -2.3 if shown else -0.75, f"whole on every rank: {names}", color=INK, va="center")
    return -2.6 if shown else -1.15


def _cut(axes: Axes, box: Box, rank: int, x: float, top: float, width: float, height: float) -> None:
    axes.text(x, top + 0.09, box.title, color=INK, family="monospace", fontsize=8)
    for (above, tall), row in zip(_shares(box.rows, height), box.rows, strict=True):
        for (left, wide), column in zip(_shares(box.columns, width), box.columns, strict=True):
            ranks = row.ranks & column.ranks
            mine = rank in ranks
            colour = RANKS[rank % len(RANKS)] if mine else OTHERS
            _box(axes, x + left, top - above - tall, wide, tall, colour)
            if min(wide / (0.075 * len(boxes.named(ranks))), tall / 0.12) > 1:
                at = x + left + wide / 2, top - above - tall / 2
                axes.text(*at, boxes.named(ranks), ha="center", va="center", color=INK, weight="bold" if mine else "normal")


def _shares(pieces: Sequence[Piece], length: float) -> Iterator[tuple[float, float]]:
    """Where each begins, and how long it is."""
    whole = pieces[-1].stop
    return ((length * p.start / whole, length * (p.stop - p.start) / whole) for p in pieces)


def _phases(view: dict) -> dict[str, list[Node]]:
    found: dict[str, list[Node]] = {}
    for node in tree(view["steps"]):
        found.setdefault(node.step["phase"], []).append(node)
    return found


def _told(nodes: Sequence[Node]) -> Iterator[dict]:
    """What is drawn, in order: the arrays that the first method is given, those that lines make, and verbs that meet another
    rank, each before what it gives. A repeat is left out."""
    if nodes and nodes[0].step["kind"] == "enter":
        yield from (a for a in nodes[0].step["sees"] if "shape" in a)
    yield from _made(nodes)


def _made(nodes: Sequence[Node], called: str = "") -> Iterator[dict]:
    """`called`: what the line that calls this method names what it returns."""
    for at, period, _ in repeats([n.same(shapes=False) for n in nodes]):
        for node in nodes[at : at + period]:
            s = node.step
            first = next(iter(s.get("makes", ())), None)
            name = called if first is None else first["name"] or called
            yield from _made(node.parts, name)
            if s["kind"] == "verb" and len(s["ranks"]) > 1:
                yield s
            # What a method gave was drawn in it; what is made of no array is room, or was saved.
            if s["kind"] != "line" or first is None or not s["reads"] or any(p.step["kind"] == "enter" for p in node.parts):
                continue
            if "parameter" in first or _dims(name) or not name:
                yield first | {"name": name or "result"}


def _dims(name: str) -> str:
    """The letters of a name that carry its shape: Tf of z_Tf. A name without them, as saved_up, is not drawn."""
    dims = name.rpartition("_")[2] if "_" in name else ""
    return dims if any(c.isupper() for c in dims) else ""


def _rows(told: Sequence[dict], longest: int) -> list[list[dict]]:
    """In rows that fit the width; an array that is changed in place is drawn once."""
    rows: list[list[dict]] = [[]]
    x, before = 0.3, None
    for a in told:
        now = (_name(a), a["shape"])
        if now == before and "verb" not in a:
            continue
        before = now
        needs = _room(a, longest)
        if rows[-1] and x + needs > WIDTH - 0.2:
            rows.append([])
            x = 0.3
        rows[-1].append(a)
        x += needs
    return rows


def _name(a: dict) -> str:
    return a.get("verb") or a.get("parameter") or a["name"]


def _room(a: dict, longest: int) -> float:
    if "verb" in a:
        return BAR + GAP
    return max(_size(_flat(a["shape"]), longest, LONGEST)[0], 0.075 * max(len(_name(a)), len(_shape(a)))) + GAP


def _height(line: Sequence[dict], longest: int) -> float:
    """Of a row with its labels; of one with a verb, enough for what is written along that."""
    tall = max((_size(_flat(a["shape"]), longest, LONGEST)[1] for a in line if "verb" not in a), default=0.0) + 0.5
    return max(tall, 1.45 if any("verb" in a for a in line) else 0.0)


def _row(axes: Axes, line: Sequence[dict], top: float, longest: int, rank: int, left: int) -> None:
    x, high = 0.3, _height(line, longest)
    y = top - high / 2
    for n, a in enumerate(line):
        room = _room(a, longest) - GAP
        if n:
            axes.annotate("", (x - 0.04, y), (x - GAP + 0.04, y), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 0.8})
        if "verb" in a:
            _sum(axes, a, x, y, high - 0.1, rank)
        else:
            width, height = _size(_flat(a["shape"]), longest, LONGEST)
            middle, own = x + room / 2, _is_part(a)
            _box(axes, middle - width / 2, y - height / 2, width, height, RANKS[rank % len(RANKS)] if own else WHOLE)
            axes.text(middle, y + height / 2 + 0.06, _name(a), ha="center", family="monospace", fontsize=7.5, color=INK)
            axes.text(middle, y - height / 2 - 0.06, _shape(a), ha="center", va="top", fontsize=7, color=INK)
        x += room + GAP
    if left:
        axes.text(x, y, f"and {left} more", color=INK, va="center")


def _sum(axes: Axes, s: dict, x: float, y: float, height: float, rank: int) -> None:
    from matplotlib.patches import FancyBboxPatch

    shape = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y - height / 2), BAR, height, boxstyle=shape, facecolor=SENT, linewidth=0))
    others = boxes.named(frozenset(s["ranks"]) - {rank})
    said = f"{s['verb']} on {s['axis']}\n{s['message_bytes']:,} bytes\nwith {others}"
    axes.text(x + BAR / 2, y, said, rotation=90, ha="center", va="center", color="white", fontsize=7, linespacing=1.1)


def _is_part(a: dict) -> bool:
    """Whether it is this rank's part: by the small letters of its name, or of a parameter by its index."""
    return "[" in a["parameter"] if "parameter" in a else any(c.islower() for c in _dims(a["name"]))


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    """As rows and columns; one dim lies along the row."""
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))


def _shape(a: dict) -> str:
    return " x ".join(map(str, a["shape"])) or "1"


def _size(sides: Sequence[int], longest: int, most: float) -> tuple[float, float]:
    """Width and height in inches."""
    rows, columns = (max(LEAST, most * min(1.0, sqrt(n / longest))) for n in sides)
    return columns, min(rows, 1.2)


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="0.35", linewidth=0.6))
