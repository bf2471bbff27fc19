"""These ranks as a machine: what was measured of the very operations and verbs of a layout, and how long others take by
that."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from layers.pieces import pairs
from plan import machine as machines
from plan.account import Operation
from plan.machine import Between, Inside, Machine

# kind, name, phase, shape.
Key = tuple[str, str, str, tuple[float, ...]]
# (bytes, seconds), ascending.
Curve = Sequence[tuple[float, float]]
# NumPy calls of a part of a model, and of what surrounds a step, that are in no operation: counted in a profile of small ones.
CALLS = {"block": 60, "beginning": 15, "end": 20, "step": 150}
BYTES = 4


@dataclass(frozen=True)
class Here(Machine):
    """`seconds`: of operations that were measured. Others are scaled: products by their rate and the bytes that they move,
    passes by their entries, attention by its pairs. `call`: seconds of a NumPy call. `verbs`: of each verb on so many ranks."""

    seconds: Mapping[Key, float] = field(default_factory=dict)
    rate: float = 1.0
    bandwidth: float = 1.0
    call: float = 1e-6
    verbs: Mapping[tuple[str, int], Curve] = field(default_factory=dict)

    def measured(self, verb: str, ranks: int, message_bytes: float) -> float | None:
        """Of another verb, or on as many other ranks, what is nearest is taken."""
        every = self.verbs.keys()
        near = [k for k in every if k[0] == verb and (k[1] > 1) == (ranks > 1)] or [k for k in every if k[1] > 1] or [*every]
        if not near:
            return self.call + message_bytes / self.bandwidth
        return between(self.verbs[min(near, key=lambda k: abs(k[1] - ranks))], message_bytes)


def between(curve: Curve, n: float) -> float:
    """In straight lines between what was measured, beyond it as the last one goes on."""
    xs, ys = map(np.array, zip(*curve, strict=True))
    if n > xs[-1] and len(xs) > 1:
        slope = max(0.0, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))
        return float(ys[-1] + slope * (n - xs[-1]))
    return float(np.interp(n, xs, ys))


def here(ranks: int, memory_gib: float, dtype: str, **measured: object) -> Here:
    """A machine of one node, nothing of which is a GPU."""
    inside, beyond = Inside("ranks", 1.0, (0.0, 0.0), 1.0, 0.0), Between("none", 1.0, 1.0, (0.0, 0.0))
    peaks, source = {dtype: measured["rate"]}, {"all": "measured on these ranks"}
    plain = (
        "here",
        ranks,
        memory_gib,
        peaks,
        measured["bandwidth"],
        1,
        1.0,
        0.0,
        1.0,
        1.0,
        {},
        0.0,
        0.0,
        inside,
        beyond,
        source,
    )
    return Here(*plain, **measured)


class Cpu:
    """The device of such a machine."""

    kernel = host = 0.0

    def __init__(self, machine: Here) -> None:
        self.machine = machine
        self._passes: dict[tuple[str, str], tuple[float, float]] = {}
        attended: dict[str, list[float]] = {}
        for (kind, name, phase, shape), seconds in machine.seconds.items():
            if kind in ("pass", "alone", "adamw", "norm", "table"):
                entries, before = self._passes.get((name, phase), (0.0, 0.0))
                self._passes[name, phase] = entries + _entries(kind, shape), before + seconds
            elif kind == "attend":
                attended.setdefault(phase, []).append(seconds / _pairs(shape))
        self._attended = {phase: sorted(of)[len(of) // 2] for phase, of in attended.items()}

    def seconds(self, operation: Operation, dtype: str) -> float:
        return operation.times * self._one(operation)

    def _one(self, op: Operation) -> float:
        m = self.machine
        if op.kind == "calls":
            return CALLS[op.name] * m.call
        if (seen := m.seconds.get(key(op))) is not None:
            return seen
        if op.kind == "product":
            M, N, K, batch = op.shape
            return m.call + batch * (2 * M * N * K / m.rate + BYTES * (M * K + K * N + 2 * M * N) / m.bandwidth)
        if op.kind == "attend":
            like = self._attended.get(_like(op.phase)) or next(iter(self._attended.values()), 4 / m.rate)
            return m.call + like * _pairs(op.shape)
        entries, seconds = self._passes.get((op.name, _like(op.phase)), (0.0, 0.0))
        if not entries:
            return m.call + BYTES * _entries(op.kind, op.shape) / m.bandwidth
        return m.call + seconds * _entries(op.kind, op.shape) / entries

    def explained(self, operation: Operation, dtype: str) -> tuple[float, float, str]:
        """Seconds, bytes moved, and whether that was measured."""
        took = self.seconds(operation, dtype)
        shape = operation.shape
        moved = 0.0
        if operation.kind == "product":
            M, N, K, batch = shape
            moved = BYTES * batch * (M * K + K * N + M * N)
        elif operation.kind in ("pass", "table", "adamw", "norm", "alone"):
            moved = BYTES * _entries(operation.kind, shape)
        known = key(operation) in self.machine.seconds
        return took, operation.times * moved, "measured" if known else "scaled"


def _like(phase: str) -> str:
    """What is done again is a forward."""
    return "forward" if phase == "again" else phase


def key(op: Operation) -> Key:
    return op.kind, op.name, _like(op.phase), tuple(op.shape)


def _entries(kind: str, shape: Sequence[float]) -> float:
    """That are gone through."""
    if kind == "table":
        return 2 * shape[0] * shape[1]
    return shape[0] / BYTES if kind == "alone" else max(1.0, sum(shape))


def _pairs(shape: Sequence[float]) -> float:
    """Multiplications of attention, hidden keys left out."""
    K, g, Q, S, E, V, causal, window = shape
    return max(1.0, K * g * (E + V) * pairs([(slice(0, Q), slice(0, S))], bool(causal), window))


# --- files


def written(m: Here) -> str:
    """As TOML that `read` reads."""
    lines = [
        'kind = "measured"',
        f"name = {json.dumps(m.name)}",
        f"ranks = {m.gpus_per_node}",
        f"memory_gib = {m.memory_gib!r}",
    ]
    lines += [
        f"dtype = {json.dumps(next(iter(m.peaks)))}",
        f"rate = {m.rate!r}",
        f"bandwidth = {m.bandwidth!r}",
        f"call = {m.call!r}",
    ]
    for (kind, name, phase, shape), seconds in m.seconds.items():
        lines += [
            "",
            "[[operation]]",
            f"kind = {json.dumps(kind)}",
            f"name = {json.dumps(name)}",
            f"phase = {json.dumps(phase)}",
        ]
        lines += [f"shape = {json.dumps(list(shape))}", f"seconds = {seconds!r}"]
    for (verb, ranks), curve in m.verbs.items():
        lines += ["", "[[verb]]", f"verb = {json.dumps(verb)}", f"ranks = {ranks}"]
        lines += [f"bytes = {json.dumps([n for n, _ in curve])}", f"seconds = {json.dumps([s for _, s in curve])}"]
    return "\n".join(lines) + "\n"


def read(name: str | Path) -> Machine:
    """A machine that comes with the project, or of a file: of constants, or of what was measured. Raises ValueError."""
    path = Path(name)
    if str(name) in machines.known() or path.suffix != ".toml":
        return machines.read(name)
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return machines.read(name)
    if values.get("kind") != "measured":
        return machines.read(name)
    try:
        seconds = {(o["kind"], o["name"], o["phase"], tuple(o["shape"])): float(o["seconds"]) for o in values["operation"]}
        verbs = {(v["verb"], v["ranks"]): tuple(zip(v["bytes"], v["seconds"], strict=True)) for v in values.get("verb", ())}
        plain = {what: float(values[what]) for what in ("rate", "bandwidth", "call")}
        return here(values["ranks"], float(values["memory_gib"]), values["dtype"], seconds=seconds, verbs=verbs, **plain)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--machine {name}: {error} is missing or no number: write it anew with --write-machine") from None
