"""Known mistakes, planted: the checks of the other files must see each of them."""

from dataclasses import replace
from fractions import Fraction

import pytest

from parallel.schedules import plan
from plan import collectives, memory, step, theirs, times
from plan.account import FORWARD
from plan.collectives import Group
from plan.strategy import Strategy
from tests.plan.known import MODELS, megatron, planner, rows
from tests.plan.test_step import alike, alike_wide

NOT_SEEN = "the mistake was not seen"


def zero_bubble_agrees():
    """The first row of the published bubbles, by the planner's own pipeline."""
    row = rows("zero_bubble2023_tables5_6")[0]
    p, m = int(row["p_stages"]), int(row["m_microbatches"])
    F, I, W, hop = (float(row[k]) for k in ("TF_ms", "TB_ms", "TW_ms", "Tcomm_ms"))  # noqa: E741
    s, stages = alike_wide(p, m, "1f1b", F, I, W)
    begins, ends = planner().pipeline(s, stages, hop)
    span = max(e - b for b, e in zip(begins, ends, strict=True))
    return f"{1 - m * (F + I + W) / span:.4f}" == f"{float(row['bubble_1F1B']):.4f}"


def test_a_hop_charged_to_nobody(monkeypatch):
    assert zero_bubble_agrees()
    costs = step.Costs
    monkeypatch.setattr(step, "Costs", lambda stages, hop, blocks: costs(stages, 0.0, blocks))
    assert not zero_bubble_agrees(), NOT_SEEN


def test_a_bubble_counted_twice(monkeypatch):
    """Simulated, and by a formula on top."""

    def makespan():
        s, stages = alike(4, 8, "1f1b", 1.0, 1.0, 1.0)
        return max(planner().pipeline(s, stages, 0.0)[1])

    assert makespan() == 33
    inner = step._ends
    monkeypatch.setattr(step, "_ends", lambda timing: (inner(timing)[0], [end + 3 * 3.0 for end in inner(timing)[1]]))
    assert makespan() != 33, NOT_SEEN


def test_the_last_stage_without_its_loss(monkeypatch):
    """Beside norm and product its passes move 38 bytes a logit forward and 14 back."""

    def moved_as_it_should():
        s = megatron("1T")
        head = next(part for part, _ in theirs.Theirs().parts(s, {})[-1] if part.name == "head")
        passes = sum(op.shape[0] for op in head.operations if op.kind == "pass")
        return passes == (4 + 6) * s.tokens * 25600 + (38 + 14) * s.tokens * 51200 / 8

    assert moved_as_it_should()
    head = theirs._Block.head

    def lossless(self):
        made = head(self)
        return replace(made, operations=tuple(op for op in made.operations if op.name != "loss"))

    monkeypatch.setattr(theirs._Block, "head", lossless)
    assert not moved_as_it_should(), NOT_SEEN


def test_in_flight_min_m_p_on_every_rank(monkeypatch):
    def agrees():
        return [memory.in_flight("1f1b", 4, 8, 1, r) for r in range(4)] == plan("1f1b", 4, 8).peaks("W")

    assert agrees()
    monkeypatch.setattr(memory, "in_flight", lambda schedule, p, m, chunks, rank: min(m, p))
    assert not agrees(), NOT_SEEN


def grown_by_its_micro_batches():
    """What 8 more micro-batches add, over what they compute, on ranks of dp alone."""
    a = Strategy(MODELS["gpt2"], 256, 8 * 8, dp=8, overlap=False)
    whole = planner()
    stages = whole.clock.stages(a)
    return (whole.estimate(replace(a, batch=16 * 8)).iteration - whole.estimate(a).iteration) / (
        8 * (stages.F[0] + stages.B[0])
    )


def test_gradients_summed_after_every_micro_batch(monkeypatch):
    assert grown_by_its_micro_batches() == pytest.approx(1, rel=1e-9)
    once = theirs.Theirs.once

    def often(self, s, rank, place):
        found = once(self, s, rank, place)
        return replace(found, sums=[t._replace(calls=t.calls * s.micro_batches) for t in found.sums])

    monkeypatch.setattr(theirs.Theirs, "once", often)
    assert grown_by_its_micro_batches() != pytest.approx(1, rel=1e-9), NOT_SEEN


def test_alpha_times_calls_forgotten(monkeypatch):
    """Two sums cost twice what one does, starting included."""

    def ratio():
        clock, sizes = planner().clock, (1, 1, 1, 1, 8)
        one = theirs.Transfer("all_reduce", "tp", FORWARD, 1, 4096)
        return clock.transfer(one._replace(calls=8), sizes)[0] / clock.transfer(one, sizes)[0]

    assert ratio() == 8
    line = times.Clock.transfer

    def once(self, sent, sizes, shards=1):
        took, g = line(self, sent, sizes, shards)
        alpha = collectives.seconds(sent.verb, 0, g, self.machine)
        return took - (sent.calls - 1) * alpha, g

    monkeypatch.setattr(times.Clock, "transfer", once)
    assert ratio() != 8, NOT_SEEN


def test_a_constant_read_from_another_level(monkeypatch):
    """The NICs must not be NVLink's rate."""

    def agrees():
        m = planner().machine
        group = Group(4, 1, 4)
        took = collectives.seconds("all_reduce", 1e9, group, m) - collectives.seconds("all_reduce", 0, group, m)
        return took == pytest.approx(2 * 3 / 4 * 1e9 / (m.between.node_gbs / 8 * 1e9 * m.between.efficiency))

    assert agrees()
    line = collectives._line
    monkeypatch.setattr(collectives, "_line", lambda g, m, whole: line(Group(g.ranks, g.ranks, 1), m, whole))
    assert not agrees(), NOT_SEEN


def test_recomputation_without_its_sums(monkeypatch):
    """Six all-reduces a block with full recomputation, four without."""

    def sums(recompute):
        (parts,) = theirs.Theirs().parts(Strategy(MODELS["gpt2"], 256, 1, tp=8, recompute=recompute), {})
        block = next(part for part, _ in parts if part.name == "block")
        return sum(t.calls for t in block.transfers if t.verb == "all_reduce")

    assert (sums("none"), sums("full")) == (4, 6)
    tp_sums = theirs._Block._tp_sums
    monkeypatch.setattr(theirs._Block, "_tp_sums", lambda self, again: tp_sums(self, False))
    assert sums("full") != 6, NOT_SEEN


def test_a_tied_table_is_held_on_both_ends_and_counted_once():
    c = MODELS["gpt2"]
    assert c.tied
    s = Strategy(c, 256, 4, pp=2)
    table, layer = c.vocabulary * c.d_model, 12 * c.d_model**2 + 13 * c.d_model
    held = [sum(memory.held(s, rank)) for rank in range(2)]
    assert held == [3 * layer + table + 256 * c.d_model, 3 * layer + table + 2 * c.d_model]
    assert len(theirs.Theirs().once(s, 0, {}).between) == len(theirs.Theirs().once(s, 1, {}).between) == 1
    # On a V both ends are one rank's.
    v = Strategy(c, 256, 4, pp=2, schedule="zb-v", chunks=2)
    assert sum(memory.held(v, 0)) == Fraction(2 * c.layers, 4) * layer + table + 256 * c.d_model + 2 * c.d_model
    assert not theirs.Theirs().once(v, 0, {}).between
