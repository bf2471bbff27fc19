"""What may belong in the place of an expression, or of a statement, of a learner's function.

Mutants (`practice/mutants.py`) turn right into wrong; many of them lead back as well. The others are here; what is often
written in one place's stead is in `usual.py`.
"""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Iterator, Sequence

from practice.answer import last
from practice.mutants import changes
from practice.twists import SUMS

# The rank of changes of which there are many, and few are meant.
FAR = 4
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
# Functions of which one is taken for another.
KINDS = (("maximum", "minimum", "logaddexp"), ("floor", "ceil", "rint", "round", "trunc"), ("tril", "triu"))
KINDS += (("exp", "log", "expm1", "log1p", "log2", "exp2"), ("empty_like", "zeros_like"), ("add", "subtract", "multiply"))
BOUNDS = ("max", "min", "maximum", "minimum", "clip")
# What a whole number is made with by cutting off.
WHOLE = ("int", "int8", "int16", "int32", "int64", "intp")


def instead(node: ast.AST, names: Sequence[str]) -> Iterator[tuple[int, ast.AST]]:
    """(rank, what may belong in a node's place)."""
    # Conditions that hold always or never, and names exchanged, hide what stands beside them.
    hiding = isinstance(node, ast.If) or (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple))
    for _, change in changes(node):
        try:
            yield 1 + hiding, change(copy.deepcopy(node))
        except (TypeError, ValueError, AttributeError):
            continue
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Name, ast.Subscript)):
        used = {ast.unparse(n) for n in ast.walk(node.value) if isinstance(n, ast.expr)}
        if ast.unparse(node.targets[0]) not in used:
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
    elif isinstance(node, (ast.Tuple, ast.List)):
        for a, b in itertools.combinations(range(len(node.elts)), 2):
            some = [*node.elts]
            some[a], some[b] = some[b], some[a]
            yield 1 + isinstance(node.ctx, ast.Store), type(node)(some, node.ctx)
    elif isinstance(node, ast.Subscript):
        yield from ((1, new) for new in _subscripts(node))
    elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        for n, one in enumerate(node.generators):
            twin, loop = copy.copy(node), ast.comprehension(one.target, one.iter, [], one.is_async)
            twin.generators = [*node.generators[:n], loop, *node.generators[n + 1 :]]
            yield from ((1, twin) for _ in one.ifs)
    elif isinstance(node, ast.Compare):
        yield 1, ast.UnaryOp(ast.Not(), node)
        text = any(isinstance(n, ast.Constant) and isinstance(n.value, str) for n in node.comparators)
        yield from ((2, ast.Compare(node.left, [ast.Eq()], [ast.Constant(n)])) for n in (() if text else (0, 1)))
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield 0, ast.Continue() if isinstance(node, ast.Break) else ast.Break()
    elif isinstance(node, ast.While):
        yield 1, ast.Pass()
    elif isinstance(node, ast.For):
        yield 1, ast.Pass()
        yield 1, ast.For(node.target, ast.Call(ast.Name("reversed", ast.Load()), [_call("list", node.iter)], []), node.body, [])
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
        yield 1, _numpy("copy", node)
        yield 1, ast.BinOp(ast.Constant(1), ast.Sub(), node)
        yield 1, ast.Attribute(node, "T", ast.Load())
        yield from ((3, ast.Name(other, ast.Load())) for other in names if other != node.id)
    elif isinstance(node, ast.expr) and not isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
        yield from ((FAR, ast.Name(other, ast.Load())) for other in names)


def like(node: ast.AST, nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Another attribute of the same object, another key: those that the function has."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and isinstance(node.value, ast.Name):
        here = {n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == node.value.id}
        yield from (ast.Attribute(node.value, other, node.ctx) for other in sorted(here - {node.attr}))
    elif isinstance(node, ast.Subscript) and isinstance(key := node.slice, ast.Constant) and isinstance(key.value, str):
        keys = {n.slice.value for n in nodes if isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Constant)}
        others = sorted(k for k in keys if isinstance(k, str) and k != key.value)
        yield from (ast.Subscript(node.value, ast.Constant(other), node.ctx) for other in others)


def turned(node: ast.AST) -> ast.AST:
    return ast.Subscript(node, ast.Slice(None, None, ast.UnaryOp(ast.USub(), ast.Constant(1))), ast.Load())


