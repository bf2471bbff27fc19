"""Twists of what people forget: a rank's term, where a slice begins, all but one term of a sum, a bracket, which logarithm.

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
ONE_TERM = {
    "-1:": "Of the sum {} the last term alone is left: each replaces the one before. Add them up.",
    ":1": "Of the sum {} the first term alone is there: go on to the end.",
}
GOES_ON = "The {} of {} does not begin anew: it goes on from the row before."
ENTRY = "The first entry of {} is used for all: each has its own."
BRACKET = "A bracket is lost: {} stands where {} belongs."
# Functions that are taken for others.
OTHERS = {
    "log": ("log2", "log10", "log1p"),
    "exp": ("exp2", "expm1"),
    "sin": ("cos",),
    "cos": ("sin",),
    "floor": ("ceil",),
    "ceil": ("floor",),
}


def ways(node: ast.AST, function: ast.FunctionDef, axes: set[str], given: dict[str, int]) -> Iterator[Way]:
    """given: how many arguments each function of the source has."""
    yield from _on_rank_0(node, function, axes)
    yield from _from_front(node, function)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) and getattr(node.left, "attr", "") == "T":
        yield 1, RESHAPED.format(plain(node)), lambda n: _parsed("({0}).T.reshape(({0}).shape)", n)
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in {
        n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)
    }:
        yield 0, f"A step is missing: {plain(node)}.", lambda n: ast.Pass()
    yield from _brackets(node)
    yield from _sums(node)
    yield from _exchanged(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in given:
        for other in (o for o, count in given.items() if o != node.func.id and count == len(node.args)):
            yield 1, "", lambda n, other=other: ast.Call(ast.Name(other, ast.Load()), n.args, n.keywords)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and len(node.id.partition("_")[2]) == 1:
        yield 3, ENTRY.format(plain(node)), lambda n: _parsed("{}[:1]", n)


def axes(nodes: list[ast.AST]) -> set[str]:
    """The names in a source that verbs are called of: in all its functions these are axes, also where none is called."""
    used = [n.value for n in nodes if isinstance(n, ast.Attribute) and n.attr in (*VERBS, "rank", "cut")]
    return {n.id for n in used if isinstance(n, ast.Name)}


def _parsed(text: str, *nodes: ast.AST) -> ast.AST:
    return ast.parse(text.format(*map(ast.unparse, nodes)), mode="eval").body


def _brackets(node: ast.AST) -> Iterator[Way]:
    """a / (b + c) as a / b + c, and f(a + b) as f(a) + b: what stands after the bracket is outside."""
    inner = node.right if isinstance(node, ast.BinOp) and not isinstance(node.op, (ast.Add, ast.Mult, ast.MatMult)) else None
    if isinstance(inner, ast.BinOp):
        new = ast.BinOp(ast.BinOp(node.left, node.op, inner.left), inner.op, inner.right)
        yield 1, BRACKET.format(plain(new), plain(node)), lambda n: new
        call = None
    else:
        call = inner if isinstance(inner, ast.Call) else node if isinstance(node, ast.Call) else None
    if call and len(call.args) == 1 and isinstance(term := call.args[0], ast.BinOp) and isinstance(term.op, (ast.Add, ast.Sub)):
        short = ast.Call(call.func, [term.left], call.keywords)
        new = ast.BinOp(short if call is node else ast.BinOp(node.left, node.op, short), term.op, term.right)
        yield 1, BRACKET.format(plain(new), plain(node)), lambda n: new


def _exchanged(node: ast.AST) -> Iterator[Way]:
    """a + b as b + a, and [a, b] as [b, a]: what is joined the other way round."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        new = ast.BinOp(node.right, ast.Add(), node.left)
        yield 3, f"{plain(new)} stands where {plain(node)} belongs: the order counts.", lambda n: new
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
        # A column for a row: x[:, None] as x[None, :].
        index = [ast.unparse(i) for i in node.slice.elts]
        if index.count("None") == 1 and "None" in (index[0], index[-1]):
            index = ["None", *index[:-1]] if index[-1] == "None" else [*index[1:], "None"]
            new = _parsed(f"{{}}[{', '.join(index)}]", node.value)
            yield 2, f"{plain(new)} stands where {plain(node)} belongs: along which dim it goes counts.", lambda n: new
    elif isinstance(node, ast.List) and isinstance(node.ctx, ast.Load) and len(node.elts) == 2:
        new = ast.List(node.elts[::-1], ast.Load())
        yield 3, f"{plain(new)} stands where {plain(node)} belongs: the order counts.", lambda n: new


def _sums(node: ast.AST) -> Iterator[Way]:
    """Of a sum one term, and a sum that is not set to 0 for the next row; another function of the same kind."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        for one, said in ONE_TERM.items():
            text = f"({{0}})[..., {one}] @ ({{1}})[..., {one}, :]"
            yield 2, said.format(plain(node)), lambda n, text=text: _parsed(text, n.left, n.right)
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return
    name, whole = node.func.attr, plain(node)
    for other in OTHERS.get(name, ()):
        yield 2, "", lambda n, other=other: ast.Call(ast.Attribute(n.func.value, other, ast.Load()), n.args, n.keywords)
    axis = next((k.value for k in node.keywords if k.arg == "axis"), None)
    if name in ("sum", "mean") and axis is not None and not node.args:
        kept = any(k.arg == "keepdims" for k in node.keywords)
        for one, said in ONE_TERM.items():
            at = one.strip(":") if one == "-1:" else "0"
            text = f"({{0}}).take({f'[{at}]' if kept else at}, axis={{1}})"
            yield 2, said.format(whole), lambda n, text=text, axis=axis: _parsed(text, n.func.value, axis)
        yield 2, GOES_ON.format(name, plain(node.func.value)), lambda n: _parsed("np.cumsum({0}, axis=0)", n)
    if name == "einsum" and isinstance(node.args[0], ast.Constant) and "->" in node.args[0].value:
        given, _, out = node.args[0].value.partition("->")
        for letter in dict.fromkeys(x for x in given if x.isalpha() and x not in out):
            for one, said in ONE_TERM.items():
                yield 2, said.format(whole), lambda n, letter=letter, one=one, given=given: _one_term(n, given, letter, one)


def _one_term(node: ast.Call, given: str, letter: str, one: str) -> ast.Call:
    for number, letters in enumerate(given.split(","), 1):
        index = ", ".join(one if x == letter else ":" for x in letters)
        node.args[number] = _parsed(f"({{}})[{index}]", node.args[number]) if letter in letters else node.args[number]
    return node


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
