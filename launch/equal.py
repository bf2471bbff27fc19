"""Train the same few steps on every mesh of these ranks and in every way, and see that they are those of one process."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from typing import NamedTuple

from mpi4py import MPI

from launch import report
from launch.measure.equal import MODELS, MOST, Case, Job, Unfit, compared, meshes, options_said, said, ways
from launch.options import COMMON, UsageError, amount, axis_sizes, parser, positive, settled
from launch.terminal import progress
from launch.terminal.lines import BYTES, column
from parallel.control import Control
from parallel.shard import AXES


def options() -> argparse.ArgumentParser:
    p = parser(
        "equal",
        "Train the same few steps on every mesh of these ranks and in every way, and compare with one process.",
        (
            "mpirun -n 4 python -m launch.equal",
            "mpirun -n 4 python -m launch.equal --model routed --mesh ep=2,cp=2",
        ),
        without=("dtype",),
    )
    p.add_argument("--model", choices=MODELS, default="dense", help="a small one of this kind")
    p.add_argument("--mesh", type=axis_sizes, help="this mesh alone, as in pp=2,tp=2 (default: every product of the axes)")
    p.add_argument("--steps", type=positive, default=3, help="of AdamW")
    p.add_argument("--tolerance", type=amount, default=1e-10, help="largest difference of a loss, gradient or weight")
    return p


class Task(NamedTuple):
    """What is to be compared, and what cannot be: a mesh, options, and why."""

    cases: list[Case]
    skipped: list[dict]


def check(args: argparse.Namespace, ranks: int) -> Task:
    if ranks > MOST:
        raise UsageError(f"these are {ranks} ranks, the model of this command is too small for them: use at most {MOST}")
    every = meshes(ranks)
    if args.mesh is not None:
        every = [dict.fromkeys(AXES, 1) | settled(args.mesh, ranks, along=AXES)]
    cases, skipped = [], []
    for axes in every:
        try:
            Case(args.model, axes, {})
        except Unfit as why:
            skipped.append({"mesh": axes, "options": {}, "why": str(why)})
            continue
        for way in ways(axes):
            try:
                cases.append(Case(args.model, axes, way))
            except Unfit as why:
                skipped.append({"mesh": axes, "options": dict(way), "why": str(why)})
    if not cases:
        raise UsageError(f"--mesh {said(every[0])} --model {args.model}: {skipped[0]['why']}")
    return Task(cases, skipped)


def main(args: argparse.Namespace, comm: MPI.Intracomm, task: Task) -> int:
    control, job = Control(comm), Job(args.model, comm.size, args.steps, args.seed)
    truth, rows = job.alone(control), []
    for case in progress.items("meshes and ways", comm.rank == 0)(task.cases):
        with start.make_mesh(args, comm, **case.axes) as mesh:
            rows.append(compared(job, case, truth, mesh, control, args.tolerance))
    if comm.rank:
        return 0
    wrong = [f"{said(row['mesh'])} {options_said(row['options'])}".rstrip() for row in rows if not row["ok"]]
    result = report.header("equal") | {
        "ranks": comm.size,
        "seed": args.seed,
        "config": {k: v for k, v in vars(args).items() if k not in (*COMMON, "deterministic")},
        "rows": rows,
        "skipped": task.skipped,
    }
    return report.publish(args.json, result, lambda: show(result), wrong)


def show(result: dict) -> None:
    """The report for people."""
    c, rows = result["config"], result["rows"]
    report.say(
        f"{c['steps']} steps of a small {c['model']} model on {result['ranks']} rank(s) in every way, beside one process: the "
        f"largest difference of a loss, a gradient (of the first step) and a weight (after the last); float64, "
        f"seed {result['seed']}",
        "",
    )
    number = lambda x: "NaN" if x is None else f"{x:.0e}"  # noqa: E731
    memory, held = column("most held", [max(row["memory_bytes_per_rank"]) for row in rows], BYTES)
    report.table(
        "Each mesh and way",
        ("mesh", "options of launch.train", "loss", "gradient", "weight", "bytes", "s", memory, ""),
        [
            (said(row["mesh"]), options_said(row["options"]),
             *(number(row[f"{what}_difference"]) for what in ("loss", "gradient", "weight")),
             "right" if row["bytes_ok"] else "WRONG", f"{row['seconds']:.2f}", most, "ok" if row["ok"] else "WRONG")
            for row, most in zip(rows, held, strict=True)
        ],
        keys=2,
    )  # fmt: skip
    why: dict[str, list[str]] = {}
    for row in result["skipped"]:
        way = " ".join(filter(None, (said(row["mesh"]), options_said(row["options"]))))
        why.setdefault(row["why"], []).append(way)
    for reason, which in why.items():
        report.say(f"left out, as {reason}: {'; '.join(which)}")
    worst = [max((row[f"{what}_difference"] for row in rows if row[f"{what}_difference"] is not None), default=0.0)
             for what in ("loss", "gradient", "weight")]  # fmt: skip
    report.say(f"{len(rows)} ways, worst differences {', '.join(f'{x:.0e}' for x in worst)} (allowed {c['tolerance']:.0e})")


if __name__ == "__main__":
    start.run(options(), check, main)
