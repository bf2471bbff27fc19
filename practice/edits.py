"""Edits of a learner's function, one thing at a time: what may have been meant where something else stands.

Mutants (`practice/mutants.py`) turn right into wrong; many of them lead back as well. The others are here.
"""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from practice.answer import last
from practice.mutants import changes
from practice.narrower import axes
from practice.twists import SUMS, cut, wider

# The rank of changes of which there are many, and few are meant.
FAR = 4
BLOCKS = ("body", "orelse")
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
# Functions of which one is taken for another.
KINDS = (("maximum", "minimum", "logaddexp"), ("floor", "ceil", "rint", "round", "trunc"), ("tril", "triu"))
KINDS += (("exp", "log", "expm1", "log1p", "log2", "exp2"), ("empty_like", "zeros_like"), ("add", "subtract", "multiply"))
BOUNDS = ("max", "min", "maximum", "minimum", "clip")
# What a whole number is made with by cutting off.
WHOLE = ("int", "int8", "int16", "int32", "int64", "intp")


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
    for node in nodes:
        if not far and isinstance(getattr(node, "body", None), list):
            yield from _moved(node)
            yield from _missing(node, names)
        if not hasattr(node, "lineno") or node not in parents or isinstance(node, (ast.arg, ast.arguments)):
            continue
        ways = [*_instead(node, [n for n in names if n not in into.get(node, ())]), *((2, x) for x in _like(node, nodes))]
        ways += [(0, new) for new in _cuts(node, sorted(ranked))]
        ways = [(FAR + 1 if rank == 2 and _apart(node, new, kinds) else rank, new) for rank, new in ways]
        outer = parents[parents[node]] if isinstance(parents[node], ast.Tuple) and parents[node] in parents else parents[node]
        if isinstance(node, ast.expr) and not isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
            whole = isinstance(outer, (ast.Assign, ast.AugAssign, ast.Return))
            ways += [(1, new) for new in (*_beside(node), ast.UnaryOp(ast.USub(), node), _turned(node)) if whole]
            ways += [(FAR + 1 if whole else FAR + 2, new) for new in _lacking(node, names)]
        for rank, new in ways:
            if (rank >= FAR) == far and (sets := put(parents[node], node, new)):
                edit = Edit(rank, node.lineno, partial(said, node, new, parents), sets)
                yield edit
                if not far and not isinstance(new, ast.Pass):
                    alike.setdefault(edit.words(), []).append(edit)
    for words, some in alike.items():
        # The same at every place.
        sets = tuple(s for e in some for s in e.sets)
        if len(some) > 1 and len({(s[0], s[1]) for s in sets}) == len(sets):
            others = ", ".join(dict.fromkeys(str(e.line) for e in some[1:]))
            yield Edit(some[0].rank + 1, some[0].line, partial(str, f"{words}, here and in line {others}"), sets)


def _apart(old: ast.AST, new: ast.AST, kinds: dict[str, set[str]]) -> bool:
    """Whether two names have never been of one kind."""
    return all(isinstance(x, ast.Name) and x.id in kinds for x in (old, new)) and not kinds[old.id] & kinds[new.id]


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


def put(parent: ast.AST, old: ast.AST, new: ast.AST) -> tuple[tuple[ast.AST, str, Any], ...]:
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
    elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Subscript) and isinstance(node.op, ast.Add):
        # An index that stands there twice is added to once.
        yield (
            0,
            ast.Expr(
                ast.Call(ast.parse("np.add.at", mode="eval").body, [node.target.value, node.target.slice, node.value], [])
            ),
        )
    elif isinstance(node, ast.Call):
        yield from ((0, new) for new in _calls(node))
    elif isinstance(node, ast.BinOp):
        yield from ((0, new) for new in _brackets(node))
        yield from ((1, ast.BinOp(node.left, op(), node.right)) for op in OPERATORS if not isinstance(node.op, op))
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
        yield from ((1, ast.Compare(node.left, [ast.Eq()], [ast.Constant(n)])) for n in (0, 1))
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield 0, ast.Continue() if isinstance(node, ast.Break) else ast.Break()
    elif isinstance(node, ast.For):
        yield 1, ast.For(node.target, ast.Call(ast.Name("reversed", ast.Load()), [_call("list", node.iter)], []), node.body, [])
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
        yield 1, _numpy("copy", node)
        yield 1, ast.BinOp(ast.Constant(1), ast.Sub(), node)
        yield 1, ast.Attribute(node, "T", ast.Load())
        yield from ((2, ast.Name(other, ast.Load())) for other in names if other != node.id)
    elif isinstance(node, ast.expr) and not isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
        yield from ((FAR, ast.Name(other, ast.Load())) for other in names)


