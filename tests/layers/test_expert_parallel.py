"""Experts over ep, each rank with tokens of its own: what one process computes of all of them; what that sends and keeps."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from mpi4py import MPI

import layers.moe as module
from layers.batch import Batch
from layers.dispatch import Dispatch, Moved
from layers.moe import MoE
from layers.saved import nbytes
from layers.work import products
from parallel.control import Control
from parallel.guard import CollectiveMismatch
from parallel.later import Later
from parallel.ledger import agrees, merged
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.parameter import drawn
from parallel.products import counted
from parallel.rows import cut_rows, own
from tests.layers import test_moe
from tests.layers.test_moe import D, F, S, correction_weighs_too

pytestmark = pytest.mark.mpi

WORLD = MPI.COMM_WORLD.size
# (ep, tp, whether rows are cut over tp).
MESHES = {4: [(4, 1, False), (2, 2, False), (2, 2, True)]}.get(WORLD, [(WORLD, 1, False)])
# Of each rank of ep, or of the first of them.
TOKENS = {"uneven": (7, 4, 9, 1), "a rank without tokens": (6, 0, 5, 3), "on one rank": (8, 0, 0, 0), "none": (0, 0, 0, 0)}


def only_the_first(moe):
    """All scores are equal: each token chooses expert 0."""
    moe.router.Wr_DX.data[...] = 0


KINDS = test_moe.KINDS | {"all active": (5, 5, S, {"scale": 0.7})}
# 5 experts over 2, 3 and 4 ranks; all of them active; what the layer is bent to.
CASES = {
    **{kind: (kind, None) for kind in ("mixtral", "switch", "all active", "deepseek-v2", "deepseek-v3")},
    "all tokens to one expert": ("switch", only_the_first),
}
GRID = [(case, "uneven", axes) for case in CASES for axes in MESHES] + [
    ("deepseek-v3" if axes[2] else "mixtral", tokens, axes) for tokens in list(TOKENS)[1:] for axes in MESHES
]


def moe_of(mesh, case, cuts_rows=False):
    kind, bend = CASES[case]
    count, active, shared, routing = KINDS[kind]
    moe = MoE(mesh.tp, drawn(1, "float64", 0.5), D, F, count, active, shared, **routing, cuts_rows=cuts_rows, ep=mesh.ep)
    if bend is not None:
        bend(moe)
    return moe


def batch(tokens, ep):
    """x and dy of all tokens, and where each rank's are."""
    sizes = TOKENS[tokens][:ep]
    ends = np.cumsum([0, *sizes])
    return *np.random.default_rng(2).standard_normal((2, ends[-1], D)), [slice(*b) for b in pairwise(ends)]


def alone(case, tokens, ep):
    """y, dx and every gradient of all tokens on one process, and the choice."""
    x, dy, _ = batch(tokens, ep)
    with Mesh(MPI.COMM_SELF, tp=1) as mesh:
        moe = moe_of(mesh, case)
        y, saved = moe.forward(x)
        dx = moe.backward(dy, saved)
        # On one rank nothing is exchanged.
        assert {verb for verb, *_ in mesh.ledger.rows} == {"all_reduce"}
        return {"y": y, "dx": dx} | {f"d{p.name}": p.grad for p in moe.parameters}, saved[2][1]


def stepped(mesh, case, tokens, cuts_rows, spoil=None, put_off=False, summed=lambda p: "ep" not in p.layout.cuts):
    """The same over ep. The layer, what it saved, this rank's tokens and rows."""
    moe = moe_of(mesh, case, cuts_rows)
    if spoil is not None:
        spoil(moe)
    x, dy, of = batch(tokens, mesh.ep.size)
    mine = of[mesh.ep.rank]
    T = mine.stop - mine.start
    rows = cut_rows(T, mesh.tp.size) if cuts_rows else None
    x, dy = (own(a[mine], rows, mesh.tp.rank) for a in (x, dy))
    later = Later() if put_off else None
    with counted() as made, mesh.phase("forward"):
        y, saved = moe.forward(x, Batch([T or 1], rows=rows, every=() if T else ((),)))
    with counted() as more, mesh.phase("backward"):
        dx = moe.backward(dy, saved, later)
        if put_off:
            later.do()
        Owed(mesh, moe.parameters).sum()
    assert spoil or made + more == products(moe.work(T, rows, moe.served(saved)))
    whole = {name: mesh.tp.gather_rows(a, rows) for name, a in {"y": y, "dx": dx}.items()}
    for p in moe.parameters:
        # The rule of gradients: what came over ep is in the experts' already.
        grad = mesh.ep.all_reduce(p.grad) if summed(p) else p.grad
        whole[f"d{p.name}"] = p.whole(mesh, grad)
    return whole, moe, saved, T, rows


