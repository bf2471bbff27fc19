"""launch.plan --verify: what is planned of a layout beside three real steps of it, on these ranks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from launch import report, start
from launch.measure import verify
from launch.measure.equal import MODELS, MOST, USUAL, Case, Job, Unfit, meshes, options_said, said, ways
from launch.options import UsageError, settled
from launch.planning import here, question
from launch.terminal import progress
from launch.terminal.lines import SECONDS, column
from layers.context import KINDS
from layers.pieces import LAYOUTS
from parallel.control import Control
from parallel.shard import AXES
from plan import ours
from plan.strategy import Strategy
from plan.training import Training
from training.text import MicroBatch

OPTIONS = ("--context", "--layout")


class Layout(NamedTuple):
    """What is run: a mesh, how a step is made, the training, and what a rank of dp and ep gets of a batch. `strategy`: the same
    in the planner's words, where its seconds are predicted too."""

    mesh: Mapping[str, int]
    options: Mapping[str, object]
    training: Training
    batch: Callable[[int], Sequence[MicroBatch]]
    strategy: Strategy | None = None


def add(p: argparse.ArgumentParser) -> None:
    v = p.add_argument_group("verify")
    v.add_argument(
        "--verify",
        action="store_true",
        help="run three steps of --mesh on these ranks, and compare what is counted with the plan; without --mesh, of all "
        f"meshes and ways of launch.equal. --model: also {', '.join(MODELS)}, small ones",
    )
    v.add_argument("--context", choices=KINDS, default=USUAL["context"], help="how tokens that are cut over cp attend")
    v.add_argument("--layout", choices=LAYOUTS, default=USUAL["layout"], help="which tokens each rank of cp has")


def layouts(args: argparse.Namespace, values: Mapping[str, object], ranks: int) -> list[Layout]:
    """Raises UsageError, or ValueError in one line."""
    small = args.model in MODELS or (args.model is None and args.family is None)
    if args.mesh is None:
        if not small:
            raise UsageError(f"--verify of --model {args.model or args.family} needs a mesh: give --mesh, as in dp={ranks}")
        return list(_all(args.model or "dense", ranks, args.seed))
    mesh = dict.fromkeys(AXES, 1) | settled(args.mesh, ranks, along=AXES)
    if small:
        return [_small(args, mesh, ranks)]
    _, config = question.config_of(values)
    return [_sized(args, values, config, mesh)]


def _all(model: str, ranks: int, seed: int) -> Iterator[Layout]:
    """Every mesh and way that launch.equal has."""
    if ranks > MOST:
        raise UsageError(f"these are {ranks} ranks, the small model is too small for them: use at most {MOST}, or --mesh")
    job = Job(model, ranks, verify.STEPS, seed)
    for axes in meshes(ranks):
        for way in ways(axes):
            try:
                yield _of_case(job, Case(model, axes, way))
            except Unfit:
                continue


def _of_case(job: Job, case: Case) -> Layout:
    return Layout(case.axes, case.options, job.training(case), lambda rank: job.dealt(case, rank))


def _small(args: argparse.Namespace, mesh: dict[str, int], ranks: int) -> Layout:
    """One of launch.equal's models, on ragged sequences."""
    if args.recompute not in (None, "none", "full"):
        raise UsageError(f"--recompute {args.recompute} is nothing that launch.train does: use none or full")
    if ranks > MOST:
        raise UsageError(f"these are {ranks} ranks, the small model is too small for them: use at most {MOST}")
    refused = ("batch", "batch_tokens", "micro_batch", "micro_batches", "sequence_length", "chunks", "layers", "dtype")
    if given := [name for name in refused if getattr(args, name) is not None]:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option} does nothing with the small model of --verify: give sizes by --family, or leave it out")
    asked = {"schedule": args.schedule, "zero": args.zero, "recompute": args.recompute == "full" or None}
    asked |= {"sequence_parallel": args.sequence_parallel, "context": args.context, "layout": args.layout}
    way = {name: value for name, value in asked.items() if value is not None and value != USUAL[name]}
    job = Job(args.model or "dense", ranks, verify.STEPS, args.seed)
    return _of_case(job, Case(job.model, mesh, way))


