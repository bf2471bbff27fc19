"""A training step in closed form: what a rank with these stages sends, keeps and computes. A trainer asks it beside what it
counts; a planner asks it on a dry mesh, where nothing ever runs.

T tokens   D model width   t this rank's share of T over tp, where rows are cut
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from layers.batch import Balance, Batch
from layers.pieces import LAYOUTS, Pieces
from layers.stage import Stage
from layers.work import Work, condensed
from parallel import pipeline
from parallel.axis import Axis
from parallel.data import Grouped
from parallel.grid import Grid
from parallel.holder import Over
from parallel.ledger import Traffic, message
from parallel.owed import Owed
from parallel.parameter import Fused, Parameter
from parallel.rows import held
from parallel.schedule import Op, Plan
from parallel.shard import DATA
from parallel.shares import Shares


@dataclass(frozen=True)
class Recipe:
    """How a step is made. `clip`: the largest norm of the whole gradient, or 0 for none. `zero`: what is split over the data
    axes, or over those of them that are named in `zero_over`: 1 the optimizer's state, 2 gradients too, 3 weights too (ZeRO,
    arXiv 1910.02054). `overlap`: send gradients while backward goes on, gather weights ahead. `schedule`: of the stages along
    pp, by name or a plan of one's own; `chunks`: stages a rank, where the schedule leaves it open. `layout`: how cp cuts
    sequences.
    `alpha`: the weight of a loss for experts that are chosen unevenly; `gamma`: by how much the bias of one that is chosen too
    often, or too rarely, is moved after each step (auxiliary-loss-free balancing, arXiv 2408.15664).
    """

    clip: float = 1.0
    zero: int = 0
    zero_over: tuple[str, ...] = DATA
    overlap: bool = True
    bucket_bytes: int = 4 * 2**20
    weight_decay: float = 0.1
    schedule: str | Plan = "1f1b"
    chunks: int | None = None
    layout: str = "zigzag"
    alpha: float = 0.0
    gamma: float = 0.0


# --- micro-batches, as the stages of a rank read them


def fullest(stages: Mapping[int, Stage]) -> Stage:
    """All stages read one batch, which is as the one with most blocks needs it: without blocks nothing is rotated."""
    return max(stages.values(), key=lambda stage: len(stage.blocks))


def crossing(stages: Mapping[int, Stage], batch: Batch) -> tuple[int, int]:
    """(t, D): of what goes from stage to stage."""
    stage = fullest(stages)
    return held(batch.tokens, batch.rows, stage.tp.rank), stage.d_model


class Kept(NamedTuple):
    """Bytes that are kept for backward, and where the products of weights are put off."""

    saved: int = 0
    later: int = 0

    @property
    def nbytes(self) -> int:
        return self.saved + self.later


def together(kept: Iterable[Kept]) -> Kept:
    """All of it."""
    return Kept(*map(sum, zip(Kept(), *kept, strict=True)))


def most_kept(stages: Mapping[int, Stage], batches: Sequence[Batch], ops: Iterable[Op]) -> Kept:
    """The most that a rank with these operations keeps at a time, by the closed forms."""
    now: dict[tuple[int, int], Kept] = {}
    most = Kept()
    for op in ops:
        stage, batch = stages[op.stage], batches[op.micro_batch]
        now.pop(op[1:], None)
        if op.kind in "FI":
            now[op[1:]] = Kept(stage.saved_bytes(batch)) if op.kind == "F" else Kept(0, stage.later_bytes(batch))
        most = max(most, together(now.values()), key=lambda kept: kept.nbytes)
    return most


# --- a step


class Step:
    """What one step of this rank of `mesh`, which may be dry, is. `stages`: its own, by number. `groups`, `units`: what sums
    gradients, of each stage of ZeRO; of a trainer, with their arrays."""

    def __init__(
        self,
        stages: Mapping[int, Stage],
        mesh: Grid[Axis],
        recipe: Recipe,
        dtype: np.dtype | str,
        groups: type[Grouped] = Grouped,
        units: type[Shares] = Shares,
    ) -> None:
        self.stages, self.mesh, self.recipe, self.dtype = dict(stages), mesh, recipe, np.dtype(dtype)
        self.parameters = [p for stage in self.stages.values() for p in stage.parameters]
        self.routed = [layer for stage in self.stages.values() for layer in stage.routed]
        self.owed = Owed(mesh, self.parameters)
        self.everyone, self.data = mesh.over(*mesh.sizes), mesh.over(*DATA)
        self.losses = mesh.over("pp", *DATA)
        self.holder = self._units(units) if recipe.zero >= 2 else self._groups(groups)

    # All ranks make the same axes, whatever their stages have.

    def _groups(self, make: type[Grouped]) -> Grouped:
        r, late, over = self.recipe, dict.fromkeys(self.owed.homes), self._over_of_cuts()
        groups: dict[Over, dict[Parameter | Fused, None]] = {ranks: {} for ranks in over.values()}
        # What is owed a sum comes last: it is sent when that has been made.
        for p in sorted(self._filling, key=lambda p: p.home in late):
            groups[over[_cuts(p)]][p.home] = None
        stages = {number: stage.parameters for number, stage in self.stages.items()}
        return make(groups, r.bucket_bytes, r.overlap, r.zero == 1, self.dtype, stages, late)

    def _units(self, make: type[Shares]) -> Shares:
        r, late, over = self.recipe, dict.fromkeys(self.owed.homes), self._over_of_cuts()
        blocks = [block for stage in self.stages.values() for block in stage.blocks]
        inside = {p.home for block in blocks for p in block.parameters}
        ends = dict.fromkeys(p.home for p in self.parameters if p.home not in inside)
        units = [[*ends], *([*dict.fromkeys(p.home for p in block.parameters)] for block in blocks)]
        parts = {number: [part.parameters for part in stage.parts] for number, stage in self.stages.items()}
        return make(units, {p.home: over[_cuts(p)] for p in self._filling}, parts, late, r.zero == 3, r.overlap, self.dtype)

    @property
    def _filling(self) -> list[Parameter]:
        """Later stages come first: what the first stage shares with the last is sent when both are complete."""
        return [p for _, stage in sorted(self.stages.items(), reverse=True) for p in stage.filling_order]

    def _over_of_cuts(self) -> dict[tuple[str, ...], Over]:
        """Over whom gradients are summed, by the data axes that cut them."""
        return {cut: self._over([name for name in DATA if name not in cut]) for cut in ((), ("ep",))}

    def _over(self, names: Sequence[str]) -> Over:
        """The ranks over which what is whole on these axes is summed: those that it is split over, and the rest."""
        if not self.recipe.zero:
            return Over(self.mesh.over(*names))
        rest = [name for name in names if name not in self.recipe.zero_over]
        return Over(self.mesh.over(*(n for n in names if n not in rest)), self.mesh.over(*rest) if rest else None)

    # --- what is asked

    def pieces_of(self, lengths: Sequence[int]) -> tuple[tuple[Pieces, ...], int]:
        """Of sequences of these lengths, as Batch has them."""
        return LAYOUTS[self.recipe.layout](lengths, self.mesh.cp.size), self.mesh.cp.rank

    def batches(self, lengths: Iterable[Sequence[int]], balance: Balance | None = None) -> list[Batch]:
        """Of micro-batches of sequences of these lengths."""
        stage = fullest(self.stages)
        return [stage.batch(of, *self.pieces_of(of), balance=balance) for of in lengths]

    def balance(self, tokens: int) -> Balance | None:
        """What routed layers are to add to the loss of a batch of so many tokens."""
        return Balance(self.recipe.alpha, tokens) if self.recipe.alpha else None

    def between(self, plan: Plan, batches: Sequence[Batch], phases: Mapping[str, str] = pipeline.PHASES) -> list[Traffic]:
        """What goes from stage to stage."""
        size = lambda i: message(crossing(self.stages, batches[i]), self.dtype.itemsize)  # noqa: E731
        return pipeline.traffic(plan, self.mesh.pp, size, phases)

    def traffic(self, plan: Plan, batches: Sequence[Batch]) -> list[Traffic]:
        """What a step on these micro-batches sends, `exchanged` aside."""
        sent = [t for batch in batches for stage in self.stages.values() for t in stage.traffic(batch)]
        sums = self.holder.traffic(self.ops(plan), pipeline.PHASES)
        return [*sent, *self.between(plan, batches), *self.owed.traffic(), *sums, *self.scalars()]

    def scalars(self) -> list[Traffic]:
        """What a step sends beside all arrays: losses, the norm, and how often experts were chosen."""
        sent = [Traffic("all_reduce", self.losses.name, "step", 16), Traffic("all_reduce", self.everyone.name, "step", 8)]
        if self.routed:
            counts = message((len(self.routed), self.routed[0].router.count), 8)
            sent.append(Traffic("all_reduce", self.data.name, "step", counts))
        return sent

    def exchanged(self, batches: Sequence[Batch]) -> list[Traffic]:
        """What is sent to other ranks' experts, and back: of batches that have noted what was chosen."""
        return [t for batch in batches for stage in self.stages.values() for t in stage.exchanged(batch)]

    def ops(self, plan: Plan) -> Sequence[Op]:
        """Those of this rank."""
        return plan.ranks[self.mesh.pp.rank]

    def memory(self, plan: Plan, batches: Sequence[Batch]) -> dict[str, int]:
        """Bytes, by what they are for."""
        ops = self.ops(plan)
        owned = sum(at.stop - at.start for at in self.holder.ranges)
        kept = most_kept(self.stages, batches, ops)
        return {
            **self.holder.memory,
            "optimizer": 2 * owned * self.dtype.itemsize,
            **self.holder.most(ops),
            "saved": kept.saved,
            "later": kept.later,
        }

    def work(self, batches: Sequence[Batch]) -> list[Work]:
        """What is computed in forward, loss and backward of these."""
        return condensed(w for batch in batches for stage in self.stages.values() for w in stage.work(batch))


def _cuts(p: Parameter) -> tuple[str, ...]:
    """The data axes that cut it."""
    return tuple(name for name in p.layout.cuts if name in DATA)
