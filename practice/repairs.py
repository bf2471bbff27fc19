"""Repairs: the learner's own file with one thing changed, made by machine, after which every case is right.

So a mistake is told however the answer is written, and in its own lines. The file is run here in a process of its own, under
the rules of a check (`practice/rules.py`), and only to this end: no verdict comes of it.
"""

from __future__ import annotations

import ast
import itertools
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from types import CodeType
from typing import Any

import numpy as np

from practice import edits, rules
from practice.answer import called
from practice.exercise import bounded, load
from practice.guarded import apart
from practice.part import Case, Outcome
from practice.simulate import simulate
from practice.truth import FILE, Truth

# How long repairs may be looked for, in seconds of the examiner's own computing.
SECONDS = 4.0
# How long it may be tried whether a change holds in draws that were not run.
HOLDING = 1.0
# What loops more often in a small case is endless.
TURNS = 200
# So many changes, each of which makes a result right, are looked for.
MOST = 3
# With so many other draws of numbers a changed solution is compared with the learner's file, less one.
OTHERS = 9
# What is wrong where an error, or a rank that waits, leaves no result.
NOTHING = "What is returned"
# The edits of a function that are near, or those that are far.
Ways = Callable[[ast.FunctionDef, dict[str, set[str]], bool], Iterator[edits.Edit]]


def found(truth: Truth, first: Case, ran: Sequence[tuple[Case, list[Outcome]]], ways: Ways = edits.edits) -> list[str]:
    """What is said of a change of the learner's file that makes all cases right, the first of which is wrong; [] if none is
    found. Or of several, each of which makes one more result right. ways: the edits that are tried.
    """
    cases = [first, *(case for case, _ in ran if case != first and not case.moved)]
    # After an error the part is run no further.
    sizes = {case.size for case in cases}
    cases += [replace(first, size=tuple(size)) for size in truth.parts[first.part].sizes if tuple(size) not in sizes]
    return (truth.answer and apart(lambda: _found(truth, cases, ways), SECONDS + HOLDING)) or []


def close(truth: Truth, first: Case) -> None:
    """From here on what runs is held to the rules of a check. What is right is asked for once before, in each part: then the
    references that say so are imported."""
    for part in truth.parts.values():
        truth.right(replace(first, part=part.name, size=tuple(part.sizes[0]), dtype=part.dtypes[0]))
    rules.close(FILE, [])
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def agrees(truth: Truth, first: Case, source: str) -> bool:
    """Whether the learner's file does what this changed solution does with other numbers, too; True where that is not known.

    In few cases two different mistakes may give the same.
    """
    cases = [replace(first, seed=first.seed + n) for n in range(1, OTHERS)]
    return not truth.answer or apart(lambda: _agrees(truth, cases, source), SECONDS) is not False


def _agrees(truth: Truth, cases: Sequence[Case], source: str) -> bool:
    until = time.process_time() + SECONDS / 4
    close(truth, cases[0])
    file = _File(truth, cases[:1])
    spaces, part = file.spaces(), truth.parts[cases[0].part]
    for case in itertools.takewhile(lambda _: time.process_time() < until, cases):
        theirs = simulate(part, case, spaces, truth.exercise.facts["allow"], FILE)
        if not truth.alike(case, truth.simulated(case, source), theirs, rough=True):
            return False
    return True


def _found(truth: Truth, cases: Sequence[Case], ways: Ways) -> list[str]:
    until = time.process_time() + SECONDS
    close(truth, cases[0])
    file, lines, told = _File(truth, cases), truth.answer.splitlines(), []
    # What the file does here otherwise than in the check, as what it draws anew each time, tells nothing.
    wrong = file.wrong(cases)
    # Costs are looked at alone: where results are wrong they may be what comes of that.
    costs = {c for case in cases for limits in truth.limits(case) for c in limits}
    costs = file.costs = costs if wrong and wrong - costs else set()
    while wrong and wrong - costs and len(told) < 2 * MOST and (step := _step(file, wrong, until, ways)):
        line, said, left = step
        names = sorted(wrong - left - costs)
        what = "All is" if not left - costs else f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"
        here = f"line {line}: {lines[line - 1].strip()}"
        # The same in the same line, as where one line makes several: it is told once.
        again = len(told) > 1 and told[-2] == here and told[-1].endswith(f" right {said}.")
        if again and left - costs:
            names = sorted({*told[-1].partition(" is right ")[0].partition(" are right ")[0].split(", "), *names})
            what = f"{', '.join(names)} are"
        told = [*(told[:-2] if again else told), *([here, f"{what} right {said}."] if names else [])]
        wrong = left
    return told or _but_for(file, lines)


