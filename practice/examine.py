"""The examiner: which parts are right, and what is wrong with the first that is not, asked as a person would ask.

not implemented -> crash or hang -> shape, dtype, NaN -> ingredients -> known mistakes, singly and in pairs -> a factor, an
order, a dependence -> where the first wrong entry is. A part that is right is then judged by what it cost.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

from practice import probes, translate
from practice.axis import Place
from practice.compare import longest_sum, same, tolerances, wrong_entries
from practice.exercise import Exercise, load
from practice.part import Case, Mistake, Outcome, Part, float64
from practice.simulate import simulate

# How long the examiner may look for pairs of mistakes, in seconds of its own computing.
PAIRS = 1.0
FILE = "solution.py"
URGENT = ("error", "silent", "hang")


@dataclass
class Judged:
    """A part's verdict. status: ok, wrong, todo (not implemented), unjudged."""

    part: str
    status: str
    case: str = ""
    lines: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Right:
    """The right answer in one case on one rank, and by how much rounding may move it."""

    results: dict[str, Any]
    allowed: dict[str, np.ndarray]


class Examiner:
    """`reference`: the module of references, handed to check files."""

    def __init__(self, exercise: Exercise, reference: Any) -> None:
        self.exercise, self.reference = exercise, reference
        self.parts = {p.name: p for p in exercise.parts}
        self.places = [Place(r, exercise.ranks) for r in range(exercise.ranks)]
        self.right = cache(self._right)
        self.spaces = cache(self._spaces)
        # What comes of a known mistake is asked for again and again.
        self.remembered = lru_cache(4096)(self.simulated)

    # --- what is right

    def _spaces(self, source: str, over: bool = False) -> list[dict[str, Any]]:
        """Namespaces of a source, one a rank; `over`: on top of the solution's."""
        before = [load(self.exercise.solution, FILE) if over else None for _ in self.places]
        return [load(source, FILE, b) | {"__source__": source} for b in before]

    def simulated(self, case: Case, source: str, over: bool = False) -> list[Outcome]:
        part = self.parts[case.part]
        return simulate(part, case, self.spaces(source, over), self.exercise.facts["allow"], FILE)

    def _right(self, case: Case) -> list[Right]:
        part = self.parts[case.part]
        a = float64(case.arrays(part))
        jitters = [replace(case, dtype="float64", jitter=n) for n in range(5)]
        moved = [self.simulated(c, self.exercise.solution) for c in jitters]
        single = [self.simulated(replace(c, dtype="float32"), self.exercise.solution) for c in jitters]
        answers = []
        for place in self.places:
            results = {
                n: x if not isinstance(x, float) else np.array(x) for n, x in part.want(a, self.reference, place).items()
            }
            base = moved[0][place.rank]
            if base.kind != "ok":
                raise RuntimeError(f"the solution fails {case}: {base.error or base.waits}")
            others = [m[place.rank].results for m in moved[1:]]
            pairs = [(m[place.rank].results, s[place.rank].results) for m, s in zip(moved, single, strict=False)]
            allowed = tolerances(base.results, others, pairs, longest_sum(a), case.dtype)
            exact = {n: np.zeros(1) for n in part.exact}
            answers.append(Right(results, allowed | exact))
        return answers

    def prepare(self, cases: Sequence[Case]) -> None:
        """Work out what is right in these cases, before it is asked for."""
        for case in (c for c in cases if not c.moved):
            # An error here comes again, and is reported, when the answer is asked for.
            with suppress(Exception):
                self.right(case)

    # --- one case

    def problem(self, case: Case, rank: int, outcome: Outcome) -> tuple[str, str] | None:
        """(kind, result) of what is wrong: error, absent, shape, dtype, nan, value; None if nothing is."""
        if outcome.kind != "ok":
            return outcome.kind, ""
        part, right = self.parts[case.part], self.right(case)[rank]
        for name, want in right.results.items():
            got = outcome.results.get(name)
            if not isinstance(want, np.ndarray):
                if not same(got, want, right.allowed.get(name)):
                    return "value", name
                continue
            if got is None or isinstance(got, (str, list, dict)):
                return "absent", name
            if np.shape(got) != want.shape:
                return "shape", name
            got = np.asarray(got)
            if want.dtype.kind in "fiu" and got.dtype.kind not in "fiub":
                return "dtype", name
            if name not in part.any_dtype and want.dtype.kind == "f" and isinstance(outcome.results[name], np.ndarray):
                if got.dtype != case.dtype and want.ndim:
                    return "dtype", name
            elif want.dtype.kind in "iu" and got.dtype.kind not in "iu":
                return "dtype", name
            if want.dtype.kind == "f" and (np.isnan(got) & ~np.isnan(want)).any():
                return "nan", name
            if not same(got, want, right.allowed.get(name)):
                return "value", name
        return None

    def judge(self, cases: Sequence[Case], outcomes: Sequence[list[Outcome]]) -> list[Judged]:
        """A verdict for each part. outcomes: by case, one a rank; [] for cases that were not reached."""
        verdict: list[Judged] = []
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
            return Judged(part.name, cost.status) if brief else cost
        if brief:
            return Judged(part.name, "wrong")
        # The smallest case that is not empty, in the wider dtype.
        failing.sort(key=lambda f: (f[0].dtype != "float64", 0 in f[0].size, abs(float(np.prod(f[0].size)))))
        return self._diagnose(part, failing, ran)

    # --- what is said

    def _diagnose(self, part: Part, failing: list, ran: list) -> Judged:
        case, by_rank, wrong = failing[0]
        judged = Judged(part.name, "wrong", case.label(part))
        # An error or an early end of one rank explains why others wait; and their waiting explains a wrong result.
        rank = min(wrong, key=lambda r: (URGENT.index(wrong[r][0]) if wrong[r][0] in URGENT else len(URGENT), r))
        kind, name = wrong[rank]
        judged.lines += self._seen(part, case, by_rank, wrong, rank)
        equation = self._equation(part, case, rank, by_rank[rank], name) if kind == "value" else ""
        judged.lines += [equation] if equation else []
        known = self._known(failing, ran)
        judged.mistakes = [m.name for m in known]
        for m in known:
            judged.lines += ["", m.sentence, *([f"Seen in the wild: {m.seen}."] if m.seen else [])]
        if not known and kind in ("value", "shape"):
            probe = self._probe(part, case, rank, by_rank[rank], name, ran)
            if probe:
                judged.lines.append(probe)
            elif not equation:
                judged.lines.append("No known mistake gives this.")
        return judged

    def _seen(self, part: Part, case: Case, by_rank: list[Outcome], wrong: dict, rank: int) -> list[str]:
        """What is wrong, as it is seen from outside."""
        kind, name = wrong[rank]
        outcome, on = by_rank[rank], "" if len(by_rank) == 1 else f" on rank {rank}"
        if kind == "error":
            first, *rest = translate.sentence(outcome.error)
            return [f"{first}{on}" if rest else first, *rest]
        if kind == "hang":
            return translate.waits(by_rank)
        if kind == "silent":
            return [f"no answer{on}: {outcome.waits}"]
        got, want = outcome.results.get(name), self.right(case)[rank].results[name]
        if kind == "absent":
            given = "nothing" if got is None else f"{got!r:.60}"
            return [f"{name}{on}: an array of shape {want.shape} is asked for, {given} was returned"]
        if kind == "shape":
            return [f"{name}{on} has shape {np.shape(got)}, should have {want.shape}"]
        if kind == "dtype":
            got = np.asarray(got)
            promoted = "; np.sqrt and np.float64 values promote, math.sqrt and Python numbers do not"
            more = promoted if case.dtype == "float32" and got.dtype == np.float64 else ""
            expected = case.dtype if want.dtype.kind == "f" else want.dtype
            return [f"{name}{on} is {got.dtype}, should be {expected}{more}"]
        if not isinstance(want, np.ndarray):
            # All lines of a name but the last describe the case.
            *case_lines, last = (name + on).split("\n")
            return [*case_lines, f"{last}:  got {got!r:.300}", f"{' ' * len(last)}   want {want!r:.300}"]
        got = np.asarray(got)
        off = wrong_entries(got, want, self.right(case)[rank].allowed.get(name, 0.0))
        lines = probes.located(name, on, off, got, want)
        if kind == "nan":
            lines.append("NaN comes of inf - inf, 0 x inf or 0/0, or of reading what was never written.")
        if len(by_rank) > 1 and len(wrong) < len(by_rank):
            ranks = ", ".join(str(r) for r in range(len(by_rank)) if r not in wrong)
            lines.append(f"wrong on ranks {', '.join(map(str, sorted(wrong)))}; right on {ranks}")
        return lines

    def _equation(self, part: Part, case: Case, rank: int, outcome: Outcome, name: str) -> str:
        if part.ingredients is None:
            return ""
        a = float64(case.arrays(part))
        parts = part.ingredients(a, self.reference, self.places[rank]).get(name)
        allowed = self.right(case)[rank].allowed.get(name)
        if not parts or allowed is None:
            return ""
        return probes.ingredients(name, outcome.results[name], parts, np.broadcast_to(allowed, outcome.results[name].shape))

    def _probe(self, part: Part, case: Case, rank: int, outcome: Outcome, name: str, ran: list) -> str:
        got, right = outcome.results[name], self.right(case)[rank]
        want, allowed = right.results[name], right.allowed.get(name)
        for said in self._dependence(part, rank, ran):
            return said
        if not isinstance(want, np.ndarray) or not isinstance(got, np.ndarray) or want.dtype.kind not in "fiu":
            return ""
        allowed = np.zeros(1) if allowed is None else allowed
        if got.shape == want.shape:
            known = dict(zip(part.size_names, map(float, case.size), strict=True)) | {"ranks": float(len(self.places))}
            known |= part.factors(*case.size) if part.factors else {}
            sentence = probes.factor(name, got, want, np.broadcast_to(allowed, want.shape), known)
            if sentence:
                return sentence
        return probes.order(name, got, want, allowed if got.shape == want.shape else np.max(allowed, initial=0.0))

    def _dependence(self, part: Part, rank: int, ran: list) -> list[str]:
        for name, result in part.influence:
            base = next((o for c, o in ran if not c.moved), None)
            for case, by_rank in ran:
                if not (case.moved and case.moved[0] == name) or base is None or by_rank[rank].kind != "ok":
                    continue
                solved = [self.simulated(replace(case, moved=m), self.exercise.solution)[rank] for m in (None, case.moved)]
                try:
                    got, right = (
                        probes.moved(a.results[result], b.results[result]) for a, b in ((base[rank], by_rank[rank]), solved)
                    )
                except (KeyError, ValueError, TypeError):
                    continue
                sentence = probes.dependence(name, case.moved[1], result, got, right)
                if sentence:
                    return [sentence]
        return []

    # --- known mistakes

    def _known(self, failing: list, ran: list) -> list[Mistake]:
        """The known mistake, or the pair of them, whose outcomes are the learner's; [] if none is.

        Compared on up to three failing cases of different sizes, and on one that is right.
        """
        shown, sizes = [], set()
        for case, by_rank, _ in failing:
            if (case.size, case.dtype) not in sizes and len(shown) < 3 and not case.moved:
                sizes.add((case.size, case.dtype))
                shown.append((case, by_rank))
        bad = [case for case, _ in shown]
        wrong = {id(by_rank) for _, by_rank, _ in failing}
        shown += [(c, o) for c, o in ran if not c.moved and id(o) not in wrong][:2]
        mistakes = self.exercise.mistakes
        for m in mistakes:
            if self._explains((m,), shown):
                return [m]
        # First come pairs of mistakes of which each, like the learner's code, makes these cases wrong and no earlier part.
        touching = [m for m in mistakes if any(self._touches(m, case) for case in bad)]
        earlier = itertools.takewhile(lambda p: p.name != bad[0].part, self.parts.values())
        before = [replace(bad[0], part=p.name, size=tuple(p.sizes[0]), dtype=p.dtypes[0]) for p in earlier]
        likely = [m for m in touching if not any(self._touches(m, case) for case in before)]
        pairs = dict.fromkeys(p for some in (likely, touching, mistakes) for p in itertools.combinations(some, 2))
        begun = time.process_time()
        for pair in itertools.takewhile(lambda _: time.process_time() - begun < PAIRS, pairs):
            if self._explains(pair, shown):
                return list(pair)
        return []

    def mistaken(self, mistakes: Sequence[Mistake]) -> str | None:
        """The solution with these mistakes; None where they do not go together."""
        source = self.exercise.solution
        try:
            for m in mistakes:
                source = m.apply(source)
        except ValueError:
            return None
        return source

    def _touches(self, mistake: Mistake, case: Case) -> bool:
        return any(self.problem(case, r, o) for r, o in enumerate(self.remembered(case, self.mistaken((mistake,)))))

    def _explains(self, mistakes: Sequence[Mistake], shown: list) -> bool:
        source = self.mistaken(mistakes)
        if source is None:
            return False
        try:
            alike = all(self._alike(c, self.remembered(c, source), by_rank) for c, by_rank in shown)
            # A mistake that gives the right answer in the failed case explains nothing, however near its other answers are.
            case = shown[0][0]
            return alike and any(self.problem(case, r, o) for r, o in enumerate(self.remembered(case, source)))
        except SyntaxError:
            return False

    def _alike(self, case: Case, ours: list[Outcome], theirs: list[Outcome]) -> bool:
        return all(self._alike_on(case, r, a, b) for r, (a, b) in enumerate(zip(ours, theirs, strict=True)))

    def _alike_on(self, case: Case, rank: int, ours: Outcome, theirs: Outcome) -> bool:
        if ours.kind != theirs.kind:
            return False
        if ours.kind == "hang":
            return ours.waits.split()[:1] == theirs.waits.split()[:1]
        if ours.kind == "error":
            return all(ours.error[k] == theirs.error[k] for k in ("type", "message", "called"))
        right = self.right(case)[rank]
        for name in right.results:
            a, b, allowed = ours.results.get(name), theirs.results.get(name), right.allowed.get(name, 0.0)
            if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
                if a.dtype != b.dtype:
                    return False
                if a.dtype.kind == "f" and a.size:
                    # A wrong answer may be larger than the right one; then its rounding is larger too.
                    finite = np.abs(a[np.isfinite(a)])
                    allowed = float(np.max(allowed)) + 64 * np.finfo(a.dtype).eps * float(finite.max(initial=0.0))
            if not same(a, b, allowed):
                return False
        return True

    # --- what it cost

    def _cost(self, part: Part, ran: list) -> Judged:
        judged = Judged(part.name, "ok")
        for case, by_rank in ran:
            if case.moved or not (part.limits or part.advice):
                continue
            a = case.arrays(part)
            for place, outcome in zip(self.places, by_rank, strict=True):
                on = f"rank {place.rank}: " if len(by_rank) > 1 else ""
                if part.advice and not judged.lines:
                    for counter, most in part.advice(a, place).items():
                        if outcome.counts.get(counter, 0) > most:
                            judged.lines.append(f"{on}{outcome.counts[counter]:,} {counter}; {most:,} are enough")
                over = _over(part.limits(a, place) if part.limits else {}, outcome)
                if over:
                    lines = [
                        f"right, but {on}{outcome.counts[c]:,} {c} where {most:,} {_are(most)}" for c, most in over.items()
                    ]
                    known = self._costing(ran, set(over))
                    for m in known:
                        lines += ["", m.sentence, *([f"Seen in the wild: {m.seen}."] if m.seen else [])]
                    return Judged(part.name, "wrong", case.label(part), lines, [m.name for m in known])
        return judged

    def _costing(self, ran: list, counters: set[str]) -> list[Mistake]:
        """The known mistake that costs the same."""
        shown = [(c, o) for c, o in ran if not c.moved][:3]
        alike = []
        for m in self.exercise.mistakes:
            ours = [self.simulated(c, self.mistaken((m,))) for c, _ in shown]
            pairs = [(a, b) for o, (_, t) in zip(ours, shown, strict=True) for a, b in zip(o, t, strict=True)]
            if all(
                a.kind == "ok" and all(_near(a.counts.get(k, 0), b.counts.get(k, 0), k) for k in counters) for a, b in pairs
            ):
                alike.append((any(self._touches(m, case) for case, _ in shown), m))
        # First come mistakes that, like the learner's, give right answers at a wrong cost.
        return [m for _, m in sorted(alike, key=lambda a: a[0])][:1]


def _over(limits: dict[str, int], outcome: Outcome) -> dict[str, int]:
    return {c: most for c, most in limits.items() if outcome.counts.get(c, 0) > most}


def _near(a: int, b: int, counter: str) -> bool:
    """Whether costs agree: counts must be equal; memory, which depends on how things are written, about equal."""
    return a == b if counter != "peak bytes" else abs(a - b) <= 0.3 * max(a, b)


def _are(most: int) -> str:
    return "is allowed" if most in (0, 1) else "are enough"
