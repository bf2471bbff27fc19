"""Pretrained models with routed experts over ep: what transformers computes, each rank of ep from sequences of its own."""

import numpy as np
import pytest
from mpi4py import MPI

from models.build import build
from models.open import open_model
from parallel.mesh import Mesh
from parallel.owed import Owed
from tests.models.test_models import FAMILIES, NAMES

pytestmark = pytest.mark.mpi

ROUTED = [name for name in NAMES if open_model(FAMILIES / name).config.experts is not None]
MESHES = {4: [(2, 2, False), (2, 2, True)]}.get(MPI.COMM_WORLD.size, [(MPI.COMM_WORLD.size, 1, False)])


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("name", ROUTED)
def test_logits_and_gradients_are_those_of_transformers(comm, name, axes):
    expected, source = np.load(FAMILIES / name / "expected.npz"), open_model(FAMILIES / name)
    ep, tp, cuts_rows = axes
    with Mesh(comm, check=True, ep=ep, tp=tp) as mesh:
        model = build(source.config, mesh.tp, source.weights("float64"), cuts_rows=cuts_rows, ep=mesh.ep)
        # Another order on each rank; each counts for as many as have it.
        ids = np.roll(expected["ids"], mesh.ep.rank, axis=0)
        logits, saved = model.forward(ids.ravel(), model.batch([ids.shape[1]] * len(ids)))
        whole = mesh.tp.all_gather(logits, 1, model.embedding.cut).reshape(*ids.shape, -1)
        np.testing.assert_allclose(np.roll(whole, -mesh.ep.rank, axis=0), expected["logits"], rtol=0, atol=1e-12)
        targets = np.concatenate([ids[:, 1:], np.full((len(ids), 1), -1)], axis=1).ravel()
        _, saved_loss = model.loss.forward(logits, targets)
        model.backward(model.loss.backward(np.full(ids.size, 1 / (targets >= 0).sum() / ep), saved_loss), saved)
        Owed(mesh, model.parameters).sum()
        of = {p.name: p.grad if "ep" in p.layout.cuts else mesh.ep.all_reduce(p.grad) for p in model.parameters}
        gradients = source.exported({p.name: p.whole(mesh, of[p.name]) for p in model.parameters})
        for key, g in gradients.items():
            want = expected[f"grad.{key}"]
            np.testing.assert_allclose(g, want, rtol=0, atol=1e-11 * max(1, abs(want).max()), err_msg=key)
