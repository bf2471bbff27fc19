"""Every schedule for the same numbers, simulated: as data, as a table, as a drawing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from launch import report
from launch.measure import chart
from launch.terminal.lines import width
from parallel.schedule import Plan
from parallel.schedules import SCHEDULES, plan
from parallel.simulation import Costs, Timing, simulate


def alternatives(
    ranks: int, micro_batches: int, chunks: int | None, costs: Callable[[Plan], Costs]
) -> tuple[dict[str, Timing], list[str]]:
    """All schedules that are possible, by name, and why the others are not. `chunks`: of those that leave it open."""
    found, impossible = {}, []
    for name, schedule in SCHEDULES.items():
        try:
            made = plan(name, ranks, micro_batches, chunks if schedule.any_chunks else None)
        except ValueError as error:
            impossible.append(str(error))
        else:
            found[name] = simulate(made, costs(made))
    return found, impossible


def as_json(timing: Timing) -> dict:
    """A timed plan in numbers. `bubble_fraction` is of the span, as papers on zero bubble print it."""
    made = timing.plan
    return {
        "stages": made.stages,
        "micro_batches": made.micro_batches,
        "makespan": float(timing.makespan),
        "span": float(timing.span),
        "bubble_fraction": float(timing.bubble(timing.span)),
        "bubble_fraction_of_makespan": float(timing.bubble(timing.makespan)),
        "peaks": made.peaks(),
        "peaks_until_weights": made.peaks("W"),
        "messages": sum(made.to(op) not in (None, rank) for op, rank in made.place.items()),
    }


def scaled(timing: Timing, by: float) -> Timing:
    """In another unit of time."""
    return Timing(timing.plan, tuple(tuple((begin * by, end * by) for begin, end in rank) for rank in timing.times))


def table(rows: Mapping[str, dict], title: str, unit: str = "", by: float = 1) -> None:
    """`rows`: by name, as `as_json` has them. Times are multiplied `by` what makes them be in `unit`."""
    report.table(
        title,
        ("schedule", "stages", f"makespan {unit}".rstrip(), "bubble %", f"span {unit}".rstrip(), "its bubble %",
         "in flight", "until W", "messages"),
        [
            (name, r["stages"], chart.time(by * r["makespan"]), f"{100 * r['bubble_fraction_of_makespan']:.1f}",
             chart.time(by * r["span"]), f"{100 * r['bubble_fraction']:.1f}", _counts(r["peaks"]),
             _counts(r["peaks_until_weights"]), f"{r['messages']:,}")
            for name, r in rows.items()
        ],
    )  # fmt: skip


def _counts(peaks: Sequence[int]) -> str:
    """Of each rank; of many that differ, the range."""
    if len(set(peaks)) == 1 and len(peaks) > 1:
        return f"{peaks[0]} each"
    return " ".join(map(str, peaks)) if len(peaks) <= 4 else f"{min(peaks)} to {max(peaks)}"


def show(result: dict, timing: Timing, title: str, unit: str = "", by: float = 1) -> None:
    """The table of `result["schedules"]`, and the plan in characters. Times `by` some number are in `unit`."""
    table({r["schedule"]: r for r in result["schedules"]}, title, unit, by)
    report.say(*result["impossible"], *[""] * bool(result["impossible"]))
    print(*chart.drawn(scaled(timing, by), width(), unit), "", sep="\n")
    if result["picture"]:
        report.say(f"wrote {result['picture']}", "")
