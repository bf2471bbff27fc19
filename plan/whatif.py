"""What if: a step on another machine or with another option, beside the one that is planned."""

from __future__ import annotations

from typing import NamedTuple

from plan import machine as machines
from plan.machine import Machine
from plan.step import Estimate, Planner

# A sensitivity changes a constant by so much, for the better.
TENTH = 1.1


class Change(NamedTuple):
    """`change`: as it was asked. `limit`: what takes most of the step then, or why it cannot be; without seconds, the
    latter."""

    change: str
    seconds: float | None
    ratio: float | None
    limit: str


def beside(e: Estimate, other: Estimate, change: str) -> Change:
    return Change(change, other.iteration, other.iteration / e.iteration, limit(other))


def limit(e: Estimate) -> str:
    """What takes the most, computing aside where another part takes a tenth of the step or more."""
    parts = {name: e.seconds[name] for name in ("host", "bubble", "optimizer", "jitter")}
    parts |= {f"exposed {axis}": seconds for axis, seconds in e.exposed.items()}
    parts["computing"] = e.seconds["forward"] + e.seconds["backward"] + e.seconds["recompute"]
    return max(parts, key=lambda name: parts[name])


def with_machine(planner: Planner, machine: Machine) -> Planner:
    return Planner(planner.account, machine, None, planner.causal)


def sensitivity(planner: Planner, e: Estimate) -> list[Change]:
    """The effect of 10 % more of each constant of the machine, or less of it where it is a cost."""
    found = []
    for name in machines.CONSTANTS:
        if name in ("gpus_per_node", "memory_gib"):
            continue
        by = 1 / TENTH if name in machines.COSTS else TENTH
        other = with_machine(planner, machines.changed(planner.machine, name, by)).estimate(e.strategy)
        found.append(beside(e, other, f"{name} {'-' if by < 1 else '+'}10 %"))
    return sorted(found, key=lambda c: c.ratio)
