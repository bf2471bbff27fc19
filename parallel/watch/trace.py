"""What a rank did when: spans, verbs and counters, recorded as tuples in lists, on the rank's own clock.

    trace = Trace(comm)
    trace.watch(mesh)                           # its verbs and phases
    trace.watch_layers([Block, MLP, ...])       # forward, backward, ... of classes, which know nothing of it
    ...
    records = trace.finish()                    # on rank 0 every rank's, elsewhere None; parallel.trace_file writes them

Nothing is written, sent or formatted while the program runs: a span costs two looks at the clock and an append.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from threading import get_ident
from time import perf_counter
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from parallel.axis import Axis
from parallel.call import Call, Watcher
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.verbs import method_name
from parallel.watch.clock import Clock, Reading, read

# The most spans of a rank. What comes later is only counted, and the file says so.
LIMIT = 500_000
# The methods of a layer that are seen, where it has them.
LAYER_METHODS = ("forward", "backward", "cached", "cached_striped", "apply")
# Seconds between two looks at the memory.
MEMORY_EVERY = 0.005

PAGE = os.sysconf("SC_PAGE_SIZE")


class Span(NamedTuple):
    """`kind`: phase, step, a layer's method, optimizer, control."""

    name: str
    kind: str
    begun: float
    ended: float


class TracedCall(NamedTuple):
    """A `Call` and when it was, of plain objects alone, so that it travels light. `ranks`: of the axis among all, in its order.
    `mesh`: how many meshes of the same axes there were before. `waited`: since when the rank waited for what it had started;
    None where it never did."""

    axis: str
    ranks: tuple[int, ...]
    mesh: int
    number: int
    verb: str
    started: bool
    shape: tuple[int, ...]
    dtype: str
    how: str
    peer: int | None
    message_bytes: int
    phase: str
    site: str
    what: str
    entered: float
    left: float
    waited: float | None

    @property
    def name(self) -> str:
        return method_name(self.verb, self.started)


class Record(NamedTuple):
    """What one rank recorded. `counters`: (name, when, value). `dropped`: how many spans came beyond the limit. `failed`: the
    exception that ended it, or ''."""

    rank: int
    size: int
    host: str
    clock: Clock
    spans: list[Span]
    verbs: list[TracedCall]
    counters: list[tuple[str, float, float]]
    dropped: int = 0
    failed: str = ""


