"""Gradients in buckets over dp, their split, and the optimizer on flat arrays."""

import numpy as np
import pytest

from layers.optimizer import AdamW, global_norm, warmup_cosine
from parallel.control import Control
from parallel.data import GradientSums
from parallel.flat import Flat, Owned
from parallel.holder import Over
from parallel.ledger import agrees, merged
from parallel.mesh import Mesh
from parallel.parameter import given
from parallel.shard import Layout, covering, even

pytestmark = pytest.mark.mpi


def parameters(dtype="float64"):
    """A matrix, a norm, two that share memory, and a bias: 12 + 5 + 21 + 3 entries."""
    random = np.random.default_rng(0)
    shapes = {"a.W1": (3, 4), "a.wn": (5,), "a.Wq": (3, 4), "a.Wk": (3, 3), "a.b1": (3,)}
    weights = given({name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()})
    W1, _, Wq, Wk, b1 = map(Layout, shapes.values())
    side = weights.matrices({"a.Wq": Wq, "a.Wk": Wk}, 1, 0, 3).parameters
    return [weights.matrix("a.W1", W1, 0, 3), weights.norm("a.wn", 5), *side, weights.bias("a.b1", b1, 0)]


@pytest.fixture
def dp(comm):
    with Mesh(comm, check=True, dp=comm.size) as mesh:
        yield mesh.dp


def test_flat_arrays_hold_what_the_parameters_held(comm):
    before = [p.data.copy() for p in parameters()]
    flat = Flat(parameters())
    for p, was in zip(flat.parameters, before, strict=True):
        np.testing.assert_array_equal(p.data, was)
        assert np.shares_memory(p.data, flat.data)
        p.add_grad(np.full(p.data.shape, 2.0)) if p.home is p else None
    q, k = flat.parameters[2:4]
    q.home.add_grad(np.full((3, 7), 2.0))
    q.home.add_grad(np.full((3, 7), 1.0))
    np.testing.assert_array_equal(flat.grad, [2.0] * 17 + [3.0] * 21 + [2.0] * 3)
    assert np.shares_memory(k.grad, flat.grad)
    flat.zero_grad()
    assert all(p.grad is None for p in flat.parameters)
    flat.parameters[0].add_grad_product(np.ones((1, 3)), np.ones((1, 4)))
    np.testing.assert_array_equal(flat.grad[:12], 1.0)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bucket", [1, 8 * 7, 8 * 20, 10**6])
def test_sums_are_those_of_all_ranks(dp, comm, bucket, overlap, split):
    flat = Flat(parameters())
    sums = GradientSums(flat, Over(dp), bucket, overlap, split)
    for _ in range(2):
        flat.zero_grad()
        for p in flat.parameters:
            # The norm gets no gradient: it must count as zero.
            if p.name != "a.wn":
                p.add_grad(np.full(p.data.shape, 10.0**dp.rank)) if p.home is p else None
        flat.parameters[2].home.add_grad(np.arange(21.0).reshape(3, 7) * 10**dp.rank)
        dp.ledger.rows.clear()
        with dp.ledger.phase("backward"):
            # In the order of backward, but told in one heap for the first three.
            sums.filled(flat.parameters[:3])
            assert bool(sums._pending) == (overlap and sums.buckets[0].stop <= 38)
            sums.filled(flat.parameters[3:])
            sums.finish()
        total = float(int("1" * dp.size))
        want = np.concatenate([[total] * 12, [0] * 5, np.arange(21) * total, [total] * 3])
        for at in sums.owned:
            np.testing.assert_array_equal(flat.grad[at], want[at])
        with dp.ledger.phase("step"):
            for at in sums.owned:
                flat.data[at] = want[at]
            sums.gather(flat.data)
        np.testing.assert_array_equal(flat.data, want)
        assert agrees(merged(Control(comm).everyone(dp.ledger.report(sums.traffic()))))
    owned = np.concatenate([np.arange(41)[at] for at in sums.owned])
    every = np.sort(np.concatenate(comm.allgather(owned)))
    np.testing.assert_array_equal(every, np.arange(41) if split else np.repeat(np.arange(41), dp.size))


def test_a_gradient_that_backward_did_not_report_is_named(dp):
    flat = Flat(parameters())
    sums = GradientSums(flat, Over(dp), 10**6)
    sums.filled(flat.parameters[:2])
    with pytest.raises(ValueError, match=r"gradients of a\.Wq, a\.Wk were never filled"):
        sums.finish()


def test_each_weight_is_counted_once_over_tp(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        heads = even(9, comm.size)
        layouts = {
            "Wo": Layout((9, 2), {"tp": (0, heads)}),
            "Wk": Layout((5, 3, 2), {"tp": (1, covering(heads, 3))}),
            "wn": Layout((7,)),
        }
        whole = {n: np.random.default_rng(1).standard_normal(layout.shape) for n, layout in layouts.items()}
        flat = Flat([given(whole).matrix(n, layout, mesh.place, 1) for n, layout in layouts.items()])
        flat.grad[...] = flat.data
        norm = global_norm([Owned(slice(None), flat.data, flat.grad)], [flat.counted_once(mesh.tp.place)], mesh.tp)
        assert norm == pytest.approx(np.sqrt(sum((a**2).sum() for a in whole.values())), rel=1e-14)


def test_adamw_is_its_formula_whatever_the_ranges(dp):
    for owned in ([slice(0, 41)], [slice(0, 3), slice(9, 14), slice(14, 41)]):
        flat = Flat(parameters())
        flat.grad[...] = np.random.default_rng(3).standard_normal(41)
        adamw, grad = AdamW(flat, flat.owned(owned), (0.9, 0.95), 1e-8, 0.1), flat.grad.copy()
        want, m, v = flat.data.copy(), np.zeros(41), np.zeros(41)
        decays = np.r_[[0.1] * 12, [0] * 5, [0.1] * 21, [0] * 3]
        mine = np.zeros(41, bool)
        for at in owned:
            mine[at] = True
        for t in range(1, 4):
            adamw.step(0.01 * t, 0.5)
            g = 0.5 * grad
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + decays * want
            want -= np.where(mine, 0.01 * t * step, 0)
        np.testing.assert_allclose(flat.data, want, rtol=1e-13)
        np.testing.assert_allclose(adamw.state_in(slice(2, 30)), np.where(mine, [want, m, v], 0)[:, 2:30], rtol=1e-13)
        other = AdamW(flat, flat.owned(owned))
        other.take_state(slice(0, 20), adamw.state_in(slice(0, 20)))
        other.take_state(slice(20, 41), adamw.state_in(slice(20, 41)))
        np.testing.assert_array_equal(other.m, adamw.m)
        np.testing.assert_array_equal(other.v, adamw.v)


def test_what_is_started_must_be_the_buffer_itself(dp):
    with pytest.raises(ValueError, match="a verb that is started needs a C-contiguous array"):
        dp.start_all_reduce(np.zeros((3, 4)).T)
    x = np.full(3 * dp.size, dp.rank + 1.0)
    pending = dp.start_reduce_scatter(x, even(3 * dp.size, dp.size))
    pending.poke()
    np.testing.assert_array_equal(pending.wait(), [dp.size * (dp.size + 1) / 2] * 3)
    assert pending.wait() is pending.wait()


def test_the_rate_rises_then_falls_as_a_cosine():
    rates = [warmup_cosine(n, 100, 2.0, 10) for n in range(100)]
    assert rates[0] == 0.2
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rates == [*sorted(rates[:10]), *sorted(rates[10:], reverse=True)]
    assert rates[99] == pytest.approx(0.2, rel=0.01)