def lacking(node: ast.AST, names: Sequence[str]) -> Iterator[ast.AST]:
    """What a statement makes, with a name more as a factor or a term."""
    for op in (ast.Mult(), ast.Div(), ast.Add(), ast.Sub()):
        yield from (ast.BinOp(node, op, ast.Name(name, ast.Load())) for name in names)
    yield from (ast.BinOp(node, ast.Div(), _call("len", ast.Name(name, ast.Load()))) for name in names)


def terms(node: ast.AST, outer: ast.AST, names: Sequence[str], kinds: dict[str, set[str]]) -> Iterator[ast.AST]:
    """A term of a sum with a factor more, as what was there before scaled anew; a side of a comparison less what a list has."""
    if isinstance(outer, ast.Compare):
        lists = [name for name in names if kinds.get(name, set()) & {"list", "deque", "set", "dict"}]
        yield from (
            ast.BinOp(node, op, _call("len", ast.Name(name, ast.Load()))) for op in (ast.Sub(), ast.Add()) for name in lists
        )
    elif isinstance(outer, ast.BinOp) and isinstance(outer.op, (ast.FloorDiv, ast.Mod)) and node is outer.right:
        # What there is of each, in place of how many there are.
        for name in (n for n in names if "int" in kinds.get(n, ())):
            yield ast.BinOp(ast.Name(name, ast.Load()), ast.FloorDiv(), node)
    elif isinstance(outer, (ast.BinOp, ast.AugAssign)) and isinstance(outer.op, (ast.Add, ast.Sub)):
        for name in (n for n in names if any(k.startswith("array f") for k in kinds.get(n, ()))):
            yield ast.BinOp(node, ast.Mult(), ast.Name(name, ast.Load()))
            if "array f 1" in kinds[name]:
                yield ast.BinOp(node, ast.Mult(), ast.parse(f"{name}[:, None]", mode="eval").body)


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
        yield from (ast.Call(node.func, [*args[:stop], x, *args[stop + 1 :]], []) for x in beside(args[stop]))
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
            for new in (None, *beside(bound)) if bound else ():
                twin = ast.Slice(bounds.lower, bounds.upper, bounds.step)
                setattr(twin, field, new)
                yield ast.Subscript(node.value, twin, node.ctx)
    elif isinstance(bounds, (ast.Name, ast.BinOp, ast.Call)):
        yield from (ast.Subscript(node.value, new, node.ctx) for new in beside(bounds))


def cuts(node: ast.AST, ranked: Sequence[str], lengths: Sequence[str] = ()) -> Iterator[ast.AST]:
    """Parts that are taken to be equally long, x[r * n : (r + 1) * n] and x[:, r * n : (r + 1) * n], as the axis cuts them."""
    if isinstance(node, ast.Call) and last(node.func) == "slice" and len(node.args) == 2:
        used = dict.fromkeys(x.id for x in ast.walk(node) if isinstance(x, ast.Name) and x.id != "slice")
        rank = [f", {name}" for name in used]
        yield from (
            ast.parse(f"{axis}.cut({length}{r})", mode="eval").body
            for axis in ranked
            for length in lengths
            for r in ("", *rank)
        )
    if not isinstance(node, ast.Subscript):
        return
    places = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    for n, bounds in enumerate(places):
        if not (isinstance(bounds, ast.Slice) and bounds.lower and bounds.upper):
            continue
        used = dict.fromkeys(x.id for x in ast.walk(bounds) if isinstance(x, ast.Name))
        length = f"{ast.unparse(node.value)}.shape[{n}]" if len(places) > 1 else f"len({ast.unparse(node.value)})"
        for axis in ranked:
            for rank in ("", *(f", {name}" for name in used if name != axis)):
                part = ast.parse(f"{axis}.cut({length}{rank})", mode="eval").body
                some = ast.Tuple([*places[:n], part, *places[n + 1 :]], ast.Load()) if len(places) > 1 else part
                yield ast.Subscript(node.value, some, node.ctx)


def beside(node: ast.AST) -> list[ast.AST]:
    return [ast.BinOp(node, op, ast.Constant(1)) for op in (ast.Sub(), ast.Add())]


def _call(name: str, x: ast.AST) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), [x], [])


def _renamed(function: ast.AST, name: str) -> ast.AST:
    return (
        ast.Attribute(function.value, name, ast.Load()) if isinstance(function, ast.Attribute) else ast.Name(name, ast.Load())
    )


def _numpy(name: str, x: ast.AST) -> ast.Call:
    return ast.Call(ast.Attribute(ast.Name("np", ast.Load()), name, ast.Load()), [x], [])
