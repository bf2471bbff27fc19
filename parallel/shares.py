"""Of which gradients and weights a rank keeps its share only, in closed form: what is cut over whom, what a step sends, what
comes and goes. `parallel.sharded` has the arrays."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from parallel import residence
from parallel.flat import Numbering
from parallel.holder import Over
from parallel.ledger import Traffic
from parallel.parameter import Fused, Parameter
from parallel.rows import cut_rows
from parallel.schedule import Op


class Share:
    """This rank's share of what some homes hold, whose entries are cut over the ranks of `over`; `start`: the number of the
    first. `late`: gradients are owed another sum first, so that they stay whole until the end of a step. `gathers`: so much of
    the weights is all that stays."""

    def __init__(self, homes: Sequence[Parameter | Fused], over: Over, late: bool, gathers: bool, start: int) -> None:
        self.over, self.late, self.gathers = over, late, gathers
        self.numbering = Numbering([p for home in homes for p, _ in home.parts])
        self.cut = cut_rows(self.numbering.size, over.axis.size)
        here = slice(*self.cut.bounds[over.axis.rank])
        self.at = slice(start + here.start, start + here.stop)

    @property
    def nbytes(self) -> int:
        """Of the share."""
        return (self.at.stop - self.at.start) * self.numbering.dtype.itemsize


class Shares:
    """`units`: the homes of each, those of the root first; what a rank has none of is empty. `over_of`: over which ranks each
    home's gradient is summed. `parts`: of each stage the parameters of each part, in the order of forward. `late`: as Share
    has it. `gathers`: stage 3 of ZeRO, else 2. `ahead`: gathers and sums go on while the rank computes."""

    share: type[Share] = Share

    def __init__(
        self,
        units: Sequence[Sequence[Parameter | Fused]],
        over_of: Mapping[Parameter | Fused, Over],
        parts: Mapping[int, Sequence[Sequence[Parameter]]],
        late: Collection[Parameter | Fused],
        gathers: bool,
        ahead: bool = True,
        dtype: np.dtype | str | None = None,
    ) -> None:
        self.over_of, self.gathers, self.ahead = over_of, gathers, ahead
        self.units: list[list[Share]] = []
        start = 0
        for homes in units:
            by_ranks: dict[tuple[Over, bool], list] = {}
            for home in homes:
                by_ranks.setdefault((over_of[home], home in late), []).append(home)
            self.units.append([])
            for (over, is_late), own in by_ranks.items():
                self.units[-1].append(self.share(own, over, is_late, gathers, start))
                start += self.units[-1][-1].numbering.size
        self.numbering = Numbering([p for s in self.shards for p in s.numbering.parameters], dtype)
        self._unit_of = {home: n for n, homes in enumerate(units) for home in homes}
        # By stage: the unit of each part, as residence has them.
        self.parts = {stage: [self._unit(parameters) for parameters in of] for stage, of in parts.items()}

    @property
    def shards(self) -> list[Share]:
        return [shard for unit in self.units for shard in unit]

    @property
    def split(self) -> bool:
        return True

    @property
    def ranges(self) -> list[slice]:
        """The numbers of the entries that this rank updates."""
        return [shard.at for shard in self.shards]

    def _unit(self, parameters: Iterable[Parameter]) -> int:
        """What belongs to a part: of no parameters, the root."""
        return next((self._unit_of[p.home] for p in parameters), residence.ROOT)

    def _size(self, unit: int, late: bool = True) -> int:
        return sum(shard.numbering.nbytes for shard in self.units[unit] if late or not shard.late)

    def traffic(self, ops: Sequence[Op], phases: Mapping[str, str]) -> list[Traffic]:
        """What a step of these operations sends."""
        return [*(t for sent in self.within(ops, phases).values() for t in sent), *self.after()]

    def within(self, ops: Sequence[Op], phases: Mapping[str, str]) -> dict[tuple[int, int, str], list[Traffic]]:
        """What of it is sent for a part, by its stage, its place there, and the kind of operation that gathers or scatters."""
        uses = iter(residence.uses(ops, self.parts, phases) if self.gathers else ())
        fills = iter(residence.fills(ops, self.parts, phases))
        found: dict[tuple[int, int, str], list[Traffic]] = {}
        for op in ops:
            places = range(len(self.parts[op.stage]))
            for place in places if op.kind == "F" else reversed(places):
                sent = found.setdefault((op.stage, place, op.kind), [])
                if self.gathers and op.kind != "W" and (use := next(uses)).gathers:
                    sent += [_of(shard, "all_gather", use.phase) for shard in self.units[use.unit]]
                if op.kind in "BW" and (fill := next(fills)).sends:
                    sent += [_of(shard, "reduce_scatter", fill.phase) for shard in self.units[fill.unit] if not shard.late]
        return found

    def after(self) -> list[Traffic]:
        """What of it is sent when all backwards are done."""
        sent = []
        for shard in self.shards:
            sent += [_of(shard, "reduce_scatter", "backward")] if shard.late else []
            if (rest := shard.over.rest) is not None:
                sent.append(Traffic("all_reduce", rest.name, "backward", shard.nbytes))
            sent += [] if self.gathers else [_of(shard, "all_gather", "step")]
        return sent

    def gathered(self, ops: Sequence[Op], phases: Mapping[str, str]) -> list[Traffic]:
        """What is sent so that the weights are there."""
        every = residence.uses(ops, self.parts, phases) if self.gathers else []
        return [_of(shard, "all_gather", use.phase) for use in every if use.gathers for shard in self.units[use.unit]]

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of what stays."""
        own = sum(shard.nbytes for shard in self.shards)
        late = sum(shard.numbering.nbytes for shard in self.shards if shard.late)
        return {"weights": own if self.gathers else self.numbering.nbytes, "gradients": own + late}

    def most(self, ops: Sequence[Op]) -> dict[str, int]:
        """Bytes of what comes and goes in these operations, at most: units that are gathered, gradients that are not summed
        yet."""
        phases = dict.fromkeys("FIBW", "")
        uses = residence.uses(ops, self.parts, phases) if self.gathers else []
        fills = residence.fills(ops, self.parts, phases)
        return {
            "gathered": residence.most_gathered(uses, self._size, self.ahead),
            "unsummed": residence.most_filled(fills, lambda unit: self._size(unit, late=False), self.ahead),
        }


def _of(shard: Share, verb: str, phase: str) -> Traffic:
    return Traffic(verb, shard.over.axis.name, phase, shard.numbering.nbytes)
