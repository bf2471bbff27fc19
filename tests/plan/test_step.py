"""Steps: closed forms of schedules, what papers print of bubbles, and what holds of every layout."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest

from parallel.schedules import SCHEDULES, plan
from parallel.simulation import Costs, simulate
from plan import machine as machines
from plan import step, times
from plan.memory import in_flight
from plan.step import shortened
from plan.strategy import Strategy
from plan.times import Spent, Stages, StageTimes
from tests.grids import FULL
from tests.plan.known import MODELS, megatron, planner, rows, some_layouts

NOTHING = Spent(0.0, (0.0,) * 5, (0.0,) * 5, 0.0)
LAYOUTS = some_layouts(2000 if FULL else 60)


def alike(p, m, schedule, F, I, W, chunks=1):  # noqa: E741
    """A pipeline whose stages take these times on a rank, and its layout."""
    s = Strategy(MODELS["llama"], 64, m, pp=p, schedule=schedule, chunks=chunks, p2p="delay")
    each = StageTimes((NOTHING,) * 4, F / chunks, I / chunks, W / chunks)
    return s, Stages([each] * s.stages, s)


@pytest.mark.parametrize("row", rows("zero_bubble2023_tables5_6"), ids=lambda r: f"{r['p_stages']}-{r['m_microbatches']}")
def test_bubbles_of_zero_bubble(row, monkeypatch):
    """2401.10241, tables 5 and 6: the longest stage's time, messages beside computing; four printed digits."""
    p, m = int(row["p_stages"]), int(row["m_microbatches"])
    F, I, W, hop = (float(row[k]) for k in ("TF_ms", "TB_ms", "TW_ms", "Tcomm_ms"))  # noqa: E741
    whole = planner()
    for schedule, column in (("1f1b", "bubble_1F1B"), ("zb-h1", "bubble_ZB-H1"), ("zb-h2", "bubble_ZB-H2")):
        s, stages = alike_wide(p, m, schedule, F, I, W)
        begins, ends = whole.pipeline(s, stages, hop)
        span = max(end - begin for begin, end in zip(begins, ends, strict=True))
        assert f"{1 - m * (F + I + W) / span:.4f}" == f"{float(row[column]):.4f}"


def alike_wide(p, m, schedule, F, I, W):  # noqa: E741
    """As `alike`, of a model with a block a stage."""
    s = Strategy(replace(MODELS["llama"], layers=p), 64, m, pp=p, schedule=schedule, p2p="delay")
    return s, Stages([StageTimes((NOTHING,) * 4, F, I, W)] * p, s)


# Makespan of p=4, m=8 in units of F = I = W = 1 a rank, and peaks in flight.
MAKESPANS = {"gpipe": 33, "1f1b": 33, "zb-h1": 27, "zb-h2": 27, "interleaved": 28.5, "zb-v": 25.5, "dualpipe-v": 25.5}


@pytest.mark.parametrize("schedule", MAKESPANS)
def test_makespans_of_schedules(schedule):
    s, stages = alike(4, 8, schedule, 1.0, 1.0, 1.0, SCHEDULES[schedule].chunks)
    assert max(planner().pipeline(s, stages, 0.0)[1]) == MAKESPANS[schedule]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_in_flight_is_what_the_plan_says(schedule):
    for p in (1, 2, 3, 4, 6):
        for m in range(1, 20):
            chunks = SCHEDULES[schedule].chunks
            if m < SCHEDULES[schedule].least(p):
                continue
            peaks = plan(schedule, p, m, chunks).peaks("W")
            assert [in_flight(schedule, p, m, chunks, r) for r in range(p)] == peaks, (p, m)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_long_plan_is_extended_from_two_short_ones(schedule, blocks):
    """The time goes on linearly, to the bit of exact numbers; where stages are uneven, within half a per cent."""
    chunks = SCHEDULES[schedule].chunks
    for p, uneven in ((2, 0), (3, 1), (4, 2), (4, 0)):
        costs = tuple((Fraction(10 + (s * 7 + uneven) % 3 * uneven), Fraction(11), Fraction(9)) for s in range(p * chunks))
        for rest in range(p):
            m = 10 * p + rest
            few, more = shortened(schedule, p, m)
            assert few < more < m
            ends = [[rank[-1][1] for rank in simulate(plan(schedule, p, n, chunks), Costs(costs, Fraction(1), blocks)).times]
                    for n in (few, more, m)]  # fmt: skip
            for a, b, c in zip(*ends, strict=True):
                extended = a + Fraction(m - few, more - few) * (b - a)
                assert abs(extended - c) <= ((uneven > 0) * c / 200)


