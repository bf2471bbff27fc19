"""Pipeline schedules as data: a plan is a list of operations a rank. Here it is written, read and checked.

F is the forward of one stage on one micro-batch, B its backward. A backward may come in halves: I gives the gradient of the
input, which the stage before waits for; W gives those of the weights, which nobody waits for. B is I and W at once.

`parallel/schedules.py` makes the known plans and `parallel/simulation.py` times any plan. An executor runs one as follows, and
then a plan that `check` lets pass cannot deadlock: sends never wait; before an operation that needs an array of another rank,
it receives from that rank, in the order of `sent`, until the array is there. What came early waits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

_WORD = re.compile(r"(\d+)([FIWB])(\d+)", re.ASCII)


class Op(NamedTuple):
    """One operation. `kind`: F, I, W or B. As text: 3F1 is the forward of stage 3 on micro-batch 1."""

    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


@dataclass(frozen=True)
class Plan:
    """`ranks`: the operations of each rank of pp, in order. All operations of a stage are on one rank, in any placement: a loop
    (stage s on rank s mod p), a V (stage s on rank s or 2p-1-s), or a user's own."""

    ranks: tuple[tuple[Op, ...], ...]

    @cached_property
    def place(self) -> dict[Op, int]:
        """The rank that has it, by operation."""
        return {op: rank for rank, ops in enumerate(self.ranks) for op in ops}

    @cached_property
    def rank_of(self) -> dict[int, int]:
        """The rank that holds it, by stage."""
        return dict(sorted((op.stage, rank) for op, rank in self.place.items()))

    @property
    def stages(self) -> int:
        return len(self.rank_of)

    @cached_property
    def micro_batches(self) -> int:
        return 1 + max((op.micro_batch for op in self.place), default=-1)

    def needs(self, op: Op) -> Op | None:
        """The operation of a neighbouring stage whose array this one takes in: F that of F before it, I and B that of I or B
        after it. None for W and at the ends."""
        if op.kind == "W" or op.stage == (0 if op.kind == "F" else self.stages - 1):
            return None
        if op.kind == "F":
            return op._replace(stage=op.stage - 1)
        half = Op("I", op.stage + 1, op.micro_batch)
        return half if half in self.place else half._replace(kind="B")

    def to(self, op: Op) -> int | None:
        """The rank that needs the array which this operation makes, perhaps its own; None for W and at the ends."""
        return None if op.kind == "W" else self.rank_of.get(op.stage + (1 if op.kind == "F" else -1))

    def sent(self, source: int, target: int) -> list[Op]:
        """The operations of `source` whose arrays go to `target`, in the order in which they are sent, and so received. A rank
        sends itself nothing: where the next stage is its own, the array is handed over."""
        return [op for op in self.ranks[source] if self.to(op) == target != source]

    def peaks(self, until: str = "I") -> list[int]:
        """The most chunks in flight at a time, by rank. A micro-batch on a stage is in flight from F until I, or until W; B is
        both."""
        peaks = []
        for ops in self.ranks:
            now = most = 0
            for op in ops:
                now += (op.kind == "F") - (op.kind in (until, "B"))
                most = max(most, now)
            peaks.append(most)
        return peaks

    def text(self) -> str:
        """A line a rank, words like 3F1 between commas: also the form of PyTorch's pipeline schedules."""
        return "".join(",".join(map(str, ops)) + "\n" for ops in self.ranks)


def read(text: str) -> Plan:
    """The plan of such a text. Blank words and blank lines at the end say nothing. Raises ValueError, naming line and word."""

    def operation(word: str, line: int) -> Op:
        if (found := _WORD.fullmatch(word)) is None:
            raise ValueError(f"line {line}: {word!r} is no operation: write stage, F, I, W or B, and micro-batch, as in 3F1")
        return Op(found[2], int(found[1]), int(found[3]))

    lines = enumerate(text.rstrip().split("\n"), 1)
    return Plan(tuple(tuple(operation(w, n) for w in map(str.strip, line.split(",")) if w) for n, line in lines))


