"""Training on any dp x tp mesh: the same losses and weights, whatever is split, recomputed or accumulated."""

import numpy as np
import pytest
from mpi4py import MPI

from launch import start
from layers.optimizer import warmup_cosine
from models.build import build
from models.config import gpt2_like, llama_like
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.parameter import drawn, given
from tests.apart import on_first
from tests.grids import every_other
from tests.harness import ROOT
from tests.training.runs import FEW, STEPS, WARMUP, with_steps
from training.text import MicroBatch, Order, dealt
from training.trainer import Recipe, Trainer

pytestmark = pytest.mark.mpi

V, S, SEQUENCES = 29, 10, 13
# Of 3 key/value heads one is held by both of 2 tp ranks, and two by two of 4.
CONFIGS = {"gpt2": gpt2_like(V, 24, 2, 4, 10, S), "llama": llama_like(V, 24, 2, 6, 3, 14, S)}
MESHES = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 3: [(3, 1), (1, 3)], 4: [(2, 2), (4, 1), (1, 4)]}


def trained(mesh, kind, micro_batches=1, recompute=False, recipe=None, steps=STEPS, cuts_rows=False):
    """Losses, and the weights after the last step by name, whole; the trainer."""
    model = build(CONFIGS[kind], mesh.tp, drawn(1, "float64", 0.1), recompute, cuts_rows)
    trainer = Trainer({0: model}, mesh, recipe or Recipe(clip=0.8))
    data = np.random.default_rng(5).integers(0, V, 60 * S + 1)
    order = Order(60, 7)
    losses = []
    for n in range(steps):
        parts = dealt(data, order.next(SEQUENCES), S, mesh.dp.size, mesh.dp.rank, micro_batches)
        losses.append(trainer.step(parts, SEQUENCES * S, warmup_cosine(n, STEPS, 1e-2, WARMUP)))
    return np.array(losses), trainer.wholes("data"), trainer


@pytest.fixture(scope="module")
def alone():
    """The same on one process, no options, by how many steps."""
    mesh = Mesh(MPI.COMM_SELF, dp=1, tp=1)
    return on_first(
        start.begin(), lambda: {kind: {n: trained(mesh, kind, steps=n)[:2] for n in (FEW, STEPS)} for kind in CONFIGS}
    )


# Every pair of options, off and on.
OPTIONS = [(False, False, 1), (True, False, 3), (False, True, 3), (True, True, 1)]


