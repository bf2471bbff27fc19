"""Training with experts over ep, else a data axis: losses, norms, weights as on one process, checkpoints for any mesh."""

from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI

from launch import start
from layers.context import KINDS
from models.build import Parts
from models.config import Experts, llama_like
from models.stage import dealt, stages
from parallel import schedules
from parallel.checkpoint import save
from parallel.control import Control
from parallel.data import Groups
from parallel.holder import Over
from parallel.ledger import agrees, merged
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.replicas import Replicas
from tests.apart import on_first
from tests.grids import FULL
from tests.training.runs import FEW, STEPS, Run, loaded, with_steps
from training import text
from training.trainer import Recipe, Trainer

pytestmark = pytest.mark.mpi(min_size=2)

V, S, SEQUENCES, LAYERS = 29, 6, 9, 2
RUN = Run(V, S, SEQUENCES)
# 5 experts over 2, 3 and 4 ranks; the first block is dense.
EXPERTS = Experts(5, 2, 7, d_shared=5, scoring="sigmoid", scale=1.3, first=1, correction=True)
CONFIG = llama_like(V, 24, LAYERS, 4, 2, 14, S)
# Axes, the schedule, sequence parallelism, recomputation, ZeRO.
CASES = {
    2: [({"ep": 2}, "1f1b", False, True, False), ({"ep": 2}, "1f1b", False, False, True)],
    3: [({"ep": 3}, "1f1b", False, False, True)],
    4: [
        ({"ep": 4}, "1f1b", False, False, False),
        ({"dp": 2, "ep": 2}, "1f1b", False, True, True),
        ({"ep": 2, "tp": 2}, "1f1b", True, False, True),
        ({"ep": 2, "cp": 2}, "1f1b", False, False, True),
        ({"pp": 2, "ep": 2}, "zb-h1", False, False, True),
    ],
}


def made(mesh, schedule="1f1b", cuts_rows=False, recompute=False, zero=False, micro_batches=1):
    plan = schedules.plan(schedule, mesh.pp.size, micro_batches)
    parts = Parts(replace(CONFIG, experts=EXPERTS), mesh.tp, recompute, cuts_rows, KINDS["ring"](mesh.cp), mesh.ep)
    own = stages(parts, drawn(1, "float64", 0.1), dealt(LAYERS, plan.stages), [*plan.rank_of.values()], mesh.pp.rank)
    return Trainer(own, mesh, Recipe(clip=0.8, zero=zero, bucket_bytes=20_000, schedule=plan, alpha=0.05, gamma=0.01))


@pytest.fixture(scope="module")
def alone():
    mesh = Mesh(MPI.COMM_SELF, dp=1)
    return on_first(start.begin(), lambda: RUN.truth(mesh, made(mesh)))


@pytest.mark.limit(120)
@pytest.mark.parametrize("case", with_steps(CASES.get(start.begin().size, CASES[2])), ids=str)
def test_all_steps_are_the_same(comm, alone, case):
    axes, *how, steps = case
    (told, weights), control = alone[steps], Control(comm)
    with Mesh(comm, check=True, **axes) as mesh:
        trainer = made(mesh, *how, micro_batches=2)
        got, after, parts = RUN.trained(mesh, trainer, 2, end=steps)
        np.testing.assert_allclose(got, told, rtol=0, atol=1e-10)
        for name, a in after.items():
            np.testing.assert_allclose(a, weights[name], rtol=0, atol=1e-10, err_msg=name)
        assert {name for names in control.everyone([*after]) for name in names} == weights.keys()
        # Twice, once for the experts; where they are not cut, all of it is one.
        assert len(trainer.holder.each) == 1 + (mesh.ep.size > 1)
        sent = {t.axis for t in trainer.holder.traffic((), {})}
        assert sent <= {mesh.over("dp", "ep", "cp").name, mesh.over("dp", "cp").name}
        Replicas(mesh, control, 1).check(1, trainer.copies)
        # What goes to experts depends on the choice, and was counted as it was made: of all steps no more is kept than of one.
        assert len(trainer.exchanged) <= 2 * len({(t.verb, t.axis, t.phase) for t in trainer.exchanged})
        predicted = [t for t in trainer.traffic(parts) for _ in range(steps)] + trainer.exchanged
        rows = merged(control.everyone(mesh.ledger.report(predicted)))
        assert agrees(r for r in rows if r["phase"] != "compare")
        memory = trainer.memory(parts)
        assert memory["saved"] == memory["predicted_saved"]


