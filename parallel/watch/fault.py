"""Faults on purpose, to see how a run ends: one of them, on one rank, at one call of a verb.

    RANKWISE_FAULT="rank=1,at=all_reduce:3,kind=raise"        the third all_reduce of rank 1, on any axis
    RANKWISE_FAULT="rank=0,at=tp.all_gather:1,kind=kill,when=in"

`when`: before the ranks agree on the call, in it (they have agreed, and the others enter MPI), or after it. A nan or a flip
comes into what is sent (before) or what arrived (after). Only the rank named is touched, and only where the variable is set.

    raise, exit:N, osexit:N, return, kill, segv, stop, sleep:S, spin, thread    what befalls the process
    disk:BYTES                                                                  from here on no file may grow beyond
    nan, flip, forder                                                           the array: a NaN, a bit of it, its order
    shape, dtype, op, root, verb, axis                                          the call differs from the others'
    skip, double, order                                                         left out, made twice, made after the next one
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from parallel.axis import Axis
from parallel.call import Call, Watcher
from parallel.mesh import Mesh
from parallel.pending import Pending
from parallel.verbs import METHODS

VARIABLE = "RANKWISE_FAULT"
BEFALL = ("raise", "exit", "osexit", "return", "kill", "segv", "stop", "sleep", "spin", "thread", "disk")
NUMBERED = ("exit", "osexit", "sleep", "disk")
# At which methods each kind that alters the call has a meaning.
SENDING = tuple(v for v in METHODS if v != "receive")
ALTER = {
    "nan": SENDING,
    "flip": ("all_reduce", "start_all_reduce", "reduce_scatter", "all_gather", "all_to_all", "exchange", "broadcast"),
    "forder": SENDING,
    # Rows differ from rank to rank: how many there are is no shape that the ranks agree on.
    "shape": tuple(v for v in SENDING if v != "exchange"),
    "dtype": SENDING,
    "op": ("all_reduce",),
    "root": ("broadcast",),
    "verb": ("all_reduce", "reduce_scatter", "all_gather", "broadcast"),
    "axis": ("all_reduce", "start_all_reduce", "broadcast"),
    "skip": ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send", "start_send", "receive"),
    "double": METHODS,
    "order": ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send", "start_send"),
}
DEFAULT_WHEN = {"flip": "after"}
FOREVER = 1e9


class Returned(BaseException):
    """`return`: this rank leaves its main as if it were done."""


class Planted(Exception):
    """`raise` and `thread`."""


@dataclass(frozen=True)
class Fault:
    """`axis`: its name, or None for any. `verb`: the method. `call`: which of this rank's calls of it, counted from 1.
    `amount`: the N of exit:N."""

    rank: int
    axis: str | None
    verb: str
    call: int
    kind: str
    amount: float
    when: str

    def around(self, main: Callable[..., int]) -> Callable[..., int]:
        """main; the fault `return` leaves it with status 0."""

        def left_early(*args: object) -> int:
            try:
                return main(*args)
            except Returned:
                return 0

        return left_early


def parsed(text: str) -> Fault:
    """The fault that the text describes. Raises ValueError, naming the part that cannot be used and what would be right."""
    given: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or name not in ("rank", "at", "kind", "when") or name in given:
            raise ValueError(f"{part!r} in {VARIABLE} is no part of a fault: use rank=1,at=all_reduce:3,kind=raise")
        given[name] = value
    if missing := [name for name in ("rank", "at", "kind") if name not in given]:
        raise ValueError(f"{VARIABLE} says no {missing[0]}: use rank=1,at=all_reduce:3,kind=raise")
    if not given["rank"].isdecimal():
        raise ValueError(f"rank={given['rank']} in {VARIABLE} is no rank: use a whole number of 0 or more")
    kind, amount = _kind(given["kind"])
    axis, verb, call = _place(given["at"], kind)
    when = given.get("when", DEFAULT_WHEN.get(kind, "before"))
    allowed = ("before", "in", "after") if kind in BEFALL else ("before", "after") if kind in ("nan", "flip") else ("before",)
    if when not in allowed:
        raise ValueError(f"when={when} in {VARIABLE} has no meaning for {kind}: use {' or '.join(allowed)}")
    if (kind, when) == ("nan", "after") and verb in ("send", "start_send"):
        raise ValueError(f"when=after in {VARIABLE}: nothing comes of {verb} that could be NaN: use before")
    return Fault(int(given["rank"]), axis, verb, call, kind, amount, when)


def _kind(text: str) -> tuple[str, float]:
    kind, colon, number = text.partition(":")
    if kind not in (*BEFALL, *ALTER):
        raise ValueError(f"kind={text} in {VARIABLE} is unknown: use one of {', '.join((*BEFALL, *ALTER))}")
    if bool(colon) != (kind in NUMBERED):
        right = f"{kind}:3" if kind in NUMBERED else kind
        raise ValueError(f"kind={text} in {VARIABLE} cannot be used: use {right}")
    try:
        amount = float(number or 0)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < FOREVER or (kind != "sleep" and amount != int(amount)):
        raise ValueError(f"kind={text} in {VARIABLE}: {number!r} is no number for {kind}: use {kind}:3")
    return kind, amount


def _place(text: str, kind: str) -> tuple[str | None, str, int]:
    name, _, call = text.partition(":")
    axis, _, verb = name.rpartition(".")
    if verb not in METHODS or not call.isdecimal() or int(call) < 1:
        raise ValueError(
            f"at={text} in {VARIABLE} is no call: use VERB:N or AXIS.VERB:N, N from 1, with one of {', '.join(METHODS)}"
        )
    if verb not in ALTER.get(kind, METHODS):
        raise ValueError(f"kind={kind} in {VARIABLE} has no meaning for {verb}: use at {' or '.join(ALTER[kind])}")
    return axis or None, verb, int(call)


def plant(fault: Fault, mesh: Mesh, rank: int) -> None:
    """Let the fault stand before the verbs of every axis of `mesh`, if this is its rank.

    Raises ValueError, on all ranks, where there is no such rank or axis.
    """
    names, ranks = list(mesh.sizes), prod(mesh.sizes.values())
    if fault.rank >= ranks:
        raise ValueError(f"rank={fault.rank} in {VARIABLE} is none of {ranks} ranks: use 0 to {ranks - 1}")
    if fault.axis is not None and fault.axis not in names:
        raise ValueError(f"at={fault.axis}.{fault.verb} in {VARIABLE}: this mesh has no such axis: use {' or '.join(names)}")
    if fault.kind == "axis" and sum(n > 1 for n in mesh.sizes.values()) < 2:
        raise ValueError(f"kind=axis in {VARIABLE} needs two axes of two ranks or more: use a mesh of both, as dp=2,tp=2")
    if rank == fault.rank:
        mesh.watchers.append(_Standing(fault, [getattr(mesh, name) for name in names]))


class _Standing(Watcher):
    """Stands in place of the axes' verbs, and behind all other watchers for what is to come in a verb."""

    def __init__(self, fault: Fault, axes: list[Axis]) -> None:
        self.fault, self.axes = fault, axes
        self.calls = 0
        self.due = False
        self.postponed: Callable[[], object] | None = None
        self._covered: list[Axis] = []
        for axis in axes:
            self._cover(axis)

    def _cover(self, axis: Axis) -> Axis:
        if axis not in self._covered:
            self._covered.append(axis)
            for verb in METHODS:
                setattr(axis, verb, partial(self.called, axis, verb, getattr(axis, verb)))
            group = axis.group
            axis.group = lambda ranks: self._cover(group(ranks))
        return axis

    def begin(self, axis: Axis, call: Call, x: np.ndarray | None) -> None:
        if self.due:
            self.due = False
            _befall(self.fault)

    def called(self, axis: Axis, verb: str, real: Callable, *args: object, **more: object) -> object:
        """What is run when this verb is called."""
        if self.postponed is not None:
            late, self.postponed = self.postponed, None
            result = real(*args, **more)
            late()
            return result
        call = partial(real, *args, **more)
        if not self._is_now(axis, verb):
            return call()
        fault = self.fault
        if fault.kind not in BEFALL:
            return getattr(self, f"_{fault.kind}")(axis, verb, call)
        if fault.when == "before":
            _befall(fault)
        self.due = fault.when == "in"
        result = call()
        if fault.when == "after":
            _befall(fault)
        return result

    def _is_now(self, axis: Axis, verb: str) -> bool:
        fault = self.fault
        if verb != fault.verb or fault.axis not in (None, axis.name.partition("[")[0]):
            return False
        self.calls += 1
        return self.calls == fault.call

    # --- another array

    def _altered(self, call: partial, alter: Callable[[np.ndarray], np.ndarray]) -> object:
        """The call with what it sends, or what comes of it, altered."""
        if self.fault.when == "before":
            return partial(call.func, alter(call.args[0]), *call.args[1:], **call.keywords)()
        result = call()
        if isinstance(result, Pending):
            arrived = result.wait()
            arrived[...] = alter(arrived)
            return result
        return alter(result)

    def _nan(self, axis: Axis, verb: str, call: partial) -> object:
        return self._altered(call, lambda x: _changed(x, lambda y: y[:1].fill(np.nan)))

    def _flip(self, axis: Axis, verb: str, call: partial) -> object:
        def flip(y: np.ndarray) -> None:
            # Of the first entry: of a mantissa a bit that rounding does not hide, of an integer the last.
            y[:1].view(np.uint8)[y.itemsize - 2 if y.dtype.kind == "f" else 0] ^= 1

        return self._altered(call, lambda x: _changed(x, flip))

    def _forder(self, axis: Axis, verb: str, call: partial) -> object:
        return self._altered(call, np.asfortranarray)

    def _shape(self, axis: Axis, verb: str, call: partial) -> object:
        return self._altered(call, lambda x: np.concatenate([x, x[:1]]))

    def _dtype(self, axis: Axis, verb: str, call: partial) -> object:
        """The same bytes as another dtype, which no MPI notices."""
        return self._altered(call, lambda x: x.view(f"{'i' if x.dtype.kind == 'f' else 'f'}{x.itemsize}"))

    # --- another call

    def _op(self, axis: Axis, verb: str, call: partial) -> object:
        return call.func(call.args[0], "sum" if "max" in (*call.args[1:], *call.keywords.values()) else "max")

    def _root(self, axis: Axis, verb: str, call: partial) -> object:
        root = call.args[1] if len(call.args) > 1 else call.keywords.get("root", 0)
        return call.func(call.args[0], (root + 1) % axis.size)

    def _verb(self, axis: Axis, verb: str, call: partial) -> object:
        return getattr(Axis, "all_reduce" if verb == "broadcast" else "broadcast")(axis, call.args[0])

    def _axis(self, axis: Axis, verb: str, call: partial) -> object:
        other = next(a for a in self.axes if a.name != axis.name.partition("[")[0] and a.size > 1)
        return getattr(Axis, verb)(other, *call.args, **call.keywords)

    def _skip(self, axis: Axis, verb: str, call: partial) -> object:
        return _of_the_right_shape(axis, verb, call.args)

    def _double(self, axis: Axis, verb: str, call: partial) -> object:
        again = call.args[0].copy() if isinstance(call.args[0], np.ndarray) else call.args[0]
        first = partial(call.func, again, *call.args[1:], **call.keywords)()
        result = call()
        # Nobody may ever receive the second of two messages.
        if isinstance(first, Pending) and verb != "start_send":
            first.wait()
        return result

    def _order(self, axis: Axis, verb: str, call: partial) -> object:
        self.postponed = call
        return _of_the_right_shape(axis, verb, call.args)


