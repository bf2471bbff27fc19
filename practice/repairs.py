"""Repairs: the learner's own file with one thing changed, made by machine, after which every case is right.

So a mistake is told however the answer is written, and in its own lines. The file is run here in a process of its own, under
the rules of a check (`practice/rules.py`), and only to this end: no verdict comes of it.
"""

from __future__ import annotations

import ast
import copy
import itertools
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

from practice import rules
from practice.answer import called
from practice.exercise import bounded, load
from practice.guarded import apart
from practice.mutants import changes
from practice.part import Case, Outcome
from practice.simulate import simulate
from practice.truth import FILE, Truth
from practice.twists import SUMS, cut, wider

# How long repairs may be looked for, in seconds of the examiner's own computing.
SECONDS = 3.0
# The rank of changes of which there are many, and few are meant.
FAR = 4
# So many changes, each of which makes a result right, are looked for.
MOST = 3
BLOCKS = ("body", "orelse")
# What a whole number is made with by cutting off.
WHOLE = ("int", "int8", "int16", "int32", "int64", "intp")


@dataclass(frozen=True)
class Edit:
    """sets: (node, field, new value), all at once."""

    rank: int
    line: int
    said: str
    sets: tuple[tuple[ast.AST, str, Any], ...]

    def swap(self) -> Edit:
        """Make the change; what is returned takes it back."""
        before = tuple((node, field, getattr(node, field)) for node, field, _ in self.sets)
        for node, field, new in self.sets:
            setattr(node, field, new)
        return Edit(0, 0, "", before)


def found(truth: Truth, first: Case, ran: Sequence[tuple[Case, list[Outcome]]]) -> list[str]:
    """What is said of a change of the learner's file that makes all cases right, the first of which is wrong; [] if none is
    found. Or of several, each of which makes one more result right.
    """
    cases = [first, *(case for case, _ in ran if case != first and not case.moved)]
    # After an error the part is run no further.
    sizes = {case.size for case in cases}
    cases += [replace(first, size=tuple(size)) for size in truth.parts[first.part].sizes if tuple(size) not in sizes]
    return (truth.answer and apart(lambda: _found(truth, cases), SECONDS)) or []


def _found(truth: Truth, cases: Sequence[Case]) -> list[str]:
    until = time.process_time() + SECONDS
    rules.close(FILE, [])
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    file, lines, told = _File(truth, cases), truth.answer.splitlines(), []
    # What the file does here otherwise than in the check, as what it draws anew each time, tells nothing.
    wrong = file.wrong(cases)
    # Costs are looked at alone: where results are wrong they may be what comes of that.
    costs = {c for case in cases for limits in truth.limits(case) for c in limits}
    costs = costs if wrong and wrong - costs else set()
    while wrong and wrong - costs and len(told) < 2 * MOST and (step := _step(file, wrong, until)):
        edit, left = step
        names = sorted(wrong - left - costs)
        what = "All is" if not left - costs else f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"
        told += [f"line {edit.line}: {lines[edit.line - 1].strip()}", f"{what} right {edit.said}."] if names else []
        wrong = left
    return told


def _step(file: _File, wrong: set[str], until: float) -> tuple[Edit, set[str]] | None:
    """A change after which less is wrong, and what still is. It is made."""
    functions = [s for s in called(file.tree, file.cases[0].part) or file.tree.body if hasattr(s, "body")]
    edits = sorted((e for f in functions for e in _edits(f)), key=lambda e: e.rank)
    at_first = file.wrong(file.cases[:1])
    for edit in itertools.takewhile(lambda _: time.process_time() < until, edits):
        back = edit.swap()
        if file.compiled(edit):
            some = file.wrong(file.cases[:1])
            if some is not None and some < at_first:
                left = file.wrong(file.cases, earlier=True)
                if left is not None and left < wrong:
                    return edit, left
        back.swap()
        file.compiled(edit)
    return None


