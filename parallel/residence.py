"""When weights that are split over ranks have to be there, and when gradients leave: read off a plan, before it is run.

A *unit* is what is gathered at once: a block of the model, or the root (`ROOT`): all that its ends need, embedding, last norm
and head, of whatever stages a rank has. A unit is gathered where it is not there, and dropped after its use; but

* the last block of a forward stays where its own backward comes next,
* the root stays while any micro-batch that has used it waits for its backward, and its gradient leaves when none does.

So without a pipeline a step of m micro-batches gathers m (P_root + 2 (P - P_root) - P_last) bytes (ZeRO-3, arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from parallel.schedule import Op

ROOT = 0
# By stage: the unit of each of its parts, in the order of forward.
Parts = Mapping[int, Sequence[int]]


class Use(NamedTuple):
    """A part is computed, in this phase. `gathers`: its unit is not there yet; `drops`: nobody needs it after this."""

    unit: int
    phase: str
    gathers: bool
    drops: bool


class Fill(NamedTuple):
    """A part's gradients of a micro-batch are complete. `sends`: those of its unit are, and leave."""

    unit: int
    phase: str
    sends: bool


def uses(ops: Sequence[Op], parts: Parts, phases: Mapping[str, str]) -> list[Use]:
    """Those of a rank with these operations, in order."""
    computed = [op for op in ops if op.kind != "W"]
    ends = {op[1:] for op in computed if op.kind != "F"}
    waiting: set[tuple[int, int]] = set()
    there: set[int] = set()
    found = []
    for n, op in enumerate(computed):
        order = parts[op.stage] if op.kind == "F" else parts[op.stage][::-1]
        if ROOT in order and op.kind == "F" and op[1:] in ends:
            waiting.add(op[1:])
        after = computed[n + 1] if n + 1 < len(computed) else None
        returns = op.kind == "F" and after is not None and after[1:] == op[1:]
        blocks = [unit for unit in order if unit != ROOT]
        for at, unit in enumerate(order):
            if unit == ROOT:
                again = ROOT in order[at + 1 :]
                if op.kind != "F" and not again:
                    waiting.discard(op[1:])
                drops = not again and not waiting
            else:
                drops = not (returns and unit == blocks[-1])
            found.append(Use(unit, phases[op.kind], unit not in there, drops))
            (there.discard if drops else there.add)(unit)
    return found


def fills(ops: Sequence[Op], parts: Parts, phases: Mapping[str, str]) -> list[Fill]:
    """Those of a rank with these operations, in order: in B, or in W where a backward comes in halves."""
    ends = {op[1:] for op in ops if op.kind in "BW"}
    waiting: set[tuple[int, int]] = set()
    found = []
    for op in ops:
        order = parts[op.stage][::-1]
        if op.kind == "F" and ROOT in order and op[1:] in ends:
            waiting.add(op[1:])
        if op.kind not in "BW":
            continue
        for at, unit in enumerate(order):
            again = unit == ROOT and ROOT in order[at + 1 :]
            if unit == ROOT and not again:
                waiting.discard(op[1:])
            found.append(Fill(unit, phases[op.kind], not again and not (unit == ROOT and waiting)))
    return found


def most_gathered(uses: Sequence[Use], size: Callable[[int], int], ahead: bool) -> int:
    """The most that is gathered at a time, by the `size` of units. `ahead`: while a part is computed, what the next one needs
    is on its way."""
    there: set[int] = set()
    most = 0
    for n, use in enumerate(uses):
        there.add(use.unit)
        if ahead and n + 1 < len(uses):
            there.add(uses[n + 1].unit)
        most = max(most, sum(map(size, there)))
        if use.drops:
            there.discard(use.unit)
    return most


def most_filled(fills: Sequence[Fill], size: Callable[[int], int], ahead: bool) -> int:
    """The most of gradients that are being filled, or on their way, at a time. `ahead`: of those on their way, the last may
    still be when others are filled."""
    open_: set[int] = set()
    leaving: list[int] = []
    most = 0
    for fill in fills:
        if fill.unit not in open_:
            leaving = leaving[-1:]
            open_.add(fill.unit)
        most = max(most, sum(map(size, [*open_, *leaving])))
        if fill.sends:
            open_.discard(fill.unit)
            leaving = [*leaving, fill.unit] if ahead else []
    return most
