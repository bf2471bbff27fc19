"""A model in stages: the same weights on any placement, and what a whole one computes, in every schedule."""

from itertools import product

import numpy as np
import pytest

from launch import start
from models.build import Parts
from models.stage import by_hand, dealt, stages
from parallel import schedules
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.schedules import SCHEDULES
from parallel.watch.messages import Messages
from tests.grids import every_other, thinned
from tests.models.staged import CONFIGS, COUNTS, LAYERS, alone, gradients, held, one_after_another, parts, trainer
from tests.models.staged import weights as drawn

RANKS = start.begin().size
# On 4 ranks also stages whose tensors, or whose tokens too, are cut over tp.
GRIDS = {"pp": {"pp": RANKS, "dp": 1, "tp": 1}}
if RANKS == 4:
    GRIDS |= {"tp": {"pp": 2, "dp": 1, "tp": 2}, "rows": {"pp": 2, "dp": 1, "tp": 2}}
# On each number of ranks each schedule with one model, on another number with another; of those cut over tp every third.
CASES = [*product(GRIDS, SCHEDULES, CONFIGS)]


def chosen(grid, name, kind):
    at = [[*GRIDS].index(grid), [*SCHEDULES].index(name), [*CONFIGS].index(kind)]
    return (at[1] + at[2] + RANKS) % len(CONFIGS) == 0 and (not at[0] or (at[0] + at[1]) % 3 == 0)


def near(got, want, name=""):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * max(1, np.abs(want).max()), err_msg=name)


def table_on_one_rank(config, plan):
    """Two stages on one rank use it: its gradient is summed in the order of the plan."""
    ranks = [*plan.rank_of.values()]
    return {"Wte"} if config.tied and len(ranks) > 1 and ranks[0] == ranks[-1] else set()


@pytest.mark.mpi
@pytest.mark.parametrize(("grid", "name", "kind"), thinned(CASES, [case for case in CASES if chosen(*case)]))
def test_every_schedule_gives_the_bits_of_one_after_another(comm, grid, name, kind):
    config, pp = CONFIGS[kind], GRIDS[grid]["pp"]
    m = max(2 + (len(name) + RANKS) % 4, SCHEDULES[name].least(pp))
    plan, (every, tokens) = schedules.plan(name, pp, m), parts(m)
    more = {"cuts_rows": grid == "rows", "recompute": len(kind) % 2 == 0}
    loss, norm, whole, *_ = alone(kind, m)
    with Mesh(comm, check=True, watchers=[Messages()], **GRIDS[grid]) as mesh:
        in_turn = trainer(mesh, config, one_after_another(plan), **more)
        assert in_turn.gradients(every, tokens) == pytest.approx(loss, rel=1e-13)
        want = gradients(in_turn)
        planned = trainer(mesh, config, plan, **more)
        planned.plan(m)
        mesh.ledger.rows.clear()
        assert planned.gradients(every, tokens) == pytest.approx(loss, rel=1e-13)
        assert planned.update(0.0) == pytest.approx(norm, rel=1e-12)
        assert agrees(report := mesh.ledger.report(planned.traffic(every))), report
        memory = planned.memory(every)
        assert memory["saved"] == memory["predicted_saved"]
        got = gradients(planned)
        assert got.keys() == want.keys()
        for tensor, g in got.items():
            if tensor not in table_on_one_rank(config, plan):
                np.testing.assert_array_equal(g, want[tensor], err_msg=tensor)
            near(g, whole[tensor], tensor)
        # Every weight is somewhere.
        assert {tensor for names in comm.allgather([*got]) for tensor in names} == {*whole}


UNEVEN = {
    1: [[5]],
    2: [[5, 0], [0, 5], [1, 4]],
    3: [[3, 2, 0], [2, 0, 3], [0, 5, 0]],
    4: [[2, 3, 0, 0], [3, 0, 0, 2], [0, 0, 5, 0]],
}


