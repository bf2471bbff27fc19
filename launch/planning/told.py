"""What was planned as one JSON document: docs/planning.md has its keys. Seconds and bytes are plain numbers."""

from __future__ import annotations

from dataclasses import asdict
from math import ceil

from models.config import Config
from parallel.verbs import VERBS
from plan.account import FORWARD, KINDS, PHASES, Transfer
from plan.memory import USABLE
from plan.search import Found, Space
from plan.sizes import sizes
from plan.step import Estimate, Planner
from plan.strategy import Strategy
from plan.whatif import Change

LAYOUT = ("schedule", "chunks", "stage_layers", "micro_batch", "micro_batches", "recompute", "sequence_parallel", "zero",
          "zero_over", "attention", "fused", "overlap", "tp_overlap", "p2p", "scatter_gather", "dtype", "grad_dtype",
          "jitter")  # fmt: skip


def config(c: Config) -> dict:
    """Sizes alone: what rotates, and how scores are chosen, cost nothing."""
    plain = {name: value for name, value in vars(c).items() if name not in ("rope", "latent", "experts")}
    return plain | {name: None if (part := getattr(c, name)) is None else asdict(part) for name in ("latent", "experts")}


def question(name: str, estimate: Estimate) -> dict:
    """The model, the machine, the batch."""
    s, m, facts = estimate.strategy, estimate.machine, estimate.facts
    return {
        "model": {"name": name, "parameters": facts.parameters, "active_parameters": facts.active, "config": config(s.config)},
        "machine": {
            "name": m.name,
            "ranks": s.ranks,
            "nodes": ceil(s.ranks / m.gpus_per_node),
            "gpus_per_node": m.gpus_per_node,
        },
        "batch": {"sequences": s.batch, "tokens": s.batch * s.sequence_length, "sequence_length": s.sequence_length},
    }


def layout(s: Strategy) -> dict:
    found = {name: getattr(s, name) for name in LAYOUT}
    found["stage_layers"] = [len(blocks) for blocks in s.blocks]
    found["p2p"] = "blocking" if s.blocks_on_messages else "delay"
    return found


def estimate(e: Estimate) -> dict:
    """The keys of one layout, but for its communication."""
    s = e.strategy
    return {
        "mesh": s.mesh,
        "layout": layout(s),
        "iteration_seconds": e.iteration,
        "tokens_per_second": e.tokens_per_second,
        "tokens_per_second_per_gpu": e.tokens_per_second / s.ranks,
        "tflops_per_gpu": e.tflops,
        "mfu": e.mfu,
        "hfu": e.hfu,
        "model_flops": e.facts.model_flops,
        "hardware_flops": e.facts.hardware_flops,
        "bubble_fraction": e.bubble,
        "makespan_seconds": e.makespan,
        "span_seconds": e.span,
        "seconds": {**e.seconds, "exposed": e.exposed},
        "hidden_seconds": e.hidden,
        "slowest_rank": rank_number(s, e.slowest),
        "memory": memory(e),
    }