@pytest.mark.limit(120)
@pytest.mark.parametrize(
    ("kind", "options", "axes", "steps"),
    with_steps(every_other(CONFIGS, OPTIONS, MESHES[start.begin().size])),
)
def test_all_steps_are_the_same_on_every_mesh(comm, alone, kind, options, axes, steps):
    losses, weights = alone[kind][steps]
    zero, recompute, micro_batches = options
    with Mesh(comm, check=True, dp=axes[0], tp=axes[1]) as mesh:
        # 13 sequences over 4 ranks: unequal parts, in up to 3 micro-batches.
        recipe = Recipe(clip=0.8, zero=zero, overlap=zero != recompute, bucket_bytes=5000)
        got, after, _ = trained(mesh, kind, micro_batches, recompute, recipe, steps)
        np.testing.assert_allclose(got, losses, rtol=0, atol=1e-10)
        for name, a in weights.items():
            np.testing.assert_allclose(after[name], a, rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.mpi(min_size=2)
@pytest.mark.limit(120)
@pytest.mark.parametrize(
    ("kind", "options", "axes", "steps"),
    with_steps(every_other(CONFIGS, OPTIONS[1:3], MESHES[start.begin().size])),
)
def test_all_steps_with_tokens_cut_over_tp_are_the_same(comm, alone, kind, options, axes, steps):
    losses, weights = alone[kind][steps]
    zero, recompute, micro_batches = options
    with Mesh(comm, check=True, dp=axes[0], tp=axes[1]) as mesh:
        recipe = Recipe(clip=0.8, zero=zero, bucket_bytes=5000)
        got, after, trainer = trained(mesh, kind, micro_batches, recompute, recipe, steps, cuts_rows=True)
        np.testing.assert_allclose(got, losses, rtol=0, atol=1e-10)
        for name, a in weights.items():
            np.testing.assert_allclose(after[name], a, rtol=0, atol=1e-10, err_msg=name)
        every = {p.name: p for p in trainer.parameters}
        # Norms are replicas: the sum that they are owed gives all ranks the same bits.
        for name in ("blocks.0.wn1", "wnf"):
            assert len({a.tobytes() for a in comm.allgather(every[name].data)}) == 1


def test_the_norm_of_the_gradient_does_not_depend_on_how_tokens_are_cut(comm):
    for dp, tp in MESHES[comm.size]:
        with Mesh(comm, check=True, dp=dp, tp=tp) as mesh:
            norms = []
            for cuts_rows in (False, True):
                trainer = Trainer(
                    {0: build(CONFIGS["llama"], mesh.tp, drawn(1, "float64", 0.1), cuts_rows=cuts_rows)}, mesh, Recipe()
                )
                data = np.random.default_rng(5).integers(0, V, 60 * S + 1)
                trainer.gradients(dealt(data, np.arange(8), S, dp, mesh.dp.rank, 1), 8 * S)
                norms.append(trainer.update(0.0))
            assert norms[1] == pytest.approx(norms[0], rel=1e-14)


def test_zero_keeps_a_share_of_the_state_and_recomputation_less_for_backward(comm):
    with Mesh(comm, check=True, dp=comm.size, tp=1) as mesh:
        held = {zero: trained(mesh, "llama", recipe=Recipe(zero=zero), steps=1)[2] for zero in (False, True)}
        whole, part = (t.optimizer.m.nbytes for t in held.values())
        assert abs(part - whole / comm.size) <= 8 * len(held[True].holder.each[0].buckets)
        kept = [trained(mesh, "llama", recompute=r, steps=1)[2].kept.nbytes for r in (False, True)]
        assert kept[1] < kept[0]


def test_weights_are_bitwise_the_same_on_every_dp_rank(comm):
    with Mesh(comm, check=True, dp=comm.size, tp=1) as mesh:
        _, weights, _ = trained(mesh, "gpt2", steps=3)
        for name, a in weights.items():
            for other in comm.allgather(a.tobytes()):
                assert other == a.tobytes(), name


def test_clipping_is_by_the_norm_of_the_whole_gradient(comm):
    for dp, tp in MESHES[comm.size]:
        with Mesh(comm, check=True, dp=dp, tp=tp) as mesh:
            model = build(CONFIGS["llama"], mesh.tp, drawn(1, "float64", 0.1))
            trainer = Trainer({0: model}, mesh, Recipe(zero=True))
            data = np.random.default_rng(5).integers(0, V, 60 * S + 1)
            trainer.gradients(dealt(data, np.arange(8), S, dp, mesh.dp.rank, 1), 8 * S)
            norm = trainer.update(0.0)
            lone = Mesh(MPI.COMM_SELF, dp=1, tp=1)
            other = Trainer({0: build(CONFIGS["llama"], lone.tp, drawn(1, "float64", 0.1))}, lone, Recipe())
            other.gradients(dealt(data, np.arange(8), S, 1, 0, 1), 8 * S)
            assert norm == pytest.approx(np.linalg.norm(other.holder.flat.grad), rel=1e-12)


def test_an_order_goes_on_where_it_was_left():
    import json

    order = Order(10, 3)
    order.next(13)
    state = json.loads(json.dumps(order.state()))
    other = Order(10, 99)
    other.resume(state)
    for _ in range(4):
        np.testing.assert_array_equal(other.next(7), order.next(7))
    taken = np.concatenate([Order(10, 3).next(4), np.zeros(0, int)])
    assert len(set(taken)) == 4
    assert sorted(Order(10, 3).next(20)) == sorted([*range(10)] * 2)


# Sabotages.


@pytest.mark.mpi(min_size=2)
def test_a_sum_that_is_owed_and_left_out_is_seen(comm, alone, monkeypatch):
    """Key/value heads that several ranks hold, each with the gradient by its own queries alone."""
    monkeypatch.setattr(Owed, "sum", lambda self: None)
    with Mesh(comm, dp=1, tp=comm.size) as mesh:
        losses, *_ = trained(mesh, "llama", steps=3)
    # On 3 ranks two heads each read one key/value head alone.
    assert (np.abs(losses - alone["llama"][STEPS][0][:3]).max() > 1e-6) == (comm.size != 3)


def test_an_average_by_ranks_instead_of_tokens_is_seen(comm, alone):
    """Each rank's mean over its own tokens, averaged over ranks: right only where all have equally many."""
    with Mesh(comm, check=True, dp=comm.size, tp=1) as mesh:
        model = build(CONFIGS["llama"], mesh.tp, drawn(1, "float64", 0.1))
        trainer = Trainer({0: model}, mesh, Recipe(clip=0.8))
        data = np.random.default_rng(5).integers(0, V, 60 * S + 1)
        parts = dealt(data, Order(60, 7).next(SEQUENCES), S, comm.size, mesh.dp.rank, 1)
        loss = trainer.gradients(parts, len(parts[0].ids) * comm.size)
        assert (abs(loss - alone["llama"][STEPS][0][0]) < 1e-10) == (SEQUENCES % comm.size == 0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_pytorch_agrees(comm, kind):
    """Logits, loss, every gradient and the weights after three steps of AdamW with clipping, by PyTorch."""
    with np.load(ROOT / "tests/oracles/models.npz") as stored:
        of = {n.removeprefix(f"{kind}."): a for n, a in stored.items() if n.startswith(kind)}
        lengths = stored["lengths"].tolist()
    config = oracle_config(kind)
    if config.heads < comm.size:
        pytest.skip(f"this model has {config.heads} heads")
    with Mesh(comm, check=True, dp=1, tp=comm.size) as mesh:
        model = build(config, mesh.tp, given(of))
        trainer = Trainer({0: model}, mesh, Recipe(clip=0.5))
        part = MicroBatch(of["ids"], of["targets"], lengths)
        logits, _ = model.forward(part.ids, model.batch(lengths))
        logits = mesh.tp.all_gather(logits, 1, model.embedding.cut)
        np.testing.assert_allclose(logits, of["logits"], rtol=0, atol=1e-12 * np.abs(of["logits"]).max())
        for n, loss in enumerate(of["losses"]):
            assert trainer.gradients([part], len(part.ids)) == pytest.approx(float(loss), rel=1e-10)
            if n == 0:
                for p in model.parameters:
                    got, want = p.whole(mesh, p.grad), of[f"d{p.name}"]
                    # Keys' biases move nothing: their gradient is what rounding leaves, in both.
                    atol = max(1e-11 * np.abs(want).max(), 1e-15)
                    np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=p.name)
            norm = trainer.update(0.01)
            if n == 0:
                assert norm == pytest.approx(float(of["norm"]), rel=1e-11)
        for p in model.parameters:
            got = p.whole(mesh, p.data)
            np.testing.assert_allclose(got, of[f"after.{p.name}"], rtol=0, atol=1e-9, err_msg=p.name)


def oracle_config(kind):
    from dataclasses import replace

    from layers.rope import Llama3, Rope

    if kind == "gpt2":
        return gpt2_like(23, 12, 2, 3, 10, 16)
    rope = Rope(8, 500.0, "half", Llama3(8.0, 1.0, 4.0, 64))
    return replace(llama_like(19, 12, 2, 6, 3, 10, 16), d_head=8, rope=rope, eps=1e-6)