def wrong(whole, right, mine):
    """The tensors that differ."""
    right = right | {name: right[name][mine] for name in ("y", "dx")}
    assert whole.keys() == right.keys()
    far = lambda a, b: a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max(initial=0)))  # noqa: E731
    return {name for name, b in right.items() if far(whole[name], b)}


@pytest.mark.parametrize(("case", "tokens", "axes"), GRID)
def test_it_is_what_one_process_computes_and_sends_and_keeps_what_is_predicted(comm, case, tokens, axes):
    ep, tp, cuts_rows = axes
    with Mesh(comm, check=True, ep=ep, tp=tp) as mesh:
        whole, moe, saved, T, rows = stepped(mesh, case, tokens, cuts_rows)
        right, c = alone(case, tokens, ep)
        mine = batch(tokens, ep)[2][mesh.ep.rank]
        assert not wrong(whole, right, mine)
        # From the choice of all tokens, which nobody has.
        at, here = np.zeros(len(c), int), moe.cut.bounds[mesh.ep.rank]
        at[mine] = 1
        inside = (here[0] <= c) & (c < here[1])
        P, Q = int((~inside)[at == 1].sum()), int(inside[at == 0].sum())
        assert moe.moved(saved) == Moved(P, Q)
        predicted = [*moe.traffic(T, rows, moe.moved(saved)), *Owed(mesh, moe.parameters).traffic()]
        report = [r for r in mesh.ledger.report(predicted) if r["phase"] != "none"]
        assert agrees(merged(Control(comm).everyone(report)))
        others = (moe.router.count - (here[1] - here[0])) * 8
        sent = {r["phase"]: r["message_bytes"] for r in report if r["verb"] == "exchange"}
        want = {"forward": 8 * (P * (D + 1) + Q * D) + others, "backward": 8 * (P * D + Q * (D + 1))}
        assert sent == (want if ep > 1 else {})
        assert nbytes(saved) == moe.saved_bytes(T, rows, moe.moved(saved))


@pytest.mark.parametrize("axes", MESHES)
def test_put_off_products_and_no_backward(comm, axes):
    ep, tp, cuts_rows = axes
    with Mesh(comm, check=True, ep=ep, tp=tp) as mesh:
        whole, moe, *_ = stepped(mesh, "deepseek-v3", "uneven", cuts_rows)
        halves, *_ = stepped(mesh, "deepseek-v3", "uneven", cuts_rows, put_off=True)
        for name, a in whole.items():
            np.testing.assert_array_equal(halves[name], a, err_msg=name)
        mine = batch("uneven", ep)[2][mesh.ep.rank]
        y = moe.apply(batch("uneven", ep)[0][mine])
        np.testing.assert_allclose(y, whole["y"], rtol=0, atol=1e-13)


def test_a_rank_holds_its_experts_and_their_names_are_those_of_all(comm):
    with Mesh(comm, ep=comm.size) as mesh:
        moe = moe_of(mesh, "mixtral")
        start, stop = moe.cut.bounds[mesh.ep.rank]
        w1, w2 = (p for p in moe.parameters if p.name != "Wr")
        assert (w1.data.shape, w2.data.shape) == ((stop - start, D, 2, F), (stop - start, F, D))
        with Mesh(MPI.COMM_SELF, tp=1) as lone:
            one = {p.name: p.data for p in moe_of(lone, "mixtral").parameters}
        np.testing.assert_array_equal(w1.data, one["W1"][start:stop])
        np.testing.assert_array_equal(w2.whole(mesh, w2.data), one["W2"])


@pytest.mark.mpi(min_size=2)
def test_more_ranks_than_experts_and_an_unknown_choice_are_refused(comm):
    with Mesh(comm, ep=comm.size) as mesh:
        with pytest.raises(ValueError, match=f"cannot cut 1 experts over {comm.size} ranks: use at most 1 ranks"):
            MoE(mesh.tp, drawn(0, "float32"), D, F, 1, 1, ep=mesh.ep)
        moe = moe_of(mesh, "mixtral")
        with pytest.raises(ValueError, match=f"{comm.size} ranks share the experts: .* give `moved`"):
            moe.saved_bytes(3)


# Sabotages.