def rank_number(s: Strategy, stage_rank: int) -> int:
    """The number, among all, of the first rank of a place on pp."""
    return stage_rank * (s.ranks // s.pp)


def memory(e: Estimate) -> dict:
    rows = []
    for rank, kinds in enumerate(e.memory):
        total = sum(kinds.values())
        row = {"stage_rank": rank} | {kind: kinds[kind] for kind in KINDS}
        rows.append(row | {"margin": USABLE * e.capacity - total, "total": total, "in_flight": e.in_flight[rank]})
    return {"peak_bytes": e.peak_bytes, "capacity_bytes": e.capacity, "fits": e.fits,
            "fullest_rank": rank_number(e.strategy, e.fullest), "stages": rows}  # fmt: skip


# --- communication


def communication(planner: Planner, e: Estimate) -> list[dict]:
    """What each rank of pp sends in a step; those with the same rows are told together, `ranks` being how many ranks these
    are."""
    s, classes = e.strategy, []
    for rank in range(s.pp):
        rows = _rows(planner, e, rank)
        if classes and classes[-1]["rows"] == rows:
            classes[-1]["ranks"] += s.ranks // s.pp
        else:
            classes.append({"ranks": s.ranks // s.pp, "stage_rank": rank, "rows": rows})
    return classes


def _rows(planner: Planner, e: Estimate, rank: int) -> list[dict]:
    """Of one rank of pp, as the ledger's report has them."""
    s, clock, m = e.strategy, planner.clock, e.strategy.micro_batches
    found: dict[tuple, dict] = {}
    place = planner.account.places(s)[0]
    parts = planner.account.parts(s, place)
    for stage in s.stages_of(rank):
        for part, n in parts[stage]:
            for phase in PHASES:
                for sent, group, took, away in clock.sent(part, phase, s.stage_shape, s.shards):
                    _add(found, sent, "forward" if phase == FORWARD else "backward", group.ranks, n * m, took, took - away)
        for there, phase in ((1, "forward"), (-1, "backward")):
            for verb, other in (("send", stage + there), ("receive", stage - there)):
                if 0 <= other < s.stages and s.rank_of[other] != rank:
                    sent = Transfer(verb, "pp", phase, 1, planner.account.hop_bytes(s))
                    _add(found, sent, phase, s.pp, m, e.hop, e.hop if s.blocks_on_messages else 0.0)
    once, tail = planner.account.once(s, rank, place), clock.tail(s, rank, place, *e.rooms[rank])
    sums = [(t, *clock.transfer(t, s.shape, s.shards)) for t in (*once.sums, *once.gathers)]
    seen = tail.exposed / total if (total := sum(took for _, took, _ in sums)) else 0.0
    for sent, took, group in sums:
        _add(found, sent, "step", group.ranks, 1, took, seen * took)
    for sent in once.between:
        _add(found, sent, "step", 2, 1, tail.tied, tail.tied)
    return [row for row in found.values() if row["ranks"] > 1]


def _add(found: dict, sent: Transfer, phase: str, ranks: int, times: float, took: float, seen: float) -> None:
    axis = {"shards": "dp", "replicas": "dp"}.get(sent.axis, sent.axis)
    row = found.setdefault(
        (sent.verb, axis, phase, ranks),
        {"verb": sent.verb, "axis": axis, "phase": phase, "calls": 0, "message_bytes": 0.0, "wire_bytes": 0.0, "ranks": ranks,
         "seconds": 0.0, "exposed_seconds": 0.0},
    )  # fmt: skip
    n = times * sent.calls * sent.message_bytes
    row["calls"] += times * sent.calls
    row["message_bytes"] += n
    row["wire_bytes"] += float(VERBS[sent.verb].share(ranks)) * n
    row["seconds"] += times * took
    row["exposed_seconds"] += times * seen


# --- search


def found(result: Found) -> dict:
    return {
        "considered": result.considered,
        "feasible": result.feasible,
        "simulated": result.simulated,
        "seconds_taken": result.seconds,
        "layouts": [estimate(e) for e in result.layouts],
        "infeasible": [
            {
                "why": miss.why,
                "count": miss.count,
                "nearest": {
                    "mesh": None if miss.nearest is None else miss.nearest.mesh,
                    "missing_bytes": miss.missing,
                    "would_fit": miss.would_fit,
                },
            }
            for miss in result.misses
        ],
    }


def nobody(name: str, planner: Planner, space: Space) -> dict:
    """As `question`, where no layout fits."""
    m, c = planner.machine, space.base["config"]
    size, S, batch = sizes(c), space.base["sequence_length"], space.base["batch"]
    return {
        "model": {"name": name, "parameters": size.parameters, "active_parameters": size.met, "config": config(c)},
        "machine": {"name": m.name, "ranks": space.ranks, "nodes": ceil(space.ranks / m.gpus_per_node),
                    "gpus_per_node": m.gpus_per_node},
        "batch": {"sequences": batch, "tokens": batch * S, "sequence_length": S},
    }  # fmt: skip


def change(c: Change) -> dict:
    return {"change": c.change, "iteration_seconds": c.seconds, "ratio": c.ratio, "limit": c.limit}
