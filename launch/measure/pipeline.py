"""A step of a model in stages on real ranks: its gradients gathered, its operations timed, and what a message takes.

T tokens   D model width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from launch import report
from launch.measure.small import joined, ragged, reference_loss
from models.build import Parts, build
from models.config import Config
from models.stage import stages
from parallel import pipeline
from parallel.control import Control
from parallel.holder import IN_PLACE
from parallel.ledger import agrees, merged
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.round_trip import half_round_trips
from parallel.schedule import Op, Plan
from parallel.shard import even
from reference.compare import Comparison
from reference.layer import compared
from training.text import MicroBatch
from training.trainer import Recipe, Trainer
from training.work import Work

REPEATS = 5
# Comparisons use weights and biases of this spread at least.
SPREAD = 0.1


class Job(NamedTuple):
    """A batch through a model in stages: the `blocks` of each stage, and the micro-batches."""

    config: Config
    blocks: list[range]
    micro_batches: list[MicroBatch]
    dtype: str
    seed: int

    @property
    def tokens(self) -> int:
        return sum(len(part.ids) for part in self.micro_batches)

    def trainer(self, mesh: Mesh, plan: Plan) -> Trainer:
        """Of this rank's stages, with weights made anew."""
        weights, rank_of = drawn(self.seed, self.dtype, SPREAD), [*plan.rank_of.values()]
        held = stages(Parts(self.config, mesh.tp), weights, self.blocks, rank_of, mesh.pp.rank)
        return Trainer(held, mesh, Recipe(schedule=plan))

    def whole(self) -> dict[str, np.ndarray]:
        """The weights of the whole model by name, in the order of forward, drawn on this rank alone."""
        with Mesh(MPI.COMM_SELF, tp=1) as alone:
            model = build(self.config, alone.tp, drawn(self.seed, self.dtype, SPREAD))
            return {p.name: p.data for p in model.parameters}

    def stages_of(self, tensor: str) -> list[int]:
        """The stages that hold a weight: of a tied table the first and the last."""
        if tensor.startswith("blocks."):
            return [stage for stage, held in enumerate(self.blocks) if int(tensor.split(".")[1]) in held]
        ends = {0} if tensor in ("Wte", "Wpe") else {len(self.blocks) - 1}
        return sorted(ends | {len(self.blocks) - 1} if tensor == "Wte" and self.config.tied else ends)


def dealt_out(sequences: int, longest: int, micro_batches: int, seed: int) -> list[MicroBatch]:
    """Sequences of unequal lengths, in micro-batches of unequal sizes."""
    parts = ragged(sequences, longest, seed)
    return [joined(parts[a:b]) for a, b in even(sequences, micro_batches, "sequences").bounds]


def one_by_one(plan: Plan) -> Plan:
    """On the same ranks, each micro-batch through all stages and back before the next begins."""

    def ops(rank: int) -> Iterator[Op]:
        held = [stage for stage, holder in plan.rank_of.items() if holder == rank]
        for i in range(plan.micro_batches):
            yield from (Op("F", stage, i) for stage in held)
            yield from (Op("B", stage, i) for stage in reversed(held))

    return Plan(tuple(tuple(ops(rank)) for rank in range(len(plan.ranks))))


def halved(plan: Plan) -> Plan:
    """Each B as I and W, one after the other."""
    ranks = (
        (half for op in ops for half in ([op._replace(kind=k) for k in "IW"] if op.kind == "B" else [op])) for ops in plan.ranks
    )
    return Plan(tuple(map(tuple, ranks)))


def may_differ(job: Job, plan: Plan, tensor: str) -> bool:
    """Whether the plan adds up a gradient in another order than one micro-batch after another, so that its last bits may be
    others: of a stage that takes backwards in another order, and of a tied table that two stages of one rank fill."""
    held = job.stages_of(tensor)
    return len({plan.rank_of[s] for s in held}) < len(held) or not all(_in_turn(plan, stage) for stage in held)


def _in_turn(plan: Plan, stage: int) -> bool:
    ops = [op for op in plan.ranks[plan.rank_of[stage]] if op.stage == stage]
    taken = ([op.micro_batch for op in ops if op.kind in kinds] for kinds in ("BI", "BW"))
    return all(order == sorted(order) for order in taken)


class Stepped:
    """A step of the job on this rank: the `loss`; its stages' `weights` and `gradients` by name; what all ranks counted beside
    their closed forms, `counted`, as JSON has it. All ranks make it together."""

    def __init__(self, job: Job, plan: Plan, mesh: Mesh) -> None:
        trainer = job.trainer(mesh, plan)
        mesh.ledger.rows.clear()
        self.loss = trainer.gradients(job.micro_batches, job.tokens)
        self.gradients = {p.name: p.grad.copy() for p in trainer.parameters}
        # The rest of a step; at this rate the weights stay as they are.
        trainer.update(0.0)
        self.weights = {p.name: p.data.copy() for p in trainer.parameters}
        rows = mesh.ledger.report(trainer.traffic(job.micro_batches))
        told = mesh.control.everyone((rows, trainer.memory(job.micro_batches)))
        sent = [[r for r in rows if r["verb"] == "send"] for rows, _ in told]
        kinds = {"messages": "calls", "predicted_messages": "predicted_calls"}
        kinds |= {"bytes": "message_bytes", "predicted_bytes": "predicted_message_bytes"}
        self.counted = {
            # Along axes of one rank nothing crosses a process.
            "communication": [r for r in merged([rows for rows, _ in told]) if r["axis"] == mesh.pp.name or not agrees([r])],
            "sent": {f"{name}_per_rank": [sum(r[kind] for r in rows) for rows in sent] for name, kind in kinds.items()},
            "memory": report.by_rank([memory for _, memory in told]),
        }

    def unlike(self, other: Stepped) -> list[str]:
        """The gradients that are not bit for bit the other's."""
        return [name for name, grad in self.gradients.items() if not np.array_equal(grad, other.gradients[name])]


