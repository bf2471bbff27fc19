"""Edits of a learner's function, one thing at a time: what may have been meant where something else stands.

What may stand in an expression's place is in `instead.py`; here are the changes of statements, and what is said of all.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from practice.answer import last
from practice.instead import FAR, beside, cuts, instead, lacking, like, terms, turned
from practice.narrower import axes
from practice.twists import cut, swapped, wider
from practice.usual import usual

BLOCKS = ("body", "orelse")
COLLECTIVE = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
# Of so many calls of a verb some are left out together.
MANY = 6


@dataclass(frozen=True)
class Edit:
    """sets: (node, field, new value), all at once. words: what is said of it, put together where it is asked for."""

    rank: int
    line: int
    words: Callable[[], str]
    sets: tuple[tuple[ast.AST, str, Any], ...]

    def swap(self) -> Edit:
        """Make the change; what is returned takes it back."""
        before = tuple((node, field, getattr(node, field)) for node, field, _ in self.sets)
        for node, field, new in self.sets:
            setattr(node, field, new)
        return Edit(0, 0, str, before)


def edits(function: ast.AST, kinds: dict[str, set[str]], far: bool) -> Iterator[Edit]:
    """far: those of which there are many, or the others. kinds: of each name what it has been: others are seldom meant."""
    # What a text says is nothing that is wrong.
    texts = {n for s in ast.walk(function) if isinstance(s, ast.JoinedStr) for n in ast.walk(s)}
    nodes = [n for n in ast.walk(function) if n not in texts]
    parents = {child: n for n in nodes for child in ast.iter_child_nodes(n)}
    names = dict.fromkeys(n.arg if isinstance(n, ast.arg) else n.id for n in nodes if _made(n))
    names.pop("self", None)
    # What is put into a list is not the list itself: NumPy, handed that, never comes to its end.
    into: dict[ast.AST, set[str]] = {}
    for node in nodes:
        for x in ast.walk(node) if (filled := _filled(node)) else ():
            into[x] = into.get(x, set()) | filled
    alike: dict[str, list[Edit]] = {}
    sized = [n.value for n in nodes if isinstance(n, ast.Attribute) and n.attr in ("size", "rank")]
    ranked = {n.id for n in sized if isinstance(n, ast.Name)} | axes(nodes)
    lengths = [ast.unparse(n) for n in nodes if isinstance(n, ast.Subscript) and getattr(n.value, "attr", "") == "shape"]
    lengths += [ast.unparse(n) for n in nodes if isinstance(n, ast.Call) and last(n.func) == "len"]
    within = {x for n in nodes if isinstance(n, (ast.If, ast.IfExp, ast.While)) for x in ast.walk(n.test)}
    asked = [n.test for n in nodes if isinstance(n, (ast.If, ast.While)) and isinstance(n.test, ast.Compare)]
    tests = [x for test in dict.fromkeys(map(ast.unparse, asked)) for x in (test, f"not {test}")]
    for node in nodes:
        if not far and isinstance(getattr(node, "body", None), list):
            yield from _moved(node)
            yield from _missing(node, names)
            yield from _guarded(node, tests)
        if not hasattr(node, "lineno") or node not in parents or isinstance(node, (ast.arg, ast.arguments)):
            continue
        ways = [*instead(node, [n for n in names if n not in into.get(node, ())]), *((2, x) for x in like(node, nodes))]
        ways += [*((0, new) for new in cuts(node, sorted(ranked), lengths)), *usual(node)]
        # What two names are given in one line: exchanged, it hides where one of them is used.
        given = isinstance(node, ast.Tuple) and isinstance(parents[node], ast.Assign)
        # What is asked for, made always or never so, hides what it asks for.
        asks = node in within and isinstance(node, (ast.Subscript, ast.Name, ast.Attribute, ast.Call, ast.Constant))
        ways = [(rank + ((given or asks) and rank < FAR), new) for rank, new in ways]
        if isinstance(parents[node], ast.Attribute) and parents[node].attr in ("shape", "size", "ndim", "dtype"):
            # Of a thing's shape another's may be meant; not its own turned round.
            ways = [(rank, new) for rank, new in ways if isinstance(new, (ast.Name, ast.Subscript))]
        ways = [(FAR + 1 if rank == 3 and _apart(node, new, kinds) else rank, new) for rank, new in ways]
        outer = parents[parents[node]] if isinstance(parents[node], ast.Tuple) and parents[node] in parents else parents[node]
        if isinstance(node, ast.expr) and not isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
            whole = isinstance(outer, (ast.Assign, ast.AugAssign, ast.Return))
            ways += [(1, new) for new in beside(node) if whole]
            ways += [(2, ast.UnaryOp(ast.USub(), node)), (2, turned(node))] if whole else []
            ways += [(3, new) for new in terms(node, parents[node], names, kinds)]
            ways += [(FAR + 1 if whole else FAR + 2, new) for new in lacking(node, names)]
        for rank, new in ways:
            if (rank >= FAR) == far and (sets := put(parents[node], node, new)):
                edit = Edit(rank, node.lineno, partial(said, node, new, parents), sets)
                yield edit
                if not far and not isinstance(new, ast.Pass):
                    alike.setdefault(edit.words(), []).append(edit)
        if isinstance(node, ast.If) and not node.orelse and not far:
            yield Edit(2, node.lineno, partial(str, "with else: break after it"), ((node, "orelse", [ast.Break()]),))
    yield from () if far else _of_a_kind(alike)
    yield from () if far else (*_straight(nodes, parents), *_not_sent(nodes, parents), *_scattered(nodes, parents))
    for words, some in alike.items():
        # The same at every place.
        sets = tuple(s for e in some for s in e.sets)
        if len(some) > 1 and separate(sets):
            others = ", ".join(dict.fromkeys(str(e.line) for e in some[1:]))
            yield Edit(some[0].rank + 1, some[0].line, partial(str, f"{words}, here and in line {others}"), sets)


def _apart(old: ast.AST, new: ast.AST, kinds: dict[str, set[str]]) -> bool:
    """Whether two names have never been of one kind."""
    return all(isinstance(x, ast.Name) and x.id in kinds for x in (old, new)) and not kinds[old.id] & kinds[new.id]


def _made(node: ast.AST) -> bool:
    return isinstance(node, ast.arg) or _stored(node)


def _stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


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


def put(parent: ast.AST, old: ast.AST, new: ast.AST) -> tuple[tuple[ast.AST, str, Any], ...]:
    """The change that puts a node in another's place."""
    for field, value in ast.iter_fields(parent):
        if value is old:
            return ((parent, field, new),)
        if isinstance(value, list) and any(x is old for x in value):
            return ((parent, field, [new if x is old else x for x in value]),)
    return ()


