"""The same few steps on every mesh of some ranks, in every way to make them, beside one process.

T tokens   D model width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from time import perf_counter
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from launch import report
from launch.measure.small import VOCABULARY, joined, ragged
from layers.context import KINDS
from layers.optimizer import warmup_cosine
from layers.rope import Rope
from layers.step import Recipe
from models.config import Config, Experts, Latent, gpt2_like, llama_like
from models.stage import by_hand
from parallel import schedules
from parallel.control import Control
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.shard import AXES, DATA, even
from plan.training import Lengths, Training
from training.text import MicroBatch
from training.trainer import Trainer

# Enough heads, experts and rows for 8 ranks along any axis, and nothing that 2, 3 or 4 divide alike.
D, HEADS, LAYERS, CONTEXT = 32, 8, 4, 12
SPREAD, RATE = 0.1, 1e-2
# On more ranks there are too many meshes, and the model is too small for them.
MOST = 8


def _latent() -> Config:
    plain = llama_like(VOCABULARY, D, LAYERS, HEADS, HEADS, 20, CONTEXT)
    return replace(plain, latent=Latent(6, 5, 4, 3, 7), rope=Rope(4, pairing="interleaved"), d_head=9)


def _routed() -> Config:
    experts = Experts(9, 2, 10, d_shared=11, first=1, scoring="sigmoid", correction=True)
    return replace(llama_like(VOCABULARY, D, LAYERS, HEADS, 4, 20, CONTEXT), experts=experts)


MODELS = {
    "dense": llama_like(VOCABULARY, D, LAYERS, HEADS, 4, 20, CONTEXT),
    "tied": gpt2_like(VOCABULARY, D, LAYERS, HEADS, 20, CONTEXT),
    "mla": _latent(),
    "routed": _routed(),
}
# How a step may be made otherwise than as usual, by the option of launch.train.
Options = Mapping[str, str | int | bool]
USUAL = {"schedule": "1f1b", "zero": 0, "sequence_parallel": False, "recompute": False, "context": "ring", "layout": "zigzag"}


class Unfit(ValueError):
    """A mesh, or a way to make a step on it, that this model cannot have; the text says why."""


def meshes(ranks: int) -> list[dict[str, int]]:
    """Every product of the axes."""
    sizes = [n for n in range(1, ranks + 1) if ranks % n == 0]
    return [dict(zip(AXES, found, strict=True)) for found in product(sizes, repeat=len(AXES)) if prod(found) == ranks]


def said(axes: Mapping[str, int]) -> str:
    """A mesh as it is typed, without axes of one rank."""
    return ",".join(f"{name}={n}" for name, n in axes.items() if n > 1) or "one rank"


def options_said(options: Mapping[str, object]) -> str:
    """As they are typed for launch.train."""
    typed = ((f"--{name.replace('_', '-')}", value) for name, value in options.items())
    return " ".join(name if value is True else f"{name} {value}" for name, value in typed)


def ways(axes: Mapping[str, int]) -> Iterator[Options]:
    """The usual one; then each option by itself that does something on this mesh; then all of them at once."""
    data = [name for name in DATA if axes[name] > 1]
    yield {}
    if prod(axes.values()) == 1:
        # Axes of one rank are ordinary axes.
        yield from ({"zero": 3}, {"schedule": "zb-v"}, {"sequence_parallel": True}, {"context": "gather"})
    if axes["pp"] > 1:
        yield from ({"schedule": name} for name in schedules.SCHEDULES if name != USUAL["schedule"])
    if data:
        yield from ({"zero": stage} for stage in (1, 2, 3))
    if len(data) > 1:
        yield from ({"zero": 3, "zero_over": name} for name in data)
    if axes["cp"] > 1:
        yield from ({"context": kind} for kind in KINDS if kind != USUAL["context"])
        yield {"layout": "contiguous"}
    if axes["tp"] > 1:
        yield {"sequence_parallel": True}
    yield {"recompute": True}
    for schedule in ("zb-v", "interleaved") if axes["pp"] > 1 else ("1f1b",):
        every = {"schedule": schedule, "zero": 3 if data else 0, "sequence_parallel": axes["tp"] > 1, "recompute": True}
        if (changed := {name: value for name, value in every.items() if value != USUAL[name]}) != {"recompute": True}:
            yield changed


@dataclass(frozen=True)
class Case:
    """A mesh and a way to make steps on it. Raises Unfit where the model cannot have that."""

    model: str
    axes: Mapping[str, int]
    options: Options

    def __post_init__(self) -> None:
        axes, config = self.axes, MODELS[self.model]
        if axes["ep"] > 1 and config.experts is None:
            raise Unfit("without experts ep is dp")
        most = {"tp": HEADS, "ep": config.experts.count if config.experts else 1}
        for name, n in most.items():
            if axes[name] > n:
                raise Unfit(f"cannot cut {n} {'heads' if name == 'tp' else 'experts'} over {name}={axes[name]}")
        if self["context"] == "ulysses" and axes["cp"] * axes["tp"] > HEADS:
            raise Unfit(f"cannot cut {HEADS // axes['tp']} heads of a rank over cp={axes['cp']}: ring can")

    def __getitem__(self, name: str) -> str | int | bool:
        return self.options.get(name, USUAL[name])

    @property
    def micro_batches(self) -> int:
        """As many as every schedule needs."""
        return 2 * self.axes["pp"]

    def training(self, dealt: Callable[[int], Lengths]) -> Training:
        """Where there are more stages than blocks, some have none."""
        plan = schedules.plan(self["schedule"], self.axes["pp"], self.micro_batches)
        at = [n * plan.stages // LAYERS for n in range(LAYERS)]
        blocks = by_hand([at.count(stage) for stage in range(plan.stages)])
        config, over = MODELS[self.model], self.options.get("zero_over")
        balance = {} if config.experts is None else {"alpha": 0.02, "gamma": 0.01}
        zero = {"zero": self["zero"], "zero_over": DATA if over is None else (over,)}
        recipe = Recipe(clip=0.8, bucket_bytes=10_000, schedule=plan, layout=self["layout"], **zero, **balance)
        how = self["recompute"], self["sequence_parallel"], self["context"]
        return Training(config, self.axes, plan, blocks, dealt, recipe, "float64", *how)


class Taken(NamedTuple):
    """Some steps: the losses, the first gradients and the last weights by name, each whole; of this rank what it has.

    `right`: whether it sent and kept what was predicted. `seconds`: of all steps. `memory`: bytes, by what they are for."""

    losses: list[float]
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    right: bool
    seconds: float
    memory: dict[str, int]


@dataclass(frozen=True)
class Job:
    """`steps` of a model, each on one batch, which is ragged and the same on every mesh of `ranks`."""

    model: str
    ranks: int
    steps: int
    seed: int

    @cached_property
    def batch(self) -> list[MicroBatch]:
        """One part a sequence: a few more than any mesh needs, so that they are dealt out unevenly."""
        return ragged(2 * self.ranks + 3, CONTEXT, self.seed)

    def dealt(self, case: Case, rank: int) -> list[MicroBatch]:
        """What a rank of dp and ep gets, by its number among them."""
        mine = self.batch[slice(*even(len(self.batch), case.axes["dp"] * case.axes["ep"]).bounds[rank])]
        return [joined(mine[slice(*at)]) for at in even(len(mine), case.micro_batches).bounds]

    def training(self, case: Case) -> Training:
        return case.training(lambda rank: [part.lengths for part in self.dealt(case, rank)])

    def trainer(self, case: Case, mesh: Mesh) -> Trainer:
        """Of this rank."""
        training = self.training(case)
        return Trainer(training.stages(mesh, drawn(self.seed, training.dtype, SPREAD)), mesh, training.recipe)

    def taken(self, case: Case, mesh: Mesh) -> Taken:
        """All ranks of the mesh call it together."""
        trainer, tokens = self.trainer(case, mesh), sum(len(part.ids) for part in self.batch)
        parts = self.dealt(case, mesh.over("dp", "ep").rank)
        losses, gradients, seconds = [], {}, 0.0
        for n in range(self.steps):
            begun = perf_counter()
            losses.append(trainer.gradients(parts, tokens))
            seconds += perf_counter() - begun
            if not n:
                with mesh.phase("compare"):
                    gradients = trainer.wholes("grad")
            begun = perf_counter()
            trainer.update(warmup_cosine(n, self.steps, RATE, 1))
            seconds += perf_counter() - begun
        with mesh.phase("compare"):
            weights = trainer.wholes("data")
        predicted = [*(t for t in trainer.traffic(parts) for _ in range(self.steps)), *trainer.exchanged]
        rows = [row for row in mesh.ledger.report(predicted) if row["phase"] != "compare"]
        memory = trainer.memory(parts)
        right = agrees(rows) and report.as_predicted(memory)
        return Taken(losses, gradients, weights, right, seconds, memory)

    def alone(self, control: Control) -> Taken:
        """On one process, in one micro-batch a time; all ranks get it. The others sleep meanwhile."""
        found = None
        if control.rank == 0:
            with Mesh(MPI.COMM_SELF, dp=1) as mesh:
                found = self.taken(Case(self.model, dict.fromkeys(AXES, 1), {}), mesh)
        control.wait(patient=True)
        return control.from_first(found)


# What a rank holds at a time, at most: what stays, and what comes and goes.
HELD = ("weights", "gradients", "optimizer", "gathered", "unsummed", "saved")


def compared(job: Job, case: Case, truth: Taken, mesh: Mesh, control: Control, tolerance: float) -> dict:
    """A row of the table. All ranks call it together."""
    got = job.taken(case, mesh)
    memory = sum(got.memory.get(kind, 0) for kind in HELD)
    mine = (
        max(abs(a - b) for a, b in zip(got.losses, truth.losses, strict=True)),
        _apart(got.gradients, truth.gradients),
        _apart(got.weights, truth.weights),
    )
    every = control.everyone((mine, got.right, got.seconds, memory, [*got.weights]))
    differences, right, seconds, held, names = zip(*every, strict=True)
    missing = truth.weights.keys() - {name for of_rank in names for name in of_rank}
    # A difference that is no number is larger than any.
    loss, gradient, weight = (float(np.max(of_ranks)) for of_ranks in zip(*differences, strict=True))
    return {
        "mesh": dict(case.axes),
        "options": dict(case.options),
        "loss_difference": _number(loss),
        "gradient_difference": _number(gradient),
        "weight_difference": _number(weight),
        "bytes_ok": all(right),
        "seconds": max(seconds),
        "memory_bytes_per_rank": list(held),
        "ok": all(right) and not missing and all(x <= tolerance for x in (loss, gradient, weight)),
    }


def _apart(got: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> float:
    """The largest difference of any entry of what this rank has."""
    return max((float(np.max(np.abs(a - truth[name]))) for name, a in got.items()), default=0.0)


def _number(x: float) -> float | None:
    """For JSON, which has no other."""
    return x if np.isfinite(x) else None
