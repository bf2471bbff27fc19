"""Every layout of so many ranks, the fastest first, and why the others fail.

All factorisations over pp, dp, ep, cp and tp that model and batch allow, times what is tried of the other options. Memory is
asked first; then a lower bound of the time (`Planner.bound`); only what could still be among the best is simulated. Candidates
are made anew in each pass and only the most promising are kept, so memory does not grow with their number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappush, heapreplace
from itertools import product
from time import perf_counter
from typing import NamedTuple

from parallel.schedules import SCHEDULES
from parallel.shard import AXES
from plan.memory import USABLE
from plan.step import Estimate, Planner
from plan.strategy import Strategy

# What is tried where nothing else is said. Chunks: of schedules that leave them open.
TRIED: Mapping[str, tuple] = {
    "schedule": tuple(SCHEDULES),
    "chunks": (2, 4, 8),
    "micro_batch": (1, 2, 4, 8),
    "recompute": ("none", "selective", "full"),
    "zero": (0, 1, 2, 3),
}
# So many of the most promising are simulated in one pass.
PASS = 2000


@dataclass
class Miss:
    """Why some layouts fail, and the one that fails by the least. `missing`: bytes, of a layout that is too large; `would_fit`:
    the smallest change with which it fits."""

    why: str
    count: int = 0
    nearest: Strategy | None = None
    missing: float | None = None
    kind: str = ""
    stage: int = 0
    would_fit: str | None = None


@dataclass
class Found:
    """`considered` layouts, of which `feasible` fit; the best of them."""

    considered: int = 0
    feasible: int = 0
    simulated: int = 0
    seconds: float = 0.0
    layouts: list[Estimate] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)


class Space(NamedTuple):
    """`base`: the options that all layouts share, as Strategy names them, the model and the batch among them; `tries`: the
    values of each that varies, the axes of the mesh among them where they are fixed."""

    ranks: int
    base: Mapping[str, object]
    tries: Mapping[str, Sequence]

    def meshes(self) -> Iterator[dict[str, int]]:
        """Every factorisation, tp fastest and as small as it goes first."""
        for sizes in factorisations(self.ranks, len(AXES)):
            mesh = dict(zip(AXES, sizes, strict=True))
            if mesh["ep"] > 1 and self.base["config"].experts is None:
                continue
            if all(mesh[name] in self.tries[name] for name in AXES if name in self.tries):
                yield mesh

    def layouts(self) -> Iterator[Strategy | tuple[str, int]]:
        """Every layout; of what cannot be, why, and how many layouts that are."""
        tries = {**TRIED, **self.tries}
        names = [name for name in tries if name not in (*AXES, "schedule", "chunks", "micro_batch")]
        rest = [dict(zip(names, values, strict=True)) for values in product(*(tries[name] for name in names))]
        schedules = [(name, v) for name in tries["schedule"] for v in self._chunks(name, tries["chunks"])]
        config, batch = self.base["config"], self.base["batch"]
        for mesh in self.meshes():
            single = schedules if mesh["pp"] > 1 else [("1f1b", 1)]
            micro = [n for n in tries["micro_batch"] if batch % (mesh["dp"] * mesh["ep"] * n) == 0]
            if why := impossible(config, mesh):
                yield why, len(tries["micro_batch"]) * len(rest) * len(single)
                continue
            if len(micro) < len(tries["micro_batch"]):
                data = mesh["dp"] * mesh["ep"]
                why = f"cannot deal {batch} sequences to {data} data ranks evenly: use a smaller micro-batch or dp"
                yield why, (len(tries["micro_batch"]) - len(micro)) * len(rest) * len(single)
            for n in micro:
                for schedule, chunks in single:
                    own = {**self.base, **mesh, "micro_batch": n, "schedule": schedule, "chunks": chunks}
                    try:
                        first = Strategy(**own, **rest[0])
                    except ValueError as error:
                        yield str(error), len(rest)
                        continue
                    yield first
                    for more in rest[1:]:
                        yield first.varied(more)

    @staticmethod
    def _chunks(name: str, tried: Sequence[int]) -> Sequence[int]:
        schedule = SCHEDULES[name]
        return [v for v in tried if v > 1] if schedule.any_chunks else [schedule.chunks]


def factorisations(n: int, factors: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write n as a product of so many factors."""
    if factors == 1:
        yield (n,)
        return
    for first in (d for d in range(1, n + 1) if n % d == 0) if n < 4096 else _divisors(n):
        for others in factorisations(n // first, factors - 1):
            yield (first, *others)


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def impossible(config: object, mesh: Mapping[str, int]) -> str | None:
    """Why no layout on this mesh is tried: what libraries on GPUs do not cut unevenly, and axes without use."""
    tp, c = mesh["tp"], config
    for what, n in (("heads", c.heads), ("hidden entries", c.d_ff)):
        if n % tp:
            return f"cannot cut {n} {what} over tp={tp} evenly: use a divisor of {n}"
    if mesh["ep"] > 1 and c.experts.count % mesh["ep"]:
        return f"cannot deal {c.experts.count} experts to ep={mesh['ep']} evenly: use a divisor"
    return None


def search(planner: Planner, space: Space, keep: int = 20) -> Found:
    """The `keep` fastest layouts that fit."""
    begun, found = perf_counter(), Found()
    misses: dict[str, Miss] = {}
    best: list[tuple[float, int, Estimate]] = []
    seen: set[int] = set()
    first = True
    while True:
        heap: list[tuple[float, int, Strategy]] = []
        more = False
        for number, made in enumerate(space.layouts()):
            if first:
                found.considered += made[1] if isinstance(made, tuple) else 1
                if (fits := _judged(planner, made, misses)) is None:
                    continue
                found.feasible += fits
            elif isinstance(made, tuple) or number in seen:
                continue
            try:
                bound = planner.bound(made)
                if not first and not planner.fits(made):
                    continue
            except ValueError as error:
                _missed(misses, str(error), made)
                found.feasible -= first
                continue
            if len(best) == keep and bound > -best[0][0]:
                continue
            if len(heap) < PASS:
                heappush(heap, (-bound, -number, made))
            else:
                more = True
                if bound < -heap[0][0]:
                    heapreplace(heap, (-bound, -number, made))
        for bound, number, made in sorted(heap, key=lambda h: (-h[0], -h[1])):
            if len(best) == keep and -bound > -best[0][0]:
                more = False
                break
            seen.add(-number)
            estimate = planner.estimate(made)
            found.simulated += 1
            entry = (-estimate.iteration, number, estimate)
            if not estimate.fits:
                continue
            if len(best) < keep:
                heappush(best, entry)
            elif entry[:2] > best[0][:2]:
                heapreplace(best, entry)
        first = False
        if not more:
            break
    found.layouts = [estimate for *_, estimate in sorted(best, key=lambda b: (-b[0], -b[1]))]
    found.misses = sorted(misses.values(), key=lambda miss: -miss.count)
    for miss in found.misses:
        if miss.missing is not None and miss.nearest is not None:
            miss.would_fit = would_fit(planner, miss.nearest)
    found.seconds = perf_counter() - begun
    return found


def _judged(planner: Planner, made: Strategy | tuple[str, int], misses: dict[str, Miss]) -> bool | None:
    """True for what fits; else it is counted among the misses."""
    if isinstance(made, tuple):
        _missed(misses, made[0], None, made[1])
        return None
    most, rank, kinds = planner.fullest(made)
    missing = most - USABLE * planner.machine.memory_gib * 2**30
    if missing <= 0:
        return True
    miss = misses.setdefault("too large", Miss("too large"))
    miss.count += 1
    if miss.missing is None or missing < miss.missing:
        miss.nearest, miss.missing, miss.stage = made, missing, rank
        miss.kind = max(kinds, key=lambda kind: kinds[kind])
    return None


def _missed(misses: dict[str, Miss], why: str, made: Strategy | None, count: int = 1) -> None:
    """Reasons that differ in numbers alone are one; the first stands for them."""
    miss = misses.setdefault(re.sub(r"\d+", "N", why.partition(":")[0]), Miss(why, nearest=made))
    miss.count += count


def would_fit(planner: Planner, s: Strategy) -> str | None:
    """The option, as it is typed, with which the layout fits: the first of those that cost the least time."""
    changes: list[dict] = [{"sequence_parallel": True}] if s.tp > 1 else []
    changes += [{"zero": zero} for zero in range(s.zero + 1, 2)]
    changes += [{"recompute": kind} for kind in ("selective", "full") if kind != s.recompute and s.recompute != "full"]
    changes += [{"micro_batch": s.micro_batch // 2}] if s.micro_batch % 2 == 0 else []
    changes += [{"zero": zero} for zero in range(max(2, s.zero + 1), 4)]
    for change in changes:
        try:
            fits = planner.fits(replace(s, **change))
        except ValueError:
            continue
        if fits:
            name, value = next(iter(change.items()))
            option = f"--{name.replace('_', '-')}"
            return option if value is True else f"{option} {value}"
    return None
