"""What dynamic batch scheduling is worth: one workload through the engine, in static batches and in continuous ones."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from mpi4py import MPI

from inference import workload
from inference.blocks import BLOCK, needed
from inference.engine import Engine
from inference.generate import Generator, make_cache
from inference.policies import APART, POLICIES
from inference.scheduler import Scheduler
from inference.workload import Workload
from launch import pretrained, report
from launch.measure.acceptance import explained, tie
from launch.measure.serving import STEPS, Served, alone, closed_form, decode_steps, latencies, serve
from launch.options import UsageError, amount, only_with, parser, positive
from launch.pictures import occupancy
from launch.terminal import progress, targets
from layers.transformer import Transformer
from models.source import Source
from parallel.control import Control
from parallel.mesh import Mesh

# Lengths in and out and the largest token id: a small twin of nano-vllm's workload, and that itself.
SCALED, FULL = ((8, 64), 255), ((100, 1024), 10000)
# Static first: continuous batching is compared with it.
ORDER = tuple(sorted(POLICIES, reverse=True))
# Tokens of a request that warms up. There are as many of these as slots.
WARM = 4


def options() -> argparse.ArgumentParser:
    p = parser(
        "serving_bench",
        "What dynamic batch scheduling is worth: static against continuous batches of one workload, greedy and without end "
        "tokens. As it stands, with SmolLM2 on 2 ranks, about a minute.",
        (
            "mpirun -n 2 python -m launch.serving_bench",
            "mpirun -n 2 python -m launch.serving_bench --rate 4 --slots 16",
            "python -m launch.serving_bench --scheduler-only",
        ),
        check_collectives="off",
    )
    pretrained.add_model(p)
    p.add_argument("--requests", type=positive, help="how many (default: 64; --full 256)")
    p.add_argument("--full", action="store_true", help="nano-vllm's own lengths, 100 to 1024 tokens in and out, not 8 to 64")
    p.add_argument("--policy", choices=("both", *ORDER), default="both", help="what to run")
    p.add_argument(
        "--rate", type=amount, metavar="R", help="requests a second, a Poisson process (default: all are there at once)"
    )
    p.add_argument(
        "--slots", type=positive, help="the most requests in a step (default: 8; --scheduler-only 4 to 16, --full to 64)"
    )
    p.add_argument("--kv-blocks", type=positive, help="blocks of 16 tokens for keys and values (default: enough for all slots)")
    p.add_argument("--max-batch-tokens", type=positive, help="the most tokens in a step (default: 512)")
    p.add_argument("--speculate", action="store_true", help="draft by prompt lookup, request by request, where it pays")
    p.add_argument("--scheduler-only", action="store_true", help="count steps without a model: prompts and decodes apart")
    p.add_argument(
        "--png", metavar="FILE", type=targets.Picture, default="out/serving-timeline.png", help="the timeline as a picture"
    )
    only_with(p, "--model", "--rate", "--kv-blocks", "--max-batch-tokens", "--speculate", scheduler_only=False)
    return p


class Task(NamedTuple):
    """The workload, when each request comes, and what may run at once.

    Without a model, `source` is None and only slots are limited, if they are given.
    """

    load: Workload
    policies: tuple[str, ...]
    png: Path
    source: Source | None
    came: list[float]
    slots: int | None
    kv_blocks: int | None
    max_batch_tokens: int | None
    speculate: bool

    def scheduler(self, policy: str) -> Scheduler:
        sizes = {"slots": self.slots, "max_batch_tokens": self.max_batch_tokens, "context": self.source.config.context}
        return POLICIES[policy](self.kv_blocks, **sizes)


def check(args: argparse.Namespace, ranks: int) -> Task:
    policies = ORDER if args.policy == "both" else (args.policy,)
    lengths, last_id = FULL if args.full else SCALED
    source = None if args.scheduler_only else pretrained.opened(args.model, ranks)
    if source is not None:
        last_id = min(last_id, source.config.vocabulary - 1)
    requests = args.requests or (256 if args.full else 64)
    load = workload.drawn(requests, lengths, last_id, args.seed)
    if source is None:
        return Task(load, policies, args.png, None, [], args.slots, None, None, False)
    slots = args.slots or 8
    longest = max(len(p) + m for p, m in zip(*load, strict=True))
    # The scheduler keeps a block more for each running request.
    blocks = args.kv_blocks or slots * (needed(longest) + 1)
    pretrained.check_memory(source, ranks, args.dtype, "--kv-blocks", blocks, tokens=BLOCK)
    try:
        came = workload.arrivals(requests, args.rate, args.seed) if args.rate is not None else [0.0] * requests
        task = Task(load, policies, args.png, source, came, slots, blocks, args.max_batch_tokens or 512, args.speculate)
        trial = task.scheduler(policies[0])
        for id, (prompt, most) in enumerate(zip(*load, strict=True)):
            trial.add(id, prompt, most)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return task


# --- with a model


def run(task: Task, policy: str, model: Transformer, mesh: Mesh, control: Control) -> tuple[Served, Scheduler]:
    """The workload, after a few steps that warm up; what rank 0 saw."""
    load = task.load
    few = Workload(load.prompts[: task.slots], [min(WARM, m) for m in load.max_tokens[: task.slots]])
    served, books = Served(task.came), None
    for requests, into in ((few, Served([0.0] * len(few.prompts))), (load, served)):
        books = task.scheduler(policy)
        engine = Engine(model, mesh, control, books, task.speculate)
        if control.rank:
            engine.follow()
            continue
        shown = into is served
        for _ in progress.items(policy, shown, len(requests.prompts))(serve(engine, requests, into)):
            pass
        engine.stop()
    return served, books


def main(args: argparse.Namespace, comm: MPI.Intracomm, task: Task) -> int:
    if task.source is None:
        return without_model(args, task) if comm.rank == 0 else 0
    control, first, load = Control(comm), comm.rank == 0, task.load
    mesh = start.make_mesh(args, comm, tp=comm.size)
    model, _ = pretrained.load(task.source, mesh.tp, args.dtype, first)
    by_policy, policies, checks = {}, {}, []
    for policy in task.policies:
        by_policy[policy], books = run(task, policy, model, mesh, control)
        if first:
            policies[policy] = summary(by_policy[policy], books, policy)
            checks += counted(task, policy, books)
    differences = compared(task, model, mesh, control, by_policy) if len(task.policies) > 1 else []
    wrong = [f"{c['count']}, {c['policy']}, by the {c['by']}" for c in checks if not c["ok"]]
    wrong += [f"tokens of request {d['request']}" for d in differences if not d["explained"]]
    if not first:
        return 1 if wrong else 0
    schedules = {title(policies[p]): occupancy.cells(by_policy[p].columns, task.slots) for p in task.policies}
    unwritten = targets.write(task.png, lambda file: occupancy.picture(file, schedules))
    result = report.header("serving_bench", args, mesh) | {
        "model": str(task.source.path),
        "family": task.source.family,
        "config": {"requests": len(load.prompts)}
        | {k: getattr(args, k) for k in ("full", "rate")}
        | {k: getattr(task, k) for k in ("slots", "kv_blocks", "max_batch_tokens", "speculate")},
        "load": {"input_tokens": sum(map(len, load.prompts)), "output_tokens": sum(load.max_tokens)},
        "policies": policies,
        "ratios": ratios(policies),
        "checks": checks,
        "differences": differences,
        "png": None if unwritten else str(task.png),
    }
    said = f"all agreed: {agreed(result)}"
    return report.publish(args.json, result, lambda: show(result, schedules), wrong, said, "; ", unwritten=[unwritten])


def summary(served: Served, books: Scheduler, policy: str) -> dict:
    """A policy's counts and latencies, for JSON."""
    metrics = books.metrics()
    kept = ("steps", "decode_steps", "prefill_tokens", "decode_tokens", "draft_tokens", "accepted_tokens", "hit_tokens")
    kept += ("preemptions", "slots_used", "slot_use", "kv_waste", "finished")
    seconds = latencies(served.came, served.deliveries)
    return {
        "policy": policy,
        "seconds": served.seconds,
        "output_tokens": served.output_tokens,
        "output_tokens_per_second": served.output_tokens / served.seconds,
        **{f"{name}_seconds": spread for name, spread in seconds.items()},
        **{name: metrics[name] for name in kept},
        "decode_step_seconds": decode_steps(served),
    }


