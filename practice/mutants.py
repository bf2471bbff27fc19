"""Mechanical mutants of a solution: an operator, axis, constant, term, verb and statement between the marks, one at a time."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Sequence

from practice.axis import VERBS

BINARY = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div, ast.Add), ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Div,),
    ast.Mod: (ast.FloorDiv,), ast.Pow: (ast.Mult,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,),
}  # fmt: skip
COMPARE = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip


def mutants(source: str, yours: Sequence[range]) -> Iterator[tuple[str, str]]:
    """(what was done at which line, the mutated source), for every place in the lines of `yours`."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    seen = {ast.unparse(tree)}
    for number, node in enumerate(nodes):
        line = getattr(node, "lineno", 0)
        if not any(line in lines for lines in yours):
            continue
        for what, change in changes(node):
            mutant = copy.deepcopy(tree)
            twin = list(ast.walk(mutant))[number]
            replacement = change(twin)
            if replacement is not twin:
                _Swap(twin, replacement).visit(mutant)
            try:
                text = ast.unparse(ast.fix_missing_locations(mutant))
                compile(text, "mutant", "exec")
            except (SyntaxError, ValueError, TypeError):
                continue
            if text not in seen:
                seen.add(text)
                yield f"line {line}: {what}", text


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST | None) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST | None:
        return self.new if node is self.old else self.generic_visit(node)


def _set(name: str, value: object) -> object:
    def change(node: ast.AST) -> ast.AST:
        setattr(node, name, value)
        return node

    return change


def changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    """(description, function of the copied node that changes it or returns what to put in its place)."""
    if isinstance(node, ast.BinOp):
        for other in BINARY.get(type(node.op), ()):
            yield f"{type(node.op).__name__} to {other.__name__}", _set("op", other())
        yield f"left of {type(node.op).__name__} only", lambda n: n.left
        yield f"right of {type(node.op).__name__} only", lambda n: n.right
        if isinstance(node.op, (ast.Sub, ast.Div, ast.MatMult, ast.FloorDiv, ast.Mod)):
            yield f"{type(node.op).__name__} exchanged", lambda n: ast.BinOp(n.right, n.op, n.left)
    elif isinstance(node, ast.AugAssign):
        for other in BINARY.get(type(node.op), ()):
            yield f"augmented {type(node.op).__name__} to {other.__name__}", _set("op", other())
        yield "augmented to plain assignment", lambda n: ast.Assign([n.target], n.value, lineno=n.lineno)
        yield "augmented assignment dropped", lambda n: ast.Pass()
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for other in COMPARE.get(type(node.ops[0]), ()):
            yield f"{type(node.ops[0]).__name__} to {other.__name__}", _set("ops", [other()])
    elif isinstance(node, ast.UnaryOp):
        yield f"{type(node.op).__name__} dropped", lambda n: n.operand
    elif isinstance(node, ast.BoolOp):
        yield "and/or exchanged", _set("op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
        yield "first condition only", lambda n: n.values[0]
        yield "last condition only", lambda n: n.values[-1]
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        steps = (1, -1) if isinstance(node.value, int) else (node.value, -0.5 * node.value)
        for step in steps:
            yield f"{node.value} to {node.value + step}", _set("value", node.value + step)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield f"{node.value} to {not node.value}", _set("value", not node.value)
    elif isinstance(node, ast.Attribute) and node.attr == "T":
        yield ".T dropped", lambda n: n.value
    elif isinstance(node, ast.IfExp):
        yield "condition always true", lambda n: n.body
        yield "condition always false", lambda n: n.orelse
    elif isinstance(node, ast.If):
        yield "if: negated", lambda n: ast.If(ast.UnaryOp(ast.Not(), n.test), n.body, n.orelse)
        yield "if: always", lambda n: ast.If(ast.Constant(True), n.body, n.orelse)
        yield "if: never", lambda n: ast.If(ast.Constant(False), n.body, n.orelse)
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield f"{type(node).__name__.lower()} dropped", lambda n: ast.Pass()
    elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
        yield "statement dropped", lambda n: ast.Pass()
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Subscript, ast.Attribute)):
        yield "assignment dropped", lambda n: ast.Pass()
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and len(node.targets[0].elts) == 2:
        yield (
            "targets exchanged",
            lambda n: ast.Assign([ast.Tuple(n.targets[0].elts[::-1], ast.Store())], n.value, lineno=n.lineno),
        )
    elif isinstance(node, ast.Call):
        yield from _call_changes(node)


def _call_changes(node: ast.Call) -> Iterator[tuple[str, object]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in VERBS and node.args:
        if name.startswith(("all_", "reduce_", "broadcast")):
            yield f"{name} dropped", lambda n: n.args[0]
        yield f"{name} doubled", lambda n: ast.Call(n.func, [n, *n.args[1:]], n.keywords) if name == "all_reduce" else _twice(n)
    elif isinstance(node.func, ast.Attribute) and not node.args and not isinstance(node.func.value, ast.Constant):
        yield f".{name}() dropped", lambda n: n.func.value
    elif len(node.args) == 1 and name not in ("range", "len"):
        yield f"{name}() dropped", lambda n: n.args[0]
    if len(node.args) == 2:
        yield f"arguments of {name} exchanged", lambda n: ast.Call(n.func, n.args[::-1], n.keywords)
    for k in node.keywords:
        if k.arg:
            yield f"{k.arg}= dropped", lambda n, k=k: ast.Call(n.func, n.args, [x for x in n.keywords if x.arg != k.arg])
    swaps = {"max": "min", "min": "max", "sum": "mean", "mean": "sum", "maximum": "minimum", "argmax": "argmin", "exp": "log"}
    swaps |= {"zeros": "ones", "zeros_like": "ones_like", "tril": "triu", "triu": "tril", "any": "all", "all": "any"}
    if name in swaps and isinstance(node.func, ast.Attribute):
        yield (
            f"{name} to {swaps[name]}",
            lambda n: ast.Call(ast.Attribute(n.func.value, swaps[name], ast.Load()), n.args, n.keywords),
        )


def _twice(n: ast.Call) -> ast.AST:
    """The verb called, and then called again for its result."""
    again = ast.Call(n.func, n.args, n.keywords)
    return ast.Subscript(ast.Tuple([n, again], ast.Load()), ast.Constant(1), ast.Load())
