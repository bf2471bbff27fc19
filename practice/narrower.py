"""Twists that leave a part out: a term of rank 0 alone, a slice from the beginning, a product reshaped for its transpose.

Each is (rank, sentence, change of a copy of the node), as in twists.py.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from practice.axis import VERBS
from practice.plain import plain

Way = tuple[int, str, Callable[[ast.AST], ast.AST]]
RANKS = "The term {} is added on rank 0 alone: each rank adds it to its own."
FRONT = "{0} is read from its beginning: {0}[:{1}] stands where {2} belongs."
RESHAPED = "{} is made the other way round and then reshaped: reshape leaves the numbers in their order, transpose it."


def ways(node: ast.AST, function: ast.FunctionDef, axes: set[str]) -> Iterator[Way]:
    yield from _on_rank_0(node, function, axes)
    yield from _from_front(node, function)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) and getattr(node.left, "attr", "") == "T":
        yield 1, RESHAPED.format(plain(node)), lambda n: _parsed("({0}).T.reshape(({0}).shape)", n)


def axes(nodes: list[ast.AST]) -> set[str]:
    """The names in a source that verbs are called of: in all its functions these are axes, also where none is called."""
    used = [n.value for n in nodes if isinstance(n, ast.Attribute) and n.attr in (*VERBS, "rank", "cut")]
    return {n.id for n in used if isinstance(n, ast.Name)}


def _parsed(text: str, *nodes: ast.AST) -> ast.AST:
    return ast.parse(text.format(*map(ast.unparse, nodes)), mode="eval").body


def _on_rank_0(node: ast.AST, function: ast.FunctionDef, axes: set[str]) -> Iterator[Way]:
    """x + b as x + b on rank 0 alone, in a function that has an axis."""
    axis = next((a.arg for a in function.args.args if a.arg in axes), "")
    if not axis or not isinstance(getattr(node, "op", None), ast.Add):
        return
    only = "({} if " + axis + ".rank == 0 else 0 * ({}))"
    if isinstance(node, ast.BinOp):
        for side, other in (("right", "left"), ("left", "right")):
            term = getattr(node, side)
            yield (
                1, RANKS.format(plain(term)),
                lambda n, side=side, other=other: ast.BinOp(
                    getattr(n, other), ast.Add(), _parsed(only, getattr(n, side), getattr(n, side))
                ),
            )  # fmt: skip
    elif isinstance(node, ast.AugAssign):
        yield (
            1, RANKS.format(plain(node.value)),
            lambda n: ast.AugAssign(n.target, ast.Add(), _parsed(only, n.value, n.value)),
        )  # fmt: skip


def _from_front(node: ast.AST, function: ast.FunctionDef) -> Iterator[Way]:
    """x[a:b] as x[:b - a], where the slice is written there or has a name."""
    if not (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)):
        return
    first, *rest = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if isinstance(first, ast.Slice) and first.lower is not None and first.upper is not None and first.step is None:
        length = f"{ast.unparse(first.upper)} - ({ast.unparse(first.lower)})"
    elif isinstance(first, ast.Name) and first.id in _slices(function):
        length = f"{first.id}.stop - {first.id}.start"
    else:
        return
    more = "".join(f", {ast.unparse(x)}" for x in rest)
    sentence = FRONT.format(plain(node.value), f"{length}{more}", plain(node))
    yield 1, sentence, lambda n: ast.parse(f"({ast.unparse(n.value)})[:{length}{more}]", mode="eval").body


def _slices(function: ast.FunctionDef) -> set[str]:
    """The names that are given slices."""
    given = [a for a in ast.walk(function) if isinstance(a, ast.Assign) and isinstance(a.value, ast.Call)]
    return {ast.unparse(a.targets[0]) for a in given if ast.unparse(a.value.func).rpartition(".")[2] in ("slice", "cut")}
