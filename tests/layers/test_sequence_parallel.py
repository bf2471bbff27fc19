"""Sequence parallelism: rows cut over tp between the products give what whole rows give, and the reference; with less kept."""

from dataclasses import replace

import numpy as np
import pytest

from launch.measure import step
from layers.batch import Batch
from layers.block import Block
from layers.mlp import MLP
from layers.rope import Rope
from layers.saved import nbytes
from layers.work import products
from models.build import build
from models.config import Experts, Latent, gpt2_like, llama_like
from parallel.control import Control
from parallel.ledger import agrees, wire_bytes
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.parameter import drawn
from parallel.products import counted
from parallel.rows import cut_rows
from tests.grids import one_in

pytestmark = pytest.mark.mpi

V = 23
LATENT = replace(
    llama_like(V, 24, 2, 6, 6, 14, 64), latent=Latent(6, 5, 4, 3, 7), rope=Rope(4, pairing="interleaved"), d_head=9
)
PLAIN = replace(LATENT, latent=Latent(6, 5, 4, 3, 0))
NORMED = replace(llama_like(V, 24, 2, 6, 3, 14, 64, tied=True), qk_norm=True)
EXPERTS = replace(
    llama_like(V, 24, 2, 4, 2, 14, 64), experts=Experts(5, 2, 9, d_shared=8, scoring="sigmoid", scale=1.3, first=1)
)
CONFIGS = {
    "gpt2": gpt2_like(V, 24, 2, 4, 10, 64),
    "gpt2 untied": gpt2_like(V, 24, 1, 4, 10, 64, tied=False),
    "llama normed": NORMED,
    "latent": LATENT,
    "latent, queries from x": PLAIN,
    "experts": EXPERTS,
}
# One token, fewer than ranks, what nothing divides, and what all divide.
TOKENS = (1, 3, 7, 48)


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


def stepped(mesh, config, tokens, cuts_rows, recompute=False):
    """Loss, whole gradients by name; what is kept, as counted and as predicted; whether messages and products are
    as predicted."""
    model = build(config, mesh.tp, drawn(1, "float64", 0.2), recompute, cuts_rows=cuts_rows)
    ids, targets = np.random.default_rng(tokens).integers(0, V, (2, tokens))
    lengths = [tokens] if tokens < 5 else [2, tokens - 5, 3]
    mesh.ledger.rows.clear()
    batch = model.batch(lengths)
    with counted() as made, mesh.phase("forward"):
        logits, saved = model.forward(ids, batch)
        nll, saved_loss = model.loss.forward(logits, targets)
    with counted() as more, mesh.phase("backward"):
        model.backward(model.loss.backward(np.full(tokens, 1 / tokens), saved_loss), saved)
        owed = Owed(mesh, model.parameters)
        owed.sum()
    kept = nbytes(saved[1:]) + nbytes(saved_loss[:2])
    sent = agrees(mesh.ledger.report([*model.traffic(model.batch(lengths)), *owed.traffic()]))
    return (
        float(nll.mean()),
        {p.name: p.whole(mesh, p.grad) for p in model.parameters},
        (kept, model.saved_bytes(batch)),
        sent and made + more == products(model.work(batch)),
    )


@pytest.mark.parametrize(("kind", "tokens"), one_in(3, CONFIGS, TOKENS))
def test_every_gradient_is_that_of_whole_rows(mesh, kind, tokens):
    if CONFIGS[kind].heads < mesh.tp.size:
        pytest.skip(f"this model has {CONFIGS[kind].heads} heads")
    loss, gradients, (kept, predicted), sent = stepped(mesh, CONFIGS[kind], tokens, True)
    loss_whole, whole, (kept_whole, _), _ = stepped(mesh, CONFIGS[kind], tokens, False)
    assert loss == pytest.approx(loss_whole, abs=1e-12)
    for name, a in whole.items():
        np.testing.assert_allclose(gradients[name], a, rtol=0, atol=1e-12 * max(1, np.abs(a).max()), err_msg=name)
    assert kept == predicted
    # The rank that has the only token keeps what it did.
    own = cut_rows(tokens, mesh.tp.size).size(mesh.tp.rank)
    assert (kept < kept_whole) == (own < tokens)
    assert sent


