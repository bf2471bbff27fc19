"""What this machine takes for the operations and verbs of a layout, measured on all its ranks at once (docs/planning.md).

    machine = calibrated(make, control, needs(planner_account, strategies), dtype)

Nothing is kept. Operations are timed in turn, so that each finds the cache as others leave it; all ranks are at it together, as
in a step. What is not in the list is scaled from what is (`plan.here`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from math import prod
from statistics import fmean, median
from time import perf_counter
from typing import NamedTuple

import numpy as np

from parallel.control import Control
from parallel.mesh import Mesh
from parallel.round_trip import half_round_trips
from parallel.rows import cut_rows
from plan import timed
from plan.account import Operation
from plan.here import Curve, Here, Key, here, key
from plan.ours import Ours
from plan.strategy import Strategy

# Seconds for operations, and rounds of them.
SECONDS, LEAST, ROUNDS = 2.5, 3, 15
SIZES = (8, 4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20)
CALLS = 15


class Needs(NamedTuple):
    """What a plan asks for. `operations`: each once, with the width of the model and the tokens of a micro-batch; `verbs`: the
    largest message of each on so many ranks."""

    operations: Mapping[Key, tuple[Operation, int, int]]
    verbs: Mapping[tuple[str, int], float]


def needs(account: Ours, strategies: Iterable[Strategy]) -> Needs:
    operations: dict[Key, tuple[Operation, int, int]] = {}
    verbs: dict[tuple[str, int], float] = {}

    def verb(name: str, ranks: int, size: float) -> None:
        verbs[name, ranks] = max(verbs.get((name, ranks), 0.0), size)

    for s in strategies:
        of = lambda axis: prod(s.mesh[name] for name in axis.split(","))  # noqa: B023, E731
        for place in account.places(s):
            parts = [part for stage in account.parts(s, place) for part, _ in stage]
            once = [account.once(s, rank, place) for rank in range(s.pp)]
            sent = [t for part in parts for t in part.transfers]
            sent += [t for o in once for t in (*o.sums, *o.gathers)]
            every = [op for part in parts for op in part.operations] + [op for o in once for op in o.update]
            for op in every:
                if op.kind == "alone":
                    verb(op.name, 1, op.shape[0])
                else:
                    operations.setdefault(key(op), (op, s.config.d_model, s.tokens))
            for t in sent:
                verb(t.verb, of(t.axis), t.message_bytes)
            for t in (t for o in once for t in o.between):
                verb(t.verb, 2, t.message_bytes)
        if s.pp > 1:
            verb("send", 2, account.hop_bytes(s))
    return Needs(operations, verbs)


def calibrated(
    make: Callable[..., AbstractContextManager[Mesh]], control: Control, wanted: Needs, memory_gib: float, dtype: str
) -> Here:
    """`make(**axes)`: a mesh of these ranks. All of them call it together; all get the same."""
    seconds, rounds = _operations(wanted, control, dtype)
    verbs: dict[tuple[str, int], Curve] = {}
    for ranks in sorted({n for _, n in wanted.verbs}):
        mine = {verb: size for (verb, n), size in wanted.verbs.items() if n == ranks}
        if control.size % ranks:
            continue
        with make(dp=control.size // ranks, tp=ranks) as mesh:
            verbs |= {(verb, ranks): _verb(mesh, control, verb, size) for verb, size in mine.items()}
    every = control.everyone((seconds, verbs, rate(dtype), bandwidth(dtype), call(), rounds))
    found = {k: median(of[0][k] for of in every) for k in seconds}
    # On a machine that others use, an operation is seldom interrupted and a step often: a round says by how much.
    slowest = median(max(of) for of in zip(*(of[-1] for of in every), strict=True)) if rounds else 0.0
    busy = max(1.0, slowest / whole) if (whole := sum(found.values())) else 1.0
    found = {k: busy * took for k, took in found.items()}
    curves = {k: tuple((n, median(of[1][k][i][1] for of in every)) for i, (n, _) in enumerate(c)) for k, c in verbs.items()}
    plain = {name: median(of[n] for of in every) for n, name in enumerate(("rate", "bandwidth", "call"), 2)}
    return here(control.size, memory_gib, dtype, seconds=found, verbs=curves, **plain)


def _operations(wanted: Needs, control: Control, dtype: str) -> tuple[dict[Key, float], list[float]]:
    """Seconds of each operation, the median of some rounds; and of each round."""
    runs = {k: (run, timed.times(op)) for k, (op, *size) in wanted.operations.items() if (run := timed.made(op, dtype, *size))}
    found: dict[Key, list[float]] = {k: [] for k in runs}
    rounds: list[float] = []
    for run, _ in runs.values():
        run()
    begun = perf_counter()
    for n in range(ROUNDS):
        # All ranks stop after as many rounds.
        if n >= LEAST and control.from_first(perf_counter() - begun) > SECONDS:
            break
        control.wait()
        for k, (run, times) in runs.items():
            at = perf_counter()
            run()
            found[k].append(times * (perf_counter() - at))
        rounds.append(sum(of[-1] for of in found.values()))
    return {k: median(of) for k, of in found.items()}, rounds


def _verb(mesh: Mesh, control: Control, verb: str, largest: float) -> Curve:
    """Seconds by bytes, up to the largest that is needed."""
    sizes = [n for n in SIZES if n < largest] + [max(8, int(largest))]
    return tuple((n, _seconds(mesh, control, verb, n)) for n in dict.fromkeys(sizes))


def _seconds(mesh: Mesh, control: Control, verb: str, size: int) -> float:
    axis, x = mesh.tp, np.zeros(max(1, size // 4), np.float32)
    if verb == "send":
        return median(half_round_trips(axis, control, x, CALLS) or [0.0])
    cut = cut_rows(len(x), axis.size)
    part = np.ascontiguousarray(cut.take(x, 0, axis.rank))
    counts = [cut.size(r) for r in range(axis.size)]
    run = {
        "all_reduce": lambda: axis.all_reduce(x),
        "reduce_scatter": lambda: axis.reduce_scatter(x, 0, cut),
        "all_gather": lambda: axis.all_gather(part, 0, cut),
        "shift": lambda: axis.shift(part, counts),
        "exchange": lambda: axis.exchange(x, counts, [counts[axis.rank]] * axis.size),
        "all_to_all": lambda: axis.exchange(x, counts, [counts[axis.rank]] * axis.size),
    }[verb]
    took = []
    control.wait()
    with mesh.phase("compare"):
        run()
        for _ in range(CALLS if size < 4 * 2**20 else LEAST):
            at = perf_counter()
            run()
            took.append(perf_counter() - at)
    # The mean, as in a step too some of them wait for a rank that was interrupted.
    return fmean(took)


def _median(run: Callable[[], object], many: int) -> float:
    took = []
    for _ in range(many):
        at = perf_counter()
        run()
        took.append(perf_counter() - at)
    return median(took)


def rate(dtype: str) -> float:
    """Operations a second of this rank's products."""
    a = np.ones((384, 384), dtype)
    return 2 * 384**3 / _median(lambda: np.matmul(a, a), 5)


def bandwidth(dtype: str) -> float:
    """Bytes a second of this rank's memory, read and written."""
    a = np.ones(2**22, dtype)
    b = np.empty_like(a)
    return 2 * a.nbytes / _median(lambda: np.copyto(b, a), 5)


def call() -> float:
    """Seconds of a call of NumPy that does next to nothing."""
    a = np.ones(8, np.float32)
    return _median(lambda: [np.multiply(a, a, out=a) for _ in range(1000)], 5) / 1000
