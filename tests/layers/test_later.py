"""Backward in two halves: the same bits, whatever is put off, and exactly the memory that is predicted."""

from collections import Counter

import numpy as np
import pytest

from layers.work import AGAIN, WEIGHTS, products
from models.build import build
from parallel.later import Later
from parallel.parameter import drawn
from parallel.products import counted
from tests.grids import every_other
from tests.layers.test_sequence_parallel import CONFIGS, mesh  # noqa: F401

pytestmark = pytest.mark.mpi
LENGTHS = [2, 5, 3]
PHASES = ("forward", "backward", WEIGHTS, AGAIN)


class Frozen(Later):
    """Nobody may write what was put off."""

    def put(self, add, *arrays):
        for a in arrays:
            a.setflags(write=False)
        super().put(add, *arrays)


def gradients(mesh, kind, cuts_rows, recompute, put_off, later=Frozen):  # noqa: F811
    """Of two micro-batches whose second halves follow one another at the end; and what was put off, counted and predicted."""
    model = build(CONFIGS[kind], mesh.tp, drawn(1, "float64", 0.1), recompute, cuts_rows)
    kept, made = [], Counter()
    for seed in (0, 1):
        ids, targets = np.random.default_rng(seed).integers(0, CONFIGS[kind].vocabulary, (2, sum(LENGTHS)))
        batch = model.batch(LENGTHS)
        with counted() as of_forward:
            logits, saved = model.forward(ids, batch)
        nll, saved_loss = model.loss.forward(logits, targets)
        dlogits = model.loss.backward(np.ones(len(nll)), saved_loss)
        with counted() as of_backward:
            if put_off:
                kept.append(later())
                model.backward(dlogits, saved, later=kept[-1])
            else:
                model.backward(dlogits, saved)
        phases = {phase: products(w for w in model.work(batch) if w.phase == phase) for phase in PHASES}
        assert of_forward == phases["forward"]
        assert of_backward == phases["backward"] + phases[AGAIN] + (Counter() if put_off else phases[WEIGHTS])
        made += phases[WEIGHTS]
    sizes = [(part.nbytes, model.later_bytes(model.batch(LENGTHS))) for part in kept]
    with counted() as of_weights:
        for part in kept:
            part.do()
    assert later is not Frozen or of_weights == (made if put_off else Counter())
    return {p.name: p.grad for p in model.parameters}, sizes


@pytest.mark.parametrize(("kind", "cuts_rows", "recompute"), every_other(CONFIGS, [False, True], [False, True]))
def test_put_off_products_give_the_same_bits(mesh, kind, cuts_rows, recompute):  # noqa: F811
    once, _ = gradients(mesh, kind, cuts_rows, recompute, False)
    halves, sizes = gradients(mesh, kind, cuts_rows, recompute, True)
    assert once.keys() == halves.keys()
    for name, g in once.items():
        np.testing.assert_array_equal(halves[name], g, err_msg=name)
    assert all(counted == predicted > 0 for counted, predicted in sizes)


def test_a_product_that_is_never_made_is_seen(mesh):  # noqa: F811
    once, _ = gradients(mesh, "gpt2", False, False, False)

    class Forgetful(Later):
        def do(self):
            products = [n for n, (_, arrays) in enumerate(self._put) if arrays]
            del self._put[products[-1]]
            super().do()

    halves, _ = gradients(mesh, "gpt2", False, False, True, Forgetful)
    assert any(not np.array_equal(halves[name], g) for name, g in once.items())