@pytest.mark.parametrize("kind", ["llama normed", "experts"])
def test_recomputed_blocks_keep_their_own_rows(mesh, kind):
    _, gradients, (kept, predicted), sent = stepped(mesh, CONFIGS[kind], 7, True, recompute=True)
    _, whole, _, _ = stepped(mesh, CONFIGS[kind], 7, True)
    for name, a in whole.items():
        np.testing.assert_array_equal(gradients[name], a, err_msg=name)
    assert kept == predicted
    assert sent


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_mlp_alone(mesh, comm, activation, tokens):
    x, dy = np.random.default_rng(0).standard_normal((2, tokens, 6))
    rows = cut_rows(tokens, comm.size)
    made = [MLP(mesh.tp, drawn(1, "float64", 0.1), 6, 13, activation, cuts_rows=cut) for cut in (True, False)]
    cut = step.run(made[0], x, dy, mesh, Control(comm), Batch([len(x)], rows=rows))
    mesh.ledger.rows.clear()
    whole = step.run(made[1], x, dy, mesh, Control(comm))
    for name, a in whole.whole.items():
        np.testing.assert_allclose(cut.whole[name], a, rtol=0, atol=1e-12, err_msg=name)
    assert agrees(cut.communication)
    assert not cut.wrong
    assert cut.memory["saved_bytes_per_rank"] == cut.memory["predicted_saved_bytes_per_rank"]


@pytest.mark.mpi(min_size=4, max_size=4)
def test_bytes_of_the_main_job_by_default(mesh, comm):
    """T 48, D 64, F 1024, float32, as the paper counts them."""
    mlp, rows = MLP(mesh.tp, drawn(0, "float32", 0.1), 64, 1024, cuts_rows=True), cut_rows(48, 4)
    x, dy = np.random.default_rng(0).standard_normal((2, 48, 64)).astype("float32")
    ran = step.run(mlp, x, dy, mesh, Control(comm), Batch([len(x)], rows=rows))
    wire = {}
    for r in ran.communication:
        kind = "owed" if r["verb"] == "all_reduce" else r["phase"]
        wire[kind] = wire.get(kind, 0) + (r["message_bytes"] if kind == "owed" else r["wire_bytes"])
    assert wire == {"forward": 18_432, "backward": 27_648, "owed": 256}
    assert ran.memory["saved_bytes_per_rank"] == [101_376] * 4
    assert mlp.saved_bytes(48) == 110_592
    plain = sum(wire_bytes(t.verb, t.message_bytes, 4) for t in mlp.traffic(48))
    assert plain == 2 * 18_432


def test_a_block_keeps_its_own_rows_of_the_residual_stream(mesh):
    """T[nE + h + hE + 3f] b, and [4D + 2] t b: section 4 of the paper, in this project's terms."""
    if mesh.tp.size > 4:
        pytest.skip("this block has 4 heads")
    model = build(llama_like(V, 24, 1, 4, 4, 14, 64), mesh.tp, drawn(1, "float64", 0.1), cuts_rows=True)
    block: Block = model.blocks[0]
    T, D, b = 7, 24, 8
    t, h, E, f = cut_rows(T, mesh.tp.size).size(mesh.tp.rank), block.attention.h, block.attention.E, block.mlp.d_ff_local
    n = h + 2 * block.attention.k
    assert block.saved_bytes(model.batch([T])) == (4 * D + 2) * t * b + T * (n * E + h + h * E + 3 * f) * b


# Sabotages: each turns a check of its own red.


