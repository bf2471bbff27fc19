"""Finds the constants of plan/machines again: one fit on all public rows together, of 1 December 2026.

`python -m tests.oracles.plan_constants [ROUNDS]`: descends on the tables' mean errors, an error beyond 25 % counted as 25, each
over its goal, with twice what lies beyond a goal on top. A round measures the slopes of all constants, one by one, and goes
along them. No constant is a table's, a model's or a row's. What is printed is rounded and written into the files by hand.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from math import exp, log

import numpy as np

from launch.planning import columns, question
from plan.machine import Machine, read
from plan.step import Planner
from plan.theirs import Theirs
from tests.plan.known import rows

GOALS = {"narayanan-t1": 3.0, "narayanan-t2": 2.5, "korthikanti": 3.65, "vtrain-multi": 4.5, "mosaic": 8.0}
MACHINES = ("a100-80gb", "a100-40gb", "h100-sxm")
# By name: where it begins, the notes' prototype; and what it may be. These rows leave the efficiency between nodes open: it is
# held to where Llama 3's steps on 16,384 H100 come out about right.
BEGIN = {
    "product": (0.86, 0.70, 0.95), "product_k0": (96, 32, 192), "passes": (0.66, 0.55, 0.80), "unfused": (0.53, 0.30, 0.80),
    "flash": (0.335, 0.30, 0.40), "flash_back": (0.32, 0.28, 0.36), "product_h": (0.57, 0.50, 0.75),
    "flash_h": (0.22, 0.19, 0.26), "flash_back_h": (0.18, 0.15, 0.22), "kernel": (3.2, 1.5, 5.0), "host": (13, 5, 20),
    "efficiency": (0.91, 0.90, 0.92), "alpha": (25, 8, 40), "rested": (0.1, 0.02, 0.3),
}  # fmt: skip
SAMPLES, STEP = 500, 1.02


def machine(name: str, c: dict[str, float]) -> Machine:
    m, own = read(name), "_h" if name.startswith("h") else ""
    flash = {**m.flash, "flash1": (c[f"flash{own}"], c[f"flash_back{own}"])}
    between = replace(m.between, efficiency=c["efficiency"], alpha_us=(c["alpha"], 0.0))
    own_k0 = m.product_k0 if own else c["product_k0"]
    return replace(m, product=c[f"product{own}"], product_k0=own_k0, passes=c["passes"], unfused=c["unfused"], flash=flash,
                   kernel=1e-6 * c["kernel"], host=1e-6 * c["host"], between=between,
                   rested=c["rested"])  # fmt: skip


def asked() -> list[tuple[str, dict, float]]:
    """Of each row its table, its values, and the seconds that were measured."""
    found = []
    for name in GOALS:
        for row in rows(name):
            values = {k: columns.read(k, text) for k, text in row.items() if k in columns.COLUMNS and text}
            found.append((name, values, float(row["measured_seconds"])))
    return found


def logarithms(c: dict[str, float], every: list[tuple[str, dict, float]]) -> np.ndarray:
    """Of each row, log of predicted over measured."""
    planners: dict[tuple, Planner] = {}
    found = []
    for _, values, measured in every:
        key = values["machine"], values["node_gbs"]
        if key not in planners:
            planners[key] = Planner(Theirs(), question.machine_of(values, machine(values["machine"], c)))
        _, config = question.config_of(values)
        found.append(
            log(planners[key].estimate(question.strategy_of(values, config, planners[key].machine)).iteration / measured)
        )
    return np.array(found)


def errors(y: np.ndarray, tables: np.ndarray) -> dict[str, np.ndarray]:
    """Mean errors by table, in per cent; `y` may be many fits' at once."""
    of = np.minimum(abs(np.expm1(y)), 0.25)
    return {name: 100 * of[..., tables == name].mean(-1) for name in GOALS}


def objective(y: np.ndarray, tables: np.ndarray) -> np.ndarray:
    over = np.stack([of / GOALS[name] for name, of in errors(y, tables).items()], -1)
    return over.mean(-1) + 2 * np.maximum(0, over - 0.97).sum(-1)


def descended(c: dict[str, float], rounds: int) -> dict[str, float]:
    every, draw, reach = asked(), np.random.default_rng(0), 0.06
    tables, names = np.array([name for name, *_ in every]), list(c)
    y = logarithms(c, every)
    best = float(objective(y, tables))
    for turn in range(rounds):
        slopes = np.array([(logarithms({**c, name: c[name] * STEP}, every) - y) / log(STEP) for name in names])
        low, high = (np.array([log(BEGIN[name][n] / c[name]) for name in names]) for n in (1, 2))
        low, high = np.maximum(low, -reach), np.minimum(high, reach)
        at, there, wide = np.zeros(len(names)), best, reach / 2
        for _ in range(400):
            some = draw.random((SAMPLES, len(names))) < 0.5
            tried = np.clip(at + draw.normal(0, wide, (SAMPLES, len(names))) * some, low, high)
            judged = objective(y + tried @ slopes, tables)
            if judged.min() < there - 1e-7:
                at, there = tried[judged.argmin()], float(judged.min())
            else:
                wide = max(0.9 * wide, 0.001)
        new = {name: c[name] * exp(by) for name, by in zip(names, at, strict=True)}
        moved = logarithms(new, every)
        if (value := float(objective(moved, tables))) < best:
            c, y, best = new, moved, value
        else:
            reach /= 2
        print(turn, {name: f"{float(of):.2f}" for name, of in errors(y, tables).items()}, flush=True)
    return c


if __name__ == "__main__":
    found = descended({name: begin for name, (begin, *_) in BEGIN.items()}, int(sys.argv[1]) if len(sys.argv) > 1 else 12)
    print(*(f"{name} = {value:.3g}" for name, value in found.items()), sep="\n")