def _but_for(file: _File, lines: list[str]) -> list[str]:
    """What is said of a change after which all is right but in one case, or in those of one size; [] where there is none."""
    part = file.truth.parts[file.cases[0].part]
    before = [c for c in file.cases if file.wrong([c])]
    for edit in file.near:
        with file.changed(edit) as runs:
            left = [c for c in file.cases if file.wrong([c]) != set()] if runs else before
            good = len({c.size for c in left}) == 1 and 2 * len(left) < len(before) and file.holds(set(), left[0].size)
        if good:
            what = f"All is right {edit.words()}, but for {left[0].label(part)}: there something else is wrong."
            return [f"line {edit.line}: {lines[edit.line - 1].strip()}", what]
    return []


def _step(file: _File, wrong: set[str], until: float, kind: Ways) -> tuple[int, str, set[str]] | None:
    """The line of a change after which less is wrong, what is said of it, and what still is wrong. It is made."""
    made = called(file.tree, file.cases[0].part) or file.tree.body
    # Then those that have made what it is given, as `saved`.
    groups = [_functions(made), _functions([s for s in file.tree.body if s not in made])]
    some = (
        sorted((e for f in functions for e in kind(f, file.kinds, far)), key=attrgetter("rank"))
        for far in (False, True)
        for functions in groups
    )
    ways = itertools.chain.from_iterable(some)
    at_first = file.wrong(file.cases[:1])
    for edit in itertools.takewhile(lambda _: time.process_time() < until, ways):
        with file.changed(edit) as runs:
            now = file.wrong(file.cases[:1]) if runs else None
            less = now is not None and now < at_first
            left = file.wrong(file.cases, earlier=True) if less else None
            good = _better(wrong, left, file.costs) and file.holds(left)
        if good:
            # It is told by the file as it was.
            said = edit.words()
            file.make(edit)
            return edit.line, said, left
        # All right in this case, and not in another.
        if less and not now and left == wrong and len(file.near) < MOST:
            file.near.append(edit)
    return None


def _better(wrong: set[str], left: set[str] | None, costs: set[str]) -> bool:
    """Whether a change that leaves this wrong is told. Where nothing was returned, all is to be right then."""
    if left is None or not left < wrong or NOTHING in left or (NOTHING in wrong and left - costs):
        return False
    return not _some_of(wrong - left, left)


def _some_of(names: set[str], others: set[str]) -> bool:
    """Whether of results of one kind, as of arrays in a list, some are among these and some among the others.

    Or one is named by another, as `speed-up at c = 0` by `speed-up`. One alone may come right by another way than is meant.
    """
    if any(a.startswith(b) or b.startswith(a) for a in names for b in others if " " in a + b):
        return True
    one, other = ({n.rstrip("0123456789") for n in some if re.search(r" \d+$", n)} for some in (names, others))
    return bool(one & other)


def _functions(statements: Sequence[ast.stmt]) -> list[ast.FunctionDef]:
    some = [f for s in statements for f in (s.body if isinstance(s, ast.ClassDef) else [s])]
    return [f for f in some if isinstance(f, ast.FunctionDef)]


