"""What `--trace` wrote, read back: what each rank did when, who kept whom waiting, and what the verbs cost."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from mpi4py import MPI

from launch import report
from launch.measure import timeline
from launch.measure.timeline import COMPUTING, CONTROL, OUTSIDE, TRANSFERRING, WAITING, Timeline, TraceError
from launch.options import UsageError, only_with, parser
from launch.terminal import targets
from launch.terminal.lines import BYTES, SECONDS, column, width

LETTERS = dict(zip(timeline.STATES, "FBSPDd+~=c.", strict=True))
SAID = {
    "step": "optimizer step",
    timeline.OTHER: "other phases",
    WAITING: "waiting in a verb",
    TRANSFERRING: "transferring",
    CONTROL: "control message",
    OUTSIDE: "none of these",
}
DEAREST = 10


def _window(text: str) -> tuple[float, float]:
    """An argparse type: milliseconds, as 10:25.5; either may be left out."""
    first, colon, last = text.partition(":")
    try:
        window = float(first or 0), float(last or "inf")
    except ValueError:
        window = 0.0, 0.0
    if not colon or not 0 <= window[0] < window[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: use milliseconds, from:to, as 10:25.5")
    return window[0] / 1e3, window[1] / 1e3


def options() -> argparse.ArgumentParser:
    p = parser(
        "trace",
        "Read what a command wrote with --trace: a strip a rank, shares of time, stragglers, dear verbs.",
        (
            "mpirun -n 4 python -m launch.tp_mlp --trace t.json",
            "python -m launch.trace t.json",
            "python -m launch.trace t.json --window 10:25.5 --png t.png",
            "python -m launch.trace --compare t.json other.json",
        ),
        needs="(FILE | --compare A B)",
        without=("dtype", "seed", "ranks"),
    )
    p.add_argument("file", metavar="FILE", type=Path, nargs="?", help="the trace")
    p.add_argument("--compare", metavar=("A", "B"), type=Path, nargs=2, help="instead of FILE: two traces side by side")
    p.add_argument("--window", type=_window, metavar="FROM:TO", help="only this time, in milliseconds (default: all of it)")
    p.add_argument("--png", metavar="OUT", type=targets.Picture, help="draw it, as a PNG")
    only_with(p, "--png", compare=False)
    return p


def check(args: argparse.Namespace, ranks: int) -> list[Timeline]:
    if (args.file is None) == (args.compare is None):
        raise UsageError("use either the FILE of a trace, or --compare A B")
    try:
        return [_read(path, args.window) for path in args.compare or [args.file]]
    except TraceError as error:
        raise UsageError(str(error)) from None


def _read(path: Path, window: tuple[float, float] | None) -> Timeline:
    line = timeline.read(path)
    if window is None:
        return line
    part = line.between(*window)
    if not any(r.work for r in part.ranks.values()):
        raise TraceError(
            f"--window {1e3 * window[0]:g}:{1e3 * window[1]:g} ms has nothing of {path}: "
            f"use a part of {1e3 * line.begun:.1f}:{1e3 * line.ended:.1f}"
        )
    return part


def summary(path: Path, line: Timeline) -> dict:
    """A trace in numbers, for JSON."""
    by_rank = timeline.shares(line)
    caused = timeline.kept_waiting(line)
    waited = sum(caused.values())
    over = timeline.overlap(line)
    return {
        "file": str(path),
        "traced": " ".join(line.about.get("command", [])),
        "ranks": len(line.ranks),
        "from_seconds": line.begun,
        "to_seconds": line.ended,
        "clock_uncertainty_us": line.about.get("uncertainty_us"),
        "dropped": sum(line.about.get("dropped", [])),
        "failed": line.about.get("failed", {}),
        "seconds_by_rank": [
            {
                "rank": n,
                "computing": sum(s[state] for state in COMPUTING),
                **{state: s[state] for state in (*COMPUTING, WAITING, TRANSFERRING, CONTROL, OUTSIDE)},
                "kept_others_waiting": caused[n],
                "most_memory_bytes": max(line.ranks[n].memory, default=None),
            }
            for n, s in by_rank.items()
        ],
        "straggler": timeline.straggler(caused, waited),
        "steps": {name: {"calls": calls, "median_seconds": s} for name, (calls, s) in timeline.steps(line).items()},
        "verbs": [{**c._asdict(), "seconds": c.seconds} for c in timeline.costs(line)],
        "overlap": None if over is None else {**over._asdict(), "hidden": over.hidden},
    }


def draw(file: BinaryIO, line: Timeline, about: dict) -> None:
    from launch.pictures import timeline

    timeline.draw(file, line, about)


def main(args: argparse.Namespace, comm: MPI.Intracomm, lines: list[Timeline]) -> int:
    if comm.rank:
        return 0
    summaries = [summary(path, line) for path, line in zip(args.compare or [args.file], lines, strict=True)]
    unwritten = None if args.png is None else targets.write(args.png, lambda file: draw(file, lines[0], summaries[0]))

    def show_all() -> None:
        if args.compare:
            show_compared(*summaries)
        else:
            show(summaries[0], lines[0])
        if args.png is not None and unwritten is None:
            print(f"picture: {args.png}")

    result = report.header("trace") | ({"compared": summaries} if args.compare else summaries[0])
    return report.publish(args.json, result, show_all, agreed=None, unwritten=[unwritten])


# --- for people


def show(trace: dict, line: Timeline) -> None:
    """`trace`: its summary."""
    whole = line.seconds
    report.say(
        f"{trace['traced']}\n{trace['ranks']} ranks, {1e3 * whole:.1f} ms; "
        f"clocks agree to {trace['clock_uncertainty_us']:.1f} us"
    )
    for rank, cause in trace["failed"].items():
        report.say(f"rank {rank} alone, until it failed: {cause}")
    if trace["dropped"]:
        report.say(f"{trace['dropped']:,} spans came after the most that a trace keeps, and are not here")
    show_strips(line)
    ranks = trace["seconds_by_rank"]
    others = column("others waited for it", [r["kept_others_waiting"] for r in ranks], SECONDS)
    memory = column("most memory", [r["most_memory_bytes"] for r in ranks], BYTES)
    report.table(
        "Where the time went, in % of it",
        ("rank", "computing", "waiting", "transferring", "control", "outside", others[0], memory[0]),
        [
            (r["rank"], *(f"{100 * r[k] / whole:.1f}" for k in ("computing", WAITING, TRANSFERRING, CONTROL, OUTSIDE)), *last)
            for r, *last in zip(ranks, others[1], memory[1], strict=True)
        ],
    )
    if trace["steps"]:
        report.table("Steps", ("", "of a rank", "median ms"),
                     [(k, s["calls"], f"{1e3 * s['median_seconds']:.2f}") for k, s in trace["steps"].items()])  # fmt: skip
    if trace["verbs"]:
        report.table(
            f"The dearest verbs, of {len(trace['verbs'])}: mean of the ranks",
            ("verb", "axis", "shape", "calls", "message bytes", "ms", "waiting", "transfer", "wire MB/s"),
            [
                (
                    v["verb"],
                    v["axis"],
                    "x".join(map(str, v["shape"])) or "1",
                    v["calls"],
                    f"{v['message_bytes']:,}",
                    *(f"{1e3 * v[k]:.2f}" for k in ("seconds", "wait", "transfer")),
                    "-" if v["bandwidth"] is None else f"{v['bandwidth'] / 1e6:,.0f}",
                )
                for v in trace["verbs"][:DEAREST]
            ],
            keys=3,
        )
    if trace["overlap"]:
        o = trace["overlap"]
        report.say(
            f"{o['calls']} verbs were started and went on beside computation: {1e3 * o['seconds']:.1f} ms on their way, "
            f"{1e3 * o['exposed']:.1f} ms waited for, {o['hidden']:.0%} hidden"
        )
    report.say(_straggler(trace))


def _straggler(trace: dict) -> str:
    caused = {r["rank"]: r["kept_others_waiting"] for r in trace["seconds_by_rank"]}
    waited = sum(caused.values())
    if trace["straggler"] is None:
        return f"no straggler: the ranks waited {1e3 * waited:.1f} ms in all, for no single one of them"
    mine = caused[trace["straggler"]]
    return (
        f"straggler: rank {trace['straggler']}: the others waited {1e3 * mine:.1f} ms for it, "
        f"{mine / waited:.0%} of all their waiting"
    )


def show_strips(line: Timeline) -> None:
    label = len(f"rank {max(line.ranks)} ")
    columns = width() - label - 1
    used: dict[str, None] = {}
    print()
    for n, rank in line.ranks.items():
        states = timeline.strip(rank, line.begun, line.ended, columns)
        used |= dict.fromkeys(states)
        print(f"{f'rank {n}':<{label}}{''.join(LETTERS[s] for s in states)}")
    left, right = f"{1e3 * line.begun:.1f} ms", f"{1e3 * line.ended:.1f} ms"
    print(f"{'':<{label}}{left}{right:>{columns - len(left)}}")
    key = ", ".join(f"{LETTERS[s]} {SAID.get(s, s)}" for s in timeline.STATES if s in used)
    report.say(" " * label + key, "", indent=" " * label)


def show_compared(a: dict, b: dict) -> None:
    report.say(f"A  {a['traced']}\nB  {b['traced']}\n")
    report.table(
        "Side by side: ms, the ranks' mean",
        ("", "A", "B", "B - A", "B / A"),
        [(name, *_ms(x, y)) for name, x, y in compared(a, b)],
    )
    for name, trace in (("A", a), ("B", b)):
        report.say(f"{name}: {_straggler(trace)}")


def compared(a: dict, b: dict) -> list[tuple[str, float, float]]:
    """The same rows of both, in seconds; 0 where one has none."""

    def mean(trace: dict, state: str) -> float:
        return sum(r[state] for r in trace["seconds_by_rank"]) / trace["ranks"]

    def verbs(trace: dict) -> dict[str, float]:
        return {f"{v['verb']} {v['axis']} {'x'.join(map(str, v['shape']))}": v["seconds"] for v in trace["verbs"]}

    rows = [("the whole", a["to_seconds"] - a["from_seconds"], b["to_seconds"] - b["from_seconds"])]
    rows += [(s, mean(a, s), mean(b, s)) for s in ("computing", *COMPUTING, WAITING, TRANSFERRING, CONTROL, OUTSIDE)]
    for name in {**a["steps"], **b["steps"]}:
        rows.append((f"{name} (median)", *(t["steps"].get(name, {}).get("median_seconds", 0.0) for t in (a, b))))
    mine, other = verbs(a), verbs(b)
    dearest = sorted({**mine, **other}, key=lambda k: -max(mine.get(k, 0.0), other.get(k, 0.0)))[:DEAREST]
    rows += [(k, mine.get(k, 0.0), other.get(k, 0.0)) for k in dearest]
    rows += [("hidden beside computation", *((t["overlap"]["seconds"] - t["overlap"]["exposed"]) / t["ranks"]
              if t["overlap"] else 0.0 for t in (a, b)))]  # fmt: skip
    return [r for r in rows if r[1] or r[2]]


def _ms(a: float, b: float) -> Sequence[str]:
    return f"{1e3 * a:.2f}", f"{1e3 * b:.2f}", f"{1e3 * (b - a):+.2f}", f"{b / a:.2f}" if a else "-"


if __name__ == "__main__":
    start.run(options(), check, main)