class _File:
    """The learner's file, statement by statement: what is changed is compiled anew, and nothing else."""

    def __init__(self, truth: Truth, cases: Sequence[Case]) -> None:
        self.tree, self.cases, self._truth = bounded(truth.answer), cases, truth
        self._codes = [_compiled(s) for s in self.tree.body]
        self._home = {n: i for i, s in enumerate(self.tree.body) for n in ast.walk(s)}

    def compiled(self, edit: Edit) -> bool:
        """Whether it is Python as it stands after this change."""
        home = self._home[edit.sets[0][0]]
        try:
            self._codes[home] = _compiled(self.tree.body[home])
        except (SyntaxError, ValueError, TypeError):
            return False
        return True

    def wrong(self, cases: Sequence[Case], earlier: bool = False) -> set[str] | None:
        """What is wrong in these cases, one after another: results and costs. None where no result is there, or, `earlier`,
        where a part before is wrong."""
        truth, found = self._truth, set()
        spaces = [load("", FILE, {"__source__": truth.answer}) for _ in truth.places]
        try:
            for space in spaces:
                for code in self._codes:
                    exec(code, space)
            for case in cases:
                found |= self._wrong(case, spaces)
            before = truth.earlier(cases[0]) if earlier else []
            return None if any(self._wrong(case, spaces) for case in before) else found
        except Exception:
            return None

    def _wrong(self, case: Case, spaces: list[dict[str, Any]]) -> set[str]:
        truth, part = self._truth, self._truth.parts[case.part]
        found = set()
        outcomes = simulate(part, case, spaces, truth.exercise.facts["allow"], FILE)
        for rank, (outcome, limits) in enumerate(zip(outcomes, truth.limits(case), strict=True)):
            if outcome.kind != "ok":
                return {"What is returned"}
            # Before the last line of a name stands what its case is.
            found |= {n.split("\n")[-1] for n in truth.right(case)[rank].results if truth.wrong(case, rank, outcome, n)}
            found |= {counter for counter, most in limits.items() if outcome.counts.get(counter, 0) > most}
        return found


def _compiled(statement: ast.stmt) -> CodeType:
    return compile(ast.fix_missing_locations(ast.Module([statement], [])), FILE, "exec", dont_inherit=True)


# --- what is changed


def _edits(function: ast.AST) -> Iterator[Edit]:
    nodes = list(ast.walk(function))
    parents = {child: n for n in nodes for child in ast.iter_child_nodes(n)}
    names = dict.fromkeys(n.arg if isinstance(n, ast.arg) else n.id for n in nodes if _made(n))
    # What is put into a list is not the list itself: NumPy, handed that, never comes to its end.
    into: dict[ast.AST, set[str]] = {}
    for node in nodes:
        for x in ast.walk(node) if (filled := _filled(node)) else ():
            into[x] = into.get(x, set()) | filled
    alike: dict[str, list[Edit]] = {}
    for node in nodes:
        if isinstance(getattr(node, "body", None), list):
            yield from _moved(node)
        if not hasattr(node, "lineno") or node not in parents or isinstance(node, (ast.arg, ast.arguments)):
            continue
        ways = [*_instead(node, [n for n in names if n not in into.get(node, ())])]
        outer = parents[parents[node]] if isinstance(parents[node], ast.Tuple) and parents[node] in parents else parents[node]
        if isinstance(node, ast.expr) and isinstance(outer, (ast.Assign, ast.AugAssign, ast.Return)):
            ways += [(FAR + 1, new) for new in _lacking(node, names)]
        for rank, new in ways:
            if sets := _put(parents[node], node, new):
                edit = Edit(rank, node.lineno, _said(node, new, parents), sets)
                yield edit
                if rank < FAR and not isinstance(new, ast.Pass):
                    alike.setdefault(edit.said, []).append(edit)
    for said, some in alike.items():
        # The same at every place.
        sets = tuple(s for e in some for s in e.sets)
        if len(some) > 1 and len({(s[0], s[1]) for s in sets}) == len(sets):
            others = ", ".join(dict.fromkeys(str(e.line) for e in some[1:]))
            yield Edit(some[0].rank + 1, some[0].line, f"{said}, here and in line {others}", sets)


