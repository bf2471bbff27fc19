"""The pictures of docs/planning.md: `python -m launch.pictures.planning` draws them again.

One holds predicted seconds beside those that were measured, row by row; the other shows where a step of eight layouts goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.pictures import again
from launch.pictures.columns import INK
from launch.planning import question, show, table
from launch.terminal.help import Parser
from plan.step import Estimate, Planner
from plan.theirs import Theirs

# The measured rows, by table.
ROWS = Path(__file__).resolve().parents[2] / "tests/plan/data"
TABLES = {
    "narayanan-t1": "#0072B2",
    "narayanan-t2": "#56B4E9",
    "korthikanti": "#009E73",
    "vtrain-multi": "#E69F00",
    "mosaic": "#CC79A7",
}
COLOURS = {"forward": "#56B4E9", "backward": "#0072B2", "recompute": "#CC79A7", "host": "#F0E442", "bubble": "#D5D8DC",
           "optimizer": "#222222", "tp": "#E69F00", "cp": "#B8860B", "ep": "#7A5C00", "pp": "#D55E00",
           "dp": "#009E73"}  # fmt: skip
# Eight ways of Llama 3 8B on 64 H100, a batch of 128 sequences.
MODEL = {"model": "llama3-8b", "machine": "h100-sxm", "batch": 128, "grad_dtype": "bf16"}
LAYOUTS = (
    {"dp": 64, "zero": 3},
    {"dp": 64, "zero": 1, "recompute": "full"},
    {"dp": 32, "tp": 2, "zero": 1, "sequence_parallel": True},
    {"dp": 8, "tp": 8, "zero": 1, "sequence_parallel": True},
    {"dp": 16, "cp": 4, "zero": 1},
    {"dp": 16, "pp": 4, "zero": 1, "schedule": "1f1b"},
    {"dp": 16, "pp": 4, "zero": 1, "schedule": "interleaved", "chunks": 4},
    {"dp": 16, "pp": 4, "zero": 1, "schedule": "zb-v", "chunks": 2},
)


def predictions() -> dict[str, list[tuple[float, float]]]:
    """Measured and predicted seconds of each row, by table."""
    planners: dict[tuple, Planner] = {}

    def planner_of(values: Mapping[str, object]) -> Planner:
        key = values["machine"], values.get("node_gbs")
        if key not in planners:
            planners[key] = Planner(Theirs(), question.machine_of(values))
        return planners[key]

    found = {}
    for name in TABLES:
        rows = table.read(ROWS / f"{name}.csv")
        got = table.predict(rows, {}, planner_of)
        measured = [float(row["measured_seconds"]) for row in rows.rows]
        found[name] = [(t, e.iteration) for t, e in zip(measured, got.estimates, strict=True) if e is not None]
    return found


def estimates() -> list[Estimate]:
    _, config = question.config_of(MODEL)
    planner = Planner(Theirs(), question.machine_of(MODEL))
    return [planner.estimate(question.strategy_of({**MODEL, **more}, config, planner.machine)) for more in LAYOUTS]


def draw_accuracy(file: Path, found: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Errors of all rows, by the seconds that were measured."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 8, "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for name, rows in found.items():
            errors = [100 * (predicted / measured - 1) for measured, predicted in rows]
            mean = sum(map(abs, errors)) / len(errors)
            said = f"{name}: {len(rows)} rows, mean error {mean:.1f} %"
            axes.scatter([m for m, _ in rows], errors, s=16, color=TABLES[name], label=said, alpha=0.85)
        axes.axhspan(-5, 5, color="#EEF3F7", zorder=0)
        axes.axhline(0, color="0.5", linewidth=0.7)
        axes.set(xscale="log", xlabel="measured seconds of a step", ylabel="predicted, % too long", ylim=(-38, 22))
        axes.legend(frameon=False, fontsize=7, loc="lower left")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(file, dpi=120, format="png", metadata={"Software": None})


def draw_steps(file: Path, found: Sequence[Estimate]) -> None:
    """Where each layout's step goes, as a bar."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 8, "font.family": "sans-serif"}):
        figure = Figure(figsize=(8.4, 0.42 * len(found) + 1.2), layout="constrained")
        axes = figure.add_subplot()
        for row, e in enumerate(found):
            left = 0.0
            for part, seconds in {**e.seconds, **e.exposed}.items():
                if seconds > 0 and part in COLOURS:
                    axes.barh(row, seconds, left=left, height=0.66, color=COLOURS[part])
                    left += seconds
            gib = e.peak_bytes / 2**30
            said = f"{e.iteration:.2f} s, MFU {100 * e.mfu:.0f} %, {gib:.0f} GiB" + ("" if e.fits else ": too large")
            axes.text(left, row, f"  {said}", va="center", color=INK if e.fits else "#C0392B", fontsize=7.5)
        names = [f"{show.mesh(e.strategy)}\n{show.options(e.strategy).replace('--', '')}" for e in found]
        axes.set_yticks(range(len(found)), names, fontsize=6.5)
        axes.set(ylim=(len(found) - 0.5, -0.5), xlim=(0, 1.35 * max(e.iteration for e in found)), xlabel="seconds")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        used = [p for p in COLOURS if any({**e.seconds, **e.exposed}.get(p, 0) > 1e-3 * e.iteration for e in found)]
        from matplotlib.patches import Patch

        key = [Patch(color=COLOURS[p], label=f"exposed {p}" if len(p) == 2 else p) for p in used]
        figure.legend(handles=key, loc="outside lower center", ncols=len(key), frameon=False, fontsize=7)
        figure.savefig(file, dpi=120, format="png", metadata={"Software": None})


def pictures(folder: Path) -> list[Path]:
    paths = [folder / "planning-accuracy.png", folder / "planning-steps.png"]
    draw_accuracy(paths[0], predictions())
    draw_steps(paths[1], estimates())
    return paths


def options() -> Parser:
    return again.options("planning", "planning.md")


if __name__ == "__main__":
    again.main(options(), pictures)
