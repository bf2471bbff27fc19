"""Routed MLPs against the textbook, token by token; their choices; and the sabotages that must turn this red."""

from dataclasses import replace

import numpy as np
import pytest

from launch.measure import step
from layers.moe import MoE
from layers.routing import Router
from layers.saved import nbytes
from layers.work import products
from models.build import build
from models.config import Experts, llama_like
from parallel.control import Control
from parallel.ledger import agrees, merged
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.parameter import drawn, given
from parallel.products import counted
from reference import transformer as reference
from reference.attention import Options
from reference.layer import compared
from reference.transformer import Routing
from tests.apart import shared
from tests.grids import every_other
from tests.layers.deaf import Deaf

# All different, and no width divided by the ranks.
T, D, F, S = 9, 6, 7, 5
V2 = {"normed": False, "scale": 1.7, "groups": 3, "active_groups": 2, "group_top": 1}
V3 = {"scoring": "sigmoid", "scale": 2.5, "groups": 4, "active_groups": 2, "group_top": 2}
# Constructor's arguments by what the models are called: count, active, d_shared, and the routing's.
KINDS = {
    "mixtral": (5, 2, 0, {}),
    "switch": (5, 1, 0, {"normed": False}),
    "all active": (3, 3, S, {"scale": 0.7}),
    "sigmoid": (5, 2, 0, {"scoring": "sigmoid", "normed": False}),
    "deepseek-v2 greedy": (6, 3, S, {"normed": False, "scale": 1.7}),
    "deepseek-v2": (6, 3, S, V2),
    "deepseek-v3": (8, 3, S, V3 | {"correction": True}),
}


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


def moe_of(tp, kind, dtype="float64", spread=0.5):
    count, active, shared, routing = KINDS[kind]
    return MoE(tp, drawn(1, dtype, spread), D, F, count, active, d_shared=shared, **routing)


def routing_of(active, routing):
    return Routing(active, **{n: value for n, value in routing.items() if n != "correction"})


def run(mesh, comm, kind, dtype="float64", sabotage=None):
    """One step: all tensors by name, and dy. The correction is there with the gradient that it has, none."""
    moe = moe_of(mesh.tp, kind, dtype)
    fixed = {b.name: b.data.copy() for b in moe.buffers}
    x, dy = np.random.default_rng(2).standard_normal((2, T, D)).astype(dtype)
    if sabotage:
        sabotage(moe)
    ran = step.run(moe, x, dy, mesh, Control(comm))
    assert agrees(ran.communication)
    assert {(r["verb"], r["phase"], r["calls"]) for r in ran.communication} == {
        ("all_reduce", "forward", 1),
        ("all_reduce", "backward", 1),
    }
    assert not ran.wrong or sabotage
    assert ran.memory["saved_bytes_per_rank"] == ran.memory["predicted_saved_bytes_per_rank"]
    return ran.whole | {"x": x} | fixed | {f"d{n}": np.zeros_like(b) for n, b in fixed.items()}, dy


def tensors(comm, kind, whole, dy):
    """Comparisons of everything with the reference."""
    _, active, _, routing = KINDS[kind]

    def forward(W):
        return reference.mlp(W, W["x"], routing_of(active, routing))

    of = ([forward], lambda W, name, index: np.sum(dy * forward(W)), whole, dy, lambda name: 12)
    return shared(comm, lambda share: compared(*of, share))


@pytest.mark.mpi
@pytest.mark.parametrize(("kind", "dtype"), every_other(KINDS, ["float32", "float64"]))
def test_every_tensor_equals_the_reference_and_bytes_are_as_predicted(mesh, comm, kind, dtype):
    whole, dy = run(mesh, comm, kind, dtype)
    checks = tensors(comm, kind, whole, dy)
    count, _, shared, routing = KINDS[kind]
    names = {"x", "Wr", "W1", "W2"} | ({"shared.W1", "shared.W2"} if shared else set())
    names |= {"br"} if "correction" in routing else set()
    assert checks.keys() == {"y"} | {f"d{n}" for n in names} | {f"d{n}, all" for n in names}
    assert whole["W1"].shape == (count, D, 2, F)
    assert not [c.worst for c in checks.values() if not c.ok]
    if dtype == "float64":
        assert max(c.relative_error for c in checks.values()) < 1e-12