def gathered(
    own: Mapping[str, np.ndarray], whole: Mapping[str, np.ndarray], mesh: Mesh
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays of this rank's stages, named and shaped as `whole` has them, from all ranks; and those that differ between their
    holders. All ranks call it together."""
    holders = mesh.control.everyone([*own])
    found, apart = {}, []
    with mesh.phase("compare"):
        for name, like in whole.items():
            first = next(rank for rank, names in enumerate(holders) if name in names)
            found[name] = mesh.pp.broadcast(own.get(name, like), first)
            if name in own and not np.array_equal(own[name], found[name], equal_nan=True):
                apart.append(name)
    return found, sorted({name for names in mesh.control.everyone(apart) for name in names})


def against_the_reference(
    job: Job, loss: float, weights: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray], share: tuple[int, int]
) -> Iterator[Comparison]:
    """The loss and the gradients, or this share of them, beside the reference's of the whole batch."""
    reference = reference_loss(job.config, job.micro_batches)
    whole = {"y": np.array(loss, job.dtype), **weights, **{f"d{name}": g for name, g in gradients.items()}}
    yield from compared([reference], lambda W, name, index: reference(W), whole, np.array(1.0), lambda name: 4, share)


@dataclass(frozen=True)
class Times:
    """What `simulate` wants of Costs, from seconds that were measured by stage and kind."""

    seconds: Mapping[tuple[int, str], float]
    hop: float
    blocks: bool = False

    def of(self, op: Op) -> float:
        return self.seconds[op.stage, op.kind]

    def over(self, stages: int) -> Times:
        """Of the same work in so many stages: where these are others, dealt out evenly."""
        if stages == 1 + max(stage for stage, _ in self.seconds):
            return self
        kinds = {kind: sum(s for (_, k), s in self.seconds.items() if k == kind) / stages for _, kind in self.seconds}
        return Times({(stage, kind): s for stage in range(stages) for kind, s in kinds.items()}, self.hop)


class Watch:
    """Does what `do` does, and keeps the seconds of each operation by stage and kind."""

    def __init__(self, do: Callable[[Op, np.ndarray | None], np.ndarray | None]) -> None:
        self.do = do
        self.seconds: dict[tuple[int, str], list[float]] = {}

    def __call__(self, op: Op, x: np.ndarray | None) -> np.ndarray | None:
        begun = perf_counter()
        made = self.do(op, x)
        self.seconds.setdefault((op.stage, op.kind), []).append(perf_counter() - begun)
        return made


def timed(job: Job, trainer: Trainer, plan: Plan, comm: MPI.Intracomm) -> tuple[list[float], dict[tuple[int, str], float]]:
    """Seconds of each of REPEATS runs of the plan on the slowest rank, after one to warm up; the median of each stage's
    operations by kind. All ranks begin together; what follows the plan (owed sums, the optimizer) is not in it."""
    pp, steps = trainer.mesh.pp, []
    every: dict[tuple[int, str], list[float]] = {}
    for n in range(REPEATS + 1):
        trainer.holder.zero_grad()
        batches = trainer.form.batches(part.lengths for part in job.micro_batches)
        work = Work(trainer.stages, job.micro_batches, job.tokens, plan.ranks[pp.rank], IN_PLACE, batches)
        watch = Watch(work)
        comm.Barrier()
        begun = perf_counter()
        pipeline.run(plan, pp, watch, work.shape, job.dtype)
        took = perf_counter() - begun
        if n:
            steps.append(took)
            for at, seconds in watch.seconds.items():
                every.setdefault(at, []).extend(seconds)
    told = trainer.mesh.control.everyone((steps, {at: median(seconds) for at, seconds in every.items()}))
    return [max(run) for run in zip(*(s for s, _ in told), strict=True)], {
        at: s for _, of_rank in told for at, s in of_rank.items()
    }


def operations(job: Job, mesh: Mesh, plan: Plan, comm: MPI.Intracomm) -> tuple[list[float], Times]:
    """The steps, as `timed` has them, and the times of F, B, I and W on each stage: of what the plan lacks, those of its
    backwards in halves, or their sum."""
    trainer = job.trainer(mesh, plan)
    steps, seconds = timed(job, trainer, plan, comm)
    if any(op.kind == "B" for op in plan.place):
        seconds = timed(job, trainer, halved(plan), comm)[1] | seconds
    for stage in plan.rank_of:
        seconds.setdefault((stage, "B"), seconds[stage, "I"] + seconds[stage, "W"])
    return steps, Times(seconds, hop(job, mesh, mesh.control))


def hop(job: Job, mesh: Mesh, control: Control) -> float:
    """Median seconds of one of the job's messages from the first rank to the second."""
    x_TD = np.zeros((len(job.micro_batches[0].ids), job.config.d_model), job.dtype)
    return control.from_first(median(half_round_trips(mesh.pp, control, x_TD, 20) or [0.0]))
