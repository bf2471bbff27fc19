"""The known pipeline schedules, each a generator of some ten lines: p ranks, m micro-batches, chunks (stages) a rank.

Sources: GPipe 1811.06965; 1F1B and interleaved 2104.04473; ZB-H1, ZB-H2 and ZB-V 2401.10241; DualPipeV, the V of
DualPipe (2412.19437). On a loop chunk c of rank r is stage c p + r; on a V chunk 0 goes down the ranks, chunk 1 up again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from parallel.schedule import Op, Plan, check


def gpipe(p: int, m: int) -> Plan:
    """All forwards, then all backwards: m in flight."""
    return Plan(tuple(_by_turns(m, *_loop(p, m, r)) for r in range(p)))


def one_f_one_b(p: int, m: int) -> Plan:
    """The backwards begin as soon as they can: p-r in flight on rank r."""
    return interleaved(p, m, chunks=1, ahead=1)


def interleaved(p: int, m: int, chunks: int, group: int | None = None, ahead: int = 2, filled: bool = False) -> Plan:
    """Micro-batches in groups of `group` (p where None), in each group chunk after chunk.

    `ahead`: forwards that a rank warms up with beyond the next rank's. 2 keeps a message in each direction on its way while
    the ranks compute; 1 is as fast where messages take no time, and holds less.

    The last group may be smaller, and deadlocks where it is too small (Megatron-LM asks for p or more). `filled`: it is planned
    as if it were full, and the surplus left out. This keeps the order of the rest, so it runs; it is as fast or faster.
    """
    group = group or p
    n = -(-m // group) * group if filled else m
    ranks = [_by_turns(ahead * (p - 1 - r) + (chunks - 1) * group, *_loop(p, n, r, chunks, group)) for r in range(p)]
    return Plan(tuple(tuple(op for op in ops if op.micro_batch < m) for ops in ranks))


def zero_bubble(p: int, m: int, k: int) -> Plan:
    """ZB-H1 (k=1) and ZB-H2 (k=2): rank r puts its weights' gradients off by k r micro-batches, into what would be bubbles."""
    ranks = []
    for r in range(p):
        # The last turns put nothing off any more.
        turns = [[Op("I", r, i), *([Op("W", r, i - k * r)] if i >= k * r else [])] for i in range(m)]
        rest = [Op("W", r, i) for i in range(max(0, m - k * r), m)]
        ranks.append(_by_turns(k * (p - 1 - r), [Op("F", r, i) for i in range(m)], [*turns, rest]))
    return Plan(tuple(ranks))


def zb_v(p: int, m: int) -> Plan:
    """Two chunks a rank on a V: no bubble inside, and as much in flight on every rank. In the order of PyTorch."""
    ranks = []
    for r in range(p):
        # Written for 2p-1 micro-batches or more; of fewer, the surplus is dropped.
        n = max(m, 2 * p - 1)
        steps = [*(2 * (p - r) - 1) * ["F0"], *r * ["F1", "F0"], *(p - r) * ["F1", "I1", "W1"]]
        steps += (n - p) * ["F0", "I0", "W0", "F1", "I1", "W1"]
        steps += [*r * ["I0", "I1"], *(p - r) * ["I0", "W0"], *n * ["W1"], *n * ["W0"]]
        ranks.append(_numbered(steps, (r, 2 * p - 1 - r), m))
    return Plan(tuple(ranks))


def dualpipe_v(p: int, m: int) -> Plan:
    """Two chunks a rank on a V, an F beside a B where one could hide the other's messages. One after the other, as here, they
    take ZB-V's time."""
    ranks = []
    for r in range(p):
        left = p - r - 1
        whole, halves = (["B1", "B0"] * (r + 1))[: r + 1], (["I1", "I0"] * (r + 1))[r + 1 :]
        weights = ["W" + half[1] for half in halves + left * ["I0"]]
        steps = [*2 * left * ["F0"], *(r + 1) * ["F0", "F1"], *left * ["I1", "W1", "F1"]]
        steps += [*(m - 2 * p + r + 1) * ["F0", "B1", "F1", "B0"], *left * ["B1", "F1", "B0"], *whole, *halves]
        steps += [step for weight in weights[:left] for step in (weight, "I0")] + weights[left:]
        ranks.append(_numbered(steps, (r, 2 * p - 1 - r), m))
    return Plan(tuple(ranks))