def _made(node: ast.AST) -> bool:
    return isinstance(node, ast.arg) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))


def _filled(node: ast.AST) -> set[str]:
    """Names that a call of a method, or an assignment to a place, may put something into."""
    into = [node.func] if isinstance(node, ast.Call) else getattr(node, "targets", [])
    return {
        n.id
        for i in into
        if isinstance(i, (ast.Attribute, ast.Subscript))
        for n in ast.walk(i.value)
        if isinstance(n, ast.Name)
    }


def _put(parent: ast.AST, old: ast.AST, new: ast.AST) -> tuple[tuple[ast.AST, str, Any], ...]:
    """The change that puts a node in another's place."""
    for field, value in ast.iter_fields(parent):
        if value is old:
            return ((parent, field, new),)
        if isinstance(value, list) and any(x is old for x in value):
            return ((parent, field, [new if x is old else x for x in value]),)
    return ()


def _instead(node: ast.AST, names: Sequence[str]) -> Iterator[tuple[int, ast.AST]]:
    """(rank, what may belong in a node's place)."""
    for _, change in changes(node):
        try:
            yield 1, change(copy.deepcopy(node))
        except (TypeError, ValueError, AttributeError):
            continue
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Name, ast.Subscript)):
        yield 0, ast.AugAssign(node.targets[0], ast.Add(), node.value)
    elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        yield 0, ast.Assign([node.target], ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value))
    elif isinstance(node, ast.Call):
        yield from ((0, new) for new in _calls(node))
    elif isinstance(node, ast.Tuple):
        for a, b in itertools.combinations(range(len(node.elts)), 2):
            some = [*node.elts]
            some[a], some[b] = some[b], some[a]
            yield 1, ast.Tuple(some, node.ctx)
    elif isinstance(node, ast.Subscript):
        yield from ((1, new) for new in _subscripts(node))
    elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        for n, one in enumerate(node.generators):
            twin, loop = copy.copy(node), ast.comprehension(one.target, one.iter, [], one.is_async)
            twin.generators = [*node.generators[:n], loop, *node.generators[n + 1 :]]
            yield from ((1, twin) for _ in one.ifs)
    elif isinstance(node, ast.Compare):
        yield 1, ast.UnaryOp(ast.Not(), node)
    elif isinstance(node, ast.For):
        yield 1, ast.For(node.target, ast.Call(ast.Name("reversed", ast.Load()), [_call("list", node.iter)], []), node.body, [])
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
        yield 2, _numpy("copy", node)
        yield 2, ast.Attribute(node, "T", ast.Load())
        yield from ((2, ast.Name(other, ast.Load())) for other in names if other != node.id)
    elif isinstance(node, ast.expr) and not isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
        yield from ((FAR, ast.Name(other, ast.Load())) for other in names)


def _lacking(node: ast.AST, names: Sequence[str]) -> Iterator[ast.AST]:
    """What a statement makes, turned round, or with a name more as a factor or a term."""
    yield ast.UnaryOp(ast.USub(), node)
    yield ast.Subscript(node, ast.Slice(None, None, ast.UnaryOp(ast.USub(), ast.Constant(1))), ast.Load())
    for op in (ast.Mult(), ast.Div(), ast.Add(), ast.Sub()):
        yield from (ast.BinOp(node, op, ast.Name(name, ast.Load())) for name in names)
    yield from (ast.BinOp(node, ast.Div(), _call("len", ast.Name(name, ast.Load()))) for name in names)


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    """A range that ends one earlier or later; what is cut off, rounded; a sum over another axis, or another operation."""
    name, args = _last(node.func), node.args
    if name == "range" and args:
        stop = min(len(args) - 1, 1)
        yield from (ast.Call(node.func, [*args[:stop], x, *args[stop + 1 :]], []) for x in _beside(args[stop]))
    elif name == "astype" and args and _last(args[0]) in WHOLE:
        yield ast.Call(ast.Attribute(_numpy("rint", node.func.value), "astype", ast.Load()), args, [])
    elif name == "int" and args:
        yield _call("int", _call("round", args[0]))
    elif name == "all_reduce":
        yield from (ast.Call(node.func, args[:1], [ast.keyword("op", ast.Constant(op))]) for op in ("sum", "max", "min"))
    elif name in SUMS and isinstance(node.func, ast.Attribute):
        others = [k for k in node.keywords if k.arg != "axis"]
        yield from (ast.Call(node.func, args[:1], [*others, ast.keyword("axis", ast.Constant(n))]) for n in (0, 1, 2, -1))
        yield ast.Call(node.func, args, [*node.keywords, ast.keyword("keepdims", ast.Constant(True))])


