"""The statements of a function as its file has them: the text of each, what it reads, and what it makes."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType

import numpy as np

from parallel.parameter import Fused, Parameter

# What of an array says nothing of its entries.
_ABOUT = frozenset({"shape", "dtype", "size", "ndim", "itemsize", "nbytes"})
# A name and the attributes after it: self.W_Io.data.
Chain = tuple[str, ...]
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)


@dataclass(frozen=True, eq=False)
class Statement:
    """`line`: its first. `text`: on one line. `reads`: names whose values it uses, in order. `makes`: those that it binds or
    writes into; of a return what it gives back, ("",) where that has no name. `asks`: whose method it calls, where that is all
    that it does. `returns`: it is a return."""

    line: int
    text: str
    reads: tuple[Chain, ...]
    makes: tuple[Chain, ...]
    asks: Chain | None
    returns: bool


def found(chain: Chain, names: Mapping[str, object]) -> tuple[str, object]:
    """The chain's text up to the first array or parameter on it, and what it leads to. No code of an object is run: a property
    leads to None."""
    value = names.get(chain[0])
    for n, attribute in enumerate(chain[1:], 1):
        if isinstance(value, np.ndarray | Parameter | Fused):
            return ".".join(chain[:n]), value
        value = getattr(value, "__dict__", {}).get(attribute)
    return ".".join(chain), value


@cache
def statements(code: CodeType) -> dict[int, Statement]:
    """The simple statements of a function, by each line that they stand on. Empty where there is no source."""
    for node in ast.walk(_tree(code.co_filename)):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if first == code.co_firstlineno:
                return dict(_by_line(node, code.co_filename))
    return {}


@cache
def text_at(file: str, line: int) -> str:
    """The text of the simple statement on this line of the file; "" where there is none."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, _SIMPLE) and node.lineno <= line <= node.end_lineno:
            return _text(node, file)
    return ""


@cache
def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse(_read(file))


def _by_line(function: ast.FunctionDef, file: str) -> Iterator[tuple[int, Statement]]:
    for node in ast.walk(function):
        if isinstance(node, _SIMPLE) and not isinstance(node.value, ast.Constant):
            statement = _statement(node, file)
            yield from ((line, statement) for line in range(node.lineno, node.end_lineno + 1))


def _statement(node: ast.stmt, file: str) -> Statement:
    makes: tuple[Chain, ...] = ()
    if isinstance(node, ast.Assign):
        makes = tuple(_named(node.targets))
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        makes = tuple(_named([node.target]))
    elif isinstance(node, ast.Return) and node.value is not None:
        given = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        makes = tuple(_chain(part) or ("",) for part in given)
    call = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    asks = _chain(call.func.value) if call is not None and isinstance(call.func, ast.Attribute) else None
    reads = () if node.value is None else tuple(dict.fromkeys(_read_by(node.value)))
    return Statement(node.lineno, _text(node, file), reads, makes, asks, isinstance(node, ast.Return))


def _text(node: ast.stmt, file: str) -> str:
    """As it stands, or on one line where it stands on several."""
    return ast.get_source_segment(_read(file), node) if node.lineno == node.end_lineno else ast.unparse(node)


def _chain(node: ast.expr) -> Chain | None:
    """a.b.c as a chain; None of anything else."""
    if isinstance(node, ast.Name):
        return (node.id,)
    before = _chain(node.value) if isinstance(node, ast.Attribute) else None
    return None if before is None else (*before, node.attr)


def _named(targets: list[ast.expr | None]) -> Iterator[Chain]:
    """The names that stand in targets: a, b of `a, b[:, i] = ...`."""
    for target in targets:
        if isinstance(target, ast.Tuple | ast.List):
            yield from _named(target.elts)
        elif isinstance(target, ast.Subscript | ast.Starred):
            yield from _named([target.value])
        elif target is not None and (chain := _chain(target)) not in (None, ("_",)):
            yield chain


def _read_by(node: ast.AST) -> Iterator[Chain]:
    """Chains in an expression, but for those of which it asks the length, shape or dtype alone."""
    if isinstance(node, ast.Name | ast.Attribute) and (chain := _chain(node)) is not None:
        if chain[-1] not in _ABOUT:
            yield chain
    elif not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len"):
        for part in ast.iter_child_nodes(node):
            yield from _read_by(part)