def test_a_message_that_blocks_makes_both_operations_longer():
    """Once where an operation takes one and makes one: both go at the same time."""
    for schedule in ("1f1b", "interleaved", "zb-v"):
        chunks = SCHEDULES[schedule].chunks
        made, hop = plan(schedule, 3, 6, chunks), Fraction(1, 7)
        stages, last = 3 * chunks, 3 * chunks - 1
        costs = [(Fraction(2), Fraction(2), Fraction(1))] * stages

        def inside(a, b, of=made.rank_of):
            return 0 <= b <= last and of[a] != of[b]  # noqa: B023

        talks = [inside(s, s - 1) or inside(s, s + 1) for s in range(stages)]
        longer = [(F + hop * t, I + hop * t, W) for t, (F, I, W) in zip(talks, costs, strict=True)]  # noqa: E741
        assert simulate(made, Costs(tuple(costs), hop, True)).times == simulate(made, Costs(tuple(longer))).times


@pytest.mark.parametrize("n", range(len(LAYOUTS)))
def test_what_holds_of_every_layout(n):
    s, plan_of = LAYOUTS[n], planner()
    e = plan_of.estimate(s)
    # The whole is the sum of its parts.
    assert sum(e.seconds.values()) + sum(e.exposed.values()) == pytest.approx(e.iteration, rel=1e-9)
    assert min(e.exposed.values()) >= 0
    assert e.seconds["bubble"] >= -1e-9 * e.iteration
    # A bound is one.
    assert plan_of.bound(s) <= e.iteration * (1 + 1e-12)
    # Each part is what it should be on an axis of one rank.
    for axis in ("tp", "cp", "ep", "pp"):
        if getattr(s, axis) == 1:
            assert e.exposed[axis] == e.hidden[axis] == 0
    assert all(kinds.keys() == e.memory[0].keys() and min(kinds.values()) >= 0 for kinds in e.memory)
    # No rank that is not asked in a search is fuller.
    assert plan_of.fullest(s)[0] == max(sum(kinds.values()) for kinds in e.memory)


@pytest.mark.parametrize("n", range(0, len(LAYOUTS), 3))
def test_a_faster_machine_is_no_slower(n):
    s, m = LAYOUTS[n], machines.read("a100-80gb")
    plain = planner().estimate(s)
    for name in machines.CONSTANTS:
        if name in ("gpus_per_node", "memory_gib"):
            continue
        by = 0.8 if name in machines.COSTS else 1.25
        other = step.Planner(planner().account, machines.changed(m, name, by)).estimate(s)
        assert other.iteration <= plain.iteration * (1 + 1e-9), name
        # What is kept and sent does not depend on the machine.
        assert other.memory == plain.memory
        assert other.facts == plain.facts


def test_a_step_is_faster_by_what_its_busiest_rank_waits():
    """Of p even stages with m micro-batches each rank waits for (p - 1) of m + p - 1 turns, with 1F1B."""
    s, m = Strategy(replace(MODELS["llama"], layers=8), 64, 8, pp=4, p2p="delay"), machines.read("a100-80gb")
    plain, rested = (step.Planner(planner().account, replace(m, rested=by)) for by in (0.0, 0.25))
    each = StageTimes((Spent(3.0, (0.0,) * 5, (0.0,) * 5, 0.0),) * 4, 3.0, 6.0, 3.0)
    begins, ends = plain.pipeline(s, Stages([each] * 4, s), 0.0)
    assert rested._pace(s, 8 * 12.0, begins, ends) == 1 - 0.25 * 3 / 11
    assert plain._pace(s, 8 * 12.0, begins, ends) == 1
    a, b = plain.estimate(s), rested.estimate(s)
    assert b.bubble == pytest.approx(a.bubble)
    pace = b.makespan / a.makespan
    assert 0.75 < pace < 1
    for kind in ("forward", "backward", "bubble"):
        assert b.seconds[kind] == pytest.approx(pace * a.seconds[kind]), kind


