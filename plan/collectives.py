"""How long a verb takes on a machine: alpha-beta rings inside a node and over nodes (docs/planning.md has the formulas).

Which level an axis is on follows from the order of the mesh alone: ranks are numbered with tp fastest, and a node is a number
divided by the GPUs of a node. Source of the ring's terms: Thakur, Rabenseifner and Gropp (2005), nccl-tests' PERFORMANCE.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import log2
from typing import NamedTuple

import numpy as np

from parallel.shard import AXES
from plan.machine import Machine

# Of the time that an all-reduce takes to start, what one way takes.
ONE_WAY = 0.7
# B_p = B p / (p + SHORT): few ranks reach less of NVLink (nccl-tests, 2 to 8 A100).
SHORT = 0.4
ROUND_TRIPS = ("all_reduce",)


class Group(NamedTuple):
    """Ranks that meet in a verb: how many, how many of them in one node at most, and over how many nodes."""

    ranks: int
    inside: int
    nodes: int


@lru_cache(4096)
def group(sizes: tuple[int, ...], axes: tuple[str, ...], gpus_per_node: int) -> Group:
    """The group of rank 0 along these axes of a mesh of these sizes, by AXES."""
    numbers = np.zeros(1, np.int64)
    stride = 1
    for name, size in zip(reversed(AXES), reversed(sizes), strict=True):
        if name in axes:
            numbers = (numbers[:, None] + stride * np.arange(size)).ravel()
        stride *= size
    nodes, counts = np.unique(numbers // gpus_per_node, return_counts=True)
    return Group(len(numbers), int(counts.max()), len(nodes))


def seconds(verb: str, message_bytes: float, g: Group, m: Machine) -> float:
    """Of one call. Messages (send, shift) go to one neighbour."""
    p, n = g.ranks, message_bytes
    if (took := m.measured(verb, p, n)) is not None:
        return took
    if p == 1:
        return 0.0
    if verb in ("send", "shift"):
        return hop(n, g, m)
    alpha, bandwidth = _line(g, m, verb in ROUND_TRIPS)
    passes = 2 if verb in ROUND_TRIPS else 1
    return alpha + passes * (p - 1) / p * n / bandwidth


def bus_bandwidth(verb: str, message_bytes: float, g: Group, m: Machine) -> float:
    """As nccl-tests print it, bytes a second."""
    passes = 2 if verb in ROUND_TRIPS else 1
    return passes * (g.ranks - 1) / g.ranks * message_bytes / seconds(verb, message_bytes, g, m)


def hop(message_bytes: float, g: Group, m: Machine) -> float:
    """From one rank to the next: over the NIC of a GPU as soon as the group leaves a node."""
    if g.ranks == 1:
        return 0.0
    if (took := m.measured("send", 2, message_bytes)) is not None:
        return took
    if g.nodes == 1:
        return 1e-6 * m.inside.p2p_us + message_bytes / (1e9 * m.inside.p2p_gbs)
    nic = 1e9 * m.between.node_gbs / m.gpus_per_node * m.between.efficiency
    return 1e-6 * m.between.alpha_us[0] + message_bytes / nic


def least_block(m: Machine, dtype: str) -> float:
    """Tokens of a rank from which on a hop of ring attention is hidden, at peak rates: 4 c D bytes go round beside 4 D c^2
    operations (2310.01889, section 3)."""
    return m.peak(dtype) / (1e9 * m.inside.p2p_gbs)


def slowed(g: Group, m: Machine) -> float:
    """How much slower products are while such a transfer goes on beside them, as a share."""
    return m.inside.slows if g.nodes == 1 else m.between.slows


def _line(g: Group, m: Machine, whole: bool) -> tuple[float, float]:
    """Seconds to start, and bytes a second on the bus. `whole`: there and back, an all-reduce."""
    q = g.inside if g.nodes > 1 else g.ranks
    a, more = m.inside.alpha_us
    alpha = 1e-6 * (a + more * q) * (1.0 if whole else ONE_WAY)
    fast = 1e9 * _curve(m.inside.ranks_gbs, q) if m.inside.ranks_gbs else 1e9 * m.inside.gbs * q / (q + SHORT)
    if g.nodes == 1:
        return alpha, fast
    turns = min(2 * (g.nodes - 1), 4 * log2(g.nodes)) / (1 if whole else 2)
    node = _curve(m.between.nodes_gbs, g.nodes) if m.between.nodes_gbs else m.between.node_gbs
    wide = 1e9 * q / m.gpus_per_node * node * m.between.efficiency
    return alpha + 1e-6 * turns * (m.between.alpha_us[0] + m.between.alpha_us[1] * q), min(fast, wide) if q > 1 else wide


def _curve(points: Sequence[tuple[float, float]], at: float) -> float:
    """Between the measured points in a straight line over the logarithm, beyond them as at the end."""
    xs, ys = zip(*sorted(points), strict=True)
    return float(np.interp(log2(at), np.log2(xs), ys))
