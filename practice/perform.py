"""Runs one case on one rank: calls the learner's functions on read-only inputs, and returns an Outcome in any case."""

from __future__ import annotations

import inspect
import re
import sys
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import wraps
from types import FrameType
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from practice import kept
from practice.axis import Axis, Place
from practice.memory import Memory
from practice.noted import Noted, line_of, watched
from practice.origin import Origins
from practice.part import Case, Outcome, Part
from practice.translate import written
from practice.weight import counted

# Seconds of looking at a case that are allowed in any case.
LOOKING = 0.1


class Stop(BaseException):
    """Raised in a verb to end a simulated rank that could never go on. No learner's `except Exception` catches it."""


def frozen(x: Any) -> Any:
    """An array over memory that cannot be made writeable again; all else as it is."""
    if not isinstance(x, np.ndarray) or x.dtype.hasobject:
        return x
    if x.size == 0:
        x = x.copy()
        x.flags.writeable = False
        return x
    return np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)


# Under these names a namespace keeps the arrays that its functions returned last, beside copies of them, and cases that ran.
# Under the last, what calls its functions, if there is such: (function, args, kwargs) -> result.
BEFORE, RAN, AROUND = "__returned__", "__ran__", "__around__"


class Changed(Exception):
    """An array that was returned has been written to since."""


class Missing(AttributeError):
    """The learner's file lacks what is asked for; the text says what."""


class Code:
    """The learner's file as `call` sees it: `code.NAME(...)`. It remembers what was called, for what is said of an error.

    `code.counts[...]`: a check's own counters. `code.counted(W)`: W, with its "multiplications" counted.
    `asked`: the function whose costs are counted; what other functions cost is left out. '': all are counted.
    """

    def __init__(self, space: dict[str, Any], asked: str = "", axis: Axis | Place | None = None, file: str = "") -> None:
        self.space, self.counts, self.called, self._file = space, Counter(), "", file
        # The function that was called last, and its arguments.
        self._last: tuple[Callable, tuple, dict] | None = None
        # Whether `watching` looks.
        self.watched = False
        # What each function has returned last: how many values (-1: none or one), and what, in words.
        self.returned: dict[str, tuple[int, str]] = {}
        # Whether another forward comes between a forward and its backward.
        self.between = False
        # The arguments that the task lets the learner's functions change.
        self.changes: tuple[str, ...] = ()
        # What traces memory, if it is counted.
        self.memory: Memory | None = None
        self._forwards: dict[str, tuple[Callable, tuple, dict] | None] = {}
        # What the learner's functions have returned is the learner's: handed back, it may be changed. It is not kept for that.
        self._theirs: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()
        # Of lists and dicts, by id: one that is gone may lend its id to another, which is not looked at then.
        self._own: set[int] = set()
        self._asked = asked if inspect.isfunction(space.get(asked)) else ""
        self._counters = [self.counts, *([axis.counts, axis.sent] if isinstance(axis, Axis) else [])]

    def __getattr__(self, name: str) -> Any:
        made = self.space.get(name)
        if not callable(made):
            what = "class" if name[:1].isupper() else "function"
            near = get_close_matches(name, [n for n, x in self.space.items() if inspect.isfunction(x) or inspect.isclass(x)], 1)
            more = f" (it has {near[0]})" if near else f" ({name} is {made!r:.40} there)" if name in self.space else ""
            raise Missing(f"your file has no {what} {name}{more}: it must be named so")
        if not inspect.isfunction(made):
            self.called = name
            return made

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.between and name.endswith("backward"):
                self._others()
            self.called, self._last = name, (made, args, kwargs)
            args = tuple(self._guarded(x) for x in args)
            before = kept.before(made, args, self.changes, self._own)
            with self._counting(name):
                around = self.space.get(AROUND)
                result = around(made, args, kwargs) if around else made(*args, **kwargs)
            if (changed := kept.first_changed(before, args)) is not None:
                raise kept.Altered(kept.said(made, changed, self.space.get("__source__", "")))
            self.returned[name] = _returned(result)
            self._own |= kept.containers(result)
            parts = result if isinstance(result, (tuple, list)) else (result,)
            self._theirs.update((id(x), x) for x in parts if isinstance(x, np.ndarray))
            if self.between and isinstance(result, tuple) and len(result) == 2:
                # Where a check calls it twice, another forward comes between as it is.
                self._forwards[name] = None if name in self._forwards else (made, args, kwargs)
            return result

        return call

    def _guarded(self, x: Any) -> Any:
        """An argument that may not be changed: a view that cannot be written, of whatever is not the learner's own."""
        if type(x) is not np.ndarray or not x.flags.writeable or self._theirs.get(id(x)) is x:
            return x
        view = x.view()
        view.flags.writeable = False
        return view

    def _others(self) -> None:
        """Run each forward once more, on other numbers, whose results nobody asks for and whose costs nobody counts."""
        before = [Counter(c) for c in self._counters]
        for made, args, kwargs in filter(None, self._forwards.values()):
            first = next((n for n, x in enumerate(args) if _floats(x)), None)
            if first is not None and all(_simple(x) for x in (*args, *kwargs.values())):
                made(*args[:first], frozen(0.5 - args[first][::-1]), *args[first + 1 :], **kwargs)
        self._forwards.clear()
        for counter, old in zip(self._counters, before, strict=True):
            counter.clear()
            counter.update(old)

    @contextmanager
    def _counting(self, name: str) -> Iterator[None]:
        """Count what is done within, or leave it out if another function is asked for."""
        if name != self._asked:
            before = [Counter(c) for c in self._counters] if self._asked else []
            try:
                yield
            finally:
                for counter, old in zip(self._counters, before, strict=False):
                    counter.clear()
                    counter.update(old)
            return
        held = self.memory.begin() if self.memory else 0
        try:
            yield
        finally:
            if self.memory:
                self.counts["peak bytes"] = max(self.counts["peak bytes"], self.memory.peak() - held)

    @contextmanager
    def watching(self, see: Callable[[list[np.ndarray]], None]) -> Iterator[None]:
        """Within, call see(arrays) at every line of the learner's file, with the arrays that its variables hold there.

        That takes time: cases of the part's first size are looked at, which are enough, and not when inputs are moved.
        """
        if not self.watched:
            yield
            return

        begun, spent = time.process_time(), 0.0

        def trace(frame: FrameType, event: str, arg: object) -> object:
            nonlocal spent
            if frame.f_code.co_filename != self._file:
                return None
            now = time.process_time()
            # Looking takes no longer than what is looked at: of a file of many short steps some are passed over.
            if spent <= max(LOOKING, 0.5 * (now - begun)):
                see(_held(frame, self._file, self.space))
                spent += time.process_time() - now
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)

    @contextmanager
    def noting(self, *names: str) -> Iterator[list[str]]:
        """Within, a list of the functions of these names in the order in which the learner's code calls them."""
        order: list[str] = []
        given = {n: self.space[n] for n in names if inspect.isfunction(self.space.get(n))}

        def noted(name: str, function: Callable) -> Callable:
            @wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                order.append(name)
                return function(*args, **kwargs)

            return call

        self.space.update({n: noted(n, f) for n, f in given.items()})
        try:
            yield order
        finally:
            self.space.update(given)

    def counted(self, W: np.ndarray) -> np.ndarray:
        return counted(W, self.counts)

    def given(self) -> dict[str, Any]:
        """The arguments of the function that was called last, by name; {} where they are not the function's."""
        if self._last is None:
            return {}
        made, args, kwargs = self._last
        try:
            return dict(inspect.signature(made).bind(*args, **kwargs).arguments)
        except (TypeError, ValueError):
            return {}


