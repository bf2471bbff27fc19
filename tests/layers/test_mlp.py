"""The sharded MLP against the reference, entry by entry; and the sabotages that must turn these checks red."""

from functools import partial

import numpy as np
import pytest

from layers.mlp import MLP
from layers.ops import ACTIVATIONS
from layers.work import products
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.products import counted
from parallel.shard import Layout
from reference import mlp as reference
from reference.compare import compare, tolerance
from tests.layers.deaf import Deaf

pytestmark = pytest.mark.mpi

# All different, none divided by the ranks, so that a transposed or misplaced dim cannot fit.
T, D, F, OUT = 11, 7, 23, 5


def run(mesh, activation="gelu", bias=True, dtype="float64", sabotage=None):
    """Comparisons by tensor of one forward and backward, after `sabotage(mlp, mesh)` has spoilt something."""
    mlp = MLP(mesh.tp, drawn(1, dtype, spread=0.3), D, F, activation, bias, d_out=OUT)
    random = np.random.default_rng(2)
    x, dy = random.standard_normal((T, D)).astype(dtype), random.standard_normal((T, OUT)).astype(dtype)
    if sabotage:
        sabotage(mlp, mesh)
    with counted() as made, mesh.phase("forward"):
        y, saved = mlp.forward(x)
    with counted() as more, mesh.phase("backward"):
        dx = mlp.backward(dy, saved)
    assert made + more == products(mlp.work(T))
    report = mesh.ledger.report(mlp.traffic(T))
    weights = {p.name: p.whole(mesh, p.data) for p in mlp.parameters}
    got = {"y": y, "x": dx} | {p.name: p.whole(mesh, p.grad) for p in mlp.parameters}
    layers = (x, weights["W1"], weights.get("b1"), weights["W2"], weights.get("b2"), activation)
    want = {"y": reference.forward(*layers)} | reference.gradients(*layers, dy, reference.grid(T, D, F, OUT))
    sums = reference.sums(*layers, dy, np.finfo(dtype).eps / 2)
    assert want.keys() == got.keys()
    return {n: compare(n, "", got[n], want[n], tolerance(dtype, *sums[n])) for n in want}, report, mlp, saved


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_tensor_equals_the_reference_and_bytes_are_as_predicted(mesh, activation, bias, dtype):
    checks, report, _, _ = run(mesh, activation, bias, dtype)
    assert not [c.worst for c in checks.values() if not c.ok]
    if dtype == "float64":
        assert max(c.relative_error for c in checks.values()) < 1e-12
    assert agrees(report)
    assert {(r["verb"], r["phase"], r["calls"]) for r in report} == {
        ("all_reduce", "forward", 1),
        ("all_reduce", "backward", 1),
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saved_bytes_are_the_closed_form(mesh, activation):
    from layers.saved import nbytes

    _, _, mlp, saved = run(mesh, activation)
    assert nbytes(saved) == mlp.saved_bytes(T)


def test_backward_adds_into_gradients(mesh):
    _, _, mlp, saved = run(mesh)
    once = [p.grad.copy() for p in mlp.parameters]
    mlp.backward(np.random.default_rng(2).standard_normal((T, D + OUT))[:, D:], saved)
    twice = [p.grad.copy() for p in mlp.parameters]
    for p in mlp.parameters:
        p.zero_grad()
    mlp.backward(np.random.default_rng(2).standard_normal((T, D + OUT))[:, D:], saved)
    for first, both, p in zip(once, twice, mlp.parameters, strict=True):
        np.testing.assert_array_equal(both, first + p.grad)


def test_several_micro_batches_in_flight(mesh):
    mlp = MLP(mesh.tp, drawn(1, "float64"), D, F)
    xs = [np.random.default_rng(n).standard_normal((T + n, D)) for n in range(2)]
    (y0, saved0), (y1, saved1) = (mlp.forward(x) for x in xs)
    late = mlp.backward(y0, saved0)
    mlp.backward(y1, saved1)
    np.testing.assert_array_equal(late, mlp.backward(y0, saved0))


def test_weights_do_not_depend_on_the_mesh(mesh):
    alone = drawn(5, "float32")
    mlp = MLP(mesh.tp, alone, D, F, "swiglu")
    for p in mlp.parameters:
        whole = p.whole(mesh, p.data)
        make = partial(alone.matrix, d_in=len(whole)) if p.name.startswith("W") else alone.bias
        np.testing.assert_array_equal(whole, make(p.name, Layout(whole.shape), {}).data)


def test_more_ranks_than_hidden_units_is_refused(mesh):
    if mesh.tp.size == 1:
        MLP(mesh.tp, drawn(0, "float32"), D, 1)
        return
    with pytest.raises(ValueError, match=f"cannot cut 1 hidden units \\(d_ff\\) over {mesh.tp.size} ranks: use at most 1"):
        MLP(mesh.tp, drawn(0, "float32"), D, 1)
    with pytest.raises(ValueError, match="unknown activation 'tanh': use one of relu, gelu, silu, swiglu"):
        MLP(mesh.tp, drawn(0, "float32"), D, F, "tanh")


# Sabotages: each spoils one thing that public implementations have got wrong, and must turn its check red.


def bias_before_the_sum(mlp, mesh):
    b, mlp.down.b_O.data = mlp.down.b_O.data, mlp.down.b_O.data * mesh.tp.size
    assert b is not mlp.down.b_O.data
    # The weights compared with are those of before: only the layer's own arithmetic is spoilt.
    mlp.down.b_O.whole = lambda axis, part: b if part is mlp.down.b_O.data else part


def backward_sum_left_out(mlp, mesh):
    mlp.up.tp = Deaf(mesh.tp)


def forward_sum_left_out(mlp, mesh):
    backward_sum_left_out(mlp, mesh)
    mlp.down.tp, mlp.up.tp = mlp.up.tp, mesh.tp


def gelu_of_erf(mlp, mesh):
    from math import erf, pi, sqrt

    def function(z):
        cdf = 0.5 * (1 + np.vectorize(erf)(z / sqrt(2)))
        return z * cdf, cdf + z * np.exp(-z * z / 2) / sqrt(2 * pi)

    mlp.activation = type(mlp.activation)("gelu", function)


def one_weight_an_ulp_of_float32_off(mlp, mesh):
    whole, W = mlp.down.W_iO.data.copy(), mlp.down.W_iO
    if mesh.tp.rank == mesh.tp.size - 1:
        W.data = W.data * (1 + 2**-23)
    W.whole = lambda mesh, part: mesh.tp.all_gather(whole if part is W.data else part, 0, W.layout.cuts["tp"][1])


@pytest.mark.parametrize(
    ("sabotage", "red", "smallest"),
    [
        (bias_before_the_sum, {"y"}, 2),
        (backward_sum_left_out, {"x"}, 2),
        (forward_sum_left_out, {"y"}, 2),
        (gelu_of_erf, {"y", "x", "W1", "b1", "W2"}, 1),
        (one_weight_an_ulp_of_float32_off, {"y", "x", "W1", "b1"}, 1),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_sabotage_is_seen(mesh, sabotage, red, smallest):
    checks, report, _, _ = run(mesh, sabotage=sabotage)
    if mesh.tp.size < smallest:
        # With one rank there is nothing to add twice or leave out.
        assert all(c.ok for c in checks.values())
        return
    assert {n for n, c in checks.items() if not c.ok} == red
    assert agrees(report) == ("left_out" not in sabotage.__name__)
