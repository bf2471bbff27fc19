"""Who may join and what shares a step: counted on published workloads, and case by case."""

import pytest

from inference import workload
from inference.blocks import BLOCK, needed
from inference.policies import APART, Apart, Static
from inference.scheduler import Scheduler
from tests.grids import thinned
from tests.inference.hashed import Engine


def run_through(scheduler, prompts, max_tokens):
    """All at once, any tokens -> the scheduler and how many each got."""
    got = [0] * len(prompts)
    for id, (prompt, most) in enumerate(zip(prompts, max_tokens, strict=True)):
        scheduler.add(id, prompt, most)
    while scheduler.requests:
        step = scheduler.schedule()
        for id, tokens, _ in scheduler.commit(step, {run.id: [1] for run in step.runs if run.sample}):
            got[id] += len(tokens)
    return scheduler, got


# --- the workload of nano-vllm: 256 requests, and its small twin

FULL, SCALED = workload.full(), workload.scaled()
DECODE_STEPS = [
    (FULL, 4, 52925, 33494),
    (FULL, 8, 29318, 17142),
    (FULL, 16, 15588, 9025),
    (FULL, 32, 7949, 4888),
    (FULL, 64, 4008, 2743),
    (SCALED, 4, 808, 586),
    (SCALED, 8, 429, 305),
    (SCALED, 16, 238, 179),
]
CASES = [pytest.param(*case, id=f"{len(case[0].prompts)} requests, {case[1]} slots") for case in DECODE_STEPS]


def test_the_workloads_are_the_published_ones():
    assert [sum(map(len, FULL.prompts)), sum(FULL.max_tokens)] == [142_827, 133_966]
    assert (len(FULL.prompts[0]), FULL.prompts[0][:3]) == (964, [6311, 6890, 663])
    assert FULL.max_tokens[:5] == [845, 312, 607, 843, 500]
    assert [sum(map(len, SCALED.prompts)), sum(SCALED.max_tokens)] == [2109, 2315]
    assert (len(SCALED.prompts[0]), SCALED.prompts[0][:3]) == (62, [197, 215, 20])
    assert SCALED.max_tokens[:5] == [50, 12, 41, 25, 44]
    lengths = [len(p) + m for p, m in zip(*FULL, strict=True)]
    assert max(lengths) == 2011
    assert sum(map(needed, lengths)) == 17422
    assert 1 - sum(lengths) / (17422 * BLOCK) == pytest.approx(0.0070, abs=5e-5)


def test_arrivals_are_a_poisson_process():
    times = workload.arrivals(20_000, 4.0, seed=1)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert min(gaps) >= 0
    mean = sum(gaps) / len(gaps)
    # Mean and deviation of the gaps are both 1/4; six standard errors.
    assert mean == pytest.approx(0.25, abs=6 * 0.25 / len(gaps) ** 0.5)
    assert (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 == pytest.approx(0.25, rel=0.1)
    with pytest.raises(ValueError, match="0 requests per second must be more than 0"):
        workload.arrivals(1, 0)


# Of the large workload in every run only the most slots.
@pytest.mark.parametrize(("load", "slots", "static", "continuous"), thinned(CASES, CASES[4:]))
def test_decode_steps_of_static_and_continuous_batches(load, slots, static, continuous):
    """A step takes any prompts and gives their first tokens; only steps without prefill count: max_tokens - 1 a request."""
    tokens = sum(load.max_tokens) - len(load.prompts)
    for policy, steps in (("static", static), ("continuous", continuous)):
        scheduler, got = run_through(APART[policy](slots=slots, max_batch_tokens=10**6), *load)
        assert got == load.max_tokens
        assert scheduler.counts.decode_steps == steps
        assert scheduler.counts.decode_tokens == tokens
        assert scheduler.counts.prefill_tokens == sum(map(len, load.prompts))
        assert scheduler.counts.finished == {"length": len(load.prompts)}


def test_mixed_steps_need_no_steps_for_prefill():
    for slots, steps in ((4, 603), (8, 313), (16, 183), (64, 64)):
        # The steps of a machine with as many lanes, each request max_tokens long, first come, first served.
        lanes = [0] * slots
        for most in SCALED.max_tokens:
            lanes[lanes.index(min(lanes))] += most
        scheduler, got = run_through(Scheduler(slots=slots, max_batch_tokens=10**6), *SCALED)
        assert got == SCALED.max_tokens
        assert scheduler.counts.steps == max(lanes) == steps


def test_prefill_apart_takes_turns_with_decodes():
    engine = Engine(Apart(slots=3, max_batch_tokens=20))
    engine.add(0, range(12), 9)
    engine.step()
    engine.add(1, range(40, 85), 3)
    steps = [[(r.id, len(r.tokens)) for r in engine.step().runs] for _ in range(7)]
    assert steps == [[(0, 1)], [(1, 20)], [(0, 1)], [(1, 20)], [(0, 1)], [(1, 5)], [(0, 1), (1, 1)]]
    engine.finish()


def test_a_static_batch_ends_before_another_begins():
    # The budget is less than the prompts of a batch: it is filled all the same.
    engine = Engine(Static(slots=3, max_batch_tokens=16))
    for id, most in enumerate([2, 9, 4, 2, 3]):
        engine.add(id, range(id, id + 14), most)
    admitted = {}
    while engine.scheduler.requests:
        for id, _ in engine.step().admitted:
            admitted[id] = set(engine.ended)
    assert admitted == {0: set(), 1: set(), 2: set(), 3: {0, 1, 2}, 4: {0, 1, 2}}
