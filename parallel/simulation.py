"""When each operation of a plan begins and ends, given what each takes. Exact with fractions.

Each rank does its operations in order, one at a time, and begins one as soon as what it needs is there. A message takes one
hop, during which both ranks compute.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from parallel.schedule import Op, Plan, in_order

Time = float | Fraction


@dataclass(frozen=True)
class Costs:
    """`stages`: the times of F, I and W on one micro-batch, by stage; B takes I + W. `hop`: of a message between two ranks."""

    stages: tuple[tuple[Time, Time, Time], ...]
    hop: Time = 0

    @classmethod
    def alike(cls, plan: Plan, F: Time, I: Time, W: Time, hop: Time = 0) -> Costs:  # noqa: E741
        """The same on every rank: `F`, `I` and `W` are of one micro-batch in all stages of a rank, which share them evenly."""
        held = Counter(plan.rank_of.values())
        return cls(tuple((F / held[rank], I / held[rank], W / held[rank]) for rank in plan.rank_of.values()), hop)

    def of(self, op: Op) -> Time:
        F, I, W = self.stages[op.stage]  # noqa: E741
        return {"F": F, "I": I, "W": W, "B": I + W}[op.kind]


@dataclass(frozen=True)
class Timing:
    """`times`: begin and end of each operation, by rank, as `plan.ranks` has them. The first begins at 0."""

    plan: Plan
    times: tuple[tuple[tuple[Time, Time], ...], ...]

    @cached_property
    def makespan(self) -> Time:
        """From the first begin of all to the last end of all."""
        return max(end for rank in self.times for _, end in rank)

    @cached_property
    def span(self) -> Time:
        """The longest time of one rank from its first begin to its last end: the cost of 2401.10241. Between the two lies what
        steps that follow one another without a barrier can share."""
        return max(rank[-1][1] - rank[0][0] for rank in self.times if rank)

    @property
    def busy(self) -> list[Time]:
        """Of each rank: the time in which it computes."""
        return [sum(end - begin for begin, end in rank) for rank in self.times]

    def bubble(self, whole: Time) -> Time:
        """The share of `whole`, the makespan or the span, in which the mean rank idles: 1 - m (F + I + W) / whole."""
        return 1 - self._mean / whole

    @property
    def _mean(self) -> Time:
        total = sum(self.busy)
        return Fraction(total, len(self.times)) if isinstance(total, int | Fraction) else total / len(self.times)


def simulate(plan: Plan, costs: Costs) -> Timing:
    """Raises ValueError for a plan that does not run to its end."""
    ends: dict[Op, Time] = {}
    free: list[Time] = [0] * len(plan.ranks)
    times: list[list[tuple[Time, Time]]] = [[] for _ in plan.ranks]
    for rank, op in in_order(plan):
        begin = free[rank]
        if (need := plan.needs(op)) is not None:
            begin = max(begin, ends[need] + (costs.hop if plan.place[need] != rank else 0))
        ends[op] = free[rank] = begin + costs.of(op)
        times[rank].append((begin, ends[op]))
    return Timing(plan, tuple(map(tuple, times)))
