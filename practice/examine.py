"""The examiner: which parts are right, and what is wrong with the first that is not, asked as a person would ask.

not implemented -> crash or hang -> shape, dtype, NaN -> ingredients -> known mistakes, singly and in pairs -> a constant,
an axis -> a factor, an order, a dependence -> where the first wrong entry is. A right part is then judged by what it cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from practice import heaviest, repairs
from practice.known import costing, either
from practice.part import Case, Outcome, Part
from practice.say import Judged, diagnose
from practice.truth import Truth

# Counters that lines which talk add to, and how many such lines are shown.
TALK = ("numbers sent", "largest message", "messages", "rounds")
SHOWN = 3


class Examiner(Truth):
    """`failed`: the case of the part that the last `judge` spoke of, with its outcomes by rank; None where none failed."""

    failed: tuple[Case, list[Outcome]] | None = None

    def judge(self, cases: Sequence[Case], outcomes: Sequence[list[Outcome]], answer: str = "") -> list[Judged]:
        """A verdict for each part. outcomes: by case, one a rank; [] for cases that were not reached. answer: what was run."""
        self.answer, self.every = answer, cases
        verdict: list[Judged] = []
        self.failed = None
        for part in self.parts.values():
            # Of the parts after a wrong one it is only said whether they are right: one thing at a time.
            brief = any(j.status == "wrong" for j in verdict)
            verdict.append(self._judge(part, cases, outcomes, brief))
        return verdict

    def _judge(self, part: Part, cases: Sequence[Case], outcomes: Sequence[list[Outcome]], brief: bool) -> Judged:
        own = [(c, o) for c, o in zip(cases, outcomes, strict=True) if c.part == part.name]
        ran = [(c, o) for c, o in own if o]
        if any(o.error.get("type") == "NotImplementedError" for _, by_rank in ran for o in by_rank):
            return Judged(part.name, "todo")
        failing = []
        for case, by_rank in ran:
            if case.moved:
                continue
            wrong = {r: p for r, o in enumerate(by_rank) if (p := self.problem(case, r, o))}
            if wrong:
                failing.append((case, by_rank, wrong))
        if not ran or (not failing and len(ran) < len(own)):
            return Judged(part.name, "unjudged")
        if not failing:
            cost = self._cost(part, ran)
            if cost.status == "wrong" and not brief and not cost.mistakes:
                lines = repairs.found(self, self.failed[0], ran)
                cost = replace(cost, lines=[*cost.lines, *lines], mistakes=[f"repair: {x}" for x in lines[-1:]])
            return Judged(part.name, cost.status) if brief else cost
        if brief:
            return Judged(part.name, "wrong")
        # The smallest case that is not empty, in the wider dtype.
        failing.sort(key=lambda f: (f[0].dtype != "float64", 0 in f[0].size, abs(float(np.prod(f[0].size)))))
        self.failed = failing[0][:2]
        return diagnose(self, part, failing, ran)

    # --- what it cost

    def _cost(self, part: Part, ran: list) -> Judged:
        judged = Judged(part.name, "ok")
        for case, by_rank in ran:
            if case.moved or not (part.limits or part.advice):
                continue
            a = case.arrays(part)
            beyond = []
            for place, outcome in zip(self.places, by_rank, strict=True):
                on = f"rank {place.rank}: " if len(by_rank) > 1 else ""
                if part.advice and not judged.lines:
                    for counter, most in outcome.over(part.advice(a, place)).items():
                        judged.lines.append(f"{on}{outcome.counts[counter]:,} {counter}; {most:,} are enough")
                beyond.append((on, outcome, outcome.over(part.limits(a, place) if part.limits else {})))
            # The rank that shows most of it: rank 0 may not show all.
            on, outcome, over = max(beyond, key=lambda b: len(b[2]))
            if over:
                lines = [f"right, but {on}{outcome.counts[c]:,} {c} where {most:,} {_are(most)}" for c, most in over.items()]
                lines += ["An all_reduce is two rounds, any other collective one."] if "rounds" in over else []
                lines += _sent(outcome, self.answer) if set(over) & set(TALK) else []
                lines += heaviest.found(self, case) if "peak bytes" in over else []
                known = costing(self, ran, set(over))
                for m in known:
                    lines += ["", m.sentence, *([f"Seen in the wild: {m.seen}."] if m.seen else [])]
                if not known:
                    said, some = either(self, ran, set(over))
                    lines += ["", said, *(m.sentence for m in some)] if some else []
                self.failed = self.failed or (case, by_rank)
                return Judged(part.name, "wrong", case.label(part), lines, [m.name for m in known])
        return judged


def _sent(outcome: Outcome, answer: str) -> list[str]:
    """Which lines of the learner's file send how much, the most first."""
    text, lines = answer.splitlines(), []
    for number, sends in sorted(outcome.sent.items(), key=lambda s: -s[1])[:SHOWN]:
        if 0 < number <= len(text):
            lines.append(f"line {number} sends {sends:,}: {text[number - 1].strip()}")
    return lines


def _are(most: int) -> str:
    return "is allowed" if most in (0, 1) else "are enough"
