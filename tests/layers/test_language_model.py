"""A whole language model, GPT-2-like and Llama-like, against the reference; and the sabotages that must turn this red."""

import numpy as np
import pytest

from layers.loss import VocabParallelCrossEntropy
from layers.saved import nbytes
from layers.work import products
from models.build import build
from models.config import gpt2_like, llama_like
from parallel.control import Control
from parallel.holder import Holder
from parallel.ledger import agrees, merged
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.parameter import drawn
from parallel.products import counted
from parallel.shard import even
from reference import transformer as reference
from reference.attention import Options
from reference.layer import compared
from tests.apart import shared
from tests.grids import every_other
from tests.layers.deaf import Deaf

pytestmark = pytest.mark.mpi

LENGTHS = [1, 3, 9]
# Vocabularies that nothing divides.
CONFIGS = {
    "gpt2": gpt2_like(23, 12, 2, 4, 10, 16),
    "gpt2 untied": gpt2_like(23, 12, 1, 6, 10, 9, tied=False),
    "llama": llama_like(19, 24, 2, 6, 3, 10, 16),
    "llama tied": llama_like(19, 24, 1, 4, 2, 10, 16, tied=True),
}


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


def batch(vocabulary, seed=3):
    random = np.random.default_rng(seed)
    return random.integers(0, vocabulary, (2, sum(LENGTHS)))


def whole_of(model, mesh):
    return {p.name: p.whole(mesh, p.data) for p in model.parameters}


class Told(Holder):
    """Keeps what it is told of."""

    def __init__(self):
        self.begun, self.complete = [], []

    def filling(self, parameters):
        self.begun += parameters

    def filled(self, parameters):
        self.complete += parameters


def run(mesh, comm, kind, dtype="float64", recompute=False, sabotage=None, spread=0.2):
    """One step of the mean loss: the loss as y, weights by name, gradients led by d; the model, and the ledger's report."""
    model = build(CONFIGS[kind], mesh.tp, drawn(1, dtype, spread), recompute)
    if sabotage:
        sabotage(model)
    ids, targets = batch(CONFIGS[kind].vocabulary)
    mesh.ledger.rows.clear()
    with counted() as made, mesh.phase("forward"):
        logits, saved = model.forward(ids, model.batch(LENGTHS))
        nll, saved_loss = model.loss.forward(logits, targets)
    with counted() as more, mesh.phase("backward"):
        dnll = np.full(len(ids), 1 / len(ids), dtype)
        holder = Told()
        model.backward(model.loss.backward(dnll, saved_loss), saved, holder)
        owed = Owed(mesh, model.parameters)
        owed.sum()
    assert holder.begun == holder.complete == model.filling_order
    assert sabotage or made + more == products(model.work(model.batch(LENGTHS)))
    assert nbytes(saved[1:]) + nbytes(saved_loss[:2]) == model.saved_bytes(model.batch(LENGTHS))
    report = merged(Control(comm).everyone(mesh.ledger.report([*model.traffic(model.batch(LENGTHS)), *owed.traffic()])))
    whole = whole_of(model, mesh) | {f"d{p.name}": p.whole(mesh, p.grad) for p in model.parameters}
    return whole | {"y": np.array(nll.mean())}, model, report


def against_the_reference(comm, kind, whole, entries=4):
    config = CONFIGS[kind]
    ids, targets = batch(config.vocabulary)
    rope = None if config.rope is None else {"pairing": "half"}

    def loss(W):
        return reference.cross_entropy(reference.logits(W, ids, Options(LENGTHS, True, rope), config.eps), targets)

    of = ([loss], lambda W, name, index: loss(W), whole, np.array(1.0), lambda name: entries)
    return shared(comm, lambda share: compared(*of, share))


@pytest.mark.parametrize(("kind", "dtype"), every_other(CONFIGS, ["float32", "float64"]))
def test_loss_and_all_gradients_are_those_of_the_reference(mesh, comm, kind, dtype):
    whole, _, report = run(mesh, comm, kind, dtype)
    checks = against_the_reference(comm, kind, whole)
    assert len(checks) == 1 + 2 * (len(whole) // 2)
    assert not [c.worst for c in checks.values() if not c.ok]
    if dtype == "float64":
        assert max(c.relative_error for c in checks.values()) < 1e-11
    assert agrees(report)


def test_recomputation_gives_the_same_bits_and_keeps_less(mesh, comm):
    (plain, model, _), (again, less, report) = (run(mesh, comm, "llama", recompute=r) for r in (False, True))
    for name, a in plain.items():
        np.testing.assert_array_equal(again[name], a)
    assert less.saved_bytes(model.batch([13])) < model.saved_bytes(model.batch([13]))
    assert agrees(report)


def test_logits_of_a_huge_size_do_not_overflow(mesh):
    cut = even(7, mesh.tp.size)
    loss = VocabParallelCrossEntropy(mesh.tp, cut)
    logits = np.array([[0, 1e4, 5, 0, 0, 0, 1e4], [-1e4, 0, 0, 0, 0, 0, -5]], "float32")
    nll, _ = loss.forward(cut.take(logits, 1, mesh.tp.rank), np.array([6, 0]))
    np.testing.assert_allclose(nll, [np.log(2), 1e4 + np.log(5 + np.exp(-5))], rtol=1e-6)


def test_a_target_of_minus_one_is_not_counted(mesh):
    cut = even(7, mesh.tp.size)
    loss = VocabParallelCrossEntropy(mesh.tp, cut)
    logits = cut.take(np.random.default_rng(0).standard_normal((3, 7)), 1, mesh.tp.rank)
    nll, saved = loss.forward(logits, np.array([2, -1, 6]))
    assert nll[1] == 0
    assert nll[0] > 0 < nll[2]
    dlogits = loss.backward(np.ones(3), saved)
    assert not dlogits[1].any()
    assert dlogits[0].any()


def test_a_vocabulary_smaller_than_the_ranks_is_refused(mesh):
    if mesh.tp.size > 1:
        with pytest.raises(ValueError, match=f"cannot cut 1 rows of the vocabulary over {mesh.tp.size} ranks: use at most 1"):
            build(llama_like(1, 24, 1, 4, 2, 10, 16), mesh.tp, drawn(0, "float32"))


# Sabotages.


def tied_gradient_from_one_end(model):
    model.head.backward = lambda dlogits, h, later: model.head.tp.all_reduce(dlogits @ model.head.table_vD.data)


def softmax_over_this_ranks_columns(model):
    model.loss.tp = Deaf(model.loss.tp)


def rows_off_by_one(model):
    forward = model.embedding.forward
    model.embedding.forward = lambda ids, rows: forward((ids + 1) % model.embedding.cut.length, rows)


@pytest.mark.parametrize(
    ("sabotage", "kind", "red"),
    [
        (tied_gradient_from_one_end, "llama tied", {"dWte, all"}),
        (softmax_over_this_ranks_columns, "llama", {"y"}),
        (rows_off_by_one, "gpt2", {"y", "dWte, all"}),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_sabotage_is_seen(mesh, comm, sabotage, kind, red):
    whole, _, _ = run(mesh, comm, kind, sabotage=sabotage)
    checks = against_the_reference(comm, kind, whole)
    wrong = {n for n, c in checks.items() if not c.ok}
    if sabotage is softmax_over_this_ranks_columns and mesh.tp.size == 1:
        assert not wrong
    else:
        assert red <= wrong
