"""Pipeline parallelism: a small model in stages, run by any schedule, compared with a reference, counted, and timed beside what
a simulation says.

T tokens   D model width   F hidden width
"""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from collections.abc import Callable
from functools import partial
from operator import eq
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from launch import report
from launch.measure import chart, schedules, small
from launch.measure.pipeline import (
    REPEATS,
    Job,
    Stepped,
    Times,
    against_the_reference,
    dealt_out,
    gathered,
    may_differ,
    one_by_one,
    operations,
)
from launch.options import UsageError, amount, layers, only_with, parser, positive
from launch.pictures import schedule as picture
from launch.process import launcher
from launch.terminal import progress, targets
from models.stage import by_hand, dealt
from parallel import threads
from parallel.schedule import Plan
from parallel.schedule import check as check_plan
from parallel.schedule import read as read_plan
from parallel.schedules import SCHEDULES
from parallel.schedules import plan as planned
from parallel.simulation import Costs, Timing, simulate
from reference.compare import Comparison
from training.text import MicroBatch

# Stages times micro-batches: more takes minutes to simulate.
MOST = 20_000


def options() -> argparse.ArgumentParser:
    p = parser(
        "pipeline",
        "Run a small model in pipeline stages by a schedule, compare it with a reference, and time it beside a simulation.",
        (
            "mpirun -n 4 python -m launch.pipeline --schedule 1f1b",
            "mpirun -n 4 python -m launch.pipeline --schedule zb-h1 --layers 3,3,2,0",
            "mpirun -n 2 python -m launch.pipeline --schedule zb-v --draw plan.png",
            "python -m launch.pipeline --simulate 18.5,18.1,9.3,0.6 --stages 8",
        ),
    )
    p.add_argument("--schedule", choices=tuple(SCHEDULES), default="1f1b", help="who does what when")
    p.add_argument("--plan", metavar="FILE", type=Path, help="a plan of your own: a line a rank, of operations like 0F0,0B0")
    p.add_argument(
        "--stages", type=positive, metavar="N", help="over all ranks (default: chunks times ranks, of which a simulation has 4)"
    )
    p.add_argument("--chunks", type=positive, metavar="V", help="stages of a rank (default: the schedule's)")
    p.add_argument("--micro-batches", type=positive, metavar="M", default=8, help="parts in which a batch goes through")
    p.add_argument("--draw", metavar="FILE", type=targets.Picture, help="also draw the plan in time, as a PNG")
    p.add_argument(
        "--simulate",
        metavar="F,I,W,HOP",
        type=_costs,
        help="run nothing: times of a micro-batch on a rank, forward, backward to the input and to the weights; of a message",
    )
    m = p.add_argument_group("model")
    m.add_argument("--family", choices=("llama", "gpt2"), default="llama", help="what it is like")
    m.add_argument("--layers", type=layers, help="blocks; or of each stage, as in 3,3,2,0 (default: 4, or one a stage)")
    m.add_argument("--tied", action="store_true", help="one table for embedding and output, on the first and last stage")
    m.add_argument("--d-model", type=positive, default=16, help="D")
    m.add_argument("--heads", type=positive, default=2, help="query heads, a divisor of D")
    m.add_argument("--d-ff", type=positive, default=24, help="hidden width of the MLP")
    m.add_argument("--sequences", type=positive, help="of a step (default: 3 for 2 micro-batches)")
    m.add_argument("--sequence-length", type=positive, default=6, help="tokens of the longest; the others are shorter")
    m.add_argument("--timed", type=_sizes, metavar="T,D,F", default="64,256,1024", help="sizes when timed; T of a micro-batch")
    only_with(p, "--schedule", "--stages", "--chunks", "--micro-batches", plan=False)
    only_with(p, *(f"--{a.dest.replace('_', '-')}" for a in m._group_actions), "--dtype", "--seed", "--trace", simulate=False)
    return p


def _costs(text: str) -> tuple[float, ...]:
    """An argparse type: F,I,W,HOP."""
    costs = tuple(map(amount, text.split(",")))
    if len(costs) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not F,I,W,HOP: use four times, such as 18.5,18.1,9.3,0.6")
    if not sum(costs[:3]) >= 1e-9 or max(costs) > 1e12 * sum(costs[:3]):
        raise argparse.ArgumentTypeError(
            f"{text!r}: F, I and W take no time, or none beside the rest: use for instance 1,1,1,0"
        )
    return costs


def _sizes(text: str) -> tuple[int, int, int]:
    """An argparse type: T,D,F."""
    sizes = tuple(positive(part) for part in text.split(","))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not T,D,F: use three sizes, such as 64,256,1024")
    return sizes