def separate(sets: Sequence[tuple[ast.AST, str, Any]]) -> bool:
    """Whether no two of these changes are of one place."""
    return len({(node, field) for node, field, _ in sets}) == len(sets)


def _moved(block: ast.AST) -> Iterator[Edit]:
    """Two statements in the other order; one at an end of a block within goes out of it; one beside it goes in."""
    for field in BLOCKS:
        lines = getattr(block, field, None) or []
        for n, (one, two) in enumerate(itertools.pairwise(lines)):
            # Behind these nothing is done.
            if isinstance(two, (ast.Return, ast.Break, ast.Continue)):
                continue
            swapped = [*lines[:n], two, one, *lines[n + 2 :]]
            yield Edit(2, one.lineno, partial(str, f"with it after line {two.end_lineno}"), ((block, field, swapped),))
        for n, inner in enumerate(lines):
            for part in BLOCKS if isinstance(inner, (ast.For, ast.If, ast.With)) else ():
                before, after, own = lines[:n], lines[n + 1 :], getattr(inner, part, [])
                if not own:
                    continue
                begins = inner.lineno if part == "body" else own[0].lineno
                where = f"the {'loop' if isinstance(inner, ast.For) else 'block'} that begins in line {begins}"
                ways = (
                    *((own[-1], "after", [*before, inner, own[-1], *after], own[:-1]) for _ in own[1:2]),
                    *((own[0], "before", [*before, own[0], inner, *after], own[1:]) for _ in own[1:2]),
                    *((s, "at the end of", [*before, inner, *after[1:]], [*own, s]) for s in after[:1]),
                    *((s, "at the beginning of", [*before[:-1], inner, *after], [s, *own]) for s in before[-1:]),
                )  # fmt: skip
                for what, said, outer, within in ways:
                    sets = ((block, field, outer), (inner, part, within))
                    yield Edit(2, what.lineno, partial(str, f"with it {said} {where}"), sets)