def counted(task: Task, policy: str, books: Scheduler) -> list[dict]:
    """Checks of what a run counted, where all requests are there at once and nothing is drafted.

    A scheduler that runs alone counts the same, whatever tokens come. Where no step lacked budget or blocks, the counts have a
    closed form, too.
    """
    if any(task.came) or task.speculate:
        return []
    same = task.scheduler(policy)
    alone(same, task.load)
    expected = [("scheduler alone", asdict(same.counts))]
    if task.slots * max(map(len, task.load.prompts)) <= task.max_batch_tokens and not same.counts.preemptions:
        expected.append(("closed form", closed_form(task.load, policy, task.slots)))
    own = asdict(books.counts)
    return [
        {"policy": policy, "by": by, "count": name, "counted": own[name], "expected": value, "ok": own[name] == value}
        for by, counts in expected
        for name, value in counts.items()
    ]


def compared(task: Task, model: Transformer, mesh: Mesh, control: Control, by_policy: dict[str, Served]) -> list[dict]:
    """Requests whose tokens the two policies disagree on, and whether rounding explains it; all ranks together."""
    static, continuous = (by_policy[p].tokens for p in ORDER)
    pairs = control.from_first([(id, a, b) for id, (a, b) in enumerate(zip(static, continuous, strict=True)) if a != b])
    if not pairs:
        return []
    it = Generator(model, mesh, make_cache(model, "contiguous"))
    return [{"request": id, **tie(it, task.load.prompts[id], a, b, task.source.config)} for id, a, b in pairs]


