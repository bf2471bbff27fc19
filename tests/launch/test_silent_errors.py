"""Errors that say nothing: the meshes on which each shows, and in what, and those on which it hides, as docs/parallelism.md has
them. Each is planted, and a step of `launch.equal` taken."""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import numpy as np
import pytest

from launch import start
from launch.measure.equal import Case, Job, compared
from launch.options import axis_sizes
from layers.batch import Batch
from layers.context import Ring
from layers.linear import RowParallelLinear
from parallel.control import Control
from parallel.data import Groups
from parallel.flat import Numbering
from parallel.holder import Over
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.shard import AXES
from parallel.sharded import FlatShard
from tests.harness import ROOT
from training.trainer import Trainer
from training.work import Work


def nothing_owed(monkeypatch):
    monkeypatch.setattr(Owed, "sum", lambda self: None)


def over_ep_too(monkeypatch):
    plain = Groups.__init__

    def one(self, over, *more):
        widest = max(over, key=lambda ranks: ranks.axis.size)
        plain(self, {widest: [home for homes in over.values() for home in homes]}, *more)

    monkeypatch.setattr(Groups, "__init__", one)


def over_the_named_alone(monkeypatch):
    plain = FlatShard.__init__
    monkeypatch.setattr(FlatShard, "__init__", lambda self, homes, over, *more: plain(self, homes, Over(over.axis), *more))


def copies_counted(monkeypatch):
    monkeypatch.setattr(Numbering, "counted_once", lambda self, *place: np.ones(self.size, bool))


def mean_of_micro_batches(monkeypatch):
    plain = Work.__init__

    def each(self, stages, parts, tokens=1, *more, **how):
        plain(self, stages, parts, tokens * len(parts), *more, **how)

    monkeypatch.setattr(Work, "__init__", each)


def mean_of_ranks(monkeypatch):
    plain = Trainer.gradients

    def own(self, parts, tokens):
        return plain(self, parts, sum(len(part.ids) for part in parts) * self.mesh.over("dp", "ep").size)

    monkeypatch.setattr(Trainer, "gradients", own)


def last_weights_forgotten(monkeypatch):
    plain = Work._weights

    def forgetful(self, op, nothing):
        if op.micro_batch == len(self.micro_batches) - 1:
            later = self._later[op[1:]]
            later._put = [(tell, arrays) for tell, arrays in later._put if not arrays]
        plain(self, op, nothing)

    monkeypatch.setattr(Work, "_weights", forgetful)


def positions_of_the_cut(monkeypatch):
    monkeypatch.setattr(Batch, "positions_T", property(lambda self: np.arange(self.tokens)))


def a_hop_too_few(monkeypatch):
    shift = Ring._shift
    less = lambda self, x, hop, until, batch: shift(self, x, hop, min(until, self.cp.size - 1), batch)  # noqa: E731
    monkeypatch.setattr(Ring, "_shift", less)


def bias_before_the_sum(monkeypatch):
    plain = RowParallelLinear.forward

    def forward(self, x, rows=None):
        y, saved = plain(self, x, rows)
        if self.b_O is not None:
            y += (self.tp.size - 1) * self.b_O.data
        return y, saved

    monkeypatch.setattr(RowParallelLinear, "forward", forward)


def last_micro_batch_alone(monkeypatch):
    plain = FlatShard.leave

    def leave(self):
        self.grad[...] = 0
        return plain(self)

    monkeypatch.setattr(FlatShard, "leave", leave)


class Silent(NamedTuple):
    """An error, what plants it, and the model; the meshes where it shows, in which columns of launch.equal, and where not."""

    error: str
    plant: Callable
    model: str
    shows: tuple[str, ...]
    tells: str
    hides: tuple[str, ...]