def puts(parents: dict[ast.AST, ast.AST], pairs: Sequence[tuple[ast.AST, ast.AST]]) -> tuple[tuple[ast.AST, str, Any], ...]:
    """The change that puts several nodes in others' places, of a list, too, that holds more than one of them."""
    whole: dict[tuple[ast.AST, str], Any] = {}
    for old, new in pairs:
        for parent, field, value in put(parents[old], old, new):
            before = whole.get((parent, field))
            whole[parent, field] = [new if x is old else x for x in before] if isinstance(before, list) else value
    return tuple((parent, field, value) for (parent, field), value in whole.items())


def _of_a_kind(alike: dict[str, list[Edit]]) -> Iterator[Edit]:
    """The same change at two or more places where other names stand, as x.T in place of x.reshape(a, b) of two weights."""
    kinds: dict[str, list[tuple[str, Edit]]] = {}
    for words, some in alike.items():
        kinds.setdefault(re.sub(r"[A-Za-z_]\w*|\d+", "n", words.removeprefix("with ")), []).append((words, some[0]))
    for some in kinds.values():
        sets = [s for _, e in some for s in e.sets]
        if 1 < len(some) <= MANY and separate(sets):
            told = ", and ".join(f"{w.removeprefix('with ')} (line {e.line})" for w, e in some)
            yield Edit(some[0][1].rank + 1, min(e.line for _, e in some), partial(str, f"with {told}"), tuple(sets))


def _guarded(block: ast.AST, tests: Sequence[str]) -> Iterator[Edit]:
    """A statement only where something holds that is asked for elsewhere."""
    for field in BLOCKS:
        for n, line in enumerate(lines := getattr(block, field, None) or []):
            for test in tests if isinstance(line, (ast.Expr, ast.Assign, ast.AugAssign)) else ():
                made = ast.If(ast.parse(test, mode="eval").body, [line], [])
                yield Edit(
                    2,
                    line.lineno,
                    partial(str, f"with if {test}: before it"),
                    ((block, field, [*lines[:n], made, *lines[n + 1 :]]),),
                )


def _straight(nodes: Sequence[ast.AST], parents: dict[ast.AST, ast.AST]) -> Iterator[Edit]:
    """Nothing is turned round, where several things are."""
    turned = [n for n in nodes if isinstance(n, ast.Subscript) and ast.unparse(n.slice) == "::-1"]
    turned += [n for n in nodes if isinstance(n, ast.Call) and last(n.func) == "reversed" and n.args]
    turned.sort(key=attrgetter("lineno"))
    if len(turned) > 1:
        sets = puts(parents, [(n, n.value if isinstance(n, ast.Subscript) else n.args[0]) for n in turned])
        words = f"if nothing is turned round, here and in line {', '.join(str(n.lineno) for n in turned[1:])}"
        yield Edit(1, turned[0].lineno, partial(str, words), sets)


def _not_sent(nodes: Sequence[ast.AST], parents: dict[ast.AST, ast.AST]) -> Iterator[Edit]:
    """Of a verb's calls some two or three are none, as where what is whole already is summed over the ranks."""
    for verb in COLLECTIVE:
        calls = [n for n in nodes if isinstance(n, ast.Call) and last(n.func) == verb and n.args][:MANY]
        for some in (s for count in (2, 3) for s in itertools.combinations(calls, count)):
            lines = ", ".join(str(n.lineno) for n in some[1:])
            words = f"without the {verb} of {', '.join(ast.unparse(n.args[0]) for n in some)}, here and in line {lines}"
            yield Edit(1, some[0].lineno, partial(str, words), puts(parents, [(n, n.args[0]) for n in some]))


def _scattered(nodes: Sequence[ast.AST], parents: dict[ast.AST, ast.AST]) -> Iterator[Edit]:
    """A sum of which this rank's part alone is read: x = axis.all_reduce(y), x[axis.cut(...)], in a line or in two."""
    parts = [n for n in nodes if isinstance(n, ast.Subscript) and last(getattr(n.slice, "func", None)) == "cut"]
    for call in (n for n in nodes if isinstance(n, ast.Call) and last(n.func) == "all_reduce" and n.args):
        given = parents[call]
        name = given.targets[0].id if isinstance(given, ast.Assign) and isinstance(given.targets[0], ast.Name) else ""
        read = [n for n in parts if n.value is call or (name and getattr(n.value, "id", "") == name)]
        new = ast.Call(ast.Attribute(call.func.value, "reduce_scatter", ast.Load()), call.args[:1], [])
        within = any(n.value is call for n in read)
        if read:
            pairs = [*((n, new if n.value is call else n.value) for n in read), *(() if within else [(call, new)])]
            words = f"with {ast.unparse(new)}, which gives each rank its part, in place of {ast.unparse(call)} cut afterwards"
            yield Edit(0, call.lineno, partial(str, words), puts(parents, pairs))