def ratios(policies: dict[str, dict]) -> dict[str, float]:
    """Continuous over static: what it gains, and what the scheduler's steps alone would have it gain."""
    if len(policies) < 2:
        return {}
    static, continuous = (policies[p] for p in ORDER)
    return {
        "output_tokens_per_second": continuous["output_tokens_per_second"] / static["output_tokens_per_second"],
        "steps": static["steps"] / continuous["steps"],
    }


# --- without


def without_model(args: argparse.Namespace, task: Task) -> int:
    """Decode steps at several numbers of slots, against their closed forms; and what blocks and padding waste."""
    sizes = [task.slots] if task.slots else [4, 8, 16, 32, 64] if args.full else [4, 8, 16]
    prompts, after_first = task.load.prompts, [m - 1 for m in task.load.max_tokens]
    rows, schedules = [], {}
    for slots in sizes:
        row = {"slots": slots, "at_least": -(-sum(after_first) // slots), "padding_waste": padding(prompts, slots)}
        for policy in task.policies:
            # Prompts and decodes in steps of their own: a decode step is one in which every slot gets a token.
            books = APART[policy](slots=slots, max_batch_tokens=sum(map(len, prompts)) + slots)
            columns = alone(books, task.load)
            steps, form = books.counts.decode_steps, STEPS[policy](after_first, slots)
            use = sum(after_first) / (steps * slots) if steps else 0.0
            row[policy] = {"decode_steps": steps, "closed_form": form, "slot_use": use, "ok": steps == form}
            if slots == (8 if 8 in sizes else sizes[0]):
                name = f"{policy}, {slots} slots: {steps} decode steps, {use:.0%} of the slots in use"
                schedules[name] = occupancy.cells(columns, slots)
        rows.append(row)
    unwritten = targets.write(task.png, lambda file: occupancy.picture(file, schedules))
    lengths = [len(p) + m for p, m in zip(*task.load, strict=True)]
    blocks = sum(map(needed, lengths))
    result = report.header("serving_bench") | {
        "seed": args.seed,
        "config": {"requests": len(prompts), "full": args.full, "scheduler_only": True},
        "load": {"input_tokens": sum(map(len, prompts)), "output_tokens": sum(task.load.max_tokens)},
        "rows": rows,
        "blocks": {"of": BLOCK, "count": blocks, "tokens": sum(lengths), "waste": 1 - sum(lengths) / (blocks * BLOCK)},
        "png": None if unwritten else str(task.png),
    }
    wrong = [f"{p} at {r['slots']} slots" for r in rows for p in task.policies if not r[p]["ok"]]
    agreed = "all agreed: decode steps are those of the closed forms"
    shown = lambda: show_steps(result, task.policies, schedules)  # noqa: E731
    return report.publish(args.json, result, shown, wrong, agreed, unwritten=[unwritten])


def padding(prompts: list[list[int]], slots: int) -> float:
    """The share of positions that are padding where batches of prompts are padded to their longest."""
    groups = [[len(p) for p in prompts[first : first + slots]] for first in range(0, len(prompts), slots)]
    return 1 - sum(map(sum, groups)) / sum(max(g) * len(g) for g in groups)


# --- for people


def title(policy: dict) -> str:
    return (
        f"{policy['policy']}: {policy['steps']} steps, {policy['seconds']:.1f} s, "
        f"{policy['output_tokens_per_second']:.1f} output tokens/s, {policy['slot_use']:.0%} of the slots in use"
    )


def agreed(result: dict) -> str:
    said = "counts are those of the closed form" if any(c["by"] == "closed form" for c in result["checks"]) else ""
    said = said or ("counts are those of the scheduler alone" if result["checks"] else "counts have no closed form here")
    if len(result["policies"]) < 2:
        return said
    ties = len(result["differences"])
    same = f"the same tokens but for {ties} requests, at a tie within rounding" if ties else "the same tokens"
    return f"{said}; both policies gave {same}"


def show(result: dict, schedules: dict) -> None:
    c, policies = result["config"], list(result["policies"].values())
    arrival = "all at once" if c["rate"] is None else f"{c['rate']:g} a second"
    drafts = ", drafts by prompt lookup" if c["speculate"] else ""
    report.table(
        f"{result['family']} on tp={result['ranks']}, {result['dtype']}: {c['requests']} requests, {arrival}, "
        f"{result['load']['input_tokens']:,} tokens in, {result['load']['output_tokens']:,} out; {c['slots']} slots, "
        f"{c['kv_blocks']} blocks of {BLOCK}, {c['max_batch_tokens']} tokens a step{drafts}",
        ("", *(p["policy"] for p in policies)),
        [
            ("output tokens/s", *(f"{p['output_tokens_per_second']:.1f}" for p in policies)),
            ("seconds", *(f"{p['seconds']:.2f}" for p in policies)),
            ("steps", *(p["steps"] for p in policies)),
            ("slots in use", *(f"{p['slot_use']:.1%}" for p in policies)),
            ("KV positions held and empty", *(f"{p['kv_waste']:.1%}" for p in policies)),
            ("preemptions", *(p["preemptions"] for p in policies)),
            *([("drafts accepted", *(f"{p['accepted_tokens']} of {p['draft_tokens']}" for p in policies))] * c["speculate"]),
        ],
    )
    names = {"ttft": "time to first token", "tpot": "time per output token", "itl": "inter-token latency"}
    kept = ("mean", "p50", "p95", "p99")
    report.table(
        "Milliseconds, by vLLM's definitions",
        ("", "", *kept),
        [
            (label if n == 0 else "", p["policy"], *("-" if s is None else f"{1e3 * s[k]:.1f}" for k in kept))
            for kind, label in names.items()
            for n, p in enumerate(policies)
            for s in (p[f"{kind}_seconds"],)
        ],
    )
    rows = sorted({n for p in policies for n in p["decode_step_seconds"]}, key=int)
    report.table(
        "Milliseconds of a step in which no prompt is run, by the tokens in it: what a slot that is free saves",
        ("", *rows),
        [(p["policy"], *(f"{1e3 * t:.1f}" if (t := p["decode_step_seconds"].get(n)) else "-" for n in rows)) for p in policies],
    )
    occupancy.show(schedules)
    if result["png"]:
        report.say(f"The picture is {result['png']}")
    for d in result["differences"]:
        report.say(f"request {d['request']}: {explained(d)}")
    if result["ratios"]:
        r = result["ratios"]
        rate, steps = r["output_tokens_per_second"], r["steps"]
        report.say(f"continuous gives {rate:.2f} times the output tokens/s of static, with {steps:.2f} times fewer steps")


def show_steps(result: dict, policies: tuple[str, ...], schedules: dict) -> None:
    load, blocks = result["load"], result["blocks"]
    both = len(policies) > 1
    report.table(
        f"The scheduler alone: {result['config']['requests']} requests, {load['input_tokens']:,} tokens in, "
        f"{load['output_tokens']:,} out, decode steps",
        ("slots", *policies, *(["static/continuous"] * both), *(f"slots in use, {p}" for p in policies), "at least", "padding"),
        [
            (
                r["slots"],
                *(r[p]["decode_steps"] for p in policies),
                *([f"{r['static']['decode_steps'] / max(1, r['continuous']['decode_steps']):.3f}"] if both else []),
                *(f"{r[p]['slot_use']:.3f}" for p in policies),
                r["at_least"],
                f"{r['padding_waste']:.1%}",
            )
            for r in result["rows"]
        ],
    )
    report.say(
        "at least: all tokens but first ones, over the slots; padding: of prompts in batches of so many, padded to the longest",
        f"blocks of {blocks['of']}: {blocks['count']:,} for {blocks['tokens']:,} tokens, {blocks['waste']:.2%} of them empty",
        "",
    )
    occupancy.show(schedules)
    if result["png"]:
        report.say(f"The picture is {result['png']}")


if __name__ == "__main__":
    start.run(options(), check, main)