def _interleaved(p: int, m: int, chunks: int) -> Plan:
    """In Megatron-LM's order where that runs."""
    found = interleaved(p, m, chunks)
    if m % p == 0:
        return found
    try:
        check(found, p * chunks, m)
    except ValueError:
        found = interleaved(p, m, chunks, filled=True)
    return found


def _loop(p: int, m: int, r: int, chunks: int = 1, group: int | None = None) -> tuple[list[Op], list[list[Op]]]:
    """The forwards of rank r in their order, and the backwards, each a turn: the same with the chunks reversed."""
    group = group or m
    order = [(c, i) for first in range(0, m, group) for c in range(chunks) for i in range(first, min(first + group, m))]
    return [Op("F", c * p + r, i) for c, i in order], [[Op("B", (chunks - 1 - c) * p + r, i)] for c, i in order]


def _by_turns(warm: int, forwards: Sequence[Op], backwards: Iterable[Sequence[Op]]) -> tuple[Op, ...]:
    """`warm` forwards, or all; then a forward and a turn of the backwards, until there are no more of either."""
    ops = list(forwards[:warm])
    for turn, backward in enumerate(backwards, warm):
        ops += [*forwards[turn : turn + 1], *backward]
    return tuple(ops)


def _numbered(steps: Iterable[str], stages: Sequence[int], m: int) -> tuple[Op, ...]:
    """The operations of steps like F0 (kind and chunk), each kind of a chunk counted from micro-batch 0 on; those from m on are
    left out. B counts as I and W."""
    counts: dict[str, int] = {}
    ops = []
    for kind, chunk in steps:
        for counted in ("I", "W") if kind == "B" else (kind,):
            i = counts[counted + chunk] = counts.get(counted + chunk, -1) + 1
        if i < m:
            ops.append(Op(kind, stages[int(chunk)], i))
    return tuple(ops)


class Schedule(NamedTuple):
    """`make(p, m, chunks)`. `chunks`: how many a rank has; `any_chunks`: where nothing else is said. `least(p)`: the fewest
    micro-batches that it is made for; `instead`: what to use with fewer."""

    make: Callable[[int, int, int], Plan]
    chunks: int = 1
    any_chunks: bool = False
    least: Callable[[int], int] = lambda p: 1
    instead: str = ""


SCHEDULES = {
    "gpipe": Schedule(lambda p, m, _: gpipe(p, m)),
    "1f1b": Schedule(lambda p, m, _: one_f_one_b(p, m)),
    "interleaved": Schedule(_interleaved, chunks=2, any_chunks=True),
    "zb-h1": Schedule(lambda p, m, _: zero_bubble(p, m, 1)),
    "zb-h2": Schedule(lambda p, m, _: zero_bubble(p, m, 2)),
    "zb-v": Schedule(lambda p, m, _: zb_v(p, m), chunks=2),
    # On one rank nothing has to be filled.
    "dualpipe-v": Schedule(lambda p, m, _: dualpipe_v(p, m), 2, least=lambda p: 2 * p if p > 1 else 1, instead="zb-v"),
}


def plan(name: str, ranks: int, micro_batches: int, chunks: int | None = None) -> Plan:
    """The plan of the schedule called `name` on `ranks` ranks of pp. `chunks`: stages a rank, where None the schedule's own.

    Raises ValueError for an unknown name, and for numbers that the schedule cannot have.
    """
    if (schedule := SCHEDULES.get(name)) is None:
        raise ValueError(f"there is no schedule {name}: use {', '.join(SCHEDULES)}")
    chunks = schedule.chunks if chunks is None else chunks
    for what, n in (("ranks", ranks), ("micro-batches", micro_batches), ("chunks", chunks)):
        if n < 1:
            raise ValueError(f"cannot plan {n} {what}: use 1 or more")
    if chunks != schedule.chunks and not schedule.any_chunks:
        own = f"{schedule.chunks} chunk{'s' * (schedule.chunks > 1)}"
        raise ValueError(f"{name} has {own} a rank, got {chunks}: use interleaved")
    if micro_batches < (least := schedule.least(ranks)):
        raise ValueError(f"{name} needs {least} micro-batches for pp={ranks}, got {micro_batches}: use {schedule.instead}")
    return schedule.make(ranks, micro_batches, chunks)
