"""A workload driven through an engine, what its clients saw, and what its steps must count to.

Latencies by vLLM's definitions (vllm/benchmarks/serve.py). Of a request that came at t and got n tokens, the first at f and the
last at e: TTFT f - t; TPOT (e - f) / (n - 1), where n > 1; ITL every gap between two deliveries. Mean and percentiles (linear
between ranks, as NumPy's) are over requests for the first two, over all gaps of all requests for the last.
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
    """A step, and which requests got their last token of it."""

    step: Step
    finished: frozenset[int]


@dataclass
class Served:
    """`tokens` and `deliveries` ((seconds since the start, tokens) each) by request, `columns` by step.

    `step_seconds` and `step_tokens` are of each step: how long it took, and the tokens that came of it.
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
    """Rank 0: request n comes at second `served.came[n]` (ascending) and is run to its end, greedily, without end tokens.

    Yields the ids of requests as they finish. A request that comes while a step is under way has come then, not after the step.
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
        for id, tokens, _ in report.deliveries:
            served.tokens[id] += [t.id for t in tokens]
            served.deliveries[id].append((report.ended - begun, len(tokens)))
        finished = frozenset(id for id, _, reason in report.deliveries if reason)
        served.columns.append(Column(report.step, finished))
        served.step_seconds.append(report.ended - report.began)
        served.step_tokens.append(sum(len(tokens) for _, tokens, _ in report.deliveries))
        yield from finished


def alone(scheduler: Scheduler, load: Workload) -> list[Column]:
    """The steps of a workload that is there at once, without a model: the counts don't depend on which tokens come."""
    for id, (prompt, most) in enumerate(zip(*load, strict=True)):
        scheduler.add(id, prompt, most)
    columns = []
    while step := scheduler.schedule():
        outputs = scheduler.commit(step, {run.id: [0] for run in step.runs if run.sample})
        columns.append(Column(step, frozenset(id for id, _, reason in outputs if reason)))
    return columns


# --- what clients saw


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles; None of nothing."""
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
    """Seconds of a step without prompts, by how many tokens are run in it (as JSON has it, a text): medians."""
    times: dict[int, list[float]] = {}
    for (step, _), seconds in zip(served.columns, served.step_seconds, strict=True):
        if not any(run.prefill for run in step.runs):
            times.setdefault(sum(len(run.tokens) for run in step.runs), []).append(seconds)
    return {str(tokens): median(times[tokens]) for tokens in sorted(times)}


# --- what steps must count to


def lanes(lengths: Iterable[int], slots: int) -> int:
    """Steps of so many lanes, each taking the next of these lengths as soon as it is free: continuous batching."""
    ends = [0] * slots
    heapify(ends)
    for length in lengths:
        heapreplace(ends, ends[0] + length)
    return max(ends)


def batches(lengths: Sequence[int], slots: int) -> int:
    """Steps of batches of `slots`, one after another, each as long as its longest: static batching."""
    return sum(max(lengths[first : first + slots]) for first in range(0, len(lengths), slots))


STEPS = {"static": batches, "continuous": lanes}


def closed_form(load: Workload, policy: str, slots: int) -> dict[str, int]:
    """What a workload that is there at once must count to, where no step lacks budget or blocks and nothing is drafted.

    Prompts run beside decodes: a request of max_tokens m holds its slot for m steps, as its first token comes of its prompt.
    """
    total = sum(load.max_tokens)
    return {
        "steps": STEPS[policy](load.max_tokens, slots),
        "prefill_tokens": sum(map(len, load.prompts)),
        "decode_tokens": total - len(load.prompts),
        "slots_used": total,
        "preemptions": 0,
    }
