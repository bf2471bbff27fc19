"""The executor of plans alone, with stages that are small products of integers: what comes of them is exact in any order."""

from itertools import product

import numpy as np
import pytest

from parallel import pipeline, schedules
from parallel.call import Watcher
from parallel.control import Control
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.pipeline import PlanMismatch
from parallel.schedule import Op, Plan, forward_only
from parallel.schedules import SCHEDULES
from parallel.watch.messages import Messages
from tests.grids import thinned

pytestmark = pytest.mark.mpi

D, MOST = 3, 9
# Tokens of each micro-batch; one has none.
TOKENS = [4, 1, 6, 2, 0, 5, 3, 1, 7]
# Nine of one size: any of them is taken for any other.
ALIKE = [2] * MOST


def small(seed, *shape):
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(float)


class Toy:
    """Stages y = x W, the loss half the sum of squares of the last y. Stages in `handing_on` have no W. Nobody may write what
    was handed over."""

    def __init__(self, stages, tokens=TOKENS, handing_on=()):
        self.last, self.tokens = stages - 1, tokens
        self.W = {s: np.eye(D) if s in handing_on else small(s, D, D) for s in range(stages)}
        self.dW = {s: np.zeros((D, D)) for s in range(stages)}
        self.handing_on, self.saved, self.later, self.done = handing_on, {}, {}, []

    def shape(self, i):
        return self.tokens[i], D

    def __call__(self, op, x):
        self.done.append(op)
        made = {"F": self.forward, "I": self.backward, "B": self.both, "W": self.weights}[op.kind](op[1:], x)
        if made is not None:
            made.setflags(write=False)
        return made

    def forward(self, at, x):
        assert (x is None) == (at[0] == 0)
        self.saved[at] = small(100 + at[1], *self.shape(at[1])) if x is None else x
        y = self.saved[at] if at[0] in self.handing_on else self.saved[at] @ self.W[at[0]]
        return y if at[0] < self.last else self.saved.update({("y", at[1]): y})

    def backward(self, at, dy):
        dy = self.saved.pop(("y", at[1])) if at[0] == self.last else dy
        self.later[at] = self.saved.pop(at), dy
        return dy if at[0] in self.handing_on else dy @ self.W[at[0]].T

    def weights(self, at, nothing):
        x, dy = self.later.pop(at)
        self.dW[at[0]] += x.T @ dy

    def both(self, at, dy):
        dx = self.backward(at, dy)
        self.weights(at, None)
        return dx


def one_after_another(stages, m, **more):
    """Its gradients, by stage."""
    toy = Toy(stages, **more)
    for i in range(m):
        x = None
        for s in range(stages):
            x = toy.forward((s, i), x)
        for s in reversed(range(stages)):
            x = toy.both((s, i), x)
    return toy.dW


def ran(mesh, plan, toy=None, **more):
    """The toy of this rank after the plan; by default a new one."""
    toy = toy or Toy(plan.stages, **more)
    pipeline.run(plan, mesh.pp, toy, toy.shape, float)
    return toy


def own(plan, rank):
    return [stage for stage, at in plan.rank_of.items() if at == rank]


def right(mesh, plan, toy, **more):
    """Whether the gradients of this rank's stages are those of one micro-batch after another."""
    want = one_after_another(plan.stages, plan.micro_batches, **more)
    return all(np.array_equal(toy.dW[stage], want[stage]) for stage in own(plan, mesh.pp.rank))


class Calls(Watcher):
    def __init__(self):
        self.heard = []

    def begin(self, axis, call, x):
        self.heard.append((call.verb, call.what, call.peer))


@pytest.fixture
def mesh(comm):
    """Under the checks of messages; at the end none is left."""
    with Mesh(comm, check=True, watchers=[Messages(), Calls()], pp=comm.size) as mesh:
        yield mesh


