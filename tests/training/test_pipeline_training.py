"""Training in stages, and with sequences cut over cp: losses and weights as on one process, checkpoints for any mesh."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from mpi4py import MPI

from launch import start
from layers.batch import Batch
from layers.context import KINDS
from models.build import Parts
from models.config import gpt2_like, llama_like
from models.stage import by_hand, dealt, stages
from parallel import schedules
from parallel.checkpoint import save
from parallel.control import Control
from parallel.ledger import agrees, merged
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.replicas import Replicas
from tests.apart import on_first
from tests.grids import FULL, every_other
from tests.training.runs import FEW, STEPS, Run, loaded, with_steps
from training.trainer import Recipe, Trainer

pytestmark = pytest.mark.mpi

V, S, SEQUENCES = 29, 10, 7
RUN = Run(V, S, SEQUENCES)
LAYERS = 4
CONFIGS = {"tied": gpt2_like(V, 24, LAYERS, 4, 10, S), "untied": llama_like(V, 24, LAYERS, 6, 3, 14, S)}
# Axes, the schedule, the layers by hand, sequence parallelism, ZeRO, and how cp meets: meshes and schedules that differ.
CASES = {
    1: [({"pp": 1}, "1f1b", None, False, False), ({"pp": 1}, "zb-h1", None, False, True)],
    2: [
        ({"pp": 2}, "1f1b", [3, 1], False, False),
        ({"pp": 2}, "zb-v", None, False, True),
        ({"pp": 2}, "gpipe", None, False, False),
    ],
    3: [
        ({"cp": 3}, "1f1b", None, False, True),
        ({"pp": 3}, "zb-h1", None, False, False),
        ({"pp": 3}, "interleaved", [1, 0, 1, 1, 0, 1], False, True),
    ],
    4: [
        ({"pp": 4}, "1f1b", None, False, True),
        ({"pp": 4}, "zb-v", [1, 0, 1, 0, 1, 0, 1, 0], False, False),
        ({"pp": 2, "dp": 2}, "zb-h1", None, False, True),
        ({"pp": 2, "dp": 2}, "interleaved", None, False, False),
        ({"pp": 2, "tp": 2}, "dualpipe-v", None, False, True),
        ({"pp": 2, "tp": 2}, "1f1b", None, True, False),
        ({"cp": 4}, "1f1b", None, False, True),
        ({"cp": 2, "tp": 2}, "1f1b", None, False, False, "gather"),
        ({"cp": 2, "tp": 2}, "1f1b", None, True, False),
        ({"dp": 2, "cp": 2}, "1f1b", None, False, True, "ulysses"),
        ({"pp": 2, "cp": 2}, "zb-h1", None, False, False),
    ],
}


def made(mesh, kind, layers, schedule="1f1b", micro_batches=1, hand=None, cuts_rows=False, zero=False, context="ring"):
    plan = schedules.plan(schedule, mesh.pp.size, micro_batches)
    blocks = by_hand(hand) if hand else dealt(layers, plan.stages)
    config = replace(CONFIGS[kind], layers=layers)
    parts = Parts(config, mesh.tp, cuts_rows=cuts_rows, context=KINDS[context](mesh.cp))
    own = stages(parts, drawn(1, "float64", 0.1), blocks, [*plan.rank_of.values()], mesh.pp.rank)
    return Trainer(own, mesh, Recipe(clip=0.8, zero=zero, bucket_bytes=5000, schedule=plan))


@cache
def alone(kind, layers):
    """The same on one process in one stage. All ranks call it together."""
    mesh = Mesh(MPI.COMM_SELF, dp=1, tp=1)
    return on_first(start.begin(), lambda: RUN.truth(mesh, made(mesh, kind, layers)))


@pytest.mark.limit(120)
@pytest.mark.parametrize(("kind", "case", "steps"), with_steps(every_other(CONFIGS, CASES[start.begin().size])), ids=str)
def test_all_steps_in_stages_are_the_same(comm, kind, case, steps):
    axes, schedule, hand, *how = case
    # At least one a stage.
    layers = 2 if schedule in ("1f1b", "gpipe", "zb-h1") and axes.get("pp", 1) < 3 and not hand else LAYERS
    (told, weights), control = alone(kind, layers)[steps], Control(comm)
    with Mesh(comm, check=True, **axes) as mesh:
        # 7 sequences over dp in 2, 3 or 5 micro-batches: nothing divides.
        micro_batches = max(schedules.SCHEDULES[schedule].least(mesh.pp.size), {1: 2, 2: 3}.get(mesh.pp.size, 5))
        trainer = made(mesh, kind, layers, schedule, micro_batches, hand, *how)
        got, after, parts = RUN.trained(mesh, trainer, micro_batches, 0, steps)
        np.testing.assert_allclose(got, told, rtol=0, atol=1e-10)
        for name, a in after.items():
            np.testing.assert_allclose(a, weights[name], rtol=0, atol=1e-10, err_msg=name)
        assert {name for names in control.everyone([*after]) for name in names} == weights.keys()
        predicted = [t for t in trainer.traffic(parts) for _ in range(steps)]
        rows = merged(control.everyone(mesh.ledger.report(predicted)))
        assert agrees(r for r in rows if r["phase"] != "compare")
        memory = trainer.memory(parts)
        assert memory["saved"] == memory["predicted_saved"]
        Replicas(mesh, control, 1).check(1, trainer.copies)


@pytest.mark.mpi(min_size=4, max_size=4)
@pytest.mark.limit(120)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_run_goes_on_from_one_mesh_to_the_next(comm, kind, shared):
    """Losses as if nothing had been, and what is loaded is written again to the bit."""
    told, weights = alone(kind, LAYERS)[STEPS if FULL else FEW]
    control, seen, end = Control(comm), [], 0
    for axes, schedule, micro_batches, zero in (
        ({"dp": 4}, "1f1b", 1, False),
        ({"pp": 2, "tp": 2}, "zb-v", 4, True),
        ({"tp": 4}, "1f1b", 2, True),
        ({"cp": 2, "tp": 2}, "1f1b", 2, False),
    ):
        with Mesh(comm, check=True, **axes) as mesh:
            trainer = made(mesh, kind, LAYERS, schedule, micro_batches, zero=zero)
            if end:
                loaded(trainer, shared, end, mesh, control)
            begin, end = end, end + (5 if FULL else 1 + (end < 4))
            got, after, _ = RUN.trained(mesh, trainer, micro_batches, begin, end)
            seen += [*got[:, 0]]
            save(shared, end, trainer.pieces(), {}, control)
    np.testing.assert_allclose(seen, told[:, 0], rtol=0, atol=1e-10)
    for name, a in after.items():
        np.testing.assert_allclose(a, weights[name], rtol=0, atol=1e-10, err_msg=name)


# Sabotages.


@pytest.mark.mpi(min_size=2)
def test_targets_that_are_shifted_after_the_cut_are_seen(comm, monkeypatch):
    """The last token of each rank's piece would be told the wrong one."""
    take = Batch.take

    def shifted(self, whole_T):
        mine = take(self, whole_T)
        return mine if whole_T is not shifted.targets else np.roll(take(self, shifted.ids), -1)

    def gradients(self, parts, tokens):
        (part,) = parts
        shifted.ids, shifted.targets = part.ids, part.targets
        return plain(self, parts, tokens)

    plain = Trainer.gradients
    monkeypatch.setattr(Batch, "take", shifted)
    monkeypatch.setattr(Trainer, "gradients", gradients)
    with Mesh(comm, check=True, cp=comm.size) as mesh:
        got, *_ = RUN.trained(mesh, made(mesh, "untied", 2), end=1)
    assert abs(got[0, 0] - alone("untied", 2)[FEW][0][0, 0]) > 1e-4
