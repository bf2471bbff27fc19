"""Requests to measure with: nano-vllm's benchmark, a small twin of it, and times of arrival."""

from __future__ import annotations

from random import Random
from typing import NamedTuple


class Workload(NamedTuple):
    """Prompts as token ids, and how many tokens each request is to get."""

    prompts: list[list[int]]
    max_tokens: list[int]


def drawn(requests: int, lengths: tuple[int, int], last_id: int, seed: int) -> Workload:
    """Lengths of prompts and answers are drawn from `lengths`, ids from 0 to `last_id`, with both ends: first all prompts, then
    all `max_tokens`."""
    random = Random(seed)
    prompts = [[random.randint(0, last_id) for _ in range(random.randint(*lengths))] for _ in range(requests)]
    return Workload(prompts, [random.randint(*lengths) for _ in range(requests)])


def full(seed: int = 0) -> Workload:
    """The benchmark of nano-vllm (bench.py): 256 requests, 142,827 tokens in and 133,966 out with seed 0."""
    return drawn(256, (100, 1024), 10000, seed)


def scaled(seed: int = 0) -> Workload:
    """The same for a small model on a CPU: 64 requests, 2,109 tokens in and 2,315 out with seed 0."""
    return drawn(64, (8, 64), 255, seed)


def arrivals(requests: int, per_second: float, seed: int = 0) -> list[float]:
    """Seconds at which requests come, ascending: a Poisson process. Raises ValueError for a rate that is not positive."""
    if not per_second > 0:
        raise ValueError(f"{per_second} requests per second must be more than 0")
    random, now = Random(seed), 0.0
    return [now := now + random.expovariate(per_second) for _ in range(requests)]
