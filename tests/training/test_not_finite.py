"""Training ends at the step in which a number is none, on all ranks alike, and changes and keeps nothing of it."""

import json

import numpy as np
import pytest

from models.build import build
from models.config import llama_like
from parallel.checkpoint import Checkpoint, latest
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import drawn
from tests.grids import at
from tests.harness import ROOT
from tests.inside import inside, ran
from training.text import Order, dealt
from training.trainer import NotFinite, Recipe, Trainer

pytestmark = [pytest.mark.mpi, at(1, 4)]
V, S, SEQUENCES = 29, 10, 13
CONFIG = llama_like(V, 24, 2, 6, 3, 14, S)
AXES = {1: (1, 1), 2: (1, 2), 3: (3, 1), 4: (2, 2)}


@pytest.fixture(params=[0, 1, 3], ids=lambda zero: f"zero {zero}")
def trainer(comm, request):
    dp, tp = AXES[comm.size]
    with Mesh(comm, check=True, dp=dp, tp=tp) as mesh:
        yield Trainer({0: build(CONFIG, mesh.tp, drawn(1, "float64", 0.1))}, mesh, Recipe(clip=0.8, zero=request.param))


def parts_of(trainer):
    data = np.random.default_rng(5).integers(0, V, 60 * S + 1)
    return dealt(data, Order(60, 7).next(SEQUENCES), S, trainer.mesh.dp.size, trainer.mesh.dp.rank, 2)


def state(trainer):
    return [a.copy() for part in trainer.optimizer.owned for a in (part.data,)] + [trainer.optimizer.m, trainer.optimizer.v]


def test_a_loss_that_is_none_is_placed_and_nothing_changes(trainer):
    parts = parts_of(trainer)
    trainer.step(parts, SEQUENCES * S, 1e-2)
    # Token 3's row of the table, wherever it is: whoever reads that token gets NaN.
    for part in parts:
        part.ids[:] = np.where(part.ids == 3, 4, part.ids)
    if trainer.mesh.dp.rank == trainer.mesh.dp.size - 1:
        parts[1].ids[S] = 3
    for p in trainer.parameters:
        if p.name == "Wte":
            spoil(trainer, p, 3)
    trainer.holder.spread()
    before, steps = state(trainer), trainer.optimizer.steps
    with pytest.raises(NotFinite) as error:
        trainer.step(parts, SEQUENCES * S, 1e-2)
    first = (trainer.mesh.dp.size - 1) * trainer.mesh.tp.size
    assert str(error.value) == f"the loss is nan, on rank {first} at position 0 of sequence 1 of its micro-batch 1"
    assert trainer.optimizer.steps == steps
    for a, b in zip(state(trainer), before, strict=True):
        np.testing.assert_array_equal(a, b)


def spoil(trainer, p, row):
    """NaN in a row of a table, where this rank owns it."""
    first, last = p.layout.bounds(trainer.mesh.place)[0]
    if not first <= row < last:
        return
    width = p.layout.shape[1]
    at = next(at for home, at in trainer.numbering.places() if home is p.home)
    begin = at.start + (row - first) * width
    for part in trainer.optimizer.owned:
        a, b = max(begin, part.at.start), min(begin + width, part.at.stop)
        if a < b:
            part.data[a - part.at.start : b - part.at.start] = np.nan


def test_a_gradient_that_is_none_names_the_rank_and_the_parameter(trainer):
    trainer.gradients(parts_of(trainer), SEQUENCES * S)
    # An entry that this rank counts, of those that several hold.
    counted = [part.grad[mask] for part, mask in zip(trainer.optimizer.owned, trainer._counted, strict=True)]
    last = max(rank for rank, n in enumerate(trainer.mesh.control.everyone(sum(map(len, counted)))) if n)
    if trainer.form.everyone.rank == last:
        part, mask = next((p, m) for p, m in zip(trainer.optimizer.owned, trainer._counted, strict=True) if m.any())
        part.grad[int(np.flatnonzero(mask)[0])] = np.inf
    before, steps = state(trainer), trainer.optimizer.steps
    with pytest.raises(NotFinite, match=rf"^the norm of the gradient is inf: rank {last} has a gradient of \S+ with NaN or"):
        trainer.update(1e-2)
    assert trainer.optimizer.steps == steps
    for a, b in zip(state(trainer), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_and_state_are_looked_through(trainer):
    trainer.require_finite()
    last = trainer.form.everyone.size - 1
    if trainer.form.everyone.rank == last:
        trainer.optimizer.v[-1] = np.inf
    with pytest.raises(NotFinite, match=rf"^rank {last} has weights, or optimizer's state, of \S+ with NaN or infinity in it"):
        trainer.require_finite()


def test_a_run_ends_at_the_step_and_keeps_no_such_checkpoint(comm, shared):
    """At a learning rate that no model survives."""
    text = ROOT / "LICENSE"
    fixed = ["--text", text, "--output", shared / "out", "--checkpoint", shared / "kept", "--sequence-length", 8, "--json"]
    fixed += [
        "--layers",
        1,
        "--d-model",
        16,
        "--d-ff",
        8,
        "--heads",
        4,
        "--batch-tokens",
        80,
        "--sample",
        0,
        "--mesh",
        f"tp={comm.size}",
    ]
    done = ran(comm, "train", *fixed, "--steps", 9, "--warmup", 1, "--lr", "1e30", "--save-every", 1)
    assert done.out, done.err
    said = json.loads(done.out, parse_constant=pytest.fail)
    assert done.status == 1
    assert not said["ok"]
    assert said["error"].startswith(("step 2: the ", "step 3: the ", "after step 1: rank "))
    assert [line for line in done.err.splitlines() if line.startswith("error: ")] == [f"error: {said['error']}"]
    newest = latest(shared / "kept")
    if newest is not None:
        control = Control(comm)
        kept = Checkpoint(newest, control)
        control.close()
        losses = kept.state["losses"]
        assert np.isfinite(losses).all()
        assert f"step {len(losses) + 1}: " in said["error"]
    # Sane rates go on.
    assert inside(comm, "train", *fixed[:4], *fixed[6:], "--steps", 1)["ok"]