ALL = "loss, gradient, weight"
EVERY = (
    Silent("a sum that is owed is left out", nothing_owed, "dense", ("tp=2 --sequence-parallel", "tp=3"),
           "gradient, weight, bytes", ("tp=2", "tp=4")),
    Silent("the same, of a tied table", nothing_owed, "tied", ("pp=2",), "gradient, weight, bytes",
           ("pp=2 --schedule zb-v",)),
    Silent("experts' gradients are summed over ep too", over_ep_too, "routed", ("ep=3",), "gradient, weight", ("dp=3",)),
    Silent("`--zero-over` sums over what it names alone", over_the_named_alone, "dense",
           ("dp=2,cp=2 --zero 3 --zero-over dp",), "gradient, weight", ("dp=2 --zero 3",)),
    Silent("the norm counts every copy", copies_counted, "tied", ("dp=2", "pp=2"), "weight",
           ("dp=2 --zero 3", "pp=2 --schedule zb-v")),
    Silent("the loss is divided by the micro-batches too", mean_of_micro_batches, "tied", ("dp=1",), "gradient, weight", ()),
    Silent("the loss is a mean of ranks' means", mean_of_ranks, "dense", ("dp=2",), ALL, ("cp=2",)),
    Silent("the last W is left out", last_weights_forgotten, "dense", ("pp=2 --schedule zb-h1",), "gradient, weight",
           ("pp=2",)),
    Silent("positions are those of the cut", positions_of_the_cut, "dense", ("cp=2",), ALL, ("dp=2",)),
    Silent("dk and dv go a hop too few", a_hop_too_few, "dense", ("cp=2",), "gradient, weight, bytes",
           ("cp=2 --context gather",)),
    Silent("a bias is added before the sum", bias_before_the_sum, "tied", ("tp=2",), ALL, ("dp=2",)),
    Silent("gradients of a micro-batch replace the last", last_micro_batch_alone, "dense", ("dp=1 --zero 3",),
           "gradient, weight", ("dp=1",)),
)  # fmt: skip


def case_of(model, typed):
    """dp=2 --zero 3 as a case of launch.equal."""
    mesh, *words = typed.split()
    options = {}
    for word in words:
        if word.startswith("--"):
            options[name := word[2:].replace("-", "_")] = True
        else:
            options[name] = int(word) if word.isdigit() else word
    return Case(model, dict.fromkeys(AXES, 1) | axis_sizes(mesh), options)


CASES = [
    pytest.param(silent, case, typed in silent.shows, id=f"{silent.plant.__name__}, {silent.model}, {typed}")
    for silent in EVERY
    for typed in (*silent.shows, *silent.hides)
    for case in [case_of(silent.model, typed)]
    if prod(case.axes.values()) == start.begin().size
]


@pytest.fixture(scope="module")
def alone():
    comm, found = start.begin(), {}

    def truth(model):
        if model not in found:
            control = Control(comm)
            found[model] = Job(model, comm.size, 1, 0).alone(control)
            control.close()
        return found[model]

    return truth


@pytest.mark.mpi
@pytest.mark.parametrize(("silent", "case", "shows"), CASES)
def test_it_shows_where_the_page_says_and_nowhere_else(comm, alone, monkeypatch, silent, case, shows):
    truth, control = alone(silent.model), Control(comm)
    silent.plant(monkeypatch)
    with Mesh(comm, **case.axes) as mesh:
        row = compared(Job(silent.model, comm.size, 1, 0), case, truth, mesh, control, 1e-10)
    control.close()
    told = [what for what in ("loss", "gradient", "weight") if not row[f"{what}_difference"] < 1e-10]
    assert ", ".join([*told, *["bytes"] * (not row["bytes_ok"])]) == (silent.tells if shows else "")
    assert row["ok"] == (not shows)


def test_clipping_and_adamw_hide_a_gradient_at_half_its_size(alone, monkeypatch):
    truth, control = alone("dense"), Control(start.begin())
    mean_of_micro_batches(monkeypatch)
    with Mesh(start.begin(), dp=1) as mesh:
        row = compared(Job("dense", 1, 1, 0), case_of("dense", "dp=1"), truth, mesh, control, 1e-10)
    control.close()
    assert row["gradient_difference"] > 0.1
    assert row["weight_difference"] < 1e-8


def test_the_page_says_the_same():
    said = lambda typed: ", ".join(f"`{one}`" for one in typed) or "nowhere"  # noqa: E731
    rows = [f"| {s.error} | {s.model} | {said(s.shows)} | {s.tells} | {said(s.hides)} |" for s in EVERY]
    assert "\n".join(rows) in (ROOT / "docs/parallelism.md").read_text(), "\n".join(rows)