def numbers(name, ranks):
    """Of micro-batches: on each number of ranks every third, so that each is run on one of them; `TESTS=all`: all."""
    every = range(1, MOST + 1)
    of_turn = [m for m in every if (m + ranks + [*SCHEDULES].index(name)) % 3 == 0]
    return [m for m in thinned(every, of_turn) if m >= SCHEDULES[name].least(ranks)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_one_micro_batch_after_another(mesh, name):
    p, rank = mesh.pp.size, mesh.pp.rank
    nbytes = [8 * D * n for n in TOKENS]
    for m in numbers(name, p):
        chunks = 2 + m // 3 % 2 if name == "interleaved" else None
        plan, calls = schedules.plan(name, p, m, chunks), mesh.watchers[-1]
        mesh.ledger.rows.clear()
        calls.heard.clear()
        toy = ran(mesh, plan)
        assert toy.done == [*plan.ranks[rank]]
        assert not toy.saved
        assert not toy.later
        assert right(mesh, plan, toy)
        assert agrees(mesh.ledger.report(pipeline.traffic(plan, mesh.pp, nbytes.__getitem__)))
        # Of each of a rank's stages one array a micro-batch goes to each neighbour, but for the turn of a V.
        every = plan.rank_of
        there = sum(t in every and every[t] != rank for s in own(plan, rank) for t in (s - 1, s + 1))
        for verb in ("send", "receive"):
            rows = [row for key, row in mesh.ledger.rows.items() if key[0] == verb]
            assert sum(row.calls for row in rows) == m * there
            assert sum(row.message_bytes for row in rows) == sum(nbytes[:m]) * there
        assert {phase for *_, phase in mesh.ledger.rows} <= {"forward", "backward"}
        assert all(peer != rank for *_, peer in calls.heard)
        # Each message says which operation has made it.
        sent = [str(op) for op in plan.ranks[rank] if plan.to(op) not in (None, rank)]
        assert [what for verb, what, _ in calls.heard if verb == "send"] == sent
        a_v = name in ("zb-v", "dualpipe-v")
        turns = 2 * p - 2 if a_v else plan.stages - 1 if p > 1 else 0
        assert sum(mesh.control.everyone(m * there)) == 2 * m * turns


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_stage_without_weights_hands_on_what_it_gets(mesh, name):
    plan = schedules.plan(name, mesh.pp.size, max(3, SCHEDULES[name].least(mesh.pp.size)))
    every = [{plan.stages // 2}, {0}, {plan.stages - 1}, {*range(1, plan.stages)}]
    for handing_on in thinned(every, every[[*SCHEDULES].index(name) % 4 :][:1]):
        assert right(mesh, plan, ran(mesh, plan, handing_on=handing_on), handing_on=handing_on)


def test_any_placement(mesh):
    """Three times as many stages as ranks, on ranks that follow no rule. All F, then I, then W, as GPipe would."""
    p, m = mesh.pp.size, 3
    for seed in thinned(range(8), [mesh.pp.size]):
        rank_of = [*range(p), *np.random.default_rng(seed).integers(0, p, 2 * p)]
        np.random.default_rng(seed).shuffle(rank_of)
        held = [[s for s, r in enumerate(rank_of) if r == rank] for rank in range(p)]
        plan = Plan(
            tuple(
                (
                    *(Op("F", s, i) for i in range(m) for s in stages),
                    *(Op(kind, s, i) for kind in "IW" for i in range(m) for s in reversed(stages)),
                )
                for stages in held
            )
        )
        mesh.ledger.rows.clear()
        assert right(mesh, plan, ran(mesh, plan))
        assert agrees(mesh.ledger.report(pipeline.traffic(plan, mesh.pp, lambda i: 8 * D * TOKENS[i])))


def test_forward_alone_has_a_phase_of_its_own(mesh):
    for name in ("1f1b", "zb-v"):
        plan = forward_only(schedules.plan(name, mesh.pp.size, 8).rank_of, 3)
        mesh.ledger.rows.clear()
        toy = Toy(plan.stages)
        pipeline.run(plan, mesh.pp, toy, toy.shape, float, {"F": "validation"})
        sent = pipeline.traffic(plan, mesh.pp, lambda i: 8 * D * TOKENS[i], {"F": "validation"})
        assert agrees(mesh.ledger.report(sent))
        assert {phase for *_, phase in mesh.ledger.rows} <= {"validation"}
        if plan.rank_of[plan.stages - 1] == mesh.pp.rank:
            for i in range(3):
                y = small(100 + i, TOKENS[i], D)
                for stage in range(plan.stages):
                    y = y @ toy.W[stage]
                np.testing.assert_array_equal(toy.saved["y", i], y)


# --- plans that differ


def swapped(plan, rank, n):
    """The plan with operations n and n+1 of a rank exchanged."""
    ops = [*plan.ranks[rank]]
    ops[n : n + 2] = ops[n + 1], ops[n]
    return Plan((*plan.ranks[:rank], tuple(ops), *plan.ranks[rank + 1 :]))


@pytest.mark.mpi(min_size=2)
def test_a_plan_that_swaps_two_operations_on_one_rank_is_named_before_the_first_message(mesh):
    p = mesh.pp.size
    plan = schedules.plan("1f1b", p, 8)
    first, second = plan.ranks[0][2:4]
    mine = swapped(plan, 0, 2) if mesh.pp.rank == p - 1 else plan
    others = {2: "rank 0 has", 3: "ranks 0 and 1 have", 4: "ranks 0, 1 and 2 have"}[p]
    with pytest.raises(PlanMismatch) as told:
        pipeline.require_same(mine, mesh.control)
    assert str(told.value).startswith("plans differ: as operation 2 of rank 0 of pp, ")
    assert f"rank {p - 1} has {second}" in str(told.value)
    assert f"{others} {first}" in str(told.value)
    assert not mesh.ledger.rows
    # After that, the ranks can go on.
    pipeline.require_same(plan, mesh.control)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ("0F0,0B0,0F1,0B1", "as operation 1 of rank 0 of pp, "),
        ("0F0,0F1,0B0", "as operation 3 of rank 0 of pp, "),
        ("0F0,0F1,0B0,0B1\n1F0", "as operation 0 of rank 1 of pp, "),
        ("", "as operation 0 of rank 0 of pp, "),
        ("0F0,0F1,0B0,0B1\n\n\n\n\n\n\n\n", ""),
    ],
)
def test_any_difference_of_plans_is_told(comm, odd, said):
    as_read = lambda text: Plan(tuple(tuple(map(op, filter(None, line.split(",")))) for line in text.split("\n")))  # noqa: E731
    op = lambda word: Op(word[1], int(word[0]), int(word[2]))  # noqa: E731
    control = Control(comm)
    with pytest.raises(PlanMismatch) as told:
        pipeline.require_same(as_read(odd if comm.rank == 1 else "0F0,0F1,0B0,0B1"), control)
    assert f"plans differ{': ' if said else ''}{said}" in str(told.value)
    assert len(set(comm.allgather(str(told.value)))) == 1
    if said:
        assert "rank 1 has " in str(told.value)
    control.close()


# --- sabotages


def test_the_saved_values_of_another_micro_batch_are_seen(mesh):
    class Late(Toy):
        def backward(self, at, dy):
            self.saved[at], self.before = getattr(self, "before", self.saved[at]), self.saved[at]
            return super().backward(at, dy)

    plan = schedules.plan("1f1b", mesh.pp.size, 3)
    assert not right(mesh, plan, ran(mesh, plan, Late(plan.stages, ALIKE)), tokens=ALIKE)


@pytest.mark.parametrize("name", ["zb-h1", "zb-v"])
def test_weights_that_are_forgotten_are_seen(mesh, name):
    plan = schedules.plan(name, mesh.pp.size, 3)
    lacking = Plan(tuple(tuple(op for op in ops if (op.kind, op.micro_batch) != ("W", 2)) for ops in plan.ranks))
    toy = ran(mesh, lacking)
    assert toy.later
    assert not right(mesh, plan, toy)


class OwnOrder(Plan):
    """Receives in the order in which the receiver needs the arrays."""

    def sent(self, source, target):
        needed = (self.needs(op) for op in self.ranks[target])
        return [op for op in needed if op is not None and self.rank_of[op.stage] == source != target]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", SCHEDULES)
def test_receives_in_the_receivers_own_order_are_seen(comm, name):
    """Where F and I come from one and the same rank, and not in the order in which they are needed."""
    p, m = comm.size, 9
    plan = schedules.plan(name, p, m)
    mine = OwnOrder(plan.ranks)
    matters = any(mine.sent(a, b) != plan.sent(a, b) for a, b in product(range(p), repeat=2))
    assert matters == (name in {2: ("interleaved", "zb-v")}.get(p, ("zb-v", "dualpipe-v")))
    # Without the checks, which would name it and end the rank.
    with Mesh(comm, pp=p) as mesh:
        toy = ran(mesh, mine, tokens=ALIKE)
        assert matters == any(comm.allgather(not right(mesh, plan, toy, tokens=ALIKE)))
