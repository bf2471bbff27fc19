"""Weights, gradients and state split over data axes, as pictures: who holds what, and what comes and goes during a step.

`python -m launch.pictures.zero` draws those of docs/parallelism.md again. All is read off trainers that are never run: what
their holders own, and which unit is there when, as `parallel.residence` says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launch.measure.equal import LAYERS, MODELS
from launch.pictures import again
from launch.pictures.columns import INK, OTHERS, RANKS, SENT
from launch.terminal.help import Parser
from models.build import Parts as Built
from models.stage import dealt, stages
from parallel.pipeline import PHASES
from parallel.residence import ROOT, Parts, fills, uses
from parallel.schedule import Op
from parallel.schedules import plan
from plan.dry import DryMesh, dry_weights
from training.trainer import Recipe, Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of the first picture, the ranks of dp and the bytes of a bucket; of the second, the micro-batches.
DP, BUCKET_BYTES, MICRO_BATCHES = 4, 20_000, 2
# What a rank has: computed with or filled, kept for later, on its way.
USED, STAYS, MOVES = "used", "stays", "moves"
WEIGHTS, GRADIENTS = "#0072B2", "#E69F00"
# In inches, of the first picture: a strip's width and height, what is beside and below strips; of the second, a cell.
STRIP, THIN, BESIDE, BELOW = 2.0, 0.13, 0.3, 0.05
CELL, TALL, LEFT = 0.4, 0.2, 0.95


class Alone(DryMesh):
    """A rank's place in a mesh whose other ranks are not there to be asked."""

    @property
    def control(self) -> Alone:
        return self

    def everyone(self, mine: object) -> list[object]:
        return [mine]


def trainer(zero: int, rank: int = 0) -> Trainer:
    """Of the small dense model of `launch.equal`, in float32, on dp=4."""
    mesh = Alone({"dp": DP}, rank)
    own = stages(Built(MODELS["dense"], mesh.tp), dry_weights("float32"), dealt(LAYERS, 1), [0], 0)
    return Trainer(own, mesh, Recipe(zero=zero, bucket_bytes=BUCKET_BYTES))


def held(of: Trainer) -> dict[str, list[slice]]:
    """Which entries of the weights a rank has, of their gradients, and of each of AdamW's two moments."""
    own, every = [part.at for part in of.holder.owned], of.numbering
    share = lambda size: [slice(0, every.size)] if size == every.nbytes else own  # noqa: E731
    memory = of.holder.memory
    state = of.optimizer.m.nbytes
    return {"weights": share(memory["weights"]), "gradients": share(memory["gradients"]), "m, v": share(state)}


def ends(of: Trainer) -> list[int]:
    """Where what is summed, or gathered, at once ends: buckets, or units."""
    if of.recipe.zero < 2:
        return [bucket.stop for sums in of.holder.each for bucket in sums.buckets]
    found, at = [], 0
    for unit in of.holder.units:
        at += sum(shard.numbering.size for shard in unit)
        found.append(at)
    return found


