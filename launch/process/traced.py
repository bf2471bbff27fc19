"""`--trace FILE`: what of our own objects a trace shows, and the file at the end of a command."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from mpi4py import MPI

from parallel.watch import trace_file
from parallel.watch.trace import Trace

# Spans kept of a rank that failed: writing them must not delay the end of the others.
LAST = 20_000

# Functions of modules and classes of which each call is a span, by the kind of span: seen where their module is loaded.
CALLS = {
    "step": {
        ("training.trainer", "Trainer"): {"step": "training step"},
        ("launch.measure.step", ""): {"once": "step"},
        ("inference.engine", "Engine"): {"step": "engine step"},
    },
    "optimizer": {("layers.optimizer", "AdamW"): {"step": "AdamW"}},
    "control": {
        ("parallel.control", "Control"): {
            "everyone": "control: everyone",
            "from_first": "control: from rank 0",
            "wait": "control: wait",
        }
    },
}


def _cached_bytes(cache: object) -> float:
    return sum(cache.lengths.values()) * cache.bytes_per_token


# Objects whose size is counted after each call of these methods: what sequences hold, and what an engine's pool has reserved.
SIZES = {
    ("inference.cache", "Cache"): (("extend", "truncate", "free"), "KV cache", _cached_bytes),
    ("inference.cache", "Striped"): (("extend", "truncate", "free"), "KV cache", _cached_bytes),
    ("inference.pool", "Pool"): (("hold",), "KV pool", lambda pool: pool.nbytes),
}


def begin(comm: MPI.Intracomm) -> Trace:
    """A recorder that sees all that is loaded. All ranks call it together."""
    trace = Trace(comm)
    comm.Set_attr(_attribute(), trace)
    see(trace)
    return trace


@cache
def _attribute() -> int:
    return MPI.Comm.Create_keyval()


def of(comm: MPI.Intracomm) -> Trace | None:
    """The recorder that `begin` has made for these ranks, if it has."""
    return comm.Get_attr(_attribute())


def see(trace: Trace) -> None:
    """Let it see, from now on, all that is loaded."""
    trace.watch_layers(_layers())
    for kind, owners in CALLS.items():
        for (module, name), methods in owners.items():
            if module in sys.modules:
                owner = getattr(sys.modules[module], name) if name else sys.modules[module]
                trace.watch_calls(owner, methods, kind)
    for (module, cls), (methods, name, size) in SIZES.items():
        if module in sys.modules:
            trace.watch_size(getattr(sys.modules[module], cls), methods, name, size)


def is_layer(cls: type) -> bool:
    """Whether it computes forward and backward, and has weights or sends something."""
    return {"forward", "backward"} <= vars(cls).keys() and bool({"parameters", "traffic"} & vars(cls).keys())


def _layers() -> Iterator[type]:
    """The layers of those classes that are loaded from layers/."""
    modules: list[ModuleType] = [m for name, m in sorted(sys.modules.items()) if name.startswith("layers.")]
    for module in modules:
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if is_layer(cls) and cls.__module__ == module.__name__:
                yield cls


def finish(trace: Trace, path: Path) -> str | None:
    """Write the file on rank 0, and say so on standard error. All ranks call it together. Returns what went wrong, or None."""
    records = trace.finish()
    if records is None:
        return None
    try:
        trace_file.write(path, records, _run())
    except OSError as error:
        return f"cannot write --trace {path}: {error.strerror or error}"
    spans = sum(len(r.spans) + len(r.verbs) for r in records)
    print(f"trace: {path}, {spans:,} spans: open it in ui.perfetto.dev or with python -m launch.trace {path}", file=sys.stderr)
    return None


def rescue(trace: Trace, path: Path, error: BaseException) -> None:
    """Write what this rank alone has into a file of its own: after an exception the others may not come."""
    record = trace.record(failed=f"{type(error).__name__}: {error}")
    record = record._replace(spans=record.spans[-LAST:], verbs=record.verbs[-LAST:], counters=record.counters[-LAST:])
    own = path.with_name(f"{path.stem}.rank{record.rank}{path.suffix}")
    try:
        trace_file.write(own, [record], _run())
    except OSError as problem:
        sys.stderr.write(f"cannot write {own}: {problem.strerror or problem}\n")


def _run() -> dict:
    """What the file says of the run."""
    file = Path(sys.argv[0])
    name = file.parent.name if file.stem == "__main__" else file.stem
    return {"command": [f"launch.{name}", *sys.argv[1:]]}
