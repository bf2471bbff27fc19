"""A picture of a trace: a bar a rank, coloured by what it did, with the verbs that went on beside it underneath."""

from __future__ import annotations

import textwrap
from typing import BinaryIO

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Patch

from launch.measure import timeline
from launch.measure.timeline import OUTSIDE, Timeline

COLOURS = {
    "forward": "#4c78a8",
    "backward": "#72b7b2",
    "step": "#54a24b",
    "prefill": "#4c78a8",
    "decode": "#72b7b2",
    "draft": "#b279a2",
    timeline.OTHER: "#bab0ac",
    timeline.WAITING: "#e45756",
    timeline.TRANSFERRING: "#f5a623",
    timeline.CONTROL: "#d8d0cb",
}
STARTED = "#ffd27f"
# Of a rank's row: its bar, and beneath it the verbs that it started.
BAR, BESIDE = 0.6, 0.16
# Links between ranks that are drawn: of those who waited longest.
LINKS = 12


def draw(file: BinaryIO, line: Timeline, summary: dict) -> None:
    numbers = list(line.ranks)
    figure, axes = pyplot.subplots(figsize=(12, 1.3 + 0.8 * len(numbers)), layout="constrained")
    used: dict[str, None] = {}
    for row, rank in enumerate(line.ranks.values()):
        by_state: dict[str, list[tuple[float, float]]] = {}
        for s in timeline.segments(rank, line.begun, line.ended):
            if s.state != OUTSIDE:
                by_state.setdefault(s.state, []).append((1e3 * s.begun, 1e3 * (s.ended - s.begun)))
        for state, spans in by_state.items():
            axes.broken_barh(spans, (row - BAR / 2, BAR), facecolors=COLOURS[state], linewidth=0)
            used[state] = None
        beside = [(1e3 * s.begun, 1e3 * s.seconds) for s in rank.started]
        if beside:
            axes.broken_barh(beside, (row + BAR / 2 + 0.02, BESIDE), facecolors=STARTED, edgecolors="#c78500", linewidth=0.4)
    _links(axes, line, {n: row for row, n in enumerate(numbers)})
    axes.set_yticks(range(len(numbers)), [f"rank {n}" for n in numbers])
    axes.set_ylim(len(numbers) - 0.4, -0.6)
    axes.set_xlim(1e3 * line.begun, 1e3 * line.ended)
    axes.set_xlabel("ms")
    axes.set_title(textwrap.fill(summary["traced"], 150), fontsize=9, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    names = {"step": "optimizer step", timeline.OTHER: "other phases", timeline.WAITING: "waiting for others"}
    patches = [Patch(color=COLOURS[s], label=names.get(s, s)) for s in timeline.STATES if s in used]
    if any(r.started for r in line.ranks.values()):
        patches.append(Patch(color=STARTED, label="verb going on beside it"))
    axes.legend(handles=patches, ncols=len(patches), loc="upper center", bbox_to_anchor=(0.5, -0.35 / len(numbers) - 0.12),
                frameon=False, fontsize=8)  # fmt: skip
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _links(axes: pyplot.Axes, line: Timeline, row: dict[int, int]) -> None:
    """Draw lines from a rank that entered a verb last to those that waited for it, where that cost most."""
    calls: dict[str, list[tuple[int, timeline.Slice]]] = {}
    for n, rank in line.ranks.items():
        for s in rank.work:
            if s.kind == "verb" and s.link is not None:
                calls.setdefault(s.link, []).append((n, s))
    dear = sorted(calls.values(), key=lambda c: -sum(s.wait for _, s in c))[:LINKS]
    for together in dear:
        last, ready = max(together, key=lambda c: c[1].begun)
        for n, s in together:
            if n != last and s.wait > 0.002 * line.seconds:
                axes.plot(
                    [1e3 * ready.begun] * 2, [row[last], row[n]], color="#333333", linewidth=0.8, marker="o", markersize=2
                )
