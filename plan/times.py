"""What a layout's parts and stages take on a machine: operations and verbs put together, seen and hidden, of one micro-batch.

An account says what is done (`plan.account`), a device how long an operation takes, `plan.collectives` how long a verb does.
The host's launches and the device's work do not add: the larger wins, smoothly.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

import numpy as np

from plan import collectives
from plan.account import PHASES, Account, Device, Part, Place, Transfer
from plan.collectives import Group
from plan.machine import Machine
from plan.strategy import Strategy

# The smoothness of "the larger of the device's time and the host's wins".
SHARPNESS = 6
# Of the backward beside which gradients are summed, what is of use; and what of the sums is always seen.
ROOM, SEEN = 0.9, 0.1
AXES = ("tp", "cp", "ep", "pp", "dp")
# Layouts whose stages are kept.
KEPT = 4096


class Spent(NamedTuple):
    """Seconds of one micro-batch in one phase: computing; in verbs, by AXES, that are seen and that are hidden; of the host."""

    compute: float
    exposed: tuple[float, ...]
    hidden: tuple[float, ...]
    host: float

    @property
    def device(self) -> float:
        return self.compute + sum(self.exposed)

    @property
    def whole(self) -> float:
        return larger(self.device, self.host)


_NONE = (0.0,) * 5


def larger(device: float, host: float) -> float:
    """The larger of two that do not add, smoothly."""
    top = max(device, host)
    return top * ((device / top) ** SHARPNESS + (host / top) ** SHARPNESS) ** (1 / SHARPNESS) if top else 0.0


def added(spents: Iterable[tuple[Spent, float]]) -> Spent:
    compute = host = 0.0
    exposed = hidden = _NONE
    for spent, n in spents:
        compute += n * spent.compute
        host += n * spent.host
        if spent.exposed is not _NONE:
            exposed, hidden = _and(exposed, n, spent.exposed), _and(hidden, n, spent.hidden)
    return Spent(compute, exposed, hidden, host)


def _and(a: tuple[float, ...], n: float, b: tuple[float, ...]) -> tuple[float, ...]:
    """a + n b, of AXES: written out, as a search does it millions of times."""
    (a0, a1, a2, a3, a4), (b0, b1, b2, b3, b4) = a, b
    return a0 + n * b0, a1 + n * b1, a2 + n * b2, a3 + n * b3, a4 + n * b4


class StageTimes(NamedTuple):
    """Of one stage on one micro-batch, by PHASES; and as a schedule has them: F, and either B as I, or I and W."""

    phases: tuple[Spent, ...]
    F: float
    I: float  # noqa: E741
    W: float

    @property
    def B(self) -> float:
        return self.I + self.W


class Stages:
    """The times of all stages, and of each rank of pp: those of one micro-batch on all its stages (`F`, `B`), and what goes
    before and after it on the first stages of the ranks before (`ahead`, `behind`)."""

    def __init__(self, times: list[StageTimes], s: Strategy) -> None:
        self.times = times
        self.held = [[times[n] for n in s.stages_of(rank)] for rank in range(s.pp)]
        self.F = [sum(t.F for t in held) for held in self.held]
        self.B = [sum(t.B for t in held) for held in self.held]
        first = [held[0] for held in self.held]
        self.ahead = [0.0, *accumulate(t.F for t in first[:-1])]
        self.behind = [0.0, *accumulate(t.B for t in first[:-1])]
        self.talking = _talking(s.pp, s.rank_of)
        self._bounds: dict[tuple[int, float, bool, bool, float], float] = {}

    def at(self, pace: float, s: Strategy) -> Stages:
        """So many times as long."""
        if pace == 1:
            return self
        # Most stages are one and the same.
        each = {id(t): t for t in self.times}
        slower = {at: StageTimes(tuple(added([(of, pace)]) for of in t.phases), pace * t.F, pace * t.I, pace * t.W)
                  for at, t in each.items()}  # fmt: skip
        return Stages([slower[id(t)] for t in self.times], s)

    def work(self, m: int, hop: float) -> list[float]:
        """Seconds of each rank with m micro-batches, without what it waits for; `hop`: of a message, where it blocks."""
        return [m * (F + B + hop * talking) for F, B, talking in zip(self.F, self.B, self.talking, strict=True)]

    def bound(self, m: int, hop: float, skewed: bool, halved: bool, rested: float) -> float:
        """The least time of the busiest rank with m micro-batches: what it computes, after what it must wait for at its begin
        (but where steps are `skewed`), and before what must follow at its end (but where backwards are `halved`); all of
        it faster by what it has `rested` meanwhile."""
        if (known := self._bounds.get(key := (m, hop, skewed, halved, rested))) is None:
            work, ahead, behind = map(np.array, (self.work(m, hop), self.ahead, self.behind))
            around = 0.0 if skewed else ahead + hop * np.arange(len(work)) + (0.0 if halved else behind)
            known = self._bounds[key] = max(0.0, float(rested * work.max() + (1 - rested) * (work + around).max()))
        return known


class Tail(NamedTuple):
    """After the last backward of a rank: sums of gradients and gathers of weights that are seen and hidden; the tied table's
    sum; the optimizer."""

    exposed: float
    hidden: float
    tied: float
    optimizer: float

    @property
    def seconds(self) -> float:
        return self.exposed + self.tied + self.optimizer


@lru_cache(1024)
def _talking(pp: int, of: tuple[int, ...]) -> list[int]:
    """Of a micro-batch, the operations of each rank of pp that take or make a message: forward and backward of each stage with
    a neighbour on another rank. `of`: the rank of each stage."""
    found, last = [0] * pp, len(of) - 1
    for n, rank in enumerate(of):
        found[rank] += 2 * ((n > 0 and of[n - 1] != rank) or (n < last and of[n + 1] != rank))
    return found


def axis_of(sent: Transfer) -> str:
    """Of AXES: several joined, and ZeRO's own, are dp's."""
    return sent.axis if sent.axis in AXES else "dp"


class Clock:
    """Times parts, stages and what surrounds them on one machine. What was worked out for a part is kept and used again."""

    def __init__(self, account: Account, machine: Machine, device: Device) -> None:
        self.account, self.machine, self.device = account, machine, device
        self._spent = lru_cache(8192)(self._part_spent)
        self._alike = lru_cache(4096)(self._stage_times)
        self._known: dict[Hashable, Stages] = {}
        # By the operations' identity; they are held, so that no others get it.
        self._took: dict[int, tuple[tuple, dict[str, dict[str, float]]]] = {}

    def group(self, axis: str, sizes: tuple[int, ...], shards: int = 1) -> Group:
        """The ranks that meet in a verb of this axis, or of several joined, of a mesh of these sizes. ZeRO's own: "shards" of
        one copy of the weights, "replicas" of one shard."""
        tp = sizes[-1]
        if axis in ("shards", "replicas"):
            data = prod(sizes[1:4])
            sizes, axis = (1, data // shards, 1, shards, tp), "cp" if axis == "shards" else "dp"
        return collectives.group(sizes, tuple(axis.split(",")), self.machine.gpus_per_node)

    def transfer(self, sent: Transfer, sizes: tuple[int, ...], shards: int = 1) -> tuple[float, Group]:
        """Seconds of all its calls, and who meets."""
        g = self.group(sent.axis, sizes, shards)
        return sent.calls * collectives.seconds(sent.verb, sent.message_bytes, g, self.machine), g

    def _part_spent(self, part: Part, sizes: tuple[int, ...], shards: int) -> tuple[Spent, ...]:
        return tuple(self._in_phase(part, phase, sizes, shards) for phase in PHASES)

    def _computed(self, part: Part, phase: str) -> dict[str, float]:
        """Seconds of what is computed, by what may hide a transfer."""
        return {"launches": part.kernels.get(phase, 0) * self.device.kernel} | self._operated(part)[phase]

    def _operated(self, part: Part) -> dict[str, dict[str, float]]:
        """Of the operations, by phase. Parts that differ in what they send share them."""
        if (known := self._took.get(id(part.operations))) is None:
            if len(self._took) >= KEPT:
                self._took.clear()
            found: dict[str, dict[str, float]] = {phase: {} for phase in PHASES}
            for op in part.operations:
                attends = op.kind == "unfused" or op.kind.startswith("flash")
                kind = "attend" if attends else "products" if op.kind == "product" else "other"
                of = found[op.phase]
                of[kind] = of.get(kind, 0.0) + self.device.seconds(op, part.dtype)
            known = self._took[id(part.operations)] = part.operations, found
        return known[1]

    def sent(self, part: Part, phase: str, sizes: tuple[int, ...], shards: int) -> list[tuple[Transfer, Group, float, float]]:
        """Of each transfer of a phase who meets, and its seconds: all, and those that are hidden."""
        mine = [t for t in part.transfers if t.phase == phase]
        if not mine:
            return []
        room, found, seen = self._computed(part, phase), [], 0.0
        compute = sum(room.values())
        # What may hide behind everything comes last, when that is known.
        for sent in sorted(mine, key=lambda t: t.beside in ("unit", "step")):
            took, g = self.transfer(sent, sizes, shards)
            if sent.beside == "unit":
                room.setdefault("unit", compute + seen)
            elif sent.beside == "step":
                room.setdefault("step", ROOM * sum(sum(self._computed(part, other).values()) for other in PHASES) + seen)
            away = 0.5 * took if sent.beside == "half" else min(took, room.get(sent.beside, 0.0))
            if sent.beside in room:
                room[sent.beside] -= away
            seen += took - away
            found.append((sent, g, took, away))
        return found

    def _in_phase(self, part: Part, phase: str, sizes: tuple[int, ...], shards: int) -> Spent:
        compute, host = sum(self._computed(part, phase).values()), part.kernels.get(phase, 0) * self.device.host
        sent = self.sent(part, phase, sizes, shards)
        if not sent:
            return Spent(compute, _NONE, _NONE, host)
        exposed, hidden = dict.fromkeys(AXES, 0.0), dict.fromkeys(AXES, 0.0)
        for transfer, g, took, away in sent:
            axis = axis_of(transfer)
            exposed[axis] += took - away
            hidden[axis] += away
            compute += away * collectives.slowed(g, self.machine)
        return Spent(compute, tuple(exposed.values()), tuple(hidden.values()), host)

    def stages(self, s: Strategy) -> Stages:
        """Of each stage the slowest of the ranks that have it."""
        key = self.account.alike(s)
        if (known := self._known.get(key)) is None:
            if len(self._known) >= KEPT:
                self._known.clear()
            each = [self._of_place(self.account.parts(s, place), s.stage_shape, s) for place in self.account.places(s)]
            known = self._known[key] = Stages([max(of, key=lambda t: t.F + t.B) for of in zip(*each, strict=True)], s)
        return known

    def _of_place(self, stages: list[tuple], sizes: tuple[int, ...], s: Strategy) -> list[StageTimes]:
        """Of each stage. Few of them differ."""
        times = {id(parts): parts for parts in stages}
        times = {n: self._alike(parts, sizes, s.shards, s.halved) for n, parts in times.items()}
        return [times[id(parts)] for parts in stages]

    def _stage_times(self, parts: tuple, sizes: tuple[int, ...], shards: int, halved: bool) -> StageTimes:
        each = [(self._spent(part, sizes, shards), n) for part, n in parts]
        phases = tuple(added((spent[n], times) for spent, times in each) for n in range(len(PHASES)))
        ahead, again, back, weights = phases
        if halved:
            return StageTimes(phases, ahead.whole, added([(again, 1), (back, 1)]).whole, weights.whole)
        return StageTimes(phases, ahead.whole, added([(again, 1), (back, 1), (weights, 1)]).whole, 0.0)

    def hop(self, s: Strategy) -> float:
        """Of a message between two stages; where each rank of tp has sent its part of whole rows, gathered again."""
        if s.pp == 1:
            return 0.0
        sizes, n = s.shape, self.account.hop_bytes(s)
        took = collectives.hop(n, self.group("pp", sizes), self.machine)
        if s.scatter_gather and not s.sequence_parallel and s.tp > 1:
            took += collectives.seconds("all_gather", n * s.tp, self.group("tp", sizes), self.machine)
        return took

    def tail(self, s: Strategy, rank: int, place: Place, room: float, first: float) -> Tail:
        """`room`: seconds of the rank's last backwards, beside which sums go on; `first`: of its first forwards, beside which
        gathers do."""
        once, sizes = self.account.once(s, rank, place), s.shape
        sums = sum(self.transfer(t, sizes, s.shards)[0] for t in once.sums)
        gathers = sum(self.transfer(t, sizes, s.shards)[0] for t in once.gathers)
        tied = sum(t.calls * self._tied(t, sizes) for t in once.between)
        whole = sums + gathers
        exposed = whole
        if s.overlap:
            exposed = max(sums - ROOM * room, 0.0) + max(gathers - ROOM * first, 0.0)
            exposed = max(exposed, SEEN * whole)
        device = sum(self.device.seconds(op, s.dtype) for op in once.update) + once.kernels * self.device.kernel
        return Tail(exposed, whole - exposed, tied, larger(device, once.kernels * self.device.host))

    def _tied(self, sent: Transfer, sizes: tuple[int, ...]) -> float:
        """Between the first and the last rank of pp, and nobody else."""
        apart = collectives.group(sizes, ("pp",), self.machine.gpus_per_node)
        two = Group(2, 2, 1) if apart.nodes == 1 else Group(2, 1, 2)
        return collectives.seconds(sent.verb, sent.message_bytes, two, self.machine)
