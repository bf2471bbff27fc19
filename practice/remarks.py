"""Remarks on a file that may well be right: a loop over tokens where one product would do."""

from __future__ import annotations

import ast
import re

from practice.exercise import Exercise

PRODUCTS = ("dot", "einsum", "matmul", "outer", "inner", "vdot", "tensordot")
# Names whose first dim is tokens, and the number of tokens.
TOKENS = re.compile(r"\w+_[Tt][A-Za-z0-9]*")


def loops(e: Exercise, source: str) -> list[str]:
    """A line for each function with a loop over tokens round a product, where the solution has none; [] for no Python."""
    try:
        own, solved = (_looping(text) for text in (source, e.solution))
    except (SyntaxError, ValueError):
        return []
    return [
        f"line {line}: {name} multiplies token by token; {what} for all rows at once is one product"
        for name, (line, what) in own.items()
        if name not in solved and f"def {name}(" in e.solution
    ]


def _looping(source: str) -> dict[str, tuple[int, str]]:
    found: dict[str, tuple[int, str]] = {}
    for function in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)):
        arrays = [a.arg for a in function.args.args if TOKENS.fullmatch(a.arg)]
        counts = {"T", "t"} | {t.id for t in _counted(function, arrays)}
        for loop in (n for n in ast.walk(function) if isinstance(n, (ast.For, ast.ListComp, ast.GeneratorExp))):
            iterables = [loop.iter] if isinstance(loop, ast.For) else [g.iter for g in loop.generators]
            product = next((p for p in ast.walk(loop) if _product(p) and not _square(p)), None)
            if product is not None and any(_over_tokens(i, arrays, counts) for i in iterables):
                found.setdefault(function.name, (loop.lineno if isinstance(loop, ast.For) else product.lineno, _said(product)))
    return found


def _counted(function: ast.FunctionDef, arrays: list[str]) -> list[ast.Name]:
    """Names that are given len(x) of an array of tokens, alone or with others."""
    found = []
    for n in (n for n in ast.walk(function) if isinstance(n, ast.Assign)):
        several = isinstance(n.targets[0], ast.Tuple) and isinstance(n.value, ast.Tuple)
        pairs = zip(n.targets[0].elts, n.value.elts, strict=False) if several else [(n.targets[0], n.value)]
        found += [target for target, value in pairs if isinstance(target, ast.Name) and _length(value, arrays, set())]
    return found


def _length(node: ast.AST, arrays: list[str], counts: set[str]) -> bool:
    text = ast.unparse(node)
    return text in counts or any(text in (f"len({a})", f"{a}.shape[0]") for a in arrays)


def _over_tokens(node: ast.AST, arrays: list[str], counts: set[str]) -> bool:
    """Whether what is gone through is tokens: x_TD, zip(x_TD, ...), enumerate(x_TD), range(T)."""
    if isinstance(node, ast.Name):
        return node.id in arrays
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return False
    if node.func.id == "range":
        return len(node.args) == 1 and _length(node.args[0], arrays, counts)
    return node.func.id in ("zip", "enumerate") and any(isinstance(a, ast.Name) and a.id in arrays for a in node.args)


def _product(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.MatMult)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PRODUCTS


def _square(node: ast.AST) -> bool:
    """Whether something is multiplied by itself, as row @ row: a sum of squares."""
    pair = [node.left, node.right] if isinstance(node, ast.BinOp) else [a for a in node.args if not isinstance(a, ast.Constant)]
    return len(pair) == 2 and ast.unparse(pair[0]) == ast.unparse(pair[1])


def _said(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 60 else "this product"