@pytest.mark.mpi
def test_a_language_model_with_a_dense_and_a_routed_block(mesh, comm):
    experts = Experts(count=4, active=2, d_ff=9, d_shared=5, first=1, scoring="sigmoid", scale=1.3, correction=True)
    config = replace(llama_like(19, 24, 2, 6, 3, 10, 16), experts=experts)
    model = build(config, mesh.tp, drawn(1, "float64", 0.2))
    lengths = [1, 3, 4]
    ids, targets = np.random.default_rng(3).integers(0, 19, (2, sum(lengths)))
    batch = model.batch(lengths)
    with counted() as made, mesh.phase("forward"):
        logits, saved = model.forward(ids, batch)
        nll, saved_loss = model.loss.forward(logits, targets)
    with counted() as more, mesh.phase("backward"):
        model.backward(model.loss.backward(np.full(len(ids), 1 / len(ids)), saved_loss), saved)
        owed = Owed(mesh, model.parameters)
        owed.sum()
    assert made + more == products(model.work(batch))
    assert nbytes(saved[1:]) + nbytes(saved_loss[:2]) == model.saved_bytes(model.batch(lengths))
    assert agrees(merged(Control(comm).everyone(mesh.ledger.report([*model.traffic(model.batch(lengths)), *owed.traffic()]))))
    br = model.blocks[1].mlp.buffers[0].data
    whole = {p.name: p.whole(mesh, p.data) for p in model.parameters} | {"y": np.array(nll.mean())}
    assert {"blocks.0.W1", "blocks.1.Wr", "blocks.1.W1", "blocks.1.shared.W2"} <= whole.keys()
    whole |= {f"d{p.name}": p.whole(mesh, p.grad) for p in model.parameters}

    def loss(W):
        o = Options(lengths, True, {"pairing": "half"})
        z = reference.logits(W | {"blocks.1.br": br}, ids, o, config.eps, Routing(2, "sigmoid", scale=1.3))
        return reference.cross_entropy(z, targets)

    of = ([loss], lambda W, name, index: loss(W), whole, np.array(1.0), lambda name: 2)
    checks = shared(comm, lambda share: compared(*of, share))
    assert not [c.worst for c in checks.values() if not c.ok]


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["mixtral", "deepseek-v3"])
def test_without_backward_the_same_comes_out(mesh, kind):
    moe = moe_of(mesh.tp, kind)
    x = np.random.default_rng(2).standard_normal((T, D))
    with mesh.phase("forward"):
        y = moe.apply(x)
    assert agrees(mesh.ledger.report(t for t in moe.traffic(T) if t.phase == "forward"))
    np.testing.assert_allclose(y, moe.forward(x)[0], rtol=1e-13, atol=1e-13)


@pytest.mark.mpi
def test_backward_adds_into_gradients(mesh):
    moe = moe_of(mesh.tp, "deepseek-v3")
    x, dy = np.random.default_rng(2).standard_normal((2, T, D))
    _, saved = moe.forward(x)
    moe.backward(dy, saved)
    once = [p.grad.copy() for p in moe.parameters]
    moe.backward(dy, saved)
    for p, first in zip(moe.parameters, once, strict=True):
        np.testing.assert_array_equal(p.grad, 2 * first)


@pytest.mark.mpi
def test_an_expert_without_tokens_has_a_gradient_of_zero_also_in_used_memory(mesh):
    moe = moe_of(mesh.tp, "mixtral")
    for x in np.random.default_rng(0).standard_normal((2, 1, D)):
        y, saved = moe.forward(x)
        dx = moe.backward(np.ones_like(x), saved)
        chosen = saved[2][1][0]
        for p in moe.parameters[1:]:
            assert [e for e in range(5) if p.grad[e].any()] == sorted(chosen)
            p.grad[:] = np.nan
            p.zero_grad()
        assert np.isfinite(y).all()
        assert np.isfinite(dx).all()


@pytest.mark.mpi
def test_no_tokens_at_all(mesh):
    moe = moe_of(mesh.tp, "deepseek-v3")
    y, saved = moe.forward(np.empty((0, D)))
    assert moe.backward(y, saved).shape == y.shape == (0, D)
    assert not any(p.grad.any() for p in moe.parameters)


@pytest.mark.mpi
def test_more_ranks_than_hidden_units_is_refused(mesh):
    if mesh.tp.size > 1:
        with pytest.raises(ValueError, match=f"cannot cut 1 hidden units of an expert \\(d_ff\\) over {mesh.tp.size} ranks"):
            MoE(mesh.tp, drawn(0, "float32"), D, 1, 4, 2)
        with pytest.raises(ValueError, match=f"cannot cut 1 hidden units of the shared expert .* over {mesh.tp.size} ranks"):
            MoE(mesh.tp, drawn(0, "float32"), D, F, 4, 2, d_shared=1)


# The choice alone: no ranks needed.


def chosen(scores, active, **options):
    r = Router(given({"Wr": np.eye(len(scores))}), len(scores), len(scores), active, **options)
    return r.forward(np.array([scores], "float64"))[0][0].tolist()


def test_of_equals_the_lower_index():
    assert chosen([0, 1, 1, 1, 0, 1], 3) == [1, 2, 3]
    assert chosen([0, 0, 0, 0, 0, 0], 2, groups=3, active_groups=1) == [0, 1]


