"""What is right in a case, what is wrong with an outcome, and which changed solution has the same outcome."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

from practice.axis import VERBS, Place
from practice.compare import longest_sum, same, tolerances, wrong_entries
from practice.exercise import SOLUTION as FILE
from practice.exercise import Exercise, load
from practice.part import Case, Mistake, Outcome, float64
from practice.simulate import simulate

# By how many roundings of its largest entry two wrong answers may differ, where another case has told them apart from others.
ROUGH = 4096


@dataclass(frozen=True)
class Right:
    """The right answer in one case on one rank, and by how much rounding may move it."""

    results: dict[str, Any]
    allowed: dict[str, np.ndarray]


class Truth:
    """`reference`: the module of references, handed to check files."""

    # The learner's source, where it is known: read for names and lines, and run in a process apart alone (repairs.py).
    answer = ""
    # The check's cases, of all parts.
    every: Sequence[Case] = ()
    # Times how long is looked for pairs of mistakes: an author waits longer than a learner.
    patience = 1.0

    def __init__(self, exercise: Exercise, reference: Any) -> None:
        self.exercise, self.reference = exercise, reference
        self.parts = {p.name: p for p in exercise.parts}
        self.places = [Place(r, exercise.ranks) for r in range(exercise.ranks)]
        self.right = cache(self._right)
        self.spaces = cache(self.made)
        # The outcomes of a known mistake are asked for again and again.
        self.remembered = lru_cache(4096)(self.simulated)

    def made(self, source: str, over: bool = False) -> list[dict[str, Any]]:
        """Namespaces of a source, one a rank; `over`: on top of the solution's. `spaces` keeps them."""
        before = [load(self.exercise.solution, FILE) if over else None for _ in self.places]
        return [load(source, FILE, {**(b or {}), "__source__": source}) for b in before]

    def simulated(self, case: Case, source: str, over: bool = False) -> list[Outcome]:
        part = self.parts[case.part]
        return simulate(part, case, self.spaces(source, over), self.exercise.facts["allow"], FILE)

    def anew(self, cases: Sequence[Case], source: str, over: bool = False) -> Iterator[list[Outcome]]:
        """The outcomes of these cases in turn, from a new start: what a source has run before it may have kept."""
        spaces, allow = self.made(source, over), self.exercise.facts["allow"]
        return (simulate(self.parts[c.part], c, spaces, allow, FILE) for c in cases)

    def _right(self, case: Case) -> list[Right]:
        part = self.parts[case.part]
        a = float64(case.arrays(part))
        jitters = [replace(case, dtype="float64", jitter=n) for n in range(5)]
        moved, single = [self.simulated(jitters[0], self.exercise.solution)], []
        # Where nothing is rounded there is no tolerance.
        if any(isinstance(x, np.ndarray) and x.dtype.kind == "f" for o in moved[0] for x in o.results.values()):
            moved += [self.simulated(c, self.exercise.solution) for c in jitters[1:]]
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
            sound = part.sound(a, self.reference, place) if part.sound else {}
            allowed = tolerances(base.results, others, pairs, longest_sum(a), case.dtype, sound)
            exact = {n: np.zeros(1) for n in part.exact}
            answers.append(Right(results, allowed | exact))
        return answers

    def prepare(self, cases: Sequence[Case]) -> None:
        """Work out what is right in these cases, before it is asked for."""
        for case in (c for c in cases if not c.moved):
            # An error here comes again, and is reported, when the answer is asked for.
            with suppress(Exception):
                self.right(case)

    def problem(self, case: Case, rank: int, outcome: Outcome) -> tuple[str, str] | None:
        """(kind, result) of what is wrong first: error, absent, shape, dtype, nan, value; None if nothing is."""
        if outcome.kind != "ok":
            return outcome.kind, ""
        names = self.right(case)[rank].results
        return next(((kind, name) for name in names if (kind := self.wrong(case, rank, outcome, name))), None)

    def wrong(self, case: Case, rank: int, outcome: Outcome, name: str) -> str:
        """What is wrong with one result, '' if nothing is."""
        part, right = self.parts[case.part], self.right(case)[rank]
        want, got, allowed = right.results[name], outcome.results.get(name), right.allowed.get(name)
        if not isinstance(want, np.ndarray):
            return "" if same(got, want, allowed) else "value"
        if got is None or isinstance(got, (str, list, dict)):
            return "absent"
        if np.shape(got) != want.shape:
            return "shape"
        array, made = np.asarray(got), isinstance(got, np.ndarray)
        if want.dtype.kind in "fiu" and array.dtype.kind not in "fiub":
            return "dtype"
        if name not in part.any_dtype and want.dtype.kind == "f" and made:
            if array.dtype != case.dtype and want.ndim:
                return "dtype"
        elif want.dtype.kind in "iu" and array.dtype.kind not in "iu":
            return "dtype"
        if want.dtype.kind == "f" and (np.isnan(array) & ~np.isnan(want)).any():
            return "nan"
        return "" if same(array, want, allowed) else "value"

    def limits(self, case: Case) -> list[dict[str, int]]:
        """What each rank may count at most."""
        part = self.parts[case.part]
        a = case.arrays(part)
        return [part.limits(a, place) if part.limits else {} for place in self.places]

    # --- what a changed solution does

    def variants(self, mistakes: Sequence[Mistake]) -> list[str]:
        """Each right answer with these mistakes: the solution, and the others that their edits fit."""
        source = self.mistaken(mistakes)
        found = [] if source is None else [source]
        edits = [e for m in mistakes for e in m.edits]
        for right in self.exercise.rights.values() if found else ():
            if any(old in right for old, _ in edits):
                changed = right
                for old, new in edits:
                    changed = changed.replace(old, new)
                found.append(f"{source}\n{changed}")
        return found

    def mistaken(self, mistakes: Sequence[Mistake]) -> str | None:
        """The solution with these mistakes; None where they do not go together."""
        source = self.exercise.solution
        try:
            for m in mistakes:
                source = m.apply(source)
        except ValueError:
            return None
        return source

    def touches(self, mistake: Mistake, case: Case) -> bool:
        return any(self.problem(case, r, o) for r, o in enumerate(self.remembered(case, self.mistaken((mistake,)))))

    def spoils(self, source: str, case: Case) -> bool:
        """Whether this source makes an earlier part wrong than that of `case`."""
        return any(self.problem(c, r, o) for c in self.earlier(case) for r, o in enumerate(self.remembered(c, source)))

    def earlier(self, case: Case) -> list[Case]:
        """The first case of each part that comes before that of `case`."""
        parts = itertools.takewhile(lambda p: p.name != case.part, self.parts.values())
        return [replace(case, part=p.name, size=tuple(p.sizes[0]), dtype=p.dtypes[0]) for p in parts]

    def explains(self, source: str | None, shown: Sequence[tuple[Case, list[Outcome]]], loose: bool = False) -> bool:
        """Whether this source has the outcomes that are shown, of which the first is wrong.

        loose: only where it has numbers, if most entries are.
        """
        if source is None:
            return False
        try:
            # In float32 a wrong answer, as exp of what should be below 0, may be rounded far more than a right one: where
            # float64 has told first, that is enough.
            first = shown[0][0].dtype
            alike = all(self.alike(c, self.remembered(c, source), o, loose, c.dtype != first) for c, o in shown)
            # A source that gives the right answer in the failed case explains nothing, however near its other answers are.
            case = shown[0][0]
            if alike and loose:
                ours = self.remembered(case, source)
                return any(self._off(case, r, o) for r, o in enumerate(ours))
            return alike and any(self.problem(case, r, o) for r, o in enumerate(self.remembered(case, source)))
        except SyntaxError:
            return False

    def in_turn(self, source: str, ran: Sequence[tuple[Case, list[Outcome]]]) -> bool:
        """Whether this source, from a new start, has the outcomes of these cases in turn, and so keeps between calls what the
        learner's keeps."""
        ours = self.anew([c for c, _ in ran], source)
        return all(self.alike(c, mine, by_rank) for (c, by_rank), mine in zip(ran, ours, strict=False))

    def _off(self, case: Case, rank: int, outcome: Outcome) -> bool:
        """Whether an outcome has numbers, not NaN or infinite, that are wrong."""
        right = self.right(case)[rank]
        arrays = {n: x for n, x in outcome.results.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f"}
        return any(
            (wrong_entries(x, want, right.allowed.get(n, 0.0)) & np.isfinite(x)).any()
            for n, x in arrays.items()
            if isinstance(want := right.results.get(n), np.ndarray) and want.shape == x.shape
        )

    def numbers(self, case: Case, rank: int, outcome: Outcome) -> bool:
        """Whether something of an outcome is wrong that is not NaN or infinite."""
        kinds = {self.wrong(case, rank, outcome, n) for n in self.right(case)[rank].results} if outcome.kind == "ok" else {""}
        return (
            bool(kinds - {"", "nan", "value"})
            or self._off(case, rank, outcome)
            or (
                "value" in kinds
                and not all(isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in outcome.results.values())
            )
        )

    def alike(self, case: Case, ours: list[Outcome], theirs: list[Outcome], loose: bool = False, rough: bool = False) -> bool:
        return all(self._alike_on(case, r, a, b, loose, rough) for r, (a, b) in enumerate(zip(ours, theirs, strict=True)))

    def _alike_on(self, case: Case, rank: int, ours: Outcome, theirs: Outcome, loose: bool, rough: bool) -> bool:
        if ours.kind != theirs.kind:
            return False
        if ours.kind == "hang":
            return _partners(ours.waits) == _partners(theirs.waits)
        if ours.kind == "error":
            # What the code itself raises, it may say in other words.
            raised = all(o.error.get("text", "").startswith("raise") for o in (ours, theirs))
            keys = ("type", "called", "argument number", "function" if raised else "message")
            return all(ours.error.get(k) == theirs.error.get(k) for k in keys)
        right = self.right(case)[rank]
        for name in right.results:
            a, b, allowed = ours.results.get(name), theirs.results.get(name), right.allowed.get(name, 0.0)
            if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
                # Where the dtype is not judged it tells nothing.
                free = name in self.parts[case.part].any_dtype or a.ndim == b.ndim == 0
                if a.dtype != b.dtype and not (free and a.dtype.kind == b.dtype.kind == "f"):
                    return False
                if a.shape != np.shape(right.results[name]):
                    allowed = float(np.max(allowed, initial=0.0))
                if a.dtype.kind == "f":
                    # A wrong answer may be larger than the right one; then its rounding is larger too.
                    finite, eps = np.abs(a[np.isfinite(a)]), max(np.finfo(x.dtype).eps for x in (a, b))
                    largest = float(finite.max(initial=0.0))
                    # Numbers this large are an exp of what should be below 0: that rounds by the exponent's size.
                    exps = largest > 1e6 * max(1.0, float(np.abs(right.results[name]).max(initial=0.0)))
                    size = (ROUGH if rough or exps else 64) * largest
                    allowed = float(np.max(allowed, initial=0.0)) + size * eps
                if loose and a.shape == b.shape and a.dtype.kind == "f" and a.size:
                    numbers = np.isfinite(a)
                    # A case in which it has no numbers at all tells nothing; the one that is spoken of must have some.
                    if numbers.any() and 2 * numbers.sum() < a.size:
                        return False
                    a, b = a[numbers], b[numbers]
            if not same(a, b, allowed):
                return False
        return True


def _partners(waits: str) -> list[tuple[str, str]]:
    """Which verbs a rank waits in, and for whom: [("send", "1"), ("recv", "3")]."""
    verbs = "|".join(v for v in VERBS if v != "sendrecv")
    return re.findall(rf"\b({verbs})\b(?:[^|]*?(?:to|from) rank (\d+))?", waits)