def forward_only(rank_of: Mapping[int, int], micro_batches: int) -> Plan:
    """F alone, for validation; `rank_of`: each stage's rank. In the order in which they could begin; of two the later stage
    first."""
    held: list[list[int]] = [[] for _ in range(1 + max(rank_of.values()))]
    for stage, rank in rank_of.items():
        held[rank].append(stage)
    ops = ([Op("F", *at) for at in product(stages, range(micro_batches))] for stages in held)
    return Plan(tuple(tuple(sorted(own, key=lambda op: (op.stage + op.micro_batch, -op.stage))) for own in ops))


def check(plan: Plan, stages: int, micro_batches: int, backward: bool = True) -> None:
    """Raises ValueError, in one line, unless the plan is complete and runs to its end.

    Complete: each stage has of each micro-batch one F and either B, or I and W; all on one rank. Without `backward`, F alone.
    """
    seen: set[Op] = set()
    for rank, ops in enumerate(plan.ranks):
        for op in ops:
            if not (0 <= op.stage < stages and 0 <= op.micro_batch < micro_batches):
                most = f"stages 0 to {stages - 1} and micro-batches 0 to {micro_batches - 1}"
                raise ValueError(f"rank {rank} has {op}: use {most}")
            if (other := plan.rank_of[op.stage]) != rank:
                raise ValueError(f"stage {op.stage} is on ranks {rank} and {other}: put all its operations on one")
            if op in seen:
                raise ValueError(f"{op} is there twice, the second time on rank {rank}: leave one out")
            seen.add(op)
    right = ("FB", "FIW") if backward else ("F",)
    for stage, i in product(range(stages), range(micro_batches)):
        has = "".join(kind for kind in "FIWB" if Op(kind, stage, i) in seen)
        if has not in right:
            want = "one F and either B, or I and W" if backward else "one F alone"
            raise ValueError(f"stage {stage} has {' and '.join(has) or 'nothing'} of micro-batch {i}: give it {want}")
    for _ in in_order(plan):
        pass


def in_order(plan: Plan) -> Iterator[tuple[int, Op]]:
    """All operations of a complete plan with their ranks, in an order in which they can run: each rank's as planned, none
    before what it needs. Raises ValueError, after those that can run, if some cannot: it says who waits for what."""
    at, done = [0] * len(plan.ranks), set()
    # By what is needed: the rank that waits for it.
    waiting: dict[Op, int] = {}
    ready = list(range(len(plan.ranks)))
    while ready:
        rank = ready.pop()
        for op in plan.ranks[rank][at[rank] :]:
            if (missing := _missing(plan, op, done)) is not None:
                if plan.place[missing] == rank:
                    raise ValueError(f"rank {rank} has {op} before {missing}, which it needs: exchange them")
                waiting[missing] = rank
                break
            yield rank, op
            at[rank] += 1
            done.add(op)
            if op in waiting:
                ready.append(waiting.pop(op))
    if waiting:
        raise ValueError(_circle(plan, {rank: (plan.ranks[rank][at[rank]], need) for need, rank in waiting.items()}))


def _missing(plan: Plan, op: Op, done: set[Op]) -> Op | None:
    """Of what the operation needs, something that is not done: of its own stage, F before the backward and I before W."""
    own = None if op.kind == "F" else op._replace(kind="I" if op.kind == "W" else "F")
    return next((need for need in (own, plan.needs(op)) if need is not None and need not in done), None)


def _circle(plan: Plan, waits: dict[int, tuple[Op, Op]]) -> str:
    """`waits`: by rank, the operation at which it waits, and the one for which. Whoever waits does so for one who waits."""
    way = [min(waits)]
    while (following := plan.place[waits[way[-1]][1]]) not in way:
        way.append(following)
    way = way[way.index(following) :]
    told = ["{} waits at {} for {} of rank {}".format("which" if n else f"rank {r}", *waits[r], plan.place[waits[r][1]])
            for n, r in enumerate(way)]  # fmt: skip
    return ", ".join(told)