class Task(NamedTuple):
    """The plan and its name; what is compared and what is timed, where anything is run."""

    name: str
    plan: Plan
    jobs: tuple[Job, Job] | None


def check(args: argparse.Namespace, ranks: int) -> Task:
    try:
        if args.plan is None:
            name, plan = args.schedule, _planned(args, ranks)
        else:
            name, plan = args.plan.name, _read(args.plan, None if args.simulate else ranks)
        return Task(name, plan, None if args.simulate else _jobs(args, plan))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from None


def _read(path: Path, ranks: int | None) -> Plan:
    """The plan in a file, for so many ranks."""
    try:
        if not path.is_file():
            raise ValueError("it is no file" if path.exists() else "there is no such file")
        plan = read_plan(path.read_text("utf-8"))
        if not plan.place:
            raise ValueError("it has no operations: write a line a rank, such as 0F0,0B0")
        if ranks not in (None, len(plan.ranks)):
            raise ValueError(f"it is for {len(plan.ranks)} ranks, these are {ranks}: write a line a rank")
        check_plan(plan, plan.stages, plan.micro_batches)
        _bounded(max(plan.stages, len(plan.ranks)), plan.micro_batches)
    except UnicodeDecodeError:
        raise UsageError(f"--plan {path}: it is no text: write a line a rank, such as 0F0,0B0") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--plan {path}: {getattr(error, 'strerror', None) or error}") from None
    return plan