def _subscripts(node: ast.Subscript) -> Iterator[ast.AST]:
    """The whole in place of a part; a bound one earlier or later, or none; an index one earlier or later."""
    yield node.value
    bounds = node.slice
    if isinstance(bounds, ast.Slice):
        for field in ("lower", "upper"):
            bound = getattr(bounds, field)
            for new in (None, *_beside(bound)) if bound else ():
                twin = ast.Slice(bounds.lower, bounds.upper, bounds.step)
                setattr(twin, field, new)
                yield ast.Subscript(node.value, twin, node.ctx)
    elif isinstance(bounds, (ast.Name, ast.BinOp, ast.Call)):
        yield from (ast.Subscript(node.value, new, node.ctx) for new in _beside(bounds))


def _beside(node: ast.AST) -> list[ast.AST]:
    return [ast.BinOp(node, op, ast.Constant(1)) for op in (ast.Sub(), ast.Add())]


def _call(name: str, x: ast.AST) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), [x], [])


def _last(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", getattr(node, "value", ""))


def _numpy(name: str, x: ast.AST) -> ast.Call:
    return ast.Call(ast.Attribute(ast.Name("np", ast.Load()), name, ast.Load()), [x], [])


def _moved(block: ast.AST) -> Iterator[Edit]:
    """Two statements in the other order; one at an end of a block within goes out of it; one beside it goes in."""
    for field in BLOCKS:
        lines = getattr(block, field, None) or []
        for n, (one, two) in enumerate(itertools.pairwise(lines)):
            swapped = [*lines[:n], two, one, *lines[n + 2 :]]
            yield Edit(2, one.lineno, f"with it after line {two.lineno}", ((block, field, swapped),))
        for n, inner in enumerate(lines):
            for part in BLOCKS if isinstance(inner, (ast.For, ast.If, ast.With)) else ():
                before, after, own = lines[:n], lines[n + 1 :], getattr(inner, part, [])
                if not own:
                    continue
                where = f"the {'loop' if isinstance(inner, ast.For) else 'block'} that begins in line {own[0].lineno}"
                ways = (
                    *((own[-1], "after", [*before, inner, own[-1], *after], own[:-1]) for _ in own[1:2]),
                    *((own[0], "before", [*before, own[0], inner, *after], own[1:]) for _ in own[1:2]),
                    *((s, "at the end of", [*before, inner, *after[1:]], [*own, s]) for s in after[:1]),
                    *((s, "at the beginning of", [*before[:-1], inner, *after], [s, *own]) for s in before[-1:]),
                )  # fmt: skip
                for what, said, outer, within in ways:
                    sets = ((block, field, outer), (inner, part, within))
                    yield Edit(1, what.lineno, f"with it {said} {where}", sets)


# --- what is said of it


def _said(old: ast.AST, new: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    if isinstance(new, ast.Pass):
        return "without it"
    before, after = cut(*(ast.unparse(ast.fix_missing_locations(x)).partition("\n")[0] for x in wider(old, new, parents)))
    return f"with {after} in place of {before}"