def _missing(block: ast.AST, names: Sequence[str]) -> Iterator[Edit]:
    """A statement more: at the end of a loop, what is moved on or kept for the next turn; anywhere, a list turned round."""
    for n, before in enumerate(block.body):
        for name in dict.fromkeys(x.id for x in ast.walk(before) if _stored(x)) if isinstance(before, ast.Assign) else ():
            statement = ast.parse(f"{name} = {name}.copy()").body[0]
            sets = ((block, "body", [*block.body[: n + 1], statement, *block.body[n + 1 :]]),)
            yield Edit(1, before.lineno, partial(str, f"with {name} copied after it, {ast.unparse(statement)}"), sets)
        for name in dict.fromkeys(x.id for x in ast.walk(before) if isinstance(x, ast.Name) and x.id in names):
            statement = ast.parse(f"{name} = {name}[::-1]").body[0]
            said = f"with {name} turned round after it, {ast.unparse(statement)}"
            yield Edit(
                2,
                before.lineno,
                partial(str, said),
                ((block, "body", [*block.body[: n + 1], statement, *block.body[n + 1 :]]),),
            )
    if not isinstance(block, (ast.For, ast.While)):
        return
    within = [x for s in block.body for x in ast.walk(s)]
    made = dict.fromkeys(x.id for x in (*within, *ast.walk(getattr(block, "target", block.body[0]))) if _stored(x))
    read = dict.fromkeys(x.id for x in within if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load) and x.id in names)
    steps = dict.fromkeys(ast.unparse(x) for x in within if isinstance(x, (ast.Attribute, ast.Call, ast.Name)))
    texts = [f"{a} = {b}" for a in read if a not in made for b in made]
    texts += [f"{a} += {b}" for a in read if a not in made for b in ("1", *steps) if b != a]
    for text in texts:
        said = f"with one line more at the end of the loop, {text}"
        rank = 1 if text.endswith("+= 1") else 2
        yield Edit(rank, block.lineno, partial(str, said), ((block, "body", [*block.body, *ast.parse(text).body]),))


# --- what is said of it


def said(old: ast.AST, new: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    if isinstance(new, ast.Pass):
        return "without it"
    if isinstance(old, ast.If) and isinstance(new, ast.If) and isinstance(new.test, ast.Constant):
        return f"if {ast.unparse(old.test)} {'always' if new.test.value else 'never'} holds"
    # What its line has twice is told with what stands round it.
    line = old
    while line in parents and not isinstance(line, ast.stmt):
        line = parents[line]
    text = ast.unparse(line).partition("\n")[0]
    while text.count(ast.unparse(old)) > 1 and isinstance(parents.get(old), ast.expr):
        old, new = parents[old], swapped(parents[old], old, new)
    before, after = cut(*(ast.unparse(ast.fix_missing_locations(x)).partition("\n")[0] for x in wider(old, new, parents)))
    return f"with {after} in place of {before}"


# --- what names are


class Noting(ast.NodeTransformer):
    """Puts a call of NOTE(name, value) after whatever gives a name a value."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.body = [*map(_note, (a.arg for a in node.args.args)), *node.body]
        return node

    def visit_For(self, node: ast.For) -> ast.AST:
        self.generic_visit(node)
        node.body = [*_notes(node.target), *node.body]
        return node

    def visit_Assign(self, node: ast.Assign) -> list[ast.AST]:
        return [node, *(note for target in node.targets for note in _notes(target))]


NOTE = "_note"


def _notes(target: ast.AST) -> list[ast.stmt]:
    return [_note(n.id) for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _note(name: str) -> ast.stmt:
    return ast.parse(f"{NOTE}({name!r}, {name})").body[0]


def kind(x: object) -> str:
    return f"array {x.dtype.kind} {x.ndim}" if isinstance(x, np.ndarray) else type(x).__name__
