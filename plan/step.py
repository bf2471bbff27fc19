"""What a step takes: the times of a layout's stages, put into the events of the schedule that an executor would run.

    estimate = Planner(account, machine).estimate(strategy)

`parallel.simulation` times the plan of `parallel.schedules` with a stage's F, I and W. With many more micro-batches than ranks
two shorter plans are timed and extended: the steady state is linear in them. After a rank's last backward come its sums of
gradients, less what is hidden, and the optimizer. The step is the slowest rank's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import log, sqrt

from parallel.schedule import Plan
from parallel.schedules import plan as planned
from parallel.simulation import Costs, Timing, simulate
from plan.account import AGAIN, FORWARD, INPUT, PHASES, WEIGHTS, Account, Device, Facts
from plan.here import Cpu, Here
from plan.kernels import Gpu
from plan.machine import Machine
from plan.memory import USABLE
from plan.strategy import Strategy
from plan.times import AXES, Clock, Stages, StageTimes, Tail, added

# How many micro-batches a rank of pp the two shorter plans have. Fewer are not in the steady state yet where stages are uneven.
EXTENDED = {"gpipe": (2, 3), "1f1b": (4, 5), "interleaved": (5, 7), "zb-h1": (2, 3), "zb-h2": (4, 6), "zb-v": (4, 5),
            "dualpipe-v": (5, 7)}  # fmt: skip
# Stages, and operations of a step, that are timed one by one.
MOST_STAGES, MOST = 2**12, 2**22
# Plans of so many ranks and micro-batches are kept.
_plan_of = lru_cache(64)(planned)


@dataclass(frozen=True)
class Estimate:
    """What a layout takes, keeps and reaches. `seconds`: of the slowest rank, adding up to `iteration`; `memory`: by pp rank
    and kind; `in_flight`: chunks at the peak, by pp rank; `rooms`: what may hide a pp rank's sums and gathers, its last
    backwards and its first forwards."""

    strategy: Strategy
    machine: Machine
    iteration: float
    makespan: float
    span: float
    bubble: float
    seconds: dict[str, float]
    exposed: dict[str, float]
    hidden: dict[str, float]
    slowest: int
    memory: list[dict[str, float]]
    in_flight: list[int]
    facts: Facts
    stages: list[StageTimes] = field(repr=False)
    hop: float
    rooms: list[tuple[float, float]] = field(repr=False)

    @property
    def fullest(self) -> int:
        totals = [sum(kinds.values()) for kinds in self.memory]
        return totals.index(max(totals))

    @property
    def peak_bytes(self) -> float:
        return sum(self.memory[self.fullest].values())

    @property
    def capacity(self) -> float:
        return self.machine.memory_gib * 2**30

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= USABLE * self.capacity

    @property
    def tokens_per_second(self) -> float:
        return self.strategy.batch * self.strategy.sequence_length / self.iteration

    @property
    def tflops(self) -> float:
        """Model operations a second and GPU, in 1e12."""
        return self.facts.model_flops / (1e12 * self.strategy.ranks * self.iteration)

    def _share(self, flops: float) -> float:
        return flops / (self.strategy.ranks * self.machine.peak(self.strategy.dtype) * self.iteration)

    @property
    def mfu(self) -> float:
        return self._share(self.facts.model_flops)

    @property
    def hfu(self) -> float:
        return self._share(self.facts.hardware_flops)

    @property
    def whole_hfu(self) -> float:
        """With all of attention counted, as papers on GPT do."""
        return self._share(self.facts.whole_flops)


class Planner:
    """Times layouts on one machine, by one account. `causal`: whether model operations count causal attention, or all of it;
    `plan`: of a user's own, in place of the schedule's.

    `estimate` and `bound` raise ValueError for what the machine cannot do.
    """

    def __init__(
        self,
        account: Account,
        machine: Machine,
        device: Device | None = None,
        causal: bool = True,
        plan: Plan | None = None,
    ) -> None:
        self.account, self.machine, self.causal, self.plan = account, machine, causal, plan
        self.clock = Clock(account, machine, device or (Cpu(machine) if isinstance(machine, Here) else Gpu(machine)))

    def memory(self, s: Strategy, rank: int) -> dict[str, float]:
        """Bytes by kind of the fullest of a pp rank's places."""
        return max(
            (self.account.memory(s, rank, place) for place in self.account.places(s)), key=lambda kinds: sum(kinds.values())
        )

    def fullest(self, s: Strategy) -> tuple[float, int, dict[str, float]]:
        """Bytes of the fullest rank, its place on pp, and its kinds."""
        asked = [(rank, self.memory(s, rank)) for rank in self.account.fullest(s)]
        return max(((sum(kinds.values()), rank, kinds) for rank, kinds in asked), key=lambda f: f[0])

    def fits(self, s: Strategy) -> bool:
        return self.fullest(s)[0] <= USABLE * self.machine.memory_gib * 2**30

    def estimate(self, s: Strategy) -> Estimate:
        if s.stages > MOST_STAGES or 2 * s.stages * shortened(s.schedule, s.pp, s.micro_batches)[1] > MOST:
            raise ValueError(f"{s.stages} stages are too many to be timed one by one: use a smaller pp, or fewer chunks")
        stages, hop = self.clock.stages(s), self.clock.hop(s)
        begins, ends = self.pipeline(s, stages, hop)
        pace = self._pace(s, max(stages.work(s.micro_batches, hop if s.blocks_on_messages else 0.0)), begins, ends)
        stages, hop, begins, ends = stages.at(pace, s), pace * hop, [pace * t for t in begins], [pace * t for t in ends]
        places = self.account.places(s)
        rooms = list(zip(stages.B, stages.F, strict=True))
        tails = [max((self.clock.tail(s, rank, place, *room) for place in places), key=lambda t: t.seconds)
                 for rank, room in enumerate(rooms)]  # fmt: skip
        skewed = s.schedule == "zb-h2"
        totals = [end - skewed * begin + tail.seconds for begin, end, tail in zip(begins, ends, tails, strict=True)]
        slowest = totals.index(max(totals))
        makespan, spans = max(ends), [end - begin for begin, end in zip(begins, ends, strict=True)]
        longest = spans.index(max(spans))
        m = s.micro_batches
        busy = m * (stages.F[longest] + stages.B[longest])
        factor = 1 + s.jitter * sqrt(2 * log(s.ranks)) if s.jitter and s.ranks > 1 else 1.0
        seconds, exposed, hidden = self._told(s, stages, hop, tails[slowest], totals[slowest], slowest)
        seconds["jitter"] = totals[slowest] * (factor - 1)
        flight = [self.account.in_flight(s, rank) for rank in range(s.pp)] if self.plan is None else self.plan.peaks("W")
        memory = [self.memory(s, rank) for rank in range(s.pp)]
        idle = max(0.0, 1 - busy / spans[longest]) if spans[longest] else 0.0
        facts = self.account.model(s, self.causal)
        return Estimate(s, self.machine, totals[slowest] * factor, makespan, spans[longest], idle, seconds, exposed, hidden,
                        slowest, memory, flight, facts, stages.times, hop, rooms)  # fmt: skip

    def _pace(self, s: Strategy, work: float, begins: Sequence[float], ends: Sequence[float]) -> float:
        """What a step lasts, as a share of what the machine sustains: GPUs that wait draw less power, and clock higher. It
        counts in which share of the time even the busiest rank, of so much `work`, waits."""
        longest = max(end - (s.schedule == "zb-h2") * begin for begin, end in zip(begins, ends, strict=True))
        return 1 - self.machine.rested * max(0.0, 1 - work / longest) if longest else 1.0

    def _told(
        self, s: Strategy, stages: Stages, hop: float, tail: Tail, total: float, rank: int
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """Where the slowest rank's time goes; what is left over is the bubble."""
        m, held = s.micro_batches, stages.held[rank]
        spent = {phase: added((t.phases[n], m) for t in held) for n, phase in enumerate(PHASES)}
        seen, away = ([sum(getattr(p, kind)[n] for p in spent.values()) for n in range(5)] for kind in ("exposed", "hidden"))
        exposed, hidden = dict(zip(AXES, seen, strict=True)), dict(zip(AXES, away, strict=True))
        messages = hop * m * stages.talking[rank]
        exposed["pp"] += tail.tied + (messages if s.blocks_on_messages else 0.0)
        hidden["pp"] += 0.0 if s.blocks_on_messages else messages
        exposed["dp"] += tail.exposed
        hidden["dp"] += tail.hidden
        computing = {"forward": spent[FORWARD].compute, "backward": spent[INPUT].compute + spent[WEIGHTS].compute,
                     "recompute": spent[AGAIN].compute}  # fmt: skip
        verbs = sum(sum(p.exposed) for p in spent.values())
        host = m * (stages.F[rank] + stages.B[rank]) - sum(computing.values()) - verbs
        rest = {"host": max(host, 0.0), "optimizer": tail.optimizer}
        bubble = total - sum(computing.values()) - sum(rest.values()) - sum(exposed.values())
        return computing | {"host": rest["host"], "bubble": bubble, "optimizer": tail.optimizer}, exposed, hidden

    def pipeline(self, s: Strategy, stages: Stages, hop: float) -> tuple[list[float], list[float]]:
        """When each rank of pp begins and ends its operations."""
        costs, m, p = Costs(tuple((t.F, t.I, t.W) for t in stages.times), hop, s.blocks_on_messages), s.micro_batches, s.pp
        if p == 1:
            # Nobody waits.
            return [0.0], [m * (stages.F[0] + stages.B[0])]
        few, more = (m, m) if self.plan is not None else shortened(s.schedule, p, m)
        first = _ends(simulate(self.planned(s, few), costs))
        if few == m:
            return first
        second = _ends(simulate(self.planned(s, more), costs))
        steady = (m - few) / (more - few)
        # The busiest rank may still wait in the shorter plans, and less and less: from then on, its own work is the least.
        work = stages.work(m - more, hop if s.blocks_on_messages else 0.0)
        ends = [max(a + steady * (b - a), b + w) for a, b, w in zip(first[1], second[1], work, strict=True)]
        return first[0], ends

    def planned(self, s: Strategy, micro_batches: int) -> Plan:
        """The operations of each rank of pp."""
        return self.plan or _plan_of(s.schedule, s.pp, micro_batches, s.chunks)

    def bound(self, s: Strategy) -> float:
        """Less than or equal to what `estimate` says, at a fraction of its cost: the busiest rank, after what it must wait for
        at its begin and before what must follow at its end, the optimizer and what is seen of the sums of gradients."""
        stages, hop = self.clock.stages(s), self.clock.hop(s)
        # A backward in halves may end with a W, after which nobody waits; zb-h2's steps follow one another skewed.
        hop = hop if s.blocks_on_messages else 0.0
        return stages.bound(s.micro_batches, hop, s.schedule == "zb-h2", s.halved, self.machine.rested)


def shortened(schedule: str, p: int, m: int) -> tuple[int, int]:
    """Two numbers of micro-batches that tell how the time goes on with more; or twice m where it is small."""
    turns = EXTENDED[schedule]
    few, more = (n * p + m % p for n in turns)
    return (m, m) if m <= more else (few, more)


def _ends(timing: Timing) -> tuple[list[float], list[float]]:
    return [rank[0][0] for rank in timing.times], [rank[-1][1] for rank in timing.times]
