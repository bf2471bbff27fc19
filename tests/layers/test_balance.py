"""Experts that are chosen unevenly: a loss by the reference's complex step, on any mesh; a bias by hand-made counts."""

import numpy as np
import pytest

from launch import start
from layers.batch import Balance, Batch
from layers.context import Ring
from layers.moe import MoE
from layers.pieces import LAYOUTS
from parallel.mesh import Mesh
from parallel.parameter import drawn, given
from parallel.rows import own
from reference import transformer as reference
from reference.transformer import Routing
from tests.grids import every_other

pytestmark = pytest.mark.mpi

D, F, X, A = 7, 9, 5, 2
LENGTHS, ALPHA = [3, 1, 6, 2], 0.7
KINDS = {
    "softmax": {"scoring": "softmax", "normed": False},
    "sigmoid": {"scoring": "sigmoid", "normed": True, "scale": 1.3, "correction": True},
}


def meshes(ranks):
    return [{"ep": ranks}, {"cp": ranks}, {"tp": ranks}, *([{"cp": 2, "tp": 2}, {"ep": 2, "tp": 2}] if ranks == 4 else [])]


def balanced(comm, axes, kind, cuts_rows, lengths=LENGTHS, weights=None):
    """The loss, and the gradients of Wr and x that it alone gives, whole; the router's weights, and x."""
    T = sum(lengths)
    x_TD = 2 * np.random.default_rng(0).standard_normal((T, D))
    with Mesh(comm, check=True, **axes) as mesh:
        more = KINDS[kind] | {"cuts_rows": cuts_rows, "ep": mesh.ep, "cp": Ring(mesh.cp).cp}
        moe = MoE(mesh.tp, weights or drawn(1, "float64", 0.3), D, F, X, A, **more)
        # Over ep ranks have sequences of their own.
        mine = [s for s in range(len(lengths)) if s % mesh.ep.size == mesh.ep.rank] or [0]
        counted = len(lengths) > mesh.ep.rank
        starts = np.cumsum([0, *lengths])
        of = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in mine])
        theirs = [lengths[s] for s in mine]
        of_cp = {"every": LAYOUTS["zigzag"](theirs, mesh.cp.size), "rank": mesh.cp.rank}
        cut_over = mesh.tp.size if cuts_rows else None
        batch = Batch.of(theirs, None, None, cut_over, **of_cp, balance=Balance(ALPHA * counted, T))
        x = own(batch.take(x_TD[of]), batch.rows, mesh.tp.rank)
        y, saved = moe.forward(x, batch)
        dx = moe.backward(np.zeros_like(y), saved)
        data = mesh.over("ep", "cp")
        loss = data.all_reduce(np.array([batch.noted[moe].loss])).item()
        dWr = data.all_reduce(moe.router.Wr_DX.grad)
        dWr = mesh.tp.all_reduce(dWr) if cuts_rows else dWr
        found = np.zeros((T, D))
        at = batch.take(of)
        found[at] = mesh.tp.gather_rows(dx, batch.rows)
        found = data.all_reduce(found)
        W = {p.name: p.data.copy() for p in [moe.router.Wr_DX, *moe.buffers]}
    return loss, dWr, found, W, x_TD


@pytest.mark.parametrize(
    ("kind", "axes", "cuts_rows"), every_other(KINDS, range(len(meshes(start.begin().size))), [False, True])
)
def test_the_loss_and_its_gradient_are_the_references(comm, kind, axes, cuts_rows):
    """On ranks along ep, cp and tp."""
    axes = meshes(comm.size)[axes]
    loss, dWr, dx, W, x = balanced(comm, axes, kind, cuts_rows)
    r = Routing(A, **{name: value for name, value in KINDS[kind].items() if name != "correction"})
    assert loss == pytest.approx(reference.balance(W, x, LENGTHS, r, ALPHA), rel=1e-13)
    random, h = np.random.default_rng(3), 1e-30
    for _ in range(3):
        v, u = random.standard_normal(W["Wr"].shape), random.standard_normal(x.shape)
        along_W = reference.balance(W | {"Wr": W["Wr"] + 1j * h * v}, x, LENGTHS, r, ALPHA).imag / h
        along_x = reference.balance(W, x + 1j * h * u, LENGTHS, r, ALPHA).imag / h
        assert np.vdot(dWr, v) == pytest.approx(along_W, rel=1e-11, abs=1e-13)
        assert np.vdot(dx, u) == pytest.approx(along_x, rel=1e-11, abs=1e-13)


def test_a_router_that_knows_nothing_has_the_loss_alpha(comm):
    for axes in meshes(comm.size):
        weights = {"Wr": np.zeros((D, X)), "W1": np.zeros((X, D, 2, F)), "W2": np.zeros((X, F, D))}
        loss, *_ = balanced(comm, axes, "softmax", False, weights=given(weights))
        assert loss == pytest.approx(ALPHA, rel=1e-15)


@pytest.mark.mpi(min_size=2)
def test_counts_of_one_rank_of_cp_are_seen(comm, monkeypatch):
    """A sequence's counts without those of the other ranks that have its tokens."""
    right, *_ = balanced(comm, {"cp": comm.size}, "softmax", False)
    init = MoE.__init__

    def deaf(self, *args, cp=None, **more):
        init(self, *args, **more)

    monkeypatch.setattr(MoE, "__init__", deaf)
    wrong, *_ = balanced(comm, {"cp": comm.size}, "softmax", False)
    assert abs(wrong - right) > 1e-6
