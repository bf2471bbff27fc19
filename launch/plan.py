"""What a layout costs on thousands of ranks, without running it: time, memory and messages of a step, or the best of all."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mpi4py import MPI

from launch import report
from launch.options import UsageError, axis_sizes, only_with, parser, positive
from launch.planning import asked, columns, here, question, show, table, timeline, told, verify
from launch.planning.table import Table
from launch.terminal import targets
from launch.terminal.lines import size
from parallel.schedules import SCHEDULES
from parallel.shard import AXES
from plan import collectives, whatif
from plan.account import Account
from plan.collectives import Group
from plan.machine import Machine
from plan.ours import Ours
from plan.search import Space, search
from plan.step import Estimate, Planner
from plan.theirs import Theirs

VERBS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
# Of a table: planners of so many machines are kept.
ONE_LAYOUT = ("--what-if", "--sensitivity", "--explain", "--timeline", "--png")


def options() -> argparse.ArgumentParser:
    p = parser(
        "plan",
        "Plan a layout without running it: the time, memory and messages of a step on many ranks; or search all layouts.",
        (
            "python -m launch.plan --model llama3-8b --machine h800 --batch 64 --mesh dp=8",
            "python -m launch.plan --model llama3-8b --machine h800 --batch 64 --ranks 64",
            "python -m launch.plan --table rows.csv --output predicted.csv",
            "mpirun -n 4 python -m launch.plan --verify --mesh pp=2,tp=2",
            "python -m launch.plan --collective all_reduce --machine a100-80gb",
        ),
        without=("dtype",),
    )
    asked.add_model(p)
    asked.add_batch_and_machine(p)
    one = p.add_argument_group("one layout")
    one.add_argument(
        "--mesh", type=axis_sizes, metavar="pp=N,dp=N,..", help="ranks along pp, dp, ep, cp and tp (default: one rank)"
    )
    one.add_argument(
        "--plan", metavar="FILE", type=Path, help="a schedule of your own: a line a rank, of operations like 0F0,0B0"
    )
    asked.add(one, columns.LAYOUT, without=("stage_layers",))
    verify.add(p)
    one.add_argument("--what-if", metavar="NAME=VALUE", action="append", type=asked.changes, default=[],
                     help="beside it, with another machine or option, as in memory=2x,peak=2x or zero=3")  # fmt: skip
    one.add_argument("--sensitivity", action="store_true", help="beside it, with 10 %% more of each constant of the machine")
    one.add_argument("--explain", action="store_true", help="the operations of a block: shape, time, bytes, what limits it")
    one.add_argument(
        "--timeline", metavar="FILE", type=targets.File, help="write the step as launch.trace and Perfetto read it"
    )
    one.add_argument("--png", metavar="FILE", type=targets.Picture, help="draw the step")
    s = p.add_argument_group("search")
    s.add_argument("--ranks", type=positive, metavar="N", help="instead of --mesh: every layout of so many ranks")
    s.add_argument(
        "--fix", metavar="NAME=VALUE,..", type=asked.fixed, default={}, help="only layouts with these, as in tp=8,zero=1"
    )
    s.add_argument("--try", dest="tries", metavar="NAME=V,V", action="append", type=asked.tried, default=[],
                   help="only these of an option, as in recompute=none,selective; again for others")  # fmt: skip
    s.add_argument("--keep", type=positive, metavar="N", default=20, help="layouts that are shown")
    t = p.add_argument_group("other questions")
    t.add_argument("--table", metavar="FILE.csv", type=Path, help="a row a layout, with columns named as the options are")
    t.add_argument("--output", metavar="FILE", type=targets.File, help="of --table (default: FILE.predicted.csv)")
    t.add_argument("--collective", choices=VERBS, help="seconds of a verb")
    t.add_argument("--group", type=positive, default=8, help="its ranks, numbered from 0 on")
    t.add_argument("--bytes", type=asked.sizes, metavar="SIZE,..", default="1MiB,16MiB", help="its messages")
    only_with(p, "--group", "--bytes", collective=True)
    only_with(p, "--output", table=True)
    only_with(p, "--fix", "--try", "--keep", ranks=True)
    only_with(p, *ONE_LAYOUT, "--mesh", "--plan", ranks=False)
    only_with(p, *verify.OPTIONS, verify=True)
    for other in ("table", "collective"):
        only_with(p, *ONE_LAYOUT, "--mesh", "--plan", "--ranks", **{other: False})
    only_with(p, *ONE_LAYOUT, "--plan", "--ranks", "--table", "--collective", verify=False)
    only_with(p, "--collective", table=False)
    return p


class Task(NamedTuple):
    """What is asked: `mode` predict, search, table, collective, verify or here. `ask` does it: once, on rank 0; of the last two
    on all ranks, given their communicator."""

    mode: str
    ask: Callable[..., int]


def check(args: argparse.Namespace, ranks: int) -> Task:
    """All that a user gives is read here; only work is left."""
    try:
        values = asked.values(args)
        if args.table is not None:
            table.require(args.account, values)
            return Task("table", partial(tabled, args, values, table.read(args.table)))
        if values["machine"] != here.NAME and (
            unused := "verify" if args.verify else "write-machine" * bool(args.write_machine)
        ):
            raise UsageError(f"--{unused} is about these ranks, not --machine {values['machine']}: leave --machine out")
        if args.verify:
            return Task("verify", partial(verify.run, args, verify.layouts(args, values, ranks)))
        if values["machine"] != here.NAME:
            return of_machine(args, values, question.machine_of(values))
        # All that is wrong is said before anything is measured.
        here.require(args, values, ranks)
        of_machine(args, here.usual(values), here.unmeasured(values, ranks))
        return Task("here", partial(measured, args, values))
    except UsageError:
        raise
    except (ValueError, OverflowError) as error:
        raise UsageError(str(error)) from None


def of_machine(args: argparse.Namespace, values: Mapping[str, object], machine: Machine) -> Task:
    """What is left to do once the machine is known."""
    try:
        if args.collective:
            return Task("collective", partial(collective, args, machine))
        name, config = question.config_of(values)
        planner = Planner(account_of(args.account, machine), machine, causal=args.count == "causal")
        if args.sensitivity and isinstance(machine, here.Here):
            raise UsageError("--sensitivity with --machine here: what was measured has no constants: leave it out")
        if args.ranks:
            return Task("search", partial(searched, args, name, planner, space_of(args, values, config, machine)))
        strategy = question.strategy_of(values, config, machine)
        if args.plan is not None:
            planner = Planner(planner.account, machine, causal=planner.causal, plan=asked.plan(args.plan, strategy))
        estimate = planner.estimate(strategy)
        if args.timeline or args.png:
            timeline.timing(planner, estimate)
        made = [change for text in args.what_if for change in [changed(planner, estimate, values, config, text)]]
        return Task("predict", partial(predicted, args, name, planner, estimate, made))
    except UsageError:
        raise
    except (ValueError, OverflowError) as error:
        raise UsageError(str(error)) from None


def account_of(name: str | None, machine: Machine) -> Account:
    """Ours on these ranks, theirs on GPUs. Raises UsageError for the other."""
    own = "ours" if isinstance(machine, here.Here) else "theirs"
    if name not in (None, own):
        use = "--machine here" if name == "ours" else "a GPU, as in --machine h100-sxm"
        raise UsageError(f"--account {name} has no times for --machine {machine.name}: use {use}")
    return Ours() if own == "ours" else Theirs()


def main(args: argparse.Namespace, comm: MPI.Intracomm, task: Task) -> int:
    if task.mode in ("verify", "here"):
        return task.ask(comm)
    return 0 if comm.rank else task.ask()


def measured(args: argparse.Namespace, values: Mapping[str, object], comm: MPI.Intracomm) -> int:
    """--machine here: all ranks measure, the first plans."""
    machine, unwritten = here.measured(args, values, comm)
    if comm.rank:
        return 0
    status = of_machine(args, here.usual(values), machine).ask()
    if unwritten is not None:
        print(f"error: {unwritten}", file=sys.stderr)
    return status if unwritten is None else 2


# --- one layout


def changed(planner: Planner, e: Estimate, values: Mapping[str, object], config: object, text: str) -> whatif.Change:
    """The step with these changes of the machine and of options."""
    machine, own = planner.machine, dict(values)
    for name, value in asked.pairs(text):
        if name in columns.LAYOUT or name in columns.BATCH or name in AXES:
            own[name] = columns.read(name, value)
            if name == "schedule" and not SCHEDULES[value].any_chunks:
                own["chunks"] = SCHEDULES[value].chunks
        elif isinstance(machine, here.Here):
            raise UsageError(f"--what-if {name}: what was measured has no constants: use an option, or a GPU's --machine")
        else:
            machine = asked.changed_machine(machine, name, value)
    other = whatif.with_machine(planner, machine)
    return whatif.beside(e, other.estimate(question.strategy_of(own, config, machine)), text)


def predicted(args: argparse.Namespace, name: str, planner: Planner, e: Estimate, made: list[whatif.Change]) -> int:
    result = report.header("plan") | {"mode": "predict", "seed": args.seed} | told.question(name, e) | told.estimate(e)
    result["communication"] = told.communication(planner, e)
    result["what_if"] = [told.change(change) for change in made] if made else None
    sensitive = whatif.sensitivity(planner, e) if args.sensitivity else []
    result["sensitivity"] = [told.change(change) for change in sensitive] if sensitive else None
    unwritten = []
    if args.timeline is not None:
        command = ["launch.plan", *sys.argv[1:]]
        unwritten.append(targets.write(args.timeline, lambda file: file.writelines(timeline.document(planner, e, command))))
    if args.png is not None:
        unwritten.append(targets.write(args.png, lambda file: drawn(file, planner, e)))

    def shown() -> None:
        show.estimate(name, planner, e)
        if made:
            show.changes("What if", e, made)
        if sensitive:
            show.changes("The machine's constants, each 10 % better", e, sensitive)
        if args.explain:
            show.explained(planner, e)
        report.say(*(f"wrote {path}" for path in (args.timeline, args.png) if path is not None))

    return report.publish(args.json, result, shown, agreed=None, unwritten=unwritten)


def drawn(file: object, planner: Planner, e: Estimate) -> None:
    from launch.measure.schedules import scaled
    from launch.pictures import schedule as picture

    picture.draw(file, {f"{show.mesh(e.strategy)} {e.strategy.schedule}": scaled(timeline.timing(planner, e), 1e3)}, "ms")


# --- all layouts


def space_of(args: argparse.Namespace, values: Mapping[str, object], config: object, machine: Machine) -> Space:
    """What is searched: options that are given stay as they are, of the others all are tried."""
    tries = {name: (columns.read(name, value),) for name, value in args.fix.items()}
    for name, several in args.tries:
        if name in tries:
            raise UsageError(f"--try {name} beside --fix {name}: give one of them")
        tries[name] = tuple(columns.read(name, value) for value in several)
    if args.mesh is not None:
        raise UsageError("--mesh beside --ranks: give one of them, or --fix tp=8")
    given = {
        name: (values[name],)
        for name in ("schedule", "chunks", "recompute", "zero", "micro_batch")
        if values.get(name) is not None
    }
    if twice := given.keys() & tries.keys():
        option = f"--{min(twice).replace('_', '-')}"
        raise UsageError(f"{option} beside --fix or --try of it: give one of them")
    base = question.options_of(values, config, machine)
    for name in ("schedule", "chunks", "recompute", "zero", *tries):
        base.pop(name, None)
    tries = given | tries
    if isinstance(machine, here.Here):
        tries = {"recompute": ("none", "full"), **tries}
    if args.micro_batches:
        raise UsageError("--micro-batches does nothing with --ranks: give --micro-batch, or --try micro_batch=1,2")
    return Space(args.ranks, base, tries)


def searched(args: argparse.Namespace, name: str, planner: Planner, space: Space) -> int:
    found = search(planner, space, args.keep)
    result = report.header("plan") | {"mode": "search", "seed": args.seed, "ranks": args.ranks}
    result |= told.question(name, found.layouts[0]) if found.layouts else told.nobody(name, planner, space)
    result["search"] = told.found(found)
    return report.publish(args.json, result, lambda: show.search(name, found), agreed=None)


# --- tables and verbs


def tabled(args: argparse.Namespace, values: Mapping[str, object], rows: Table) -> int:
    output = args.output or targets.File(args.table.with_suffix(".predicted.csv"))
    if (why := targets.problem(output)) is not None:
        raise UsageError(f"cannot write --output {output}: {why}")
    planners: dict[Machine, Planner] = {}
    account = Theirs()

    def planner_of(own: Mapping[str, object]) -> Planner:
        key = tuple(own.get(name) for name in columns.MACHINE), own.get("machine")
        if key not in planners:
            planners[key] = Planner(account, question.machine_of(own), causal=args.count == "causal")
        return planners[key]

    found = table.predict(rows, values, planner_of)
    unwritten = [targets.write(output, lambda file: file.write(table.written(rows, found)))]
    result = report.header("plan") | {"mode": "table", "seed": args.seed} | table.as_json(rows, found, output)
    return report.publish(args.json, result, lambda: show.scored(found, str(output)), agreed=None, unwritten=unwritten)


def collective(args: argparse.Namespace, machine: Machine) -> int:
    n, per = args.group, machine.gpus_per_node
    group = Group(n, min(n, per), -(-n // per))
    rows = []
    for message in args.bytes:
        took = collectives.seconds(args.collective, message, group, machine)
        bus = collectives.bus_bandwidth(args.collective, message, group, machine) if n > 1 else None
        rows.append({"message_bytes": message, "seconds": took, "bus_bytes_per_second": bus})
    result = report.header("plan") | {"mode": "collective", "seed": args.seed, "verb": args.collective, "ranks": n}
    result |= {"machine": {"name": machine.name, "ranks": n, "nodes": group.nodes, "gpus_per_node": per}, "rows": rows}

    def shown() -> None:
        report.table(
            f"{args.collective} of {n} ranks on {group.nodes} nodes of {machine.name}",
            ("message", "us", "bus GB/s"),
            [(size(r["message_bytes"]), f"{1e6 * r['seconds']:,.1f}",
              "-" if r["bus_bytes_per_second"] is None else f"{r['bus_bytes_per_second'] / 1e9:,.1f}") for r in rows],
        )  # fmt: skip

    return report.publish(args.json, result, shown, agreed=None)


if __name__ == "__main__":
    start.run(options(), check, main)