def test_one_rank_has_neither_bubble_nor_messages():
    for name, c in MODELS.items():
        e = planner().estimate(Strategy(c, 256, 8, schedule="1f1b"))
        assert e.seconds["bubble"] == pytest.approx(0, abs=1e-12), name
        assert set(e.exposed.values()) == {0.0}
        assert e.bubble == 0


@pytest.mark.parametrize("n", range(0, len(LAYOUTS), 4))
def test_twice_the_micro_batches_add_those_of_the_slowest_stage(n):
    s, plan_of = LAYOUTS[n], planner()
    if s.schedule == "gpipe" and not s.blocks_on_messages:
        pytest.skip("gpipe's messages hide one behind another")
    m = 12 * s.pp
    a, b = (replace(s, batch=k * m * s.data * s.micro_batch, overlap=False) for k in (1, 2))
    stages, hop = plan_of.clock.stages(a), plan_of.clock.hop(a)
    busy = [stages.F[r] + stages.B[r] + hop * stages.talking[r] * a.blocks_on_messages for r in range(s.pp)]
    grown = plan_of.estimate(b).iteration - plan_of.estimate(a).iteration
    assert grown >= m * max(busy) * (1 - 1e-9)
    if hop == 0 or s.pp == 1:
        assert grown == pytest.approx(m * max(busy), rel=1e-9)


# --- what papers have as plots: order alone (narayanan2021_figure_configs)


def figure(width, heads, layers, batch, **more):
    from models.config import gpt2_like

    c = gpt2_like(51200, width, layers, heads, 4 * width, 2048)
    options = {"attention": "unfused", "recompute": "full", "dtype": "fp16", "grad_dtype": "fp16", "overlap": False}
    return planner().estimate(Strategy(c, 2048, batch, **{**options, **more})).iteration


def test_figure_13_tp_within_a_node_then_pp():
    took = {pp: figure(20480, 128, 32, 128, pp=pp, tp=64 // pp) for pp in (2, 4, 8, 16, 32)}
    assert min(took, key=took.get) == 8


def test_figure_14_a_model_that_fits_one_gpu_needs_no_stages():
    took = [figure(3840, 32, 32, 512, pp=pp, dp=64 // pp) for pp in (2, 4, 8, 16, 32)]
    assert took == sorted(took)


def test_figure_15_nor_does_it_need_tp_and_beyond_a_node_least_of_all():
    took = [figure(3840, 32, 32, 512, tp=tp, dp=64 // tp) for tp in (2, 4, 8, 16, 32)]
    assert took == sorted(took)
    steps = [b / a for a, b in pairwise(took)]
    assert steps[2] > max(steps[:2])


def test_figure_16_the_best_micro_batch_is_neither_the_smallest_nor_the_largest():
    took = {b: figure(15360, 128, 32, 128, pp=8, tp=8, micro_batch=b) for b in (1, 2, 4, 8)}
    assert min(took, key=took.get) in (1, 2)
    assert took[8] > took[4] > took[2]


def test_figures_12_and_18_interleaving_and_scatter_gather():
    def took(batch, **more):
        return figure(12288, 96, 96, batch, pp=12, tp=8, **more)

    gains = [took(n) / took(n, schedule="interleaved", chunks=4) for n in (12, 24, 36, 48, 60)]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 1
    scattered = [took(n, schedule="interleaved", chunks=4, scatter_gather=False)
                 / took(n, schedule="interleaved", chunks=4, scatter_gather=True) for n in (12, 60)]  # fmt: skip
    assert min(scattered) > 1


def test_a_stage_with_the_head_and_the_loss_is_slower_than_one_without():
    stages = planner().clock.stages(megatron("1T"))
    assert stages.F[-1] > stages.F[1] * 1.02
    assert stages.F[-1] - stages.F[1] > stages.F[0] - stages.F[1]


def test_rooms_of_sums():
    """Nothing of a sum is hidden without overlap, a tenth is always seen with it."""
    s = Strategy(MODELS["gpt2"], 256, 64, dp=8)
    on, off = (planner().estimate(replace(s, overlap=overlap)) for overlap in (True, False))
    assert off.hidden["dp"] == 0
    whole = off.exposed["dp"]
    assert on.exposed["dp"] + on.hidden["dp"] == pytest.approx(whole)
    assert on.exposed["dp"] >= times.SEEN * whole