@pytest.mark.mpi(min_size=4, max_size=4)
@pytest.mark.limit(120)
def test_a_run_goes_on_from_one_mesh_to_the_next(comm, alone, shared):
    told, weights = alone[STEPS if FULL else FEW]
    control, seen, end = Control(comm), [], 0
    for axes, zero in (({"ep": 4}, True), ({"dp": 2, "ep": 2}, True), ({"ep": 2, "tp": 2}, False)):
        with Mesh(comm, check=True, **axes) as mesh:
            trainer = made(mesh, zero=zero)
            if end:
                loaded(trainer, shared, end, mesh, control)
            begin, end = end, min(end + (7 if FULL else 2), STEPS)
            seen += [*RUN.trained(mesh, trainer, 1, begin, end)[0][:, 0]]
            save(shared, end, trainer.pieces(), {}, control)
    np.testing.assert_allclose(seen, told[:, 0], rtol=0, atol=1e-10)
    for p in trainer.parameters:
        np.testing.assert_allclose(p.data, p.layout.take(weights[p.name], mesh.place), rtol=0, atol=1e-10, err_msg=p.name)


# Sabotages.


def test_gradients_of_experts_that_are_summed_over_ep_too_are_seen(comm, monkeypatch):
    """As many experts as ranks: where they are cut unequally, the guard sees it before."""
    monkeypatch.setitem(globals(), "EXPERTS", Experts(comm.size, 2, 7, first=1))
    plain = Groups.__init__
    with Mesh(comm, check=True, ep=comm.size) as mesh:
        right = RUN.trained(mesh, made(mesh), end=1)[0][0, 2]
        one = lambda axes: {Over(mesh.ep): [home for homes in axes.values() for home in homes]}  # noqa: E731
        monkeypatch.setattr(Groups, "__init__", lambda self, axes, *more: plain(self, one(axes), *more))
        assert abs(RUN.trained(mesh, made(mesh), end=1)[0][0, 2] - right) > 1e-3


def test_a_norm_that_counts_experts_once_a_rank_of_ep_alone_is_seen(comm, alone):
    with Mesh(comm, check=True, ep=comm.size) as mesh:
        trainer = made(mesh)
        for counted in trainer._counted:
            counted &= mesh.ep.rank == 0
        got, *_ = RUN.trained(mesh, trainer, end=1)
        assert abs(got[0, 2] - alone[STEPS][0][0, 2]) > 1e-3


def test_the_bias_follows_the_counts(comm):
    """8 2 3 3: the one that is chosen too often goes down, the others up."""
    mesh = Mesh(MPI.COMM_SELF, dp=1)
    config = replace(CONFIG, experts=Experts(4, 2, 7, scoring="sigmoid", correction=True))
    own = stages(Parts(config, mesh.tp), drawn(1, "float64", 0.1), dealt(LAYERS, 1), [0], 0)
    trainer = Trainer(own, mesh, Recipe(gamma=0.001))
    before = [layer.router.br_X.data.copy() for layer in trainer.routed]
    data = np.random.default_rng(5).integers(0, V, 60 * S + 1)
    trainer.gradients(text.dealt(data, np.arange(2), S, 1, 0, 1), 2 * S)
    trainer.chosen = dict.fromkeys(trainer.routed, np.array([8, 2, 3, 3]))
    trainer.update(0.0)
    for layer, br_X in zip(trainer.routed, before, strict=True):
        np.testing.assert_allclose(layer.router.br_X.data - br_X, [-0.001, 0.001, 0.001, 0.001], rtol=1e-10)