class Bent:
    """An axis whose exchange number `call` of each step is another."""

    def __init__(self, axis, call, other):
        self.axis, self.call, self.other, self.calls = axis, call, other, 0
        self.name, self.size, self.rank, self.place = axis.name, axis.size, axis.rank, axis.place

    def exchange(self, x, sent, received):
        self.calls += 1
        return (self.other if self.calls == self.call else type(self.axis).exchange)(self.axis, x, sent, received)


def combined_by_place(moe, monkeypatch):
    monkeypatch.setattr(Dispatch, "returned", lambda self: ((np.arange(at.start, at.stop), rows) for at, rows in self.away))


def gate_applied_twice(moe, monkeypatch):
    plain = module.beside
    monkeypatch.setattr(module, "beside", lambda x, g, pairs: plain(x, g * g, pairs))


def correction_in_the_gate(moe, monkeypatch):
    correction_weighs_too(moe)


def gate_gradient_left_at_the_expert(moe, monkeypatch):
    def without(axis, x, sent, received):
        y = axis.exchange(x, sent, received)
        y[:, D] = 0
        return y

    moe.ep = Bent(moe.ep, 5, without)


def own_rows_for_those_that_came(moe, monkeypatch):
    """As many rows, but those of another rank."""
    moe.ep = Bent(moe.ep, 3, lambda axis, x, sent, received: np.roll(axis.exchange(x, sent, received), 1, axis=0))


SABOTAGES = {
    combined_by_place: {"y", "dx", "dWr"},
    gate_applied_twice: {"y", "dx", "dW1", "dW2"},
    correction_in_the_gate: {"y", "dx", "dW1", "dW2", "dWr"},
    gate_gradient_left_at_the_expert: {"dx", "dWr"},
    own_rows_for_those_that_came: {"y"},
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda f: f.__name__)
def test_sabotage_is_seen(comm, monkeypatch, sabotage):
    with Mesh(comm, check=True, ep=comm.size) as mesh:
        whole, *_ = stepped(mesh, "deepseek-v3", "uneven", False, partial(sabotage, monkeypatch=monkeypatch))
        monkeypatch.undo()
        right, _ = alone("deepseek-v3", "uneven", comm.size)
        found = wrong(whole, right, batch("uneven", comm.size)[2][comm.rank])
        # Of the single token of the last of four ranks a row may come back to its place.
        assert {name for names in comm.allgather(found) for name in names} >= SABOTAGES[sabotage]


@pytest.mark.mpi(min_size=2)
def test_gradients_of_experts_summed_over_ep_are_seen(comm):
    with Mesh(comm, check=True, ep=comm.size) as mesh:
        # Where the ranks have unequally many experts, the guard sees it before.
        case = "deepseek-v2" if comm.size == 3 else "deepseek-v3"
        whole, *_ = stepped(mesh, case, "uneven", False, summed=lambda p: True)
        right, _ = alone(case, "uneven", comm.size)
        assert wrong(whole, right, batch("uneven", comm.size)[2][comm.rank]) == {"dW1", "dW2"}


@pytest.mark.mpi(min_size=2)
def test_counts_of_one_rank_for_all_are_seen(comm, monkeypatch):
    plain = module.dispatched
    of_first = lambda pairs, n_X, n_Rx, *more: plain(pairs, n_X, np.repeat(n_Rx[:1], len(n_Rx), axis=0), *more)  # noqa: E731
    with Mesh(comm, check=True, ep=comm.size) as mesh:
        monkeypatch.setattr(module, "dispatched", of_first)
        with pytest.raises(CollectiveMismatch, match=r"on ep, rank \d sends \d+ rows to rank \d, which expects \d+, in "):
            stepped(mesh, "mixtral", "uneven", False)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("how", ["swapped", "turned round"])
def test_wrong_counts_of_the_way_back_are_seen(comm, how):
    """Where as many leave as come, nobody would see it: here that is so on no rank."""

    def back(axis, x, sent, received):
        return axis.exchange(x, received, sent) if how == "swapped" else axis.exchange(x, sent[::-1], received[::-1])

    def spoil(moe):
        moe.ep = Bent(moe.ep, 3, back)

    with Mesh(comm, check=True, ep=comm.size) as mesh:
        _, moe, saved, *_ = stepped(mesh, "mixtral", "uneven", False)
        assert moe.moved(saved).left != moe.moved(saved).came
        with pytest.raises((ValueError, CollectiveMismatch), match="rows"):
            stepped(mesh, "mixtral", "uneven", False, spoil)
