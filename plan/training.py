"""Training as launch.train does it, written down: from the same words a rank builds what it runs, and a planner, on a dry mesh,
what any rank of any mesh sends, keeps and computes in a step. Exact: the layers' own closed forms are asked.

    training = Training(config, axes, plan, blocks, dealt, recipe)
    Trainer(training.stages(mesh, drawn(seed, "float32")), mesh, training.recipe)       # on ranks
    training.told(rank)                                                                 # without any
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from layers.batch import Batch
from layers.context import KINDS
from layers.dispatch import Moved
from layers.moe import MoE, Routed
from layers.stage import Stage
from layers.step import Recipe, Step
from layers.work import products
from models.build import Parts
from models.config import Config
from models.stage import stages
from parallel.axis import Axis
from parallel.grid import Grid
from parallel.ledger import sums
from parallel.parameter import Weights
from parallel.products import Product
from parallel.rows import cut_rows
from parallel.schedule import Plan
from parallel.shard import even
from plan.dry import DryMesh, dry_weights

# Of each micro-batch, the lengths of its sequences.
Lengths = Sequence[Sequence[int]]
# Of each micro-batch, what each layer that chooses experts has found out.
Noted = Sequence[Sequence[Routed]]


class Told(NamedTuple):
    """What one rank does in a step. `sent`: calls and bytes by (verb, axis, phase); `operations`: of its plan, in order;
    `memory`: bytes by kind; `in_flight`: micro-batches on stages, at the peak; `products`: how often each is made."""

    sent: dict[tuple[str, str, str], tuple[int, int]]
    operations: list[str]
    memory: dict[str, int]
    in_flight: int
    products: Counter[Product]


@dataclass(frozen=True)
class Training:
    """`axes`: ranks along each; `blocks`: of each stage of `plan`; `dealt`: what a rank of dp and ep gets of a batch, by its
    number among them."""

    config: Config
    axes: Mapping[str, int]
    plan: Plan
    blocks: Sequence[range]
    dealt: Callable[[int], Lengths]
    recipe: Recipe
    dtype: str = "float32"
    recompute: bool = False
    sequence_parallel: bool = False
    context: str = "ring"

    def parts(self, mesh: Grid[Axis]) -> Parts:
        context = KINDS[self.context](mesh.cp)
        return Parts(self.config, mesh.tp, self.recompute, self.sequence_parallel, context, mesh.ep)

    def stages(self, mesh: Grid[Axis], weights: Weights) -> dict[int, Stage]:
        """Those of this rank of the mesh, which may be dry."""
        return stages(self.parts(mesh), weights, self.blocks, [*self.plan.rank_of.values()], mesh.pp.rank)

    def step(self, rank: int) -> Step:
        """A step of this rank, without MPI and without memory."""
        mesh = DryMesh(dict(self.axes), rank)
        return Step(self.stages(mesh, dry_weights(self.dtype)), mesh, self.recipe, self.dtype)

    def lengths(self, mesh: Grid[Axis]) -> Lengths:
        return self.dealt(mesh.over("dp", "ep").rank)

    @property
    def tokens(self) -> int:
        """Of the whole batch."""
        return sum(n for rank in range(self.axes["dp"] * self.axes["ep"]) for of in self.dealt(rank) for n in of)

    def batches(self, step: Step, noted: Noted | None = None) -> list[Batch]:
        """The micro-batches of a step. `noted`: what was chosen of experts; else all are chosen alike."""
        lengths = self.lengths(step.mesh)
        if not step.routed:
            # Those of the same lengths are one: nothing is noted in them.
            apart = {tuple(of): of for of in lengths}
            made = dict(zip(apart, step.batches(apart.values()), strict=True))
            return [made[tuple(of)] for of in lengths]
        made = step.batches(lengths, step.balance(self.tokens))
        for n, batch in enumerate(made):
            for at, layer in enumerate(step.routed):
                batch.noted[layer] = evenly(layer, batch.tokens) if noted is None else noted[n][at]
        return made

    def told(self, rank: int, noted: Noted | None = None) -> Told:
        """What this rank does in a step; `noted`: as `batches` has it."""
        step = self.step(rank)
        batches = self.batches(step, noted)
        pp = step.mesh.pp.rank
        return Told(
            sums([*step.traffic(self.plan, batches), *step.exchanged(batches)]),
            [str(op) for op in self.plan.ranks[pp]],
            step.memory(self.plan, batches),
            self.plan.peaks("W")[pp],
            products(step.work(batches)),
        )


def evenly(layer: MoE, tokens: int) -> Routed:
    """What a layer would find out if each rank of ep had so many tokens and experts were chosen alike."""
    pairs, ranks = tokens * layer.router.active, layer.ep.size
    served = cut_rows(ranks * pairs, layer.router.count).sizes[slice(*layer.cut.bounds[layer.ep.rank])]
    stay = cut_rows(pairs, layer.router.count).sizes[slice(*layer.cut.bounds[layer.ep.rank])]
    came = max(0, sum(served) - sum(stay)) if ranks > 1 else 0
    return Routed(Moved(pairs - sum(stay), came), tuple(served), ())


def sequences(count: int, length: int, ranks: int, micro_batches: int) -> Callable[[int], Lengths]:
    """How so many sequences of one length are dealt out: as evenly as it goes, over ranks and then over micro-batches."""
    cut = even(count, ranks, "sequences")
    return lambda rank: [[length] * n for n in even(cut.size(rank), micro_batches, "sequences").sizes]
