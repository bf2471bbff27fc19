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

from practice.answer import MAKING, untold
from practice.noted import line_of

# Seconds of looking: a file of many short steps is looked at no longer.
LOOKING = 0.1
MAKERS = r"np\.(zeros|ones|empty|eye|identity|tri|arange|linspace|full|array|asarray)\("
# What is given to these says how much, and of what shape: it promotes nothing. np.full is given a number, whose dtype it has.
ALWAYS = MAKING.keys() - {"full"}
# Where of an array the size or the dtype alone is read; a cast to float64 that is written out.
SIZES = re.compile(r"\b\w+\.(shape|size|ndim|dtype)\b|\blen\(\w+\)")
CAST = re.compile(r"""(?<!finfo)[(=,]\s*(np\.)?["']?(float64|float|double)["']?\s*[),]|np\.float64\(""")
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
        self._given: dict[str, Made] = {}
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
        now = _names(frame)
        if line:
            found = [*now.values(), value] if event == "return" else now.values()
            for x in found:
                for y in _arrays(x):
                    if y.dtype == np.float64 and id(y) not in self._made:
                        self._made[id(y)] = Made(y, line, line_of(self._source, line), names)
        if event == "return":
            # What a function gives has no name where it is called: it goes by the function's.
            if made := next((m for y in _arrays(value) if (m := self._made.get(id(y)))), None):
                self._given[frame.f_code.co_name] = made
            del self._last[frame]
        else:
            self._last[frame] = frame.f_lineno, now
        self._spent += time.perf_counter() - begun
        return self._trace

    def of(self, x: Any) -> dict[str, Any]:
        """Of a result: the line in which it, or what it was made of, first became float64; {} where that was not seen.

        `meets`: the line where that comes together with float32, if it is another.
        """
        made, meets, passed = self._made.get(id(x)), {}, set()
        while made:
            passed.add(id(made))
            # What makes it of nothing, or casts to it, is the end; of what the size alone is read nothing is made.
            text = "" if _read(made.text)[0] or CAST.search(made.text) else SIZES.sub("", made.text)
            words = re.findall(r"\b[A-Za-z_]\w*(?:\.\w+)?", text)
            words = dict.fromkeys([*words, *(w.partition(".")[0] for w in words)])
            used = {n: made.names[n] for n in words if n in made.names}
            single = any(y.dtype == np.float32 for v in used.values() for y in _arrays(v))
            if single:
                meets = {"line": made.line, "text": made.text}
            before = [self._made.get(id(y)) for v in used.values() for y in _arrays(v) if y.dtype == np.float64]
            before += [self._given.get(n) for n in words if re.search(rf"\b{n}\(", text)]
            earlier = next((m for m in before if m and id(m) not in passed), None)
            if earlier is None:
                kinds = {n: str(y.dtype) for n, y in used.items() if isinstance(y, (np.ndarray, np.generic))}
                numbers = [n for n, y in used.items() if isinstance(y, np.float64)]
                found = {"line": made.line, "text": made.text, "kinds": kinds, "numbers": numbers}
                return found | ({"meets": meets} if meets and meets["line"] != made.line else {})
            made = earlier
        return {}


def _arrays(x: Any) -> list[np.ndarray]:
    """An array, or those of a short list or tuple."""
    return [y for y in (x if isinstance(x, (tuple, list)) and len(x) < 9 else (x,)) if isinstance(y, np.ndarray)]


def _names(frame: FrameType) -> dict[str, Any]:
    """What may be an array, or holds arrays, by name: local variables, and attributes of self as `self.k`."""
    kinds = (np.ndarray, np.generic, tuple, list)
    now = {n: tuple(x) if type(x) is list else x for n, x in frame.f_locals.items() if isinstance(x, kinds)}
    own = frame.f_locals.get("self")
    return now | {f"self.{n}": x for n, x in getattr(own, "__dict__", {}).items() if isinstance(x, kinds)}


def said(origin: dict[str, Any]) -> str:
    """What made a result float64, after `y is float64, should be float32`."""
    if not origin:
        return f": {PROMOTED}"
    kinds, text = origin["kinds"], origin["text"]
    where = f": it becomes so in line {origin['line']}, {text}"
    if meets := origin.get("meets"):
        # Float64 may be right there, as of angles: what makes the result so is that float32 meets it.
        made = f"which is made in line {origin['line']}, {text}"
        where = f": in line {meets['line']}, {meets['text']}, float32 meets float64, {made}"
    if CAST.search(text):
        return f": float64 is asked for in line {origin['line']}, {text}, and is not made float32 again"
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
    if whole and re.search(r"np\.(array|asarray)\(", text):
        return f"{where}; {whole[0]} is {kinds[whole[0]]}, and of integers float64 is made"
    # Of an array np.array makes one of the same dtype.
    if (made := re.search(MAKERS, text)) and "dtype" not in text and (made[1] not in ("array", "asarray") or not kinds):
        return f"{where}; np.{made[1]} makes float64 unless dtype= says otherwise"
    return where


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
    maker = next((name for n in nodes if n not in cast and (name := untold(n)) in ALWAYS), "")
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