def who_holds_what(axes: Axes) -> tuple[float, float]:
    """A column a stage of ZeRO, a row a rank, in it a strip each for weights, gradients and state."""
    rows = 3 * (THIN + BELOW) + 0.16
    for zero in range(4):
        left, made = 0.75 + zero * (STRIP + BESIDE), [trainer(zero, rank) for rank in range(DP)]
        scale = STRIP / made[0].numbering.size
        axes.text(left, -0.12, ("without ZeRO", "ZeRO-1", "ZeRO-2", "ZeRO-3")[zero], color=INK, weight="bold", va="center")
        for rank, of in enumerate(made):
            for n, (what, spans) in enumerate(held(of).items()):
                top = -0.42 - rank * rows - n * (THIN + BELOW)
                _box(axes, left, top - THIN, STRIP, THIN, OTHERS)
                for at in spans:
                    _box(axes, left + at.start * scale, top - THIN, (at.stop - at.start) * scale, THIN, RANKS[rank])
                if zero == 0:
                    axes.text(left - 0.06, top - THIN / 2, what, color=INK, fontsize=6, ha="right", va="center")
            if zero == 0:
                axes.text(0.05, -0.36 - rank * rows, f"rank {rank}", color=INK, weight="bold", fontsize=7, va="center")
        bottom = -0.42 - DP * rows + 0.12
        stops = ends(made[0])
        for n, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True)):
            axes.plot(2 * [left + stop * scale], [-0.36, bottom], color=INK, lw=0.5, ls=":")
            name = f"bucket {n}" if zero < 2 else "root" if n == ROOT else f"block {n - 1}"
            axes.text(left + (start + stop) / 2 * scale, -0.28, name, color=INK, fontsize=5.5, ha="center", va="center")
        said = f"rank 0: {' + '.join(f'{n:,}' for n in stays(made[0]))} bytes"
        axes.text(left, bottom - 0.12, said, color=INK, fontsize=6.5, va="center")
    return 0.75 + 4 * (STRIP + BESIDE), 0.42 + DP * rows + 0.22


def stays(of: Trainer) -> tuple[int, int, int]:
    """Bytes of weights, gradients and state, through a step and after it."""
    return of.holder.memory["weights"], of.holder.memory["gradients"], of.optimizer.m.nbytes + of.optimizer.v.nbytes


class Moment(NamedTuple):
    """A part is computed in this phase; what there is meanwhile of units, of their weights and of their gradients. Those of one
    micro-batch may be on their way while the next one's are filled."""

    phase: str
    weights: Sequence[tuple[int, str]]
    gradients: Sequence[tuple[int, str]]


def moments(ops: Sequence[Op], parts: Parts) -> Iterator[Moment]:
    """Of a rank that sends beside computing, in order. The operations are F and B."""
    every, filled = uses(ops, parts, PHASES), deque(fills(ops, parts, PHASES))
    there: set[int] = set()
    opened: set[int] = set()
    leaving: list[int] = []
    for use, after in zip(every, [*every[1:], None], strict=True):
        coming = after is not None and after.gathers and after.unit not in there | {use.unit}
        weights = [(use.unit, USED), *((unit, STAYS) for unit in there - {use.unit})]
        weights += [(after.unit, MOVES)] if coming else []
        fill = filled.popleft() if use.phase == "backward" else None
        if fill is not None and fill.unit not in opened:
            # One unit's sums may still be on their way when the next is filled.
            leaving = leaving[-1:]
            opened.add(fill.unit)
        filling = None if fill is None else fill.unit
        gradients = [(unit, USED if unit == filling else STAYS) for unit in opened] + [(unit, MOVES) for unit in leaving]
        yield Moment(use.phase, weights, gradients)
        (there.discard if use.drops else there.add)(use.unit)
        if fill is not None and fill.sends:
            opened.discard(fill.unit)
            leaving.append(fill.unit)


