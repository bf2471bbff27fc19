"""The search: what brute force finds, and why the rest fails."""

from dataclasses import replace
from itertools import product

import pytest

from parallel.schedules import SCHEDULES
from parallel.shard import AXES
from plan import search as searching
from plan.search import Space, factorisations, search, would_fit
from plan.strategy import Strategy
from tests.plan.known import MODELS, planner

RANKS, BATCH = 24, 48
TRIES = {"micro_batch": (1, 2), "recompute": ("none", "full"), "zero": (0, 1)}
CONFIGS = MODELS | {"gpt2": replace(MODELS["gpt2"], heads=12, kv_heads=12, d_model=768, d_ff=3072)}


def space(name, **tries):
    return Space(RANKS, {"config": CONFIGS[name], "sequence_length": 256, "batch": BATCH}, {**TRIES, **tries})


def small(machine_gib=None):
    found = planner()
    if machine_gib:
        found.machine = replace(found.machine, memory_gib=machine_gib)
    return found


def brute_force(name, planner):
    """All that can be, each simulated, by loops of its own."""
    c, found = CONFIGS[name], []
    for sizes in product((1, 2, 3, 4, 6, 8, 12, 24), repeat=len(AXES)):
        mesh = dict(zip(AXES, sizes, strict=True))
        n = 1
        for size in sizes:
            n *= size
        if n != RANKS or c.heads % mesh["tp"] or c.d_ff % mesh["tp"]:
            continue
        if mesh["ep"] > 1 and (c.experts is None or c.experts.count % mesh["ep"]):
            continue
        schedules = [(s, v) for s in SCHEDULES for v in ((2, 4, 8) if s == "interleaved" else (SCHEDULES[s].chunks,))]
        for schedule, chunks in schedules if mesh["pp"] > 1 else [("1f1b", 1)]:
            for micro_batch, recompute, zero in product(*TRIES.values()):
                try:
                    s = Strategy(c, 256, BATCH, micro_batch=micro_batch, recompute=recompute, zero=zero, schedule=schedule,
                                 chunks=chunks, **mesh)  # fmt: skip
                except ValueError:
                    continue
                e = planner.estimate(s)
                if e.fits:
                    found.append(e)
    return sorted(found, key=lambda e: e.iteration)


def seconds(layouts):
    return [pytest.approx(e.iteration, rel=1e-12) for e in layouts]


@pytest.mark.parametrize("name", CONFIGS)
def test_search_finds_what_brute_force_finds(name):
    # Hardly more than the least that any layout needs, so that many do not fit.
    plan_of = small(1.6)
    found, every = search(plan_of, space(name), keep=20), brute_force(name, plan_of)
    assert len(every) == found.feasible > 20
    assert [e.iteration for e in found.layouts] == seconds(every[:20])
    assert found.simulated < found.feasible
    assert found.considered == found.feasible + sum(miss.count for miss in found.misses)
    large = next((miss for miss in found.misses if miss.missing is not None), None)
    if large is not None:
        assert large.nearest is not None
        assert large.missing > 0


def test_a_dropped_factorisation_would_be_seen(monkeypatch):
    plan_of = planner()
    best = search(plan_of, space("llama")).layouts[0].strategy.mesh

    def fewer(n, factors, of=factorisations):
        return (sizes for sizes in of(n, factors) if factors < 5 or dict(zip(AXES, sizes, strict=True)) != best)

    monkeypatch.setattr(searching, "factorisations", fewer)
    found = search(plan_of, space("llama"))
    assert [e.iteration for e in found.layouts] != seconds(brute_force("llama", plan_of)[:20])


def test_more_candidates_than_are_kept_in_a_pass(monkeypatch):
    plan_of = planner()
    whole = search(plan_of, space("llama"), keep=5)
    monkeypatch.setattr(searching, "PASS", 3)
    again = search(planner(), space("llama"), keep=5)
    assert [e.iteration for e in again.layouts] == seconds(whole.layouts)


def test_what_is_fixed_stays_and_what_is_tried_varies():
    found = search(planner(), space("llama", tp=(4,), zero=(1,)))
    assert {(e.strategy.tp, e.strategy.zero) for e in found.layouts} == {(4, 1)}
    assert len({e.strategy.mesh["pp"] for e in found.layouts}) > 1


def test_factorisations_are_all_there():
    assert sorted(factorisations(12, 3)) == sorted(t for t in product(range(1, 13), repeat=3) if t[0] * t[1] * t[2] == 12)
    assert len(set(factorisations(16384, 5))) == len(list(factorisations(16384, 5))) == 3060


def test_the_smallest_change_that_makes_it_fit():
    s = Strategy(MODELS["llama"], 512, 64, micro_batch=8, dp=8)
    for gib in (40, 8, 4, 2.5, 2):
        plan_of = planner()
        plan_of.machine = replace(plan_of.machine, memory_gib=gib)
        if plan_of.fits(s):
            continue
        if (option := would_fit(plan_of, s)) is not None:
            name, _, value = option.removeprefix("--").replace("-", "_").partition(" ")
            changed = replace(s, **{name: int(value) if value.isdecimal() else value or True})
            assert plan_of.fits(changed)