def _changed(x: np.ndarray, change: Callable[[np.ndarray], None]) -> np.ndarray:
    """A copy of x, changed as a flat array."""
    y = x.copy(order="C")
    change(y.reshape(-1))
    return y


def _of_the_right_shape(axis: Axis, verb: str, args: tuple) -> np.ndarray | Pending | None:
    """What a verb that was left out might have given."""
    if verb in ("send", "start_send"):
        return None if verb == "send" else Pending(None)
    if verb == "receive":
        return np.zeros(*args[:2])
    x = args[0]
    if verb not in ("all_gather", "reduce_scatter"):
        return x.copy()
    dim, cut = args[1:3]
    length = cut.length if verb == "all_gather" else cut.size(axis.rank)
    return np.zeros((*x.shape[:dim], length, *x.shape[dim + 1 :]), x.dtype)


def _befall(fault: Fault) -> None:
    match fault.kind:
        case "raise":
            raise Planted("planted")
        case "exit":
            sys.exit(int(fault.amount))
        case "osexit":
            os._exit(int(fault.amount))
        case "return":
            raise Returned
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "segv":
            ctypes.string_at(0)
        case "sleep":
            time.sleep(fault.amount)
        case "spin":
            while True:
                pass
        case "thread":
            threading.Thread(target=_raise_in_thread).start()
            time.sleep(FOREVER)
        case "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.amount), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _raise_in_thread() -> None:
    raise Planted("planted in a thread")