def _sized(args: argparse.Namespace, values: Mapping[str, object], config: object, mesh: dict[str, int]) -> Layout:
    """A model of the sizes that are given, on sequences of one length."""
    S = values.get("sequence_length", 128)
    given = {"sequence_length": S, "micro_batches": 2 * mesh["pp"]} | values | mesh
    if "micro_batch" in values:
        del given["micro_batches"]
    if not {"batch", "batch_tokens"} & given.keys():
        given["batch"] = 4 * mesh["dp"] * mesh["ep"] * mesh["pp"]
    strategy = here.strategy(given, config)
    training = ours.training(strategy, ours.How(args.context, args.layout))
    ids = np.random.default_rng(args.seed).integers(0, config.vocabulary, S + 1)
    batch = lambda rank: [_tokens(ids, lengths) for lengths in training.dealt(rank)]  # noqa: E731
    said_of = {name: values[name] for name in ("schedule", "zero", "recompute", "sequence_parallel") if values.get(name)}
    return Layout(mesh, said_of, training, batch, strategy)


def _tokens(ids: np.ndarray, lengths: Sequence[int]) -> MicroBatch:
    found = [np.tile(a, len(lengths)) for a in (ids[:-1], ids[1:])]
    return MicroBatch(*found, list(lengths))


def run(args: argparse.Namespace, every: Sequence[Layout], comm: MPI.Intracomm) -> int:
    """All ranks call it together; the first reports."""
    control, rows, cases, wrong = Control(comm), [], [], []
    for layout in progress.items("meshes and ways", comm.rank == 0)(every):
        predicted = None if layout.strategy is None else here.seconds(args, control, comm, layout.strategy)
        with start.make_mesh(args, comm, **layout.mesh) as mesh:
            batch = layout.batch(mesh.over("dp", "ep").rank)
            found, seconds = verify.verified(layout.training, mesh, batch, args.seed)
        name = f"{said(layout.mesh)} {options_said(layout.options)}".rstrip()
        bad = [row for row in found if not row["equal"]]
        wrong += [f"{name}: {row['what']} of rank {row['rank']}" for row in bad]
        own = {"mesh": dict(layout.mesh), "options": dict(layout.options)} if len(every) > 1 else {}
        rows += [own | row for row in (found if len(every) == 1 else verify.summed(found))]
        ratio = None if predicted is None else predicted / median(seconds)
        cases.append({"mesh": dict(layout.mesh), "options": dict(layout.options), "compared": len(found), "ok": not bad,
                      "seconds": {"predicted": predicted, "measured": seconds, "ratio": ratio}})  # fmt: skip
    if comm.rank:
        return 0
    result = report.header("plan") | {"mode": "verify", "seed": args.seed, "ranks": comm.size, "mesh": cases[0]["mesh"]}
    one = cases[0]["seconds"] if len(every) == 1 else None
    result["verify"] = {"rows": rows, "seconds": one, **({} if len(every) == 1 else {"cases": cases})}
    return report.publish(args.json, result, lambda: show(result, cases), wrong, "all ==")


def show(result: dict, cases: Sequence[dict]) -> None:
    """The report for people."""
    if len(cases) > 1:
        heading, took = column("step", [median(case["seconds"]["measured"]) for case in cases], SECONDS, 1)
        report.table(
            f"{verify.STEPS} steps of each mesh and way of {result['ranks']} rank(s), predicted beside counted",
            ("mesh", "way", "compared", "", heading),
            [(said(case["mesh"]), options_said(case["options"]) or "as usual", case["compared"], _verdict(case["ok"]), seconds)
             for case, seconds in zip(cases, took, strict=True)],
            keys=2,
        )  # fmt: skip
        return
    by_rank: dict[int, list[tuple]] = {}
    for row in result["verify"]["rows"]:
        by_rank.setdefault(row["rank"], []).append(tuple(row[k] for k in ("what", "predicted", "counted", "equal")))
    ranks = [*by_rank]
    for alike in report.runs([by_rank[rank] for rank in ranks]):
        report.table(
            f"{verify.STEPS} steps of {said(cases[0]['mesh'])} {options_said(cases[0]['options'])}".rstrip()
            + f", rank {report.said(alike)}",
            ("", "predicted", "counted", ""),
            [(what, _told(a), _told(b), _verdict(equal)) for what, a, b, equal in by_rank[ranks[alike[0]]]],
        )
    told = cases[0]["seconds"]
    measured = ", ".join(f"{1e3 * s:,.1f}" for s in told["measured"])
    if told["predicted"] is not None:
        report.say(f"a step: predicted {1e3 * told['predicted']:,.1f} ms by what these ranks reach, measured {measured} ms: "
                   f"{told['ratio']:.2f} of the median")  # fmt: skip
    else:
        report.say(f"a step: measured {measured} ms")


def _verdict(equal: bool) -> str:
    return "==" if equal else "WRONG"


def _told(value: object) -> str:
    """Orders of operations by their ends: one line has no room for all."""
    if isinstance(value, str):
        words = value.split(",")
        return value if len(words) <= 6 else f"{','.join(words[:2])},..,{','.join(words[-2:])} ({len(words)})"
    return "-" if value is None else f"{value:,}"