def comes_and_goes(axes: Axes) -> tuple[float, float]:
    """A column a part that is computed; above the units' weights, below their gradients; under each the bytes."""
    of = trainer(3)
    holder, ops = of.holder, plan("1f1b", 1, MICRO_BATCHES).ranks[0]
    every = [*moments(ops, holder.parts)]
    size = [sum(shard.numbering.nbytes for shard in unit) for unit in holder.units]
    for op, (phase, group) in zip(ops, groupby(enumerate(every), lambda item: item[1].phase), strict=True):
        at = [n for n, _ in group]
        _box(axes, LEFT + at[0] * CELL + 0.03, -0.3, len(at) * CELL - 0.06, 0.2, OTHERS)
        said = f"{phase} of micro-batch {op.micro_batch}"
        axes.text(LEFT + (at[0] + len(at) / 2) * CELL, -0.2, said, color=INK, ha="center", va="center", fontsize=7)
    y = -0.36
    for what, colour in (("weights", WEIGHTS), ("gradients", GRADIENTS)):
        axes.text(0.05, y - 0.1, what, color=INK, weight="bold", va="center", fontsize=8)
        y -= 0.22
        for unit in range(len(holder.units)):
            axes.text(LEFT - 0.08, y - TALL / 2, "root" if unit == ROOT else f"block {unit - 1}", color=INK, ha="right",
                      va="center", fontsize=7)  # fmt: skip
            for n, moment in enumerate(every):
                states = [state for of_unit, state in getattr(moment, what) if of_unit == unit]
                _cell(axes, LEFT + n * CELL, y, states, colour)
            y -= TALL
        now = [sum(size[unit] for unit, _ in getattr(moment, what)) for moment in every]
        y = _sum(axes, y - 0.06, now, colour) - 0.16
    said = {
        USED: "a part is computed with it, or fills it",
        STAYS: "stays meanwhile",
        MOVES: "on its way: gathered, or summed",
    }
    for n, (style, text) in enumerate(said.items()):
        x = LEFT + n * 2.9
        for k, colour in enumerate((WEIGHTS, GRADIENTS)):
            _cell(axes, x + k * CELL, y, [style], colour)
        axes.text(x + 2 * CELL + 0.08, y - TALL / 2, text, color=INK, va="center", fontsize=7)
    return LEFT + len(every) * CELL + 0.15, -y + TALL + 0.08


def _cell(axes: Axes, x: float, y: float, states: Sequence[str], colour: str) -> None:
    """What there is twice stands side by side."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y - TALL + 0.015), CELL, TALL - 0.03, facecolor=OTHERS, edgecolor="white", linewidth=0.5))
    for n, state in enumerate(states):
        face = {USED: colour, STAYS: _pale(colour), MOVES: "white"}[state]
        edge, hatch = (SENT, "//////") if state == MOVES else ("0.35", None)
        at, wide = (x + n * CELL / len(states), y - TALL + 0.015), CELL / len(states)
        axes.add_patch(Rectangle(at, wide, TALL - 0.03, facecolor=face, edgecolor=edge, hatch=hatch, linewidth=0.5))


def _sum(axes: Axes, y: float, now: Sequence[int], colour: str) -> float:
    """The bytes of all units, over time, and the most of them."""
    most, high = max(now), 0.4
    for n, size in enumerate(now):
        _box(axes, LEFT + n * CELL, y - high, CELL, high * size / most, _pale(colour))
    n = now.index(most)
    axes.text(LEFT + (n + 0.5) * CELL, y - high / 2, f"{most:,}", color=INK, ha="center", va="center", fontsize=6, rotation=90)
    axes.text(LEFT - 0.08, y - high / 2, "bytes", color=INK, ha="right", va="center", fontsize=7)
    return y - high


def _pale(colour: str) -> tuple[float, ...]:
    return tuple(1 - (1 - int(colour[i : i + 2], 16) / 255) * 0.35 for i in (1, 3, 5))


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: object) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="0.35", linewidth=0.4))


PICTURES: dict[str, Callable[[Axes], tuple[float, float]]] = {"zero-held": who_holds_what, "zero-step": comes_and_goes}


def draw(path: Path, name: str) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 8, "font.family": "sans-serif", "hatch.color": SENT, "hatch.linewidth": 0.7}):
        figure = Figure()
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        width, height = PICTURES[name](axes)
        axes.set(xlim=(0, width), ylim=(-height, 0))
        figure.set_size_inches(width, height)
        # Without the library's version in it, the same picture is the same file.
        figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def pictures(folder: Path) -> list[Path]:
    """Draw them."""
    return again.each(folder, PICTURES, draw)


def options() -> Parser:
    return again.options("zero", "parallelism.md")


if __name__ == "__main__":
    again.main(options(), pictures)