def _floats(x: Any) -> bool:
    return type(x) is np.ndarray and x.dtype.kind == "f" and x.ndim > 0


def _simple(x: Any) -> bool:
    """Whether a forward may be handed x a second time: it keeps nothing from call to call."""
    return isinstance(x, (np.ndarray, int, float, Place)) or (isinstance(x, tuple) and all(map(_simple, x)))


def _held(frame: FrameType | None, file: str, space: dict[str, Any]) -> list[np.ndarray]:
    """The arrays in the variables of the learner's running functions and in its globals, also within containers."""
    found: list[np.ndarray] = []

    def collect(x: Any, depth: int) -> None:
        if isinstance(x, np.ndarray):
            found.append(x)
        elif isinstance(x, (list, tuple, set, deque)) and depth:
            for v in x:
                collect(v, depth - 1)
        elif isinstance(x, dict) and depth:
            for v in list(x.values()):
                collect(v, depth - 1)
        elif depth and type(x).__module__ == "exercise" and hasattr(x, "__dict__"):
            collect(vars(x), depth)

    while frame is not None:
        if frame.f_code.co_filename == file:
            collect(dict(frame.f_locals), 4)
        frame = frame.f_back
    collect({n: v for n, v in space.items() if not n.startswith("__")}, 4)
    return found


def _within(x: np.ndarray, given: Any) -> str | None:
    """Where in an argument the memory of x is: '' if it is the argument, `[1]` in a tuple; None if it is not there."""
    if isinstance(given, np.ndarray):
        return "" if np.may_share_memory(x, given) else None
    items = given.items() if isinstance(given, dict) else enumerate(given) if isinstance(given, (tuple, list)) else ()
    return next((f"[{k!r}]{place}" for k, v in items if (place := _within(x, v)) is not None), None)


def _returned(result: Any) -> tuple[int, str]:
    if isinstance(result, list):
        return len(result), f"a list of {len(result)}"
    if isinstance(result, tuple):
        return len(result), f"{len(result)} values" if len(result) != 1 else "a tuple of one value"
    if isinstance(result, np.ndarray):
        return -1, f"one array of shape {result.shape}"
    return -1, "nothing (None)" if result is None else f"one value of type {type(result).__name__}"


