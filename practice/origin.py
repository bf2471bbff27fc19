"""Where a float64 array comes from that should be float32: the line of the learner's file that makes it of others."""

from __future__ import annotations

import ast
import re
import sys
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np

from practice.noted import line_of

# Seconds of looking: a file of many short steps is looked at no longer.
LOOKING = 0.1
MAKERS = r"np\.(zeros|ones|empty|eye|identity|tri|arange|linspace|full|array|asarray)\("
# Those that make float64 whatever they are given, and how many arguments they take before dtype.
ALWAYS = {"zeros": 1, "ones": 1, "empty": 1, "eye": 3, "identity": 1, "tri": 3}
PROMOTED = (
    "np.zeros, np.ones, np.empty, np.eye and np.arange make float64 unless dtype= says otherwise, and np.sqrt of a number and"
    " other np.float64 values promote; math.sqrt and Python numbers do not"
)


@dataclass
class Made:
    """A float64 array's line, and what names had there before. `array` is held, so that its id is not used again."""

    array: np.ndarray
    line: int
    text: str
    names: dict[str, Any]


class Origins:
    """Within, every float64 array that a line of `file` makes is noted, with that line."""

    def __init__(self, file: str, source: str) -> None:
        self._file, self._source = file, source
        self._made: dict[int, Made] = {}
        self._last: dict[FrameType, tuple[int, dict[str, Any]]] = {}
        self._spent = 0.0

    def __enter__(self) -> Origins:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        self._last.clear()

    def _trace(self, frame: FrameType, event: str, value: object) -> object:
        if frame.f_code.co_filename != self._file or self._spent > LOOKING:
            return None
        begun = time.perf_counter()
        line, names = self._last.get(frame, (0, {}))
        now = {n: x for n, x in frame.f_locals.items() if isinstance(x, (np.ndarray, np.generic, tuple, list))}
        if line:
            found = [*now.values(), value] if event == "return" else now.values()
            for x in found:
                for y in x if isinstance(x, (tuple, list)) and len(x) < 9 else (x,):
                    if isinstance(y, np.ndarray) and y.dtype == np.float64 and id(y) not in self._made:
                        self._made[id(y)] = Made(y, line, line_of(self._source, line), names)
        self._last[frame] = frame.f_lineno, now
        if event == "return":
            del self._last[frame]
        self._spent += time.perf_counter() - begun
        return self._trace

    def of(self, x: Any) -> dict[str, Any]:
        """Of a result: the line in which it, or what it was made of, first became float64; {} where that was not seen."""
        made = self._made.get(id(x))
        while made:
            used = {n: made.names[n] for n in re.findall(r"\b[A-Za-z_]\w*", made.text) if n in made.names}
            before = [self._made.get(id(y)) for y in used.values() if isinstance(y, np.ndarray) and y.dtype == np.float64]
            earlier = next((m for m in before if m and m.line < made.line), None)
            if earlier is None:
                kinds = {n: str(y.dtype) for n, y in used.items() if isinstance(y, (np.ndarray, np.generic))}
                numbers = [n for n, y in used.items() if isinstance(y, np.float64)]
                return {"line": made.line, "text": made.text, "kinds": kinds, "numbers": numbers}
            made = earlier
        return {}


def said(origin: dict[str, Any]) -> str:
    """What made a result float64, after `y is float64, should be float32`."""
    if not origin:
        return f": {PROMOTED}"
    kinds, text = origin["kinds"], origin["text"]
    where = f": it becomes so in line {origin['line']}, {text}"
    maker, counted = _read(text)
    if maker:
        return f"{where}; np.{maker} makes float64 unless dtype= says otherwise"
    whole = [n for n, kind in kinds.items() if re.match(r"u?int(32|64)$", kind) and n in counted]
    if numbers := origin["numbers"]:
        return f"{where}; {numbers[0]} is a np.float64 number and promotes: float() of it, and math.sqrt, do not"
    if whole and any(kind == "float32" and n in counted for n, kind in kinds.items()):
        other = next(n for n, kind in kinds.items() if kind == "float32" and n in counted)
        both = f"{whole[0]} is {kinds[whole[0]]} and {other} float32, which make float64"
        return f"{where}; {both}: give {whole[0]} the dtype of {other} first"
    if made := re.search(MAKERS, text):
        return f"{where}; np.{made[1]} makes float64 unless dtype= says otherwise"
    if "float64" in text or re.search(r"\b(dtype=|astype\()float\b", text):
        return f"{where}, and is not made float32 again"
    return f"{where}; {PROMOTED}"


def _read(text: str) -> tuple[str, set[str]]:
    """Of a line: what in it makes float64 whatever it is given, '' if nothing does, and the names that arithmetic is done with.

    A name that is an index, a length or a shape promotes nothing: y = np.eye(n)[ids] is float64 because of np.eye.
    """
    try:
        tree = ast.parse(text.strip().removesuffix(":"))
    except SyntaxError:
        # A line of several: all names may count.
        return "", set(re.findall(r"[A-Za-z_]\w*", text))
    nodes = list(ast.walk(tree))
    cast = {n.func.value for n in nodes if _method(n) == "astype"}
    maker = ""
    for n in nodes:
        made = _method(n) in ALWAYS and ast.unparse(n.func.value) in ("np", "numpy") and n not in cast
        if made and len(n.args) <= ALWAYS[_method(n)] and not any(k.arg == "dtype" for k in n.keywords):
            maker = maker or _method(n)
    sides = [x for n in nodes if isinstance(n, ast.BinOp) for x in (n.left, n.right)]
    sides += [x for n in nodes if isinstance(n, ast.AugAssign) for x in (n.target, n.value)]
    # What functions are given counts: np.multiply(ids, x), np.where(seen, ids, x).
    sides += [x for n in nodes if isinstance(n, ast.Call) and _method(n) not in ALWAYS for x in n.args]
    return maker, {name for x in sides if (name := _base(x))}


def _method(node: ast.AST) -> str:
    return node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""


def _base(node: ast.AST) -> str:
    """The name whose numbers an operand has: x of x, x[ids], x.T and -x."""
    while isinstance(node, (ast.Subscript, ast.UnaryOp)) or (isinstance(node, ast.Attribute) and node.attr == "T"):
        node = node.operand if isinstance(node, ast.UnaryOp) else node.value
    return node.id if isinstance(node, ast.Name) else ""
