"""What is often written in an expression's place, and what belongs there: each an edit that takes one for the other."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from practice.answer import last

LOW = "-np.inf"


def usual(node: ast.AST) -> Iterator[tuple[int, ast.AST]]:
    """(rank, what may belong there)."""
    for rank, text in _texts(node):
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        new = tree.body[0] if isinstance(node, ast.stmt) else tree.body[0].value
        if hasattr(new, "ctx") and hasattr(node, "ctx"):
            new.ctx = node.ctx
        yield rank, new


def _texts(node: ast.AST) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        yield from _powers(node)
    elif isinstance(node, ast.BinOp):
        yield from _sums(node, ast.unparse(node.left), ast.unparse(node.right))
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE)):
        sides = [(node.left, ast.Constant(n)) for n in (0, 1)] + [(ast.Constant(n), node.comparators[0]) for n in (0, 1)]
        yield from ((2, ast.unparse(ast.Compare(a, node.ops, [b]))) for a, b in sides)
        if isinstance(node.ops[0], (ast.Lt, ast.LtE)):
            yield 1, f"0 <= {ast.unparse(node)}"
    elif isinstance(node, ast.Subscript):
        yield from _subscripts(node)
    elif isinstance(node, ast.Attribute) and node.attr == "shape":
        yield 2, f"{ast.unparse(node)}[::-1]"
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        yield from _grown(node.targets[0].id, node.value)


def _powers(node: ast.BinOp | ast.Call) -> Iterator[tuple[int, str]]:
    """(a + c b) ** n where a + c b ** n is meant: the power is the last term's alone."""
    base, power = (node.left, node.right) if isinstance(node, ast.BinOp) else node.args[:2]
    if isinstance(base, ast.BinOp) and isinstance(base.op, (ast.Add, ast.Sub)):
        sign, term = "+" if isinstance(base.op, ast.Add) else "-", base.right
        parts = (term.left, term.right) if isinstance(term, ast.BinOp) and isinstance(term.op, ast.Mult) else (None, term)
        factor = f"{ast.unparse(parts[0])} * " if parts[0] else ""
        yield 0, f"{ast.unparse(base.left)} {sign} {factor}({ast.unparse(parts[1])}) ** {ast.unparse(power)}"


def _sums(node: ast.BinOp, left: str, right: str) -> Iterator[tuple[int, str]]:
    if isinstance(node.op, ast.FloorDiv):
        yield 0, f"-(-({left}) // ({right}))"
    elif isinstance(node.op, ast.Add) and isinstance(node.left, ast.BinOp) and isinstance(node.left.op, ast.FloorDiv):
        yield 0, f"-(-({ast.unparse(node.left.left)}) // ({ast.unparse(node.left.right)}))"
    elif isinstance(node.op, ast.Add):
        yield from (
            (0, f"{ast.unparse(root.func)}({ast.unparse(root.args[0])} + {x})") for root, x in _roots(node, left, right)
        )
        # Something small added, against a division by 0, which is meant where there is 0 alone.
        yield from (
            (2, f"np.where({x} == 0, 1, {x})") for x in (left, right) if isinstance(node.right, (ast.Constant, ast.Name))
        )
    elif isinstance(node.op, ast.Mult):
        # A mask that multiplies scores.
        yield from ((1, f"np.where({a}, {b}, {LOW})") for a, b in ((left, right), (right, left)))
    elif isinstance(node.op, ast.Sub):
        yield int(left not in ("1", "1.0")), f"{left} - ({right}) ** 2"
        if mean := _mean_of_square(node.left):
            yield 0, mean
    if isinstance(node.op, (ast.Div, ast.Mult)):
        yield from (
            (1, f"({left}) {'/' if isinstance(node.op, ast.Div) else '*'} {new}")
            for new in (f"({right}) ** 0.5", f"({right}) ** 2")
        )


def _roots(node: ast.BinOp, left: str, right: str) -> Iterator[tuple[ast.Call, str]]:
    """The root in a sum, and what is added to it."""
    for side, other in ((node.left, right), (node.right, left)):
        if isinstance(side, ast.Call) and last(side.func) == "sqrt" and len(side.args) == 1:
            yield side, other