class Trace(Watcher):
    """The trace of this rank. All ranks make it and finish it together, as both read the clocks."""

    def __init__(self, comm: MPI.Intracomm, limit: int = LIMIT) -> None:
        self._comm = comm.Dup()
        self._limit, self._dropped = limit, 0
        self._thread = get_ident()
        self._spans: list[tuple[str, str, float, float]] = []
        self._verbs: list[tuple[tuple, Call, float, float, float | None]] = []
        self._counters: list[tuple[str, float, float]] = []
        self._groups: dict[Axis, tuple[str, tuple[int, ...], int]] = {}
        self._begun: dict[Call, float] = {}
        self._waiting: tuple[Call, float] | None = None
        self._names: dict[int, tuple[object, str]] = {}
        self._layers: tuple[type, ...] = ()
        self._replaced: list[tuple[object, str, object]] = []
        self._meshes: list[Mesh] = []
        self._looked = 0.0
        self._start = read(self._comm)
        self.look_at_memory()

    # --- verbs, as a watcher of meshes

    def watch(self, mesh: Mesh) -> None:
        """See the verbs and the phases of this mesh from now on."""
        # The first to hear of a call: what others do before MPI is entered, as waiting for all to agree, is part of the verb.
        mesh.watchers.insert(0, self)
        self._meshes.append(mesh)
        inner = mesh.phase

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            with self.span(name, "phase"), inner(name):
                yield
            self.look_at_memory()

        self._replace(mesh, "phase", phase)

    def begin(self, axis: Axis, call: Call, x: np.ndarray | None) -> None:
        # The thread that computes is the one that calls verbs: in a server that is not the first.
        self._thread = get_ident()
        self._begun[call] = perf_counter()

    def wait(self, axis: Axis, call: Call) -> None:
        self._waiting = call, perf_counter()

    def end(self, axis: Axis, call: Call, y: np.ndarray | None, entered: float, left: float) -> None:
        begun, waited = self._begun.pop(call), None
        if self._waiting is not None and self._waiting[0] is call:
            waited, self._waiting = self._waiting[1], None
        # Equal where another watcher has forbidden the call: then it did not happen.
        if entered < left and self._room():
            self._verbs.append((self._groups.get(axis) or self._group(axis), call, begun, left, waited))

    def _group(self, axis: Axis) -> tuple[str, tuple[int, ...], int]:
        """The name of the axis, its ranks among all, and how many like it there were before: the same on each of its ranks."""
        mine, all_ranks = axis._comm.Get_group(), self._comm.Get_group()
        ranks = tuple(mine.Translate_ranks(None, all_ranks))
        mine.Free()
        all_ranks.Free()
        before = sum(known[:2] == (axis.name, ranks) for known in self._groups.values())
        self._groups[axis] = axis.name, ranks, before
        return self._groups[axis]

    # --- spans

    @contextmanager
    def span(self, name: str, kind: str) -> Iterator[None]:
        begun = perf_counter()
        try:
            yield
        finally:
            self._add(name, kind, begun)

    def _add(self, name: str, kind: str, begun: float) -> None:
        # Spans of another thread would not nest in this one's.
        if get_ident() == self._thread and self._room():
            self._spans.append((name, kind, begun, perf_counter()))

    def _room(self) -> bool:
        if len(self._spans) + len(self._verbs) < self._limit:
            return True
        self._dropped += 1
        return False

    def watch_calls(self, owner: type | object, methods: Mapping[str, str], kind: str) -> None:
        """See each call of these functions of a class or module as a span of the name given."""
        for method, name in methods.items():
            self._wrap(owner, method, lambda _, name=name: name, kind)

    def watch_layers(self, classes: Iterable[type]) -> None:
        """See LAYER_METHODS of these classes as spans. A span is named by the layer's place in the one that was called from
        outside: blocks.0.attention forward. The parts of a layer are looked for in its attributes."""
        classes = tuple(classes)
        self._layers += classes
        for cls in classes:
            for method in LAYER_METHODS:
                if method in vars(cls):
                    self._wrap(cls, method, lambda layer, m=method: f"{self._place(layer)} {m}", method)

    def watch_size(self, cls: type, methods: Iterable[str], name: str, size: Callable[[object], float]) -> None:
        """Count `size` of an object of the class after each call of these methods."""
        for method in methods:
            function = vars(cls)[method]

            @wraps(function)
            def counted(this: object, *args: object, _function: Callable = function, **more: object) -> object:
                y = _function(this, *args, **more)
                self._counters.append((name, perf_counter(), size(this)))
                return y

            self._replace(cls, method, counted)

    def _wrap(self, owner: object, method: str, name: Callable[[object], str], kind: str) -> None:
        function = vars(owner)[method]

        @wraps(function)
        def timed(*args: object, **more: object) -> object:
            called = name(args[0] if args else None)
            begun = perf_counter()
            try:
                return function(*args, **more)
            finally:
                self._add(called, kind, begun)

        self._replace(owner, method, timed)

    def _replace(self, owner: object, name: str, new: object) -> None:
        self._replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, new)

    def _place(self, layer: object) -> str:
        known = self._names.get(id(layer))
        if known is None:
            # The outermost of nested calls comes here first, and names what is in it.
            self._name_parts(layer)
            known = self._names[id(layer)]
        return known[1]

    def _name_parts(self, root: object) -> None:
        """Name the layers in `root` by their place in it. The layers are kept, so that no other object gets their identity."""
        self._names[id(root)] = root, type(root).__name__
        todo = [("", root)]
        while todo:
            prefix, holder = todo.pop()
            for key, value in vars(holder).items():
                several = isinstance(value, list | tuple)
                for n, part in enumerate(value if several else [value]):
                    if isinstance(part, self._layers) and id(part) not in self._names:
                        path = f"{prefix}{key}.{n}" if several else f"{prefix}{key}"
                        self._names[id(part)] = part, path
                        todo.append((f"{path}.", part))

    # --- counters

    def look_at_memory(self) -> None:
        """Count this process's resident memory, unless that was done a moment ago."""
        now = perf_counter()
        if now - self._looked < MEMORY_EVERY:
            return
        self._looked = now
        with open("/proc/self/statm") as f:
            self._counters.append(("memory", now, float(f.read().split()[1]) * PAGE))

    # --- the end

    def stop(self) -> None:
        """See nothing more: what was wrapped is as it was before, and the meshes are left."""
        for owner, name, old in reversed(self._replaced):
            if old is None:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
        self._replaced.clear()
        for mesh in self._meshes:
            mesh.watchers.remove(self)
        self._meshes.clear()

    def finish(self) -> list[Record] | None:
        """Stop, and read the clocks again. Returns every rank's record on rank 0, None elsewhere."""
        self.look_at_memory()
        self.stop()
        control = Control(self._comm)
        control.wait()
        records = control.to_first(self.record(read(self._comm)))
        control.close()
        self._comm.Free()
        return records

    def record(self, end: Reading | None = None, failed: str = "") -> Record:
        """The record of this rank alone. Without `end`, its clock is known by its first reading."""
        return Record(
            self._comm.rank,
            self._comm.size,
            socket.gethostname(),
            Clock(self._start, end),
            [Span(*span) for span in self._spans],
            [_plain(*verb) for verb in self._verbs],
            list(self._counters),
            self._dropped,
            failed,
        )


def _plain(group: tuple[str, tuple[int, ...], int], call: Call, *times: float | None) -> TracedCall:
    how = ", ".join(str(getattr(h, "sizes", h)) for h in call.how)
    what = (call.number, call.verb, call.started, call.shape, str(call.dtype), how, call.peer)
    return TracedCall(*group, *what, call.message_bytes, call.phase, call.site, call.what, *times)