@pytest.mark.mpi
@pytest.mark.parametrize(("kind", "n"), every_other(CONFIGS, range(len(UNEVEN[RANKS]))))
def test_stages_by_hand_some_without_blocks(comm, kind, n):
    config, counts = CONFIGS[kind], UNEVEN[RANKS][n]
    every, tokens = parts(3)
    loss, norm, whole, _, logits = alone(kind, 3)
    with Mesh(comm, check=True, **GRIDS["pp"]) as mesh:
        made = trainer(mesh, config, schedules.plan("zb-h1" if n % 2 else "1f1b", RANKS, 3), counts, zero=True)
        (stage,) = made.stages.values()
        assert len(stage.blocks) == counts[comm.rank]
        assert made.gradients(every, tokens) == pytest.approx(loss, rel=1e-13)
        assert made.update(0.0) == pytest.approx(norm, rel=1e-12)
        memory = made.memory(every)
        assert memory["saved"] == memory["predicted_saved"]
        for tensor, g in gradients(made).items():
            near(g, whole[tensor], tensor)
        # Forward alone: the loss, and without targets the logits.
        mesh.ledger.rows.clear()
        work = made.forward(every, "validation")
        assert agrees(mesh.ledger.report(made.forward_traffic(every, "validation")))
        assert sum(comm.allgather(work.nats)) / tokens == pytest.approx(loss, rel=1e-13)
        asked = made.forward([part._replace(targets=None) for part in every], "decode").logits
        assert [*asked] == ([0, 1, 2] if stage.end is not None else [])
        for i, got in asked.items():
            near(got, logits[i])
        assert work.most.nbytes == 0


@pytest.mark.mpi
@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_are_drawn_by_their_names_in_the_whole_model(comm, kind):
    """The same bits on any placement."""
    weights = alone(kind, 3)[3]
    with Mesh(comm, **GRIDS["pp"]) as mesh:
        for name in ("1f1b", "interleaved", "zb-v"):
            rank_of = [*schedules.plan(name, RANKS, 3).rank_of.values()]
            mine = {p.name: p.data for stage in held(mesh, CONFIGS[kind], rank_of).values() for p in stage.parameters}
            for tensor, a in mine.items():
                np.testing.assert_array_equal(a, weights[tensor], err_msg=tensor)
            holders = [tensor for names in comm.allgather([*mine]) for tensor in names]
            assert {*holders} == {*weights}
            twice = {tensor for tensor in holders if holders.count(tensor) > 1}
            assert twice == ({"Wte"} if CONFIGS[kind].tied and rank_of[0] != rank_of[-1] else set())


def test_blocks_are_dealt_evenly_or_by_hand():
    assert dealt(7, 3) == [range(3), range(3, 5), range(5, 7)]
    assert by_hand([3, 0, 2]) == [range(3), range(3, 3), range(3, 5)]
    with pytest.raises(ValueError, match="cannot put 3 layers on 4 stages: give --layers, 0 for stages without blocks"):
        dealt(3, 4)
    assert {sum(counts) for counts in COUNTS.values()} == {LAYERS}


# Sabotage.


@pytest.mark.mpi(min_size=2)
def test_block_numbers_that_begin_anew_on_each_stage_are_seen(comm):
    """All stages would have the same weights."""
    config, weights = CONFIGS["llama tied"], alone("llama tied", 3)[3]
    with Mesh(comm, **GRIDS["pp"]) as mesh:
        for counts in ([2, *[1] * (RANKS - 1)], [1] * RANKS):
            anew = stages(Parts(config, mesh.tp), drawn(), [range(n) for n in counts], range(RANKS), comm.rank)
            names = comm.allgather([p.name for stage in anew.values() for p in stage.parameters])
            assert {tensor for held in names for tensor in held} != {*weights}
            assert len({tensor for held in names for tensor in held}) < sum(map(len, names)) - 1