def _planned(args: argparse.Namespace, ranks: int) -> Plan:
    """By the schedule: on these ranks, or in a simulation on as many as the stages need."""
    schedule, stages = SCHEDULES[args.schedule], args.stages
    chunks = args.chunks or schedule.chunks
    if args.simulate:
        ranks = 4 if stages is None else max(1, stages // chunks)
    elif stages and not args.chunks and schedule.any_chunks:
        chunks = max(1, stages // ranks)
    _bounded(ranks * chunks, args.micro_batches)
    plan = planned(args.schedule, ranks, args.micro_batches, chunks)
    if stages not in (None, plan.stages):
        other = "" if schedule.any_chunks else " or --schedule interleaved"
        on = f"{ranks} rank{'s' * (ranks > 1)} with {chunks} chunk{'s' * (chunks > 1)} each"
        raise UsageError(f"cannot put {stages} stages on {on}: use --stages {plan.stages}{other}")
    return plan


def _bounded(stages: int, micro_batches: int) -> None:
    if stages * micro_batches > MOST:
        raise UsageError(
            f"{stages} stages and {micro_batches} micro-batches are {stages * micro_batches:,} forwards: use at most {MOST:,}"
        )


def _jobs(args: argparse.Namespace, plan: Plan) -> tuple[Job, Job]:
    """What is compared, and what is timed."""
    counts, m, heads = args.layers or (max(4, plan.stages),), plan.micro_batches, args.heads
    if len(counts) not in (1, plan.stages):
        said = ",".join(map(str, counts))
        raise UsageError(f"--layers {said} is for {len(counts)} stages, these are {plan.stages}: give the blocks of each")
    blocks = dealt(counts[0], plan.stages) if len(counts) == 1 else by_hand(counts)
    sequences = args.sequences or m + (m + 1) // 2
    if sequences < m:
        raise UsageError(f"cannot deal --sequences {sequences} to {m} micro-batches: use {m} or more")
    T, D, F = args.timed
    if D % heads or (args.family == "llama" and D // heads % 2):
        raise UsageError(f"--timed D {D} does not fit {heads} heads: use a multiple of {2 * heads}")

    def job(d_model: int, d_ff: int, longest: int, micro_batches: list[MicroBatch]) -> Job:
        config = small.model(args.family, sum(counts), d_model, heads, d_ff, longest, args.tied)
        return Job(config, blocks, micro_batches, args.dtype, args.seed)

    compared = dealt_out(sequences, args.sequence_length, m, args.seed)
    timed = [small.ragged(1, T, args.seed + n)[0] for n in range(m)]
    return job(args.d_model, args.d_ff, args.sequence_length, compared), job(D, F, T, timed)


def main(args: argparse.Namespace, comm: MPI.Intracomm, task: Task) -> int:
    if task.jobs is None:
        return 0 if comm.rank else simulated(args, task)
    plan, (job, larger) = task.plan, task.jobs
    mesh = start.make_mesh(args, comm, pp=comm.size)
    stepped, whole = Stepped(job, plan, mesh), job.whole()
    weights, apart = gathered(stepped.weights, whole, mesh)
    gradients, unlike = gathered(stepped.gradients, whole, mesh)
    strange = [name for name, a in whole.items() if name in apart or not np.array_equal(weights[name], a)]
    share = progress.items("the reference, tensor by tensor", comm.rank == 0, 1 + 2 * len(whole) // comm.size)
    mine = list(share(against_the_reference(job, stepped.loss, whole, gradients, (comm.rank, comm.size))))
    mesh.control.wait(patient=True)
    checks = [c for of_rank in mesh.control.everyone(mine) for c in of_rank]
    order = {"y": -1} | {f"d{name}": n for n, name in enumerate(whole)}
    checks.sort(key=lambda c: order[c.tensor.removesuffix(", all")])
    others = mesh.control.everyone(stepped.unlike(Stepped(job, one_by_one(plan), mesh)))
    differ = [name for name in whole if any(name in names for names in others)]
    steps, times = operations(larger, mesh, plan, comm)
    if comm.rank:
        return 0
    timing = simulate(plan, times)
    result = report.header("pipeline", args, mesh) | {"config": _config(args, job), "loss": stepped.loss}
    result |= {"checks": [c.as_json() for c in checks], "one_by_one": {"same_bits": not differ, "differ": differ}}
    result |= stepped.counted | {"timed": _timed(args, steps, times)}
    result |= {"seconds": {"measured": median(steps), "predicted": timing.makespan}}
    result |= _simulation(args, task, timing, lambda made: times.over(made.stages))
    wrong = [c.tensor for c in checks if not c.ok] + [f"d{name}, unlike on its ranks" for name in unlike]
    wrong += [f"weights {name}" for name in strange] + _uncounted(result)
    wrong += [f"d{name}, unlike one by one" for name in differ if not may_differ(job, plan, name)]
    drawn = _drawn(args, result, schedules.scaled(timing, 1e3), "ms")
    shown = partial(show, task, result, checks, timing)
    return report.publish(args.json, result, shown, wrong, checks=checks, unwritten=drawn)


def simulated(args: argparse.Namespace, task: Task) -> int:
    timing = simulate(task.plan, Costs.alike(task.plan, *args.simulate))
    result = report.header("pipeline") | {
        "ranks": len(task.plan.ranks),
        "costs": dict(zip(("F", "I", "W", "hop"), args.simulate, strict=True)),
    }
    result |= _simulation(args, task, timing, lambda made: Costs.alike(made, *args.simulate))

    def shown() -> None:
        plan, (F, I, W, hop) = task.plan, map(chart.time, args.simulate)  # noqa: E741
        report.say(
            f"{task.name} on {len(plan.ranks)} ranks, {plan.stages} stages, {plan.micro_batches} micro-batches; "
            f"a micro-batch takes F {F}, I {I} and W {W} on a rank, a message {hop}",
            "",
        )
        schedules.show(result, timing, "Schedules, simulated")

    return report.publish(args.json, result, shown, agreed=None, unwritten=_drawn(args, result, timing))


def _simulation(args: argparse.Namespace, task: Task, timing: Timing, costs: Callable[[Plan], Costs]) -> dict:
    """The plan, as it was simulated, and all schedules beside it."""
    plan, chunks = task.plan, args.chunks if SCHEDULES[args.schedule].any_chunks else None
    others, impossible = schedules.alternatives(len(plan.ranks), plan.micro_batches, chunks, costs)
    rows = ({} if args.plan is None else {task.name: timing}) | others | {task.name: timing}
    found = {"schedule": task.name, "plan": plan.text().splitlines()} | schedules.as_json(timing)
    found["schedules"] = [{"schedule": name} | schedules.as_json(t) for name, t in rows.items()]
    return found | {"impossible": impossible}


def _drawn(args: argparse.Namespace, result: dict, timing: Timing, unit: str = "") -> list[str | None]:
    """Draw the plan where that is asked for, and enter it into the result. Why it could not be written."""
    unwritten = []
    if args.draw is not None:
        unwritten = [targets.write(args.draw, lambda file: picture.draw(file, {result["schedule"]: timing}, unit))]
    result["picture"] = str(args.draw) if unwritten == [None] else None
    return unwritten


def _config(args: argparse.Namespace, job: Job) -> dict:
    c = {name: getattr(args, name) for name in ("family", "tied", "d_model", "heads", "d_ff")}
    tokens = [len(part.ids) for part in job.micro_batches]
    return c | {"blocks_by_stage": [len(held) for held in job.blocks], "tokens_by_micro_batch": tokens}


def _timed(args: argparse.Namespace, steps: list[float], times: Times) -> dict:
    stages = 1 + max(stage for stage, _ in times.seconds)
    by_stage = [{kind: times.seconds[stage, kind] for kind in "FBIW"} for stage in range(stages)]
    told = dict(zip(("tokens", "d_model", "d_ff"), args.timed, strict=True)) | {"steps": steps}
    return told | {"seconds_by_stage": by_stage, "hop": times.hop, "crowded": launcher.local_size() > threads.cores()}


def _uncounted(counted: dict) -> list[str]:
    """Where what was sent or kept is not what was predicted."""
    sent = [f"communication of rank {r['rank']}" for r in counted["communication"] if "rank" in r]
    saved, predicted = (counted["memory"][f"{kind}_bytes_per_rank"] for kind in ("saved", "predicted_saved"))
    return sent + report.of_ranks("memory", map(eq, saved, predicted))


def show(task: Task, result: dict, checks: list[Comparison], timing: Timing) -> None:
    """The report for people."""
    c, job = result["config"], task.jobs[0]
    blocks, tokens = c["blocks_by_stage"], c["tokens_by_micro_batch"]
    sizes = f"{min(tokens)} to {max(tokens)} tokens" if len(tokens) > 1 else f"{tokens[0]} tokens"
    report.say(
        f"{task.name} on pp={result['ranks']}: a {c['family']}-like model{', tied' * c['tied']}, D {c['d_model']}, V "
        f"{small.VOCABULARY}; stages of {', '.join(map(str, blocks))} blocks; micro-batches: {len(tokens)}, of {sizes}; "
        f"{result['dtype']}, seed {result['seed']}",
        "",
    )
    show_checks(job, task.plan, checks)
    if result["one_by_one"]["same_bits"]:
        report.say("All gradients are those of one micro-batch after another, bit for bit.", "")
    else:
        names = ", ".join(f"d{name}" for name in result["one_by_one"]["differ"])
        report.say(f"Bit for bit those of one micro-batch after another are all gradients but {names}.", "")
    report.communication(result["communication"], "one step, of the rank that sends most in each row")
    report.table(
        "Messages sent, by rank, counted beside predicted",
        ("rank", "messages", "predicted", "bytes", "predicted"),
        [(rank, *(f"{n:,}" for n in row)) for rank, row in enumerate(zip(*result["sent"].values(), strict=True))],
    )
    report.memory(result["memory"])
    show_times(result)
    title = "Schedules, simulated with these times; with another number of stages as if all were alike"
    schedules.show(result, timing, title, "ms", 1e3)


def show_checks(job: Job, plan: Plan, checks: list[Comparison]) -> None:
    """Of each stage the worst tensor; each that is wrong."""
    groups: dict[object, list[Comparison]] = {"loss": []} | {stage: [] for stage in plan.rank_of}
    for c in checks:
        groups["loss" if c.tensor == "y" else job.stages_of(c.tensor.removesuffix(", all")[1:])[0]].append(c)
    rows = []
    for group, found in groups.items():
        if found:
            worst = max(found, key=lambda c: (not c.ok, c.max_abs_error / c.tolerance))
            named = ("", "loss") if group == "loss" else (plan.rank_of[group], worst.tensor)
            count = len({c.tensor.removesuffix(", all") for c in found})
            rows.append((group, named[0], count, named[1], f"{worst.max_abs_error:.1e}", f"{worst.tolerance:.1e}",
                         "ok" if worst.ok else "WRONG"))  # fmt: skip
    title = "Loss and gradients against the reference on the whole batch: the worst of each stage"
    report.table(title, ("stage", "rank", "tensors", "worst", "max abs error", "tolerance", ""), rows)
    report.say(*(f"WRONG: {c.worst}" for c in checks if not c.ok))


def show_times(result: dict) -> None:
    t, (measured, predicted) = result["timed"], result["seconds"].values()
    report.table(
        f"Time of a stage's operations at T {t['tokens']}, D {t['d_model']}, F {t['d_ff']}, in ms, medians of {REPEATS} steps",
        ("stage", "F", "B", "I", "W"),
        [(n, *(f"{1e3 * stage[kind]:.2f}" for kind in "FBIW")) for n, stage in enumerate(t["seconds_by_stage"])],
    )
    report.say(
        f"A step took {1e3 * measured:.1f} ms (median of {REPEATS}); simulated with these times and {1e3 * t['hop']:.2f} ms "
        f"a hop, it takes {1e3 * predicted:.1f} ms: {100 * (predicted / measured - 1):+.1f} %."
    )
    if t["crowded"]:
        report.say("There are more ranks than cores, and the simulation gives each rank a core: the two cannot agree.")
    report.say("")


if __name__ == "__main__":
    start.run(options(), check, main)
