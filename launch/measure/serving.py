"""A workload driven through an engine, what its clients saw, and what its steps must count to.

Latencies are by vLLM's definitions (vllm/benchmarks/serve.py). A request comes at t and gets n tokens, the first at f and the
last at e. Its TTFT is f - t; its TPOT is (e - f) / (n - 1), where n > 1; its ITL are all gaps between two deliveries. Means and
percentiles (NumPy's linear ones) are over requests for the first two, and over all gaps of all requests for the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from itertools import pairwise
from statistics import median
from time import perf_counter, sleep
from typing import NamedTuple

import numpy as np

from inference.engine import Ask, Engine
from inference.scheduler import Scheduler, Step
from inference.workload import Workload


class Column(NamedTuple):
    """A step, and the requests that got their last token of it."""

    step: Step
    finished: frozenset[int]


@dataclass
class Served:
    """By request: `came` (seconds since the start), `tokens`, and `deliveries` as (seconds since the start, how many tokens).

    By step: `columns`, `step_seconds` (how long it took) and `step_tokens` (how many tokens came of it).
    """

    came: list[float]
    tokens: list[list[int]] = field(default_factory=list)
    deliveries: list[list[tuple[float, int]]] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the start to the last token."""
        return max(d[-1][0] for d in self.deliveries)

    @property
    def output_tokens(self) -> int:
        return sum(map(len, self.tokens))


def serve(engine: Engine, load: Workload, served: Served) -> Iterator[int]:
    """Rank 0: request n comes at second `served.came[n]` (ascending) and runs to its end, greedily, without end tokens.

    Yields the ids of requests as they finish. A request may come while a step is under way: its time counts from then.
    """
    due = deque(zip(range(len(load.prompts)), served.came, strict=True))
    served.tokens = [[] for _ in load.prompts]
    served.deliveries = [[] for _ in load.prompts]
    begun = perf_counter()
    while due or engine.scheduler.requests:
        while due and due[0][1] <= perf_counter() - begun:
            id, _ = due.popleft()
            engine.add(id, Ask(load.prompts[id], load.max_tokens[id]))
        report = engine.step()
        if report is None:
            sleep(max(0.0, due[0][1] - (perf_counter() - begun)))
            continue
        for error in report.failed.values():
            raise error
        for id, tokens, *_ in report.deliveries:
            served.tokens[id] += [t.id for t in tokens]
            served.deliveries[id].append((report.ended - begun, len(tokens)))
        finished = frozenset(d.id for d in report.deliveries if d.reason)
        served.columns.append(Column(report.step, finished))
        served.step_seconds.append(report.ended - report.began)
        served.step_tokens.append(sum(len(d.tokens) for d in report.deliveries))
        yield from finished


def alone(scheduler: Scheduler, load: Workload) -> list[Column]:
    """The steps of a workload whose requests all come at once, without a model: counts don't depend on which tokens come."""
    for id, (prompt, most) in enumerate(zip(*load, strict=True)):
        scheduler.add(id, prompt, most)
    columns = []
    while step := scheduler.schedule():
        outputs = scheduler.commit(step, {run.id: [0] for run in step.runs if run.sample})
        columns.append(Column(step, frozenset(id for id, _, reason in outputs if reason)))
    return columns


# --- what clients saw


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles; None without values."""
    if not len(values):
        return None
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return {"mean": float(np.mean(values)), "p50": p50, "p95": p95, "p99": p99}


def latencies(came: Iterable[float], deliveries: Iterable[Sequence[tuple[float, int]]]) -> dict[str, dict[str, float] | None]:
    """Seconds: ttft, tpot and itl of requests that came then and got these deliveries."""
    ttft, tpot, itl = [], [], []
    for start, got in zip(came, deliveries, strict=True):
        (first, _), (last, _) = got[0], got[-1]
        tokens = sum(n for _, n in got)
        ttft.append(first - start)
        if tokens > 1:
            tpot.append((last - first) / (tokens - 1))
        itl += [b - a for (a, _), (b, _) in pairwise(got)]
    return {"ttft": spread(ttft), "tpot": spread(tpot), "itl": spread(itl)}


def decode_steps(served: Served) -> dict[str, float]:
    """Median seconds of a step without prompts, by the number of tokens run in it (a text, as a key in JSON is)."""
    times: dict[int, list[float]] = {}
    for (step, _), seconds in zip(served.columns, served.step_seconds, strict=True):
        if not any(run.prefill for run in step.runs):
            times.setdefault(sum(len(run.tokens) for run in step.runs), []).append(seconds)
    return {str(tokens): median(times[tokens]) for tokens in sorted(times)}


# --- what steps must count to


def lanes(lengths: Iterable[int], slots: int) -> int:
    """Continuous batching: the steps of so many lanes, each of which takes the next of these lengths as soon as it is free."""
    ends = [0] * slots
    heapify(ends)
    for length in lengths:
        heapreplace(ends, ends[0] + length)
    return max(ends)


def batches(lengths: Sequence[int], slots: int) -> int:
    """Static batching: the steps of batches of `slots`, one after another, each as long as its longest."""
    return sum(max(lengths[first : first + slots]) for first in range(0, len(lengths), slots))


STEPS = {"static": batches, "continuous": lanes}


def closed_form(load: Workload, policy: str, slots: int) -> dict[str, int]:
    """What a workload whose requests all come at once must count to, if no step lacks budget or blocks and nothing is drafted.

    Prompts run beside decodes. A request of max_tokens m holds its slot for m steps: its first token comes of its prompt.
    """
    total = sum(load.max_tokens)
    return {
        "steps": STEPS[policy](load.max_tokens, slots),
        "prefill_tokens": sum(map(len, load.prompts)),
        "decode_tokens": total - len(load.prompts),
        "slots_used": total,
        "preemptions": 0,
    }
