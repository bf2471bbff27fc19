"""Timed plans as a picture: a row a rank, time to the right, each operation with its micro-batch.

`python -m launch.pictures.schedule` draws the pictures of docs/pipeline.md again.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from launch.measure.chart import chunks, time
from launch.pictures import again
from launch.pictures.columns import INK
from launch.terminal.help import Parser
from parallel.schedules import plan
from parallel.simulation import Costs, Timing, simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours.
COLOURS = {"F": "#56B4E9", "B": "#E69F00", "I": "#F0E442", "W": "#009E73"}
KINDS = {"F": "F: forward", "B": "B: backward", "I": "I: backward to the input", "W": "W: backward to the weights"}
IDLE = "#F1F1F1"
# In inches: the picture's width and what stands left and right of the rows; a row, what is above and below the rows of a plan.
WIDTH, LEFT, RIGHT, ROW, ABOVE, BELOW = 12.0, 0.65, 1.0, 0.3, 0.3, 0.25
# Of the numbers in the rows: a digit's width and what is free beside a number, in inches.
DIGIT, FREE = 0.062, 0.015
# The pictures of docs/pipeline.md: 4 ranks, 8 micro-batches, F = I = W = 1 on a rank, and no time for messages.
PAGE = {"whole": ("gpipe", "1f1b", "interleaved"), "halves": ("zb-h1", "zb-h2"), "v": ("zb-v", "dualpipe-v")}


def draw(file: Path | BinaryIO, timings: Mapping[str, Timing], unit: str = "", whole: float = 0) -> None:
    """Write them as a PNG, under one another and to one scale, each under its name. `unit`: of the times, such as ms. `whole`:
    the time that the width stands for, if it is longer than they are."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    longest = float(max(whole, *(t.makespan for t in timings.values())))
    height = sum(ABOVE + ROW * len(t.times) + BELOW for t in timings.values()) + 0.35
    with rc_context({"font.size": 8, "font.family": "sans-serif"}):
        figure = Figure(figsize=(WIDTH, height))
        y = height
        for name, timing in timings.items():
            rows = ROW * len(timing.times)
            y -= ABOVE + rows
            box = (LEFT / WIDTH, y / height, (WIDTH - LEFT - RIGHT) / WIDTH, rows / height)
            axes = figure.add_axes(box)
            axes.set(xlim=(0, longest), ylim=(len(timing.times), 0))
            _rows(axes, timing, (WIDTH - LEFT - RIGHT) / longest)
            axes.set_title(said(name, timing, unit), loc="left", color=INK, fontsize=9, pad=4)
            y -= BELOW
        _key(figure, timings)
        # Without the library's version in it, the same picture is the same file.
        figure.savefig(file, dpi=110, format="png", metadata={"Software": None})


def said(name: str, timing: Timing, unit: str = "") -> str:
    """The line above a plan."""
    micro = timing.plan.micro_batches
    return (
        f"{name}: {micro} micro-batch{'es' * (micro != 1)}, makespan {time(timing.makespan, unit)}, "
        f"bubble {100 * float(timing.bubble(timing.makespan)):.1f} %; "
        f"longest span {time(timing.span, unit)}, bubble {100 * float(timing.bubble(timing.span)):.1f} %"
    )


def _rows(axes: Axes, timing: Timing, inches: float) -> None:
    """`inches`: of one unit of time."""
    of, peaks, kept = chunks(timing), timing.plan.peaks(), timing.plan.peaks("W")
    most = max(of.values()) + 1
    for row, (ops, times) in enumerate(zip(timing.plan.ranks, timing.times, strict=True)):
        spans = [(float(begin), float(end - begin)) for begin, end in times]
        colours = [_paler(COLOURS[op.kind], of[op.stage] / most) for op in ops]
        axes.broken_barh([(0, float(timing.makespan))], (row + 0.06, 0.88), facecolors=IDLE)
        axes.broken_barh(spans, (row + 0.06, 0.88), facecolors=colours, edgecolors="white", linewidth=0.6)
        for op, (begin, wide) in zip(ops, spans, strict=True):
            if DIGIT * len(number := str(op.micro_batch)) + FREE < wide * inches:
                axes.text(begin + wide / 2, row + 0.52, number, ha="center", va="center", color=INK, fontsize=7.5)
        flight = f"{peaks[row]} in flight" + f", {kept[row]} till W" * (kept[row] != peaks[row])
        axes.text(1.005, row + 0.5, flight, transform=axes.get_yaxis_transform(), va="center", color=INK, fontsize=7)
    axes.set_yticks([row + 0.5 for row in range(len(timing.times))], [f"rank {row}" for row in range(len(timing.times))])
    axes.tick_params(length=0, labelsize=7.5)
    axes.tick_params(axis="x", pad=1, labelsize=6.5, labelcolor="0.45")
    for side in axes.spines.values():
        side.set_visible(False)


def _paler(colour: str, part: float) -> tuple[float, ...]:
    """The colour with up to two thirds of white in it: chunk 0 has none."""
    return tuple(1 - (1 - int(colour[i : i + 2], 16) / 255) * (1 - 0.67 * part) for i in (1, 3, 5))


def _key(figure: Figure, timings: Mapping[str, Timing]) -> None:
    from matplotlib.patches import Patch

    used = {op.kind for t in timings.values() for op in t.plan.place}
    patches = [Patch(color=COLOURS[kind], label=text) for kind, text in KINDS.items() if kind in used]
    patches.append(Patch(color=IDLE, label="idle"))
    most = max(n for t in timings.values() for n in chunks(t).values())
    patches += [Patch(color=_paler(COLOURS["F"], n / (most + 1)), label=f"chunk {n}") for n in range(1, most + 1)]
    figure.legend(handles=patches, loc="lower left", bbox_to_anchor=(LEFT / WIDTH, 0), ncols=len(patches), frameon=False)


def page() -> dict[str, Timing]:
    """The plans of the pictures, timed."""
    plans = {name: plan(name, 4, 8) for names in PAGE.values() for name in names}
    return {name: simulate(made, Costs.alike(made, *3 * [Fraction(1)])) for name, made in plans.items()}


def pictures(folder: Path) -> list[Path]:
    """Draw them, all to one scale."""
    timings, paths = page(), []
    for kind, names in PAGE.items():
        paths.append(folder / f"pipeline-{kind}.png")
        draw(paths[-1], {name: timings[name] for name in names}, whole=max(t.makespan for t in timings.values()))
    return paths


def options() -> Parser:
    return again.options("schedule", "pipeline.md")


if __name__ == "__main__":
    again.main(options(), pictures)
