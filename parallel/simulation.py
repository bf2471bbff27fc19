"""When each operation of a plan begins and ends, given what each takes. Exact with fractions.

Each rank does its operations in order, one at a time, and begins one as soon as what it needs is there. A message takes one
hop. Where it is *overlapped*, both ranks compute meanwhile; where it *blocks*, both their operations are longer by it, once
where one receives and sends, as both go at the same time.
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
    """`stages`: the times of F, I and W on one micro-batch, by stage; B takes I + W. `hop`: of a message between two ranks,
    `blocks`: which computes neither meanwhile."""

    stages: tuple[tuple[Time, Time, Time], ...]
    hop: Time = 0
    blocks: bool = False

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
    events = _events(plan)
    takes = {alike: costs.of(Op(*alike, 0)) for alike in {event[1] for event in events}}
    late, busy = (0, costs.hop) if costs.blocks else (costs.hop, 0)
    ends: list[Time] = []
    free: list[Time] = [0] * len(plan.ranks)
    times: list[list[tuple[Time, Time]]] = [[] for _ in plan.ranks]
    for rank, alike, need, comes, talks in events:
        begin = free[rank]
        if need is not None:
            there = ends[need] + late if comes else ends[need]
            if there > begin:
                begin = there
        end = begin + takes[alike] + busy if talks else begin + takes[alike]
        free[rank] = end
        ends.append(end)
        times[rank].append((begin, end))
    return Timing(plan, tuple(map(tuple, times)))


def _events(plan: Plan) -> list[tuple[int, tuple[str, int], int | None, bool, bool]]:
    """In an order in which they can run, of each operation: rank, kind and stage, the number of the one of another stage that
    it needs, whether that comes from another rank, and whether it takes or makes a message. Kept with the plan."""
    if (found := vars(plan).get("_events")) is None:
        found = vars(plan)["_events"] = _ordered(plan)
    return found


def _ordered(plan: Plan) -> list[tuple[int, tuple[str, int], int | None, bool, bool]]:
    """As `in_order`, but for plans of ten thousands of operations: plain tuples, each looked at once or twice."""
    place, rank_of, last = plan.place, plan.rank_of, plan.stages - 1
    alike = {(kind, stage): (kind, stage) for stage in rank_of for kind in "FIWB"}
    number: dict[tuple, int] = {}
    found, waiting, at, ready = [], {}, [0] * len(plan.ranks), list(range(len(plan.ranks)))
    while ready:
        rank = ready.pop()
        ops = plan.ranks[rank]
        for n in range(at[rank], len(ops)):
            kind, stage, i = op = ops[n]
            ahead = kind == "F"
            need, comes, goes = None, False, False
            if kind != "W":
                if stage != (0 if ahead else last):
                    before = stage - 1 if ahead else stage + 1
                    needed = (kind, before, i) if ahead or (kind, before, i) in place else ("BI"[kind == "B"], before, i)
                    if (need := number.get(needed)) is None:
                        waiting[needed] = rank
                        break
                    comes = rank_of[before] != rank
                if stage != (last if ahead else 0):
                    goes = rank_of[stage + 1 if ahead else stage - 1] != rank
            number[op] = len(found)
            found.append((rank, alike[kind, stage], need, comes, comes or goes))
            at[rank] = n + 1
            if op in waiting:
                ready.append(waiting.pop(op))
    if waiting or len(found) < len(place):
        # It says who waits for whom.
        for _ in in_order(plan):
            pass
    return found