def perform(
    part: Part,
    case: Case,
    space: dict[str, Any],
    axis: Axis | Place,
    file: str,
    given: dict[str, Any] | None = None,
    origins: bool = False,
) -> Outcome:
    """Run `part` on the functions in `space`, which were made from `file`. given: inputs in place of the case's.

    origins: look, in float32, for the lines that make float64.
    """
    a = {name: frozen(x) for name, x in (given or case.arrays(part)).items()}
    code, noted = Code(space, part.name, axis, file), Noted(file, space.get("__source__", ""))
    code.changes, held = part.changes, [kept.content(x) for x in a.values()]
    code.watched = not case.jitter and not case.moved and case.size[0] == part.sizes[0][0]
    # A case that comes again has another forward before its backward: so what a file keeps in its globals is found out.
    ran = space.setdefault(RAN, set())
    code.between = case in ran
    ran.add(case)
    if isinstance(axis, Axis):
        axis.counts.clear()
        axis.sent.clear()
        axis.talk.clear()
    tracing, made = ExitStack(), None
    if part.count_memory:
        code.memory = tracing.enter_context(Memory())
    elif origins and case.dtype == "float32" and not case.moved:
        made = tracing.enter_context(Origins(file, noted.source))
    try:
        with warnings.catch_warnings(), np.errstate(all="log", under="ignore", call=noted):
            warnings.simplefilter("ignore")
            with watched():
                results = part.call(code, a, axis)
        # Methods are not looked at one by one: what they change is seen here.
        if [kept.content(x) for x in a.values()] != held:
            raise kept.Altered("a list or dict that was handed over is changed in place: it must be left as it was")
        outcome = Outcome("ok", {name: _kept(x) for name, x in results.items()})
        if made:
            outcome.origins = {n: made.of(x) for n, x in results.items() if getattr(x, "dtype", None) == np.float64}
        if _changed(space.get(BEFORE, ())):
            raise Changed("what was returned before has changed: the same memory is written to again")
        space[BEFORE] = [(x, outcome.results[n]) for n, x in results.items() if isinstance(x, np.ndarray)]
    except (Stop, KeyboardInterrupt):
        tracing.close()
        raise
    except BaseException as error:
        outcome = Outcome("error", error=described(error, code, file))
    if code.memory:
        code.counts.setdefault("peak bytes", code.memory.peak())
    tracing.close()
    outcome.counts = dict(code.counts + (axis.counts if isinstance(axis, Axis) else Counter()))
    outcome.sent = dict(axis.sent) if isinstance(axis, Axis) else {}
    outcome.noted, outcome.returned = noted.events + noted.silenced, code.returned
    return outcome


def _changed(before: Iterable[tuple[np.ndarray, np.ndarray]]) -> bool:
    """Whether arrays that were returned are not what they were."""
    return any(x.tobytes() != np.asarray(copy, x.dtype).tobytes() for x, copy in before if x.dtype.kind in "fiub")


def _kept(x: Any) -> Any:
    """A copy that later calls cannot change: arrays as arrays, numbers of NumPy too, all else as plain data."""
    if isinstance(x, (np.ndarray, np.generic, float)):
        return np.array(x, subok=False)
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    return _plain(x)


def _plain(x: Any) -> Any:
    if isinstance(x, (np.ndarray, np.generic)):
        return x.tolist()
    if isinstance(x, (list, tuple, set, frozenset, range)):
        return [_plain(v) for v in (sorted(x) if isinstance(x, (set, frozenset)) else x)]
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, int) and abs(x) >= 2**63:
        return f"<int of {x.bit_length()} bits>"
    return x if isinstance(x, (bool, int, float, str, type(None))) else f"<{type(x).__name__}>"


def described(error: BaseException, code: Code, file: str) -> dict[str, Any]:
    """The facts of an error: where it arose in the learner's file, on which arrays, and after which call."""
    frames = list(traceback.walk_tb(error.__traceback__))
    own = [(frame, line) for frame, line in frames if frame.f_code.co_filename == file]
    results = {
        "type": type(error).__name__,
        "message": str(error)[:400],
        "called": code.called,
        "function": code.called,
        "line": 0,
        "text": "",
        "shapes": "",
        # An error in check.py's own line, after the learner's function has returned: it returned something else than asked.
        "after": not own,
    }
    if own:
        frame, line = own[-1]
        text = line_of(code.space.get("__source__", ""), line)
        arrays = {n: v for n, v in {**frame.f_globals, **frame.f_locals}.items() if isinstance(v, (np.ndarray, np.generic))}
        named = [n for n in dict.fromkeys(re.findall(r"\b[A-Za-z_]\w*", text)) if n in arrays]
        results |= {
            "function": frame.f_code.co_name.strip("<>"),
            "line": line,
            "text": text,
            "shapes": ", ".join(f"{n} {arrays[n].shape}" for n in named),
        }
        if "read-only" in results["message"] and named:
            for number, (name, value) in enumerate(code.given().items()):
                if (place := _within(np.asarray(arrays[written(text, named)]), value)) is not None:
                    # By number too: other answers have other names.
                    results |= {"argument": f"{name}{place}", "argument number": f"{number}{place}"}
                    break
    return results