def owes_nothing(names):
    def spoilt(model):
        for p in model.parameters:
            if any(p.name.endswith(name) for name in names):
                p.owed = ()

    return spoilt


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama normed", ("wn1", "wn2", "wnf")),
        ("gpt2", ("b2", "bo")),
        ("experts", ("Wr",)),
        ("gpt2", ("Wpe",)),
        ("latent", ("Wdkv",)),
    ],
)
def test_a_sum_that_is_owed_and_left_out_is_seen(mesh, monkeypatch, kind, names):
    _, whole, _, _ = stepped(mesh, CONFIGS[kind], 7, False)
    plain = build

    def spoilt(*args, **options):
        model = plain(*args, **options)
        owes_nothing(names)(model)
        return model

    monkeypatch.setitem(stepped.__globals__, "build", spoilt)
    _, gradients, _, _ = stepped(mesh, CONFIGS[kind], 7, True)
    wrong = {n for n, a in whole.items() if np.abs(gradients[n] - a).max() > 1e-12 * max(1, np.abs(a).max())}
    assert wrong
    assert all(n.endswith(names) for n in wrong)


@pytest.mark.mpi(min_size=2)
def test_a_bias_before_the_sum_is_seen(mesh, monkeypatch):
    from layers.linear import RowParallelLinear

    _, whole, _, _ = stepped(mesh, CONFIGS["gpt2"], 7, False)

    def early(self, x_Ti, rows=None):
        x_Ti = x_Ti.reshape(len(x_Ti), -1)
        part = x_Ti @ self.W_iO.data.reshape(-1, self.d_out)
        return self.tp.sum_rows(part if self.b_O is None else part + self.b_O.data, rows), (x_Ti, rows)

    monkeypatch.setattr(RowParallelLinear, "forward", early)
    _, gradients, _, _ = stepped(mesh, CONFIGS["gpt2"], 7, True)
    assert max(np.abs(gradients[n] - a).max() for n, a in whole.items()) > 1e-6


@pytest.mark.mpi(min_size=2)
def test_a_gathered_input_that_is_kept_is_seen_by_memory(mesh, monkeypatch):
    from layers.linear import ColumnParallelLinear

    forward = ColumnParallelLinear.forward

    def keeping(self, x_tI, rows=None):
        z_To, saved = forward(self, x_tI, rows)
        return z_To, (*saved, self.tp.gather_rows(x_tI, rows))

    monkeypatch.setattr(ColumnParallelLinear, "forward", keeping)
    backward = ColumnParallelLinear.backward
    monkeypatch.setattr(ColumnParallelLinear, "backward", lambda self, dz, saved, later: backward(self, dz, saved[:2], later))
    _, _, (kept, predicted), sent = stepped(mesh, CONFIGS["gpt2 untied"], 7, True)
    assert kept > predicted
    assert not sent


@pytest.mark.mpi(min_size=2)
def test_a_whole_sum_that_is_then_sliced_is_seen_by_bytes(mesh, monkeypatch):
    axis = type(mesh.tp)
    monkeypatch.setattr(axis, "sum_rows", lambda self, x, rows: rows.take(self.all_reduce(x), 0, self.rank).copy())
    _, _, _, sent = stepped(mesh, CONFIGS["gpt2"], 7, True)
    assert not sent


@pytest.mark.mpi(min_size=2)
def test_a_seam_that_is_off_by_one_is_seen(mesh, monkeypatch):
    """Learned positions of the rows after one's own."""
    import layers.stage as module

    right = module.own
    monkeypatch.setattr(module, "own", lambda a, rows, rank: right(np.roll(a, -1), rows, rank) if rows is not None else a)
    loss, *_ = stepped(mesh, CONFIGS["gpt2"], 7, True)
    loss_whole, *_ = stepped(mesh, CONFIGS["gpt2"], 7, False)
    assert abs(loss - loss_whole) > 1e-6