def _like(node: ast.AST, nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Another attribute of the same object, another key: those that the function has."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and isinstance(node.value, ast.Name):
        here = {n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == node.value.id}
        yield from (ast.Attribute(node.value, other, node.ctx) for other in sorted(here - {node.attr}))
    elif isinstance(node, ast.Subscript) and isinstance(key := node.slice, ast.Constant) and isinstance(key.value, str):
        keys = {n.slice.value for n in nodes if isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Constant)}
        others = sorted(k for k in keys if isinstance(k, str) and k != key.value)
        yield from (ast.Subscript(node.value, ast.Constant(other), node.ctx) for other in others)


def _turned(node: ast.AST) -> ast.AST:
    return ast.Subscript(node, ast.Slice(None, None, ast.UnaryOp(ast.USub(), ast.Constant(1))), ast.Load())


def _lacking(node: ast.AST, names: Sequence[str]) -> Iterator[ast.AST]:
    """What a statement makes, with a name more as a factor or a term."""
    for op in (ast.Mult(), ast.Div(), ast.Add(), ast.Sub()):
        yield from (ast.BinOp(node, op, ast.Name(name, ast.Load())) for name in names)
    yield from (ast.BinOp(node, ast.Div(), _call("len", ast.Name(name, ast.Load()))) for name in names)


def _brackets(node: ast.BinOp) -> Iterator[ast.AST]:
    """a / c + b as (a + b) / c, and the other way round."""
    for side in ("left", "right"):
        other, part = ("right", "left") if side == "left" else ("left", "right")
        inner = getattr(node, side)
        if isinstance(inner, ast.BinOp) and _binds(inner.op) != _binds(node.op):
            # What stands beside the inner operand that is furthest from the outer one, or nearest to it.
            for far in (part, other) if not (isinstance(node.op, ast.Div) and side == "right") else ():
                near = other if far == part else part
                alone, kept = getattr(inner, far), getattr(inner, near)
                if _binds(node.op):
                    made = {far: alone, near: ast.BinOp(**{side: kept, "op": node.op, other: getattr(node, other)})}
                    yield ast.BinOp(made["left"], inner.op, made["right"])
                elif far == part or isinstance(inner.op, (ast.Mult, ast.MatMult)):
                    total = ast.BinOp(**{side: alone, "op": node.op, other: getattr(node, other)})
                    yield ast.BinOp(total, inner.op, kept) if far == "left" else ast.BinOp(kept, inner.op, total)


def _binds(op: ast.operator) -> bool:
    return isinstance(op, (ast.Mult, ast.Div, ast.MatMult))


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    """A range that ends one earlier or later; what is cut off, rounded; a sum over another axis, or another operation."""
    name, args = last(node.func), node.args
    if name == "range" and args:
        stop = min(len(args) - 1, 1)
        yield from (ast.Call(node.func, [*args[:stop], x, *args[stop + 1 :]], []) for x in _beside(args[stop]))
    elif name == "astype" and args and last(args[0]) in WHOLE:
        yield ast.Call(ast.Attribute(_numpy("rint", node.func.value), "astype", ast.Load()), args, [])
    elif name == "int" and args:
        yield _call("int", _call("round", args[0]))
    elif name in ("zeros", "zeros_like"):
        # A maximum begins below all that comes.
        full = _renamed(node.func, name.replace("zeros", "full"))
        for low in ("-np.inf", "-1e30"):
            yield ast.Call(full, [*args[:1], ast.parse(low, mode="eval").body, *args[1:]], node.keywords)
    elif name in BOUNDS and len(args) > 1:
        yield from args
    elif any(name in some for some in KINDS):
        others = next(some for some in KINDS if name in some)
        yield from (ast.Call(_renamed(node.func, other), args, node.keywords) for other in others if other != name)
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


