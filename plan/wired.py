"""Hosts that were measured, as a machine file of the planner: constants of a rank, of a host, of what joins hosts."""

from __future__ import annotations

import json
from typing import NamedTuple

# What an attention kernel reaches is not measured, nor by how much a product is slower beside a transfer.
GUESSED = {"unfused": 0.5, "flash1": [0.5, 0.5], "inside.slows": 0.1, "between.slows": 0.1}
GUESS = "a guess, to be replaced by a measurement"


class Link(NamedTuple):
    """Between two ranks: seconds of a small message, and bytes a second of a large one."""

    seconds: float
    rate: float


class Wired(NamedTuple):
    """`ranks`: of a host. `rate`, `bandwidth`, `call`: of a rank, as `plan.calibrate` measures them. `inside`, `between`: two
    ranks of a host, and of two hosts (None: there is one host). `bus`: bytes a second of an all-reduce on a ring of a host's
    ranks, after `small` seconds. `reached`: the share of the link that a host's ranks reach in an all-reduce between hosts."""

    name: str
    ranks: int
    memory_gib: float
    rate: float
    bandwidth: float
    call: float
    inside: Link
    bus: float
    small: float
    between: Link | None
    reached: float


def written(m: Wired, how: str) -> str:
    """As TOML that `plan.machine.read` reads. `how`: it was measured, for [source]."""
    beyond = m.between or m.inside
    tables = {
        "compute": {"float32": m.rate / 1e12, "memory_gbs": m.bandwidth / 1e9, "sms": 1},
        "kernel": {"product": 1.0, "product_k0": 0, "memory": 1.0, "unfused": GUESSED["unfused"], "flash1": GUESSED["flash1"],
                   "kernel_us": 1e6 * m.call, "host_us": 0},
    }  # fmt: skip
    inside = {"gbs": m.bus / 1e9, "alpha_us": [1e6 * m.small, 0], "p2p_gbs": m.inside.rate / 1e9,
              "p2p_us": 1e6 * m.inside.seconds, "slows": GUESSED["inside.slows"]}  # fmt: skip
    between = {"node_gbs": beyond.rate / 1e9, "efficiency": m.reached, "alpha_us": [1e6 * beyond.seconds, 0],
               "slows": GUESSED["between.slows"]}  # fmt: skip
    named = [*tables["compute"], *tables["kernel"], *(f"inside.{k}" for k in inside), *(f"between.{k}" for k in between)]
    lines = [f"name = {json.dumps(m.name)}", f"gpus_per_node = {m.ranks}", f"memory_gib = {m.memory_gib:.4g}"]
    for title, values in tables.items():
        lines += ["", f"[{title}]", *(f"{key} = {_number(value)}" for key, value in values.items())]
    for title, values in (("inside", inside), ("between", between)):
        lines += ["", "[[level]]", f'name = "{title}"', *(f"{key} = {_number(value)}" for key, value in values.items())]
    lines += ["", "[source]"]
    lines += [f"{json.dumps(key)} = {json.dumps(_source(key, m, how))}" for key in named]
    return "\n".join(lines) + "\n"


def _number(value: float | list) -> str:
    return json.dumps([float(f"{v:.4g}") for v in value] if isinstance(value, list) else float(f"{value:.4g}"))


def _source(key: str, m: Wired, how: str) -> str:
    if key in GUESSED:
        return GUESS
    if key in ("sms", "product", "product_k0", "memory", "host_us"):
        return "by definition: the rates are those of our own products and copies"
    if key.startswith("between.") and m.between is None:
        return "no other host was there: as inside the host"
    return how