def test_a_group_is_worth_its_best_or_its_two_best():
    scores = [9, -9, 5, 5, 4, 4]
    limits = {"groups": 3, "active_groups": 1, "scoring": "sigmoid"}
    assert chosen(scores, 1, **limits) == [0]
    # sigmoid(9) + sigmoid(-9) < 2 sigmoid(5): the best expert is in a group that is dropped.
    assert chosen(scores, 2, group_top=2, **limits) == [2, 3]


def test_a_dropped_group_is_not_chosen_even_where_the_correction_makes_all_others_worth_less_than_nothing():
    """DeepSeek-V3's first code put 0 for the dropped, which then beat negative worths (its later code: -inf)."""
    weights = given({"Wr": np.eye(4), "br": np.array([-2.0, -2.0, -3.0, -3.0])})
    r = Router(weights, 4, 4, 2, "sigmoid", correction=True, groups=2, active_groups=1, group_top=2)
    c, g, _ = r.forward(np.zeros((1, 4)))
    assert c.tolist() == [[0, 1]]
    np.testing.assert_allclose(g, [[0.5, 0.5]])


def test_tiny_scores_keep_their_proportions_in_float32():
    r = Router(given({"Wr": np.eye(3, dtype="float32")}), 3, 3, 2, "sigmoid")
    _, g, _ = r.forward(np.array([[-30, -31, -32], [-80, -1000, -1000], [1000, -1000, -1000]], "float32"))
    assert g.dtype == np.float32
    np.testing.assert_allclose(g[0], [1 / (1 + np.exp(-1)), 1 / (1 + np.e)], rtol=1e-6)
    assert np.isfinite(g).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "tanh"}, "unknown scoring 'tanh': use 'softmax' or 'sigmoid'"),
        ({"groups": 4}, "cannot put 6 experts into 4 groups: use a divisor of 6"),
        ({"groups": 3, "active_groups": 4}, "cannot choose 4 of 3 groups: use 1 to 3"),
        ({"groups": 3, "group_top": 3}, "cannot add the best 3 of a group's 2: use 1 to 2"),
        ({"groups": 3, "active": 3}, r"cannot choose 3 of 2 experts \(1 of 3 groups\): use 1 to 2"),
        ({"active": 7}, r"cannot choose 7 of 6 experts \(1 of 1 groups\): use 1 to 6"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Router(drawn(0, "float32"), D, 6, options.pop("active", 2), **options)


# Sabotages.


def router_gradient_left_out(moe):
    moe.router.Wr_DX.add_grad(np.zeros_like(moe.router.Wr_DX.data))
    moe.router.backward = lambda dg, x, *_: np.zeros_like(x)


def router_gradient_not_summed(moe):
    whole, moe.tp = moe.tp.all_reduce, Deaf(moe.tp)
    moe.tp.sum_rows = lambda x, rows: np.concatenate([whole(x)[:, :D], x[:, D:]], axis=1)


def sum_taken_for_constant(moe):
    """The gradient as if the chosen scores were divided by a number."""
    r = moe.router

    def spoilt(dg, x, saved, *_, backward=r.backward):
        s, c, _ = saved
        r.normed = False
        return backward(dg / np.take_along_axis(s, c, axis=1).sum(axis=1, keepdims=True), x, saved)

    r.backward = spoilt


def weights_not_normed(moe):
    moe.router.normed = False


def correction_weighs_too(moe):
    scores, br = moe.router._scores, moe.router.br_X.data
    moe.router._scores = lambda z: scores(z) + br
    moe.router.br_X = None


def correction_forgotten(moe):
    moe.router.br_X = None


def groups_not_limited(moe):
    moe.router.active_groups = moe.router.groups


def group_worth_of_one(moe):
    moe.router.group_top = 1


def shared_added_on_every_rank(moe):
    forward = moe.shared.forward

    def whole(x):
        y, saved = forward(x)
        return moe.tp.size * y, saved

    moe.shared.forward = whole


SABOTAGES = {
    router_gradient_left_out: {"dWr, all", "dx, all"},
    router_gradient_not_summed: {"dWr, all", "dx, all"},
    sum_taken_for_constant: {"dWr, all", "dx, all"},
    weights_not_normed: {"y"},
    correction_weighs_too: {"y"},
    correction_forgotten: {"y"},
    groups_not_limited: {"y"},
    group_worth_of_one: {"y"},
    shared_added_on_every_rank: {"y"},
}


@pytest.mark.mpi
@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda f: f.__name__)
def test_sabotage_is_seen(mesh, comm, sabotage):
    whole, dy = run(mesh, comm, "deepseek-v3", sabotage=sabotage)
    checks = tensors(comm, "deepseek-v3", whole, dy)
    wrong = {n for n, c in checks.items() if not c.ok}
    if sabotage in (router_gradient_not_summed, shared_added_on_every_rank) and mesh.tp.size == 1:
        assert not wrong
    else:
        assert SABOTAGES[sabotage] <= wrong
