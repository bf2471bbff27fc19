"""A schedule as a picture, for a file or a terminal: slots are rows, steps are columns, colours say what a slot did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from launch.measure.serving import Column
from launch.terminal.lines import fold, width


class State(NamedTuple):
    """What a slot does in a step. `mark`: its character in a terminal."""

    name: str
    mark: str
    colour: str


# Codes are places in this tuple. Where a picture is smaller than its schedule, `shrunk` chooses one of several.
STATES = (
    State("free", "·", "#ffffff"),
    State("held, nothing run", "-", "#bdbdbd"),
    State("decode", "█", "#56b4e9"),
    State("last token", "▓", "#0b3c5d"),
    State("prefill", "░", "#e69f00"),
    State("preempted", "×", "#d62728"),  # noqa: RUF001
)
FREE, HELD, DECODE, LAST, PREFILL, PREEMPTED = range(len(STATES))
# In a legend.
ORDER = (PREFILL, DECODE, LAST, PREEMPTED, HELD, FREE)
# The most characters of a line.
WIDE = 112


def cells(columns: Sequence[Column], slots: int) -> np.ndarray:
    """(slots, steps) codes of STATES. An admitted request holds the lowest free slot, until it is finished or preempted."""
    codes = np.full((slots, len(columns)), FREE, np.uint8)
    slot_of: dict[int, int] = {}
    for n, (step, finished) in enumerate(columns):
        for id in step.preempted:
            codes[slot_of.pop(id), n] = PREEMPTED
        for id, _ in step.admitted:
            taken = set(slot_of.values())
            slot_of[id] = next(s for s in range(slots) if s not in taken)
        for slot in slot_of.values():
            codes[slot, n] = HELD
        for run in step.runs:
            codes[slot_of[run.id], n] = LAST if run.id in finished else PREFILL if run.prefill else DECODE
        for id in finished:
            del slot_of[id]
    return codes


def shrunk(codes: np.ndarray, every: int) -> np.ndarray:
    """`every` steps as one: preempted, prefill or last token, in this order, if one of them is; else what most of them are."""
    parts = []
    for first in range(0, codes.shape[1], every):
        part = codes[:, first : first + every]
        counts = np.stack([(part == code).sum(axis=1) for code in (FREE, HELD, DECODE)], axis=1)
        rare = part.max(axis=1)
        parts.append(np.where(rare >= LAST, rare, counts.argmax(axis=1)))
    return np.stack(parts, axis=1).astype(np.uint8)


def lines(codes: np.ndarray, every: int) -> Iterator[Text]:
    """A line for each slot, with a character for every so many steps."""
    for row in shrunk(codes, every):
        line = Text("  ")
        for code in row:
            line.append(STATES[code].mark, "" if code == FREE else STATES[code].colour)
        yield line


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # As for everything else that is printed; rich would end the process.
        raise BrokenPipeError


def show(schedules: dict[str, np.ndarray]) -> None:
    """Print schedules by title, one above another on the same scale; in colour if standard output is a terminal."""
    console = _Console(highlight=False, soft_wrap=True, width=width())
    wide = min(width(), WIDE)
    longest = max(codes.shape[1] for codes in schedules.values())
    every = -(-longest // (wide - 2))
    for title, codes in schedules.items():
        console.print(fold(title))
        for line in lines(codes, every):
            console.print(line)
    key = Text("  ")
    for code in _seen(schedules):
        key.append(STATES[code].mark, "" if code == FREE else STATES[code].colour).append(f" {STATES[code].name}   ")
    key.append(f"(rows: slots; a character: {every} step{'s' if every > 1 else ''})")
    console.print(key, soft_wrap=False)
    console.print()


def _seen(schedules: dict[str, np.ndarray]) -> list[int]:
    return [code for code in ORDER if any((codes == code).any() for codes in schedules.values())]


def picture(file: BinaryIO, schedules: dict[str, np.ndarray]) -> None:
    """The same as a PNG file, 1,080 pixels wide."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    longest = max(codes.shape[1] for codes in schedules.values())
    # With more columns than pixels, thin ones would be left out.
    every = -(-longest // 900)
    height = min(6.0, 0.9 + 0.14 * max(len(codes) for codes in schedules.values()))
    size = (9, 0.6 + height * len(schedules))
    figure, panels = plt.subplots(len(schedules), 1, figsize=size, layout="constrained", sharex=True, squeeze=False)
    colours, norm = ListedColormap([s.colour for s in STATES]), BoundaryNorm(np.arange(len(STATES) + 1) - 0.5, len(STATES))
    for axes, (title, codes) in zip(panels[:, 0], schedules.items(), strict=True):
        drawn = shrunk(codes, every)
        extent = (0, drawn.shape[1] * every, len(codes) + 0.5, 0.5)
        axes.imshow(drawn, cmap=colours, norm=norm, aspect="auto", interpolation="nearest", extent=extent)
        for slot in range(1, len(codes)):
            axes.axhline(slot + 0.5, color="white", linewidth=1.0)
        axes.axvline(codes.shape[1], color="0.4", linewidth=1.0, linestyle=":")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set(xlim=(0, 1.01 * longest), ylabel="slot", yticks=[1, len(codes)] if len(codes) > 1 else [1])
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("step")
    key = [Patch(facecolor=STATES[c].colour, edgecolor="0.7", label=STATES[c].name) for c in _seen(schedules)]
    figure.legend(handles=key, loc="outside lower center", ncols=len(key), fontsize=9, frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
