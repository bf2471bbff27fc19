"""How good predictions are beside measurements: errors, the floors that any of them must be held to, and order.

A floor predicts each time from one fraction of peak alone. A planner is judged by order: Kendall's tau, and the regret, by how
much the layout that it picks of a group takes longer than the best one measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import mean, median
from typing import NamedTuple

# Median fraction of peak of the public rows of each GPU, all operations counted: those done again, and attention whole.
CONSTANT = {"a100-80gb": 0.485, "a100-40gb": 0.518, "h100-sxm": 0.401}


class Row(NamedTuple):
    """One measured row: its name and group; seconds; `reached`: all its operations over ranks x peak x measured seconds."""

    name: str
    group: str
    machine: str
    predicted: float
    measured: float
    reached: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


class Score(NamedTuple):
    """Errors as shares. `constant`, `own`: of the floors, None where there is none. `tau`, `regret`, `worst_regret`: over the
    groups of two rows or more; None without such."""

    rows: int
    mean: float
    median: float
    bias: float
    worst: float
    worst_row: str
    constant: float | None
    own: float | None
    tau: float | None
    regret: float | None
    worst_regret: float | None


def score(rows: Sequence[Row]) -> Score:
    """Of one row or more."""
    errors = [abs(row.error) for row in rows]
    worst = max(rows, key=lambda row: abs(row.error))
    # A fraction f predicts reached / f of what was measured.
    known = [abs(row.reached / CONSTANT[row.machine] - 1) for row in rows if row.machine in CONSTANT]
    own = [abs(row.reached / median(_others(rows, n)) - 1) for n, row in enumerate(rows)] if len(rows) > 1 else []
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    several = [group for group in groups.values() if len(group) > 1]
    taus = [t for group in several if (t := tau([r.predicted for r in group], [r.measured for r in group])) is not None]
    regrets = [regret(group) for group in several]
    return Score(
        len(rows), mean(errors), median(errors), mean(row.error for row in rows), max(errors), worst.name,
        mean(known) if len(known) == len(rows) else None, mean(own) if own else None,
        mean(taus) if taus else None, mean(regrets) if regrets else None, max(regrets, default=None),
    )  # fmt: skip


def _others(rows: Sequence[Row], n: int) -> list[float]:
    return [row.reached for i, row in enumerate(rows) if i != n]


def tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-a over the pairs that differ in b; None without any."""
    signs = [
        ((x > u) - (x < u)) * ((y > v) - (y < v)) for (x, y), (u, v) in combinations(list(zip(a, b, strict=True)), 2) if y != v
    ]
    return mean(signs) if signs else None


def regret(group: Sequence[Row]) -> float:
    """Of the layout that is predicted to be the fastest."""
    picked = min(group, key=lambda row: row.predicted)
    return picked.measured / min(row.measured for row in group) - 1
