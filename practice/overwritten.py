"""Whether what a file keeps from one call to the next is what makes it wrong: it is run again without that.

Each call finds the file's globals as at the start; and a call that is handed what another has returned, as a backward its
`saved`, finds them as that one left them. If all is right then, that is the cause. The file is run in a process of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import numpy as np

from practice import answer, rules
from practice.exercise import MODULE, bounded, load
from practice.guarded import apart
from practice.part import Case
from practice.perform import AROUND
from practice.simulate import simulate
from practice.truth import FILE, Truth

# Seconds that it may take, and in how many cases it is tried.
SECONDS, MOST = 1.0, 6
TURNS = 2000
PLAIN = (dict, list, set, tuple, np.ndarray, np.generic, int, float, str, type(None))


def found(truth: Truth, wrong: Sequence[Case]) -> str:
    """What is said of that; '' where it is not so. wrong: cases that are wrong."""
    kept = answer.kept(truth.answer)[:2]
    handed = apart(lambda: _handed(truth, wrong[:MOST]), SECONDS) if kept else None
    if handed is None:
        return ""
    names, lines = " and ".join(k.name for k in kept), "; ".join(map(str, kept))
    said = f"{names} {'is' if len(kept) == 1 else 'are'} kept from one call to the next ({lines})"
    if handed:
        return (
            f"{said}, and another call changes it before it is used. All is right if each call finds what was there when its"
            " argument was returned: put it into what is returned."
        )
    return f"{said}, and what an earlier call has left is used. All is right if each call begins without it."


def _handed(truth: Truth, wrong: Sequence[Case]) -> bool | None:
    """Whether what is right then has needed what a call has left that returned an argument; None where it is wrong still."""
    rules.close(FILE, [])
    # The simpler first.
    for without in (True, False):
        spaces = []
        for _ in truth.places:
            space = load("", FILE, {"__source__": truth.answer})
            exec(compile(bounded(truth.answer, TURNS), FILE, "exec", dont_inherit=True), space)
            spaces.append(space)
            space[AROUND] = _Around(space, without)
        if all(_right(truth, case, spaces) for case in wrong):
            return not without
    return None


def _right(truth: Truth, case: Case, spaces: list[dict[str, Any]]) -> bool:
    outcomes = simulate(truth.parts[case.part], case, spaces, truth.exercise.facts["allow"], FILE)
    return not any(truth.problem(case, r, o) for r, o in enumerate(outcomes))


class _Around:
    """Calls functions of a namespace; what outlives calls is, for each, as it was."""

    def __init__(self, space: dict[str, Any], always: bool) -> None:
        self._space, self._always, self._left = space, always, []
        self._new = self._state()

    def __call__(self, made: Callable, args: tuple, kwargs: dict) -> Any:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, (tuple, list, dict, np.ndarray))]
        of = (s for some, s in reversed(self._left) if any(x is y for x in some for y in given))
        self._put(self._new if self._always else next(of, self._new))
        result = made(*args, **kwargs)
        self._left.append(([result, *(result if isinstance(result, (tuple, list)) else ())], self._state()))
        return result

    def _state(self) -> list[tuple[Any, str, Any, Any]]:
        """(holder, name, what is there, a copy) of globals, default arguments, and attributes of functions and classes."""
        own = [x for x in self._space.values() if getattr(x, "__module__", "") == MODULE]
        named = [(self._space, n) for n in self._space if not n.startswith("__")]
        named += [(x, n) for x in own if isinstance(x, (FunctionType, type)) for n in vars(x) if not n.startswith("__")]
        named += [(x, n) for x in own if isinstance(x, FunctionType) for n in ("__defaults__", "__kwdefaults__")]
        values = [(h, n, h[n] if isinstance(h, dict) else getattr(h, n)) for h, n in named]
        return [(h, n, x, copy.deepcopy(x)) for h, n, x in values if isinstance(x, PLAIN)]

    def _put(self, state: list[tuple[Any, str, Any, Any]]) -> None:
        before = {(id(h), n) for h, n, *_ in state}
        for holder, name, *_ in self._state():
            if (id(holder), name) not in before:
                holder.pop(name) if isinstance(holder, dict) else delattr(holder, name)
        for holder, name, x, old in state:
            now = copy.deepcopy(old)
            # In place, for who holds it beside this name.
            if isinstance(x, (dict, set)):
                x.clear()
                x.update(now)
            elif isinstance(x, list) or (isinstance(x, np.ndarray) and x.ndim):
                x[:] = now
            else:
                x = now
            if isinstance(holder, dict):
                holder[name] = x
            else:
                setattr(holder, name, x)
        for x in self._space.values():
            if hasattr(x, "cache_clear"):
                x.cache_clear()