def _mean_of_square(node: ast.AST) -> str:
    """np.var(x, ...) for np.mean(x * x, ...) and its like, in their difference with the square of the mean; '' of all else."""
    if not (isinstance(node, ast.Call) and last(node.func) == "mean"):
        return ""
    method = last(getattr(node.func, "value", None)) not in ("np", "numpy")
    square = node.func.value if method else node.args[0] if node.args else None
    twice = isinstance(square, ast.BinOp) and (
        (isinstance(square.op, ast.Pow) and ast.unparse(square.right) == "2")
        or (isinstance(square.op, ast.Mult) and ast.unparse(square.left) == ast.unparse(square.right))
    )
    of = square.left if twice else square.args[0] if last(getattr(square, "func", None)) == "square" else None
    if of is None:
        return ""
    return ast.unparse(ast.Call(ast.parse("np.var", mode="eval").body, [of, *node.args[0 if method else 1 :]], node.keywords))


def _calls(node: ast.Call) -> Iterator[tuple[int, str]]:
    name, args = last(node.func), [ast.unparse(a) for a in node.args]
    of = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
    if name in ("power", "pow") and len(args) == 2:
        yield from _powers(node)
    elif (
        name == "sqrt" and isinstance(added := node.args[0] if node.args else None, ast.BinOp) and isinstance(added.op, ast.Add)
    ):
        # A small number within the root, or beside it.
        left, right = ast.unparse(added.left), ast.unparse(added.right)
        yield from (
            (0, text) for text in (f"{ast.unparse(node.func)}({left}) + {right}", f"{ast.unparse(node.func)}({right}) + {left}")
        )
    elif name == "reshape" and of not in ("np", "numpy", ""):
        yield from ((1, f"{of}{more}") for more in ("", ".T"))
    elif name == "pop" and of:
        yield 0, f"{of}.pop({'' if args == ['0'] else '0'})"
    elif name == "popleft" and of:
        yield 0, f"{of}.pop()"
    elif name in ("append", "appendleft") and of and len(args) == 1:
        yield 2, f"{of}.insert(0, {args[0]})" if name == "append" else f"{of}.append({args[0]})"
    elif name == "insert" and of and len(args) == 2:
        yield 1, f"{of}.append({args[1]})"
    elif name == "len" and args:
        yield 1, f"np.size({args[0]})"
    elif name == "where" and len(args) == 3:
        yield from ((1, f"np.where({args[0]}, {a}, {b})") for a, b in ((args[1], LOW), (LOW, args[2]), (args[1], 0)))
    elif name in ("maximum", "max", "clip") and len(args) > 1 and of in ("np", "numpy", ""):
        # A bound from below that is meant for 0 alone.
        yield from ((1, f"np.where({x} == 0, {y}, {x})") for x, y in ((args[0], 1), (args[1], 1)))
    elif name == "sum":
        # Of those that come before the first that is not, as of the drafts that are accepted.
        x = of if of not in ("np", "numpy", "") else args[0] if args else ""
        if x and not node.keywords:
            yield 2, f"np.cumprod({x}).sum()"
    elif name == "reversed" and args:
        yield 0, args[0]


def _subscripts(node: ast.Subscript) -> Iterator[tuple[int, str]]:
    of, index = ast.unparse(node.value), ast.unparse(node.slice)
    if index in ("0", "-1"):
        yield 0, f"{of}[{'-1' if index == '0' else '0'}]"
    if isinstance(node.value, ast.Attribute) and node.value.attr == "shape" and index == "0":
        yield 0, f"{ast.unparse(node.value.value)}.size"
    if index == "::-1":
        yield 0, of
    # Each row's own entry.
    if isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2 and ast.unparse(node.slice.elts[0]) == ":":
        yield 1, f"{of}[np.arange(len({of})), {ast.unparse(node.slice.elts[1])}]"


def _grown(name: str, value: ast.AST) -> Iterator[tuple[int, str]]:
    """x = x + [y], which makes a new list, as x += [y], which changes the one that is there."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add) and ast.unparse(value.left) == name:
        yield 0, f"{name} += {ast.unparse(value.right)}"
    elif isinstance(value, ast.List) and value.elts and ast.unparse(value.elts[0]) == f"*{name}":
        yield 0, f"{name} += [{', '.join(map(ast.unparse, value.elts[1:]))}]"