def _cuts(node: ast.AST, ranked: Sequence[str]) -> Iterator[ast.AST]:
    """Parts that are taken to be equally long, x[r * n : (r + 1) * n], as the axis cuts them."""
    if (
        not isinstance(node, ast.Subscript)
        or not isinstance(bounds := node.slice, ast.Slice)
        or not bounds.lower
        or not bounds.upper
    ):
        return
    used = dict.fromkeys(n.id for n in ast.walk(bounds) if isinstance(n, ast.Name))
    for axis in ranked:
        for rank in ("", *(f", {name}" for name in used if name != axis)):
            part = ast.parse(f"{axis}.cut(len({ast.unparse(node.value)}){rank})", mode="eval").body
            yield ast.Subscript(node.value, part, node.ctx)


def _beside(node: ast.AST) -> list[ast.AST]:
    return [ast.BinOp(node, op, ast.Constant(1)) for op in (ast.Sub(), ast.Add())]


def _call(name: str, x: ast.AST) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), [x], [])


def _renamed(function: ast.AST, name: str) -> ast.AST:
    return (
        ast.Attribute(function.value, name, ast.Load()) if isinstance(function, ast.Attribute) else ast.Name(name, ast.Load())
    )


def _numpy(name: str, x: ast.AST) -> ast.Call:
    return ast.Call(ast.Attribute(ast.Name("np", ast.Load()), name, ast.Load()), [x], [])


def _moved(block: ast.AST) -> Iterator[Edit]:
    """Two statements in the other order; one at an end of a block within goes out of it; one beside it goes in."""
    for field in BLOCKS:
        lines = getattr(block, field, None) or []
        for n, (one, two) in enumerate(itertools.pairwise(lines)):
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
                    yield Edit(1, what.lineno, partial(str, f"with it {said} {where}"), sets)


def _missing(block: ast.AST, names: Sequence[str]) -> Iterator[Edit]:
    """A statement more: at the end of a loop, what is moved on or kept for the next turn; anywhere, a list turned round."""
    for n, before in enumerate(block.body):
        for name in dict.fromkeys(x.id for x in ast.walk(before) if isinstance(x, ast.Name) and x.id in names):
            statement = ast.parse(f"{name} = {name}[::-1]").body[0]
            said = f"with {name} turned round after it, {ast.unparse(statement)}"
            yield Edit(
                1,
                before.lineno,
                partial(str, said),
                ((block, "body", [*block.body[: n + 1], statement, *block.body[n + 1 :]]),),
            )
    if not isinstance(block, (ast.For, ast.While)):
        return
    within = [x for s in block.body for x in ast.walk(s)]
    made = dict.fromkeys(x.id for x in (*within, *ast.walk(getattr(block, "target", block.body[0]))) if _made(x))
    read = dict.fromkeys(x.id for x in within if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load) and x.id in names)
    steps = dict.fromkeys(ast.unparse(x) for x in within if isinstance(x, (ast.Attribute, ast.Call, ast.Name)))
    texts = [f"{a} = {b}" for a in read if a not in made for b in made]
    texts += [f"{a} += {b}" for a in read if a not in made for b in ("1", *steps) if b != a]
    for text in texts:
        said = f"with one line more at the end of the loop, {text}"
        yield Edit(1, block.lineno, partial(str, said), ((block, "body", [*block.body, *ast.parse(text).body]),))


# --- what is said of it


def said(old: ast.AST, new: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    if isinstance(new, ast.Pass):
        return "without it"
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