class _File:
    """The learner's file, statement by statement: what is changed is compiled anew, and nothing else."""

    def __init__(self, truth: Truth, cases: Sequence[Case]) -> None:
        self.tree, self.cases, self.truth = bounded(truth.answer, TURNS), cases, truth
        # Changes after which the first case is right.
        self.near: list[edits.Edit] = []
        # Where results are wrong, costs are not looked at.
        self.costs: set[str] = set()
        self._codes = [_compiled(s) for s in self.tree.body]
        self.kinds = self._noted()
        # What is right in other parts stays so: they may call what is changed.
        apart = {(c.part, c.size): c for c in truth.every if c.part != cases[0].part and not c.moved}
        self._others = [c for c in apart.values() if not self.wrong([c])]
        self._at_home()

    def _noted(self) -> dict[str, set[str]]:
        """What each name is in the first case: arrays by dtype and dims."""
        kinds: dict[str, set[str]] = {}
        plain, tree = self._codes, edits.Noting().visit(bounded(self.truth.answer, TURNS))
        self._codes = [_compiled(s) for s in tree.body]
        self.wrong(self.cases[:1], note=lambda name, x: kinds.setdefault(name, set()).add(edits.kind(x)))
        self._codes = plain
        return kinds

    def _at_home(self) -> None:
        """Which statement each node is in, as the file stands."""
        self._home = {n: i for i, s in enumerate(self.tree.body) for n in ast.walk(s)}

    @contextmanager
    def changed(self, edit: edits.Edit) -> Iterator[bool]:
        """Within, the file is changed; whether it is Python then."""
        back = edit.swap()
        try:
            yield self._recompiled(edit)
        finally:
            back.swap()
            self._recompiled(edit)

    def make(self, edit: edits.Edit) -> None:
        """The file is changed from here on."""
        edit.swap()
        self._recompiled(edit)
        self._at_home()

    def _recompiled(self, edit: edits.Edit) -> bool:
        """Whether it is Python as it stands after this change."""
        home = self._home[edit.sets[0][0]]
        _place(edit)
        try:
            self._codes[home] = _compiled(self.tree.body[home])
        except (SyntaxError, ValueError, TypeError):
            return False
        return True

    def wrong(self, cases: Sequence[Case], earlier: bool = False, note: object = None) -> set[str] | None:
        """What is wrong in these cases, one after another: results and costs. None where no result is there, or, `earlier`,
        where a part before is wrong."""
        truth, found = self.truth, set()
        try:
            spaces = self.spaces(note)
            for case in cases:
                found |= self._wrong(case, spaces)
            before = truth.earlier(cases[0]) if earlier else []
            return None if any(self._wrong(case, spaces) for case in before) else found
        except Exception:
            return None

    def spaces(self, note: object = None) -> list[dict[str, Any]]:
        spaces = [load("", FILE, {"__source__": self.truth.answer, edits.NOTE: note}) for _ in self.truth.places]
        for space in spaces:
            for code in self._codes:
                exec(code, space)
        return spaces

    def holds(self, left: set[str], but: tuple[int, ...] | None = None) -> bool:
        """Whether, as it stands, no more than `left` is wrong in draws that were not run, nor in the other parts. but: a size
        that is not looked at."""
        until = time.process_time() + HOLDING
        draws = (c for c in (*self._others, *self._draws()) if c.size != but)
        for case in itertools.takewhile(lambda _: time.process_time() < until, draws):
            now = self.wrong([case])
            if now is None or now - (left if case.part == self.cases[0].part else set()) - self.costs:
                return False
        return True

    def _draws(self) -> Iterator[Case]:
        """Other numbers of every size and dtype, and other sizes."""
        first, part = self.cases[0], self.truth.parts[self.cases[0].part]
        rng = np.random.default_rng(first.seed)
        for dtype in (*part.dtypes, *part.dtypes):
            sizes = [*part.sizes, *((part.random_size(rng) for _ in range(3)) if part.random_size else ())]
            yield from (replace(first, size=tuple(size), dtype=dtype, seed=int(rng.integers(2**31))) for size in sizes)

    def _wrong(self, case: Case, spaces: list[dict[str, Any]]) -> set[str]:
        truth, part = self.truth, self.truth.parts[case.part]
        found = set()
        outcomes = simulate(part, case, spaces, truth.exercise.facts["allow"], FILE)
        for rank, (outcome, limits) in enumerate(zip(outcomes, truth.limits(case), strict=True)):
            if outcome.kind != "ok":
                return {NOTHING}
            # Before the last line of a name stands what its case is.
            found |= {n.split("\n")[-1] for n in truth.right(case)[rank].results if truth.wrong(case, rank, outcome, n)}
            found |= set(outcome.over(limits))
        return found


def _place(edit: edits.Edit) -> None:
    """What is new gets a line: to look through the whole function for what has none costs more than to compile it."""
    for _, _, new in edit.sets:
        for node in new if isinstance(new, list) else [new]:
            if isinstance(node, ast.AST) and not hasattr(node, "lineno"):
                node.lineno = node.end_lineno = edit.line
                node.col_offset = node.end_col_offset = 0
                ast.fix_missing_locations(node)


def _compiled(statement: ast.stmt) -> CodeType:
    module = ast.Module([statement], [])
    try:
        return compile(module, FILE, "exec", dont_inherit=True)
    except TypeError:
        # What is new stands within what is not.
        return compile(ast.fix_missing_locations(module), FILE, "exec", dont_inherit=True)
