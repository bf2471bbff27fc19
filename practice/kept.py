"""Lists and dicts among the arguments: whether a function has left them as they were.

Arrays are handed over read-only, so a line that writes to them fails. A list cannot be: what it holds is compared after
the call.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import numpy as np

from practice.noted import line_of

METHODS = "append|extend|insert|pop|popitem|remove|clear|sort|reverse|update|setdefault"


class Altered(Exception):
    """A list or dict that was handed over is another now; the text says whose and where."""


def content(x: Any) -> Any:
    """What x holds, to be compared later: containers by what is in them, all else as it is. None of no container."""
    if isinstance(x, list):
        return "list", [_within(v) for v in x]
    if isinstance(x, dict):
        return "dict", [(k, _within(v)) for k, v in x.items()]
    if isinstance(x, tuple) and (within := [content(v) for v in x]) != [None] * len(x):
        return "tuple", within
    return None


def _within(x: Any) -> Any:
    if type(x) is np.ndarray and not x.dtype.hasobject:
        return x.shape, x.dtype.str, x.tobytes()
    held = content(x)
    if held is not None:
        return held
    # Text, numbers and None are told by their value, for 1 and 1.0 too; of objects, which one it is.
    return repr(x) if isinstance(x, (str, bytes, int, float, complex, type(None), np.generic)) else id(x)


def containers(x: Any) -> set[int]:
    """The ids of the lists and dicts in x."""
    items = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    own = {id(x)} if isinstance(x, (list, dict)) else set()
    return own.union(*map(containers, items))


def before(function: FunctionType, args: Sequence[Any], changes: Sequence[str], own: set[int]) -> list[Any]:
    """What each argument holds; None of those that may change: `changes`, by name, and what is the learner's."""
    free = [named(function, n) in changes or bool(own & containers(x)) for n, x in enumerate(args)]
    return [None if f else content(x) for f, x in zip(free, args, strict=True)]


def named(function: FunctionType, number: int) -> str:
    """The name of an argument that is given by its place."""
    code = function.__code__
    return code.co_varnames[number] if number < code.co_argcount else f"number {number + 1}"


def first_changed(before: Sequence[Any], args: Sequence[Any]) -> int | None:
    """The number of the first argument that holds something else than before."""
    return next((n for n, (old, x) in enumerate(zip(before, args, strict=True)) if old is not None and content(x) != old), None)


def said(function: FunctionType, number: int, source: str) -> str:
    """Which argument, and the line that changes it, if it is to be seen in the function's own text."""
    name = named(function, number)
    begins = function.__code__.co_firstlineno
    last = max((line for *_, line in function.__code__.co_lines() if line), default=begins)
    writes = re.compile(rf"\b{name}\b(\[.*?\])?\.({METHODS})\(|^\s*{name}\b(\[.*?\])*\s*[-+*/|&]?=(?!=).*|\bdel {name}\b\[")
    for line in range(begins + 1, last + 1):
        text = line_of(source, line)
        found = writes.search(text)
        # A new list of that name is no change of the old one.
        if found and not re.match(rf"{name}\s*=", text):
            return f"{function.__name__} changes the argument {name} in line {line}, {text}: it must be left as it was"
    return f"{function.__name__} changes the argument {name} in place: it must be left as it was"
