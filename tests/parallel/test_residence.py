"""When split weights are there and when gradients leave, as a plan says; and how many bytes that is."""

from collections import Counter

import pytest

from parallel.pipeline import PHASES
from parallel.residence import ROOT, fills, most_filled, most_gathered, uses
from parallel.schedule import forward_only
from parallel.schedules import SCHEDULES, plan

# A whole model of five units: the root (200 bytes) at both ends, blocks of 250, 250, 200 and 100.
SIZES = [200, 250, 250, 200, 100]
PARTS = {0: (ROOT, 1, 2, 3, 4, ROOT)}


def gathered(ops, parts=PARTS):
    return [use.unit for use in uses(ops, parts, PHASES) if use.gathers]


@pytest.mark.parametrize(("m", "whole"), [(1, 2025), (4, 8100)])
def test_bytes_on_the_wire_are_those_of_the_closed_form(m, whole):
    """On 4 ranks a gather or a split sum is 3/4 of its bytes: m (P_root + 2 (P - P_root) - P_last + P)."""
    ops = plan("1f1b", 1, m).ranks[0]
    sent = gathered(ops) + [fill.unit for fill in fills(ops, PARTS, PHASES) if fill.sends]
    assert 3 / 4 * sum(SIZES[unit] for unit in sent) == whole


def test_one_micro_batch():
    ops = plan("1f1b", 1, 1).ranks[0]
    assert gathered(ops) == [0, 1, 2, 3, 4, 3, 2, 1]
    found = fills(ops, PARTS, PHASES)
    assert [(fill.unit, fill.sends) for fill in found] == [
        (0, False), (4, True), (3, True), (2, True), (1, True), (0, True)
    ]  # fmt: skip
    # The root, and two units: the one that is used and the next.
    assert most_gathered(uses(ops, PARTS, PHASES), SIZES.__getitem__, True) == 200 + 250 + 250
    assert most_gathered(uses(ops, PARTS, PHASES), SIZES.__getitem__, False) == 200 + 250
    assert most_filled(found, SIZES.__getitem__, True) == 200 + 250 + 250
    assert most_filled(found, SIZES.__getitem__, False) == 200 + 250


def test_while_micro_batches_overlap_the_root_stays():
    ops = plan("gpipe", 1, 3).ranks[0]
    assert gathered(ops).count(ROOT) == 1
    assert [fill.sends for fill in fills(ops, PARTS, PHASES) if fill.unit == ROOT] == [False] * 5 + [True]


def test_a_forward_alone_gathers_each_unit_once():
    ops = forward_only({0: 0}, 2).ranks[0]
    assert gathered(ops) == [0, 1, 2, 3, 4] * 2
    assert fills(ops, PARTS, PHASES) == []


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_on_every_plan_a_unit_is_there_while_it_is_used_and_nothing_stays(name, p):
    made = plan(name, p, 8)
    ends = {0, made.stages - 1}
    for rank, ops in enumerate(made.ranks):
        held = [s for s, r in made.rank_of.items() if r == rank]
        parts = {s: [*[ROOT] * (s == 0), 2 * s + 1, 2 * s + 2, *[ROOT] * (s == made.stages - 1)] for s in held}
        there, computed = set(), []
        for use in uses(ops, parts, PHASES):
            assert use.gathers == (use.unit not in there)
            there.add(use.unit)
            computed.append(use.unit)
            if use.drops:
                there.discard(use.unit)
        assert not there
        order = [unit for op in ops if op.kind != "W" for unit in parts[op.stage][:: 1 if op.kind == "F" else -1]]
        assert computed == order
        # Every micro-batch's gradients of a block leave once, and in the end the root's have left.
        found = fills(ops, parts, PHASES)
        sent = Counter(fill.unit for fill in found if fill.sends)
        assert all(n == 8 for unit, n in sent.items() if unit != ROOT)
        assert (ROOT in sent) == bool(ends & {*held})
        roots = [fill.sends for fill in found if fill.unit == ROOT]
        assert not roots or roots[-1]
