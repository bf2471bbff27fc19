"""Machines as files of constants: what a GPU computes, how ranks are wired. `plan/machines/*.toml`, each constant with its
source.

A file has `name`, `gpus_per_node`, `memory_gib`; `[compute]`: peaks in TFLOP/s by dtype, `memory_gbs`, `sms`; `[kernel]`: which
shares of them are reached; `[[level]]` twice, inside a node and between nodes; `[source]`: a line a constant. Unknown keys
are refused, and constants without a source.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent / "machines"


@dataclass(frozen=True)
class Inside:
    """Between the GPUs of a node. `gbs`: bus bandwidth, GB/s; `alpha_us`: (a, a'), of a verb of p ranks a + a' p; `p2p_gbs`: of
    one message; `p2p_us`: what it costs at least; `ranks_gbs`: bus bandwidth by ranks where there is no switch; `slows`: by
    how much products are slower beside a transfer."""

    name: str
    gbs: float
    alpha_us: tuple[float, float]
    p2p_gbs: float
    p2p_us: float
    ranks_gbs: tuple[tuple[float, float], ...] = ()
    slows: float = 0.0


@dataclass(frozen=True)
class Between:
    """Between nodes. `node_gbs`: GB/s of a node and direction, all its NICs; `efficiency`: the share that verbs reach;
    `alpha_us`: (a, a'), of a message a; `nodes_gbs`: measured GB/s a node by number of nodes, where the fabric degrades."""

    name: str
    node_gbs: float
    efficiency: float
    alpha_us: tuple[float, float]
    nodes_gbs: tuple[tuple[float, float], ...] = ()
    slows: float = 0.0


@dataclass(frozen=True)
class Machine:
    """`peaks`: operations a second by dtype; `memory`: bytes a second. The shares: `product` and `product_k0` (the rows of K
    that a tile's start costs), `passes` of memory, `unfused` and `flash` (forward, backward) of attention. `kernel`, `host`:
    seconds of a launch on the device and on the host. `rested`: by what share a step is faster for each share of it that even
    its busiest rank waits (docs/planning.md, "A step"), below 1."""

    name: str
    gpus_per_node: int
    memory_gib: float
    peaks: Mapping[str, float]
    memory: float
    sms: int
    product: float
    product_k0: float
    passes: float
    unfused: float
    flash: Mapping[str, tuple[float, float]]
    kernel: float
    host: float
    inside: Inside
    between: Between
    source: Mapping[str, str]
    rested: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rested < 1:
            raise ValueError(f"rested is {self.rested:g}: use a number of 0 or more, below 1")

    def measured(self, verb: str, ranks: int, message_bytes: float) -> float | None:
        """Seconds of a verb, where they were measured: `plan.here` has them."""
        return None

    def peak(self, dtype: str) -> float:
        if dtype not in self.peaks:
            raise ValueError(f"{self.name} has no peak in {dtype}: use one of {', '.join(self.peaks)}")
        return self.peaks[dtype]


_COMPUTE = ("memory_gbs", "sms")
DTYPES = ("bf16", "fp16", "fp8", "float32")
_KERNEL = ("product", "product_k0", "memory", "unfused", "flash1", "flash2", "flash3", "kernel_us", "host_us",
           "rested")  # fmt: skip
_OPTIONAL = ("ranks_gbs", "nodes_gbs", "slows", "rested", "flash1", "flash2", "flash3", "ranks", *DTYPES)


def known() -> list[str]:
    """The names of the machines that come with the project."""
    return sorted(p.stem for p in HERE.glob("*.toml"))


def read(name: str | Path) -> Machine:
    """The machine of this name, or of this file. Raises ValueError, in one line."""
    path = HERE / f"{name}.toml"
    if str(name) not in known():
        path = Path(name)
        if path.suffix != ".toml":
            raise ValueError(f"--machine {name} is not known: use one of {', '.join(known())}, or a FILE.toml")
    try:
        return parsed(tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        raise ValueError(f"--machine {name}: {error.strerror}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"--machine {name}: {error}") from None


def parsed(values: dict) -> Machine:
    """Raises ValueError for keys that are unknown, missing or of another kind, and for constants without a source."""
    _only(values, ("name", "gpus_per_node", "memory_gib", "compute", "kernel", "level", "source"), "")
    compute = _only(values["compute"], (*DTYPES, *_COMPUTE), "compute")
    kernel = _only(values["kernel"], _KERNEL, "kernel")
    levels = values["level"]
    if not isinstance(levels, list) or len(levels) != 2:
        raise ValueError("[[level]] must be there twice: inside a node, then between nodes")
    inside = _only(levels[0], ("name", "ranks", "gbs", "alpha_us", "p2p_gbs", "p2p_us", "ranks_gbs", "slows"), "level 1")
    between = _only(levels[1], ("name", "node_gbs", "efficiency", "alpha_us", "nodes_gbs", "slows"), "level 2")
    if inside.pop("ranks", values["gpus_per_node"]) != values["gpus_per_node"]:
        raise ValueError(f"level 1 has other ranks than gpus_per_node, {values['gpus_per_node']}: use the same")
    peaks = {name: 1e12 * _number(compute, name, "compute") for name in DTYPES if name in compute}
    if not peaks:
        raise ValueError(f"[compute] has no peak: give one of {', '.join(DTYPES)} in TFLOP/s")
    flash = {name: _pair(kernel, name, "kernel") for name in _KERNEL if name.startswith("flash") and name in kernel}
    named = [*compute, *kernel, *(f"{level['name']}.{k}" for level in (inside, between) for k in level if k != "name")]
    if missing := [name for name in named if name not in values["source"]]:
        raise ValueError(f"[source] says nothing of {missing[0]}: write what it was fitted on, or whose data sheet says it")
    return Machine(
        str(values["name"]),
        int(_number(values, "gpus_per_node", "")),
        _number(values, "memory_gib", ""),
        peaks,
        1e9 * _number(compute, "memory_gbs", "compute"),
        int(_number(compute, "sms", "compute")),
        *(_number(kernel, name, "kernel") for name in ("product", "product_k0", "memory", "unfused")),
        flash,
        *(1e-6 * _number(kernel, name, "kernel") for name in ("kernel_us", "host_us")),
        Inside(**_level(inside, "level 1")),
        Between(**_level(between, "level 2")),
        {str(k): str(v) for k, v in values["source"].items()},
        _number(kernel, "rested", "kernel") if "rested" in kernel else Machine.rested,
    )


def _only(values: object, keys: tuple[str, ...], where: str) -> dict:
    inside = f"[{where}]" if where else "the file"
    if not isinstance(values, dict):
        raise ValueError(f"{inside} is no table of keys and values")
    if unknown := [k for k in values if k not in keys]:
        raise ValueError(f"{inside} has {unknown[0]}, which is not known: use {', '.join(keys)}")
    if missing := [k for k in keys if k not in values and k not in _OPTIONAL]:
        raise ValueError(f"{inside} has no {missing[0]}")
    return dict(values)


def _number(values: dict, key: str, where: str) -> float:
    value = values[key]
    least = 0 if key in ("slows", "rested", "host_us", "kernel_us", "product_k0") else 1e-12
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        raise ValueError(
            f"{where + ': ' if where else ''}{key} is {value!r}: use a number {'of 0 or more' if least == 0 else 'above 0'}"
        )
    return value


def _pair(values: dict, key: str, where: str) -> tuple[float, float]:
    value = values[key]
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, int | float) and v >= 0 for v in value):
        raise ValueError(f"{where}: {key} is {value!r}: use two numbers")
    return tuple(map(float, value))


def _level(values: dict, where: str) -> dict:
    found: dict = {"name": str(values["name"])}
    for key in values:
        if key.endswith("s_gbs"):
            found[key] = tuple(_pair({key: pair}, key, where) for pair in values[key])
        elif key == "alpha_us":
            found[key] = _pair(values, key, where)
        elif key != "name":
            found[key] = _number(values, key, where)
    return found


# --- one constant after another

# What `--what-if` and `--sensitivity` change, by name; COSTS are those of which less is faster.
COSTS = ("kernel_us", "host_us", "product_k0", "inside_us", "between_us", "p2p_us")
CONSTANTS = ("peak", "memory", "sms", "product", "passes", "unfused", "flash", "inside_gbs", "p2p_gbs", "node_gbs",
             "efficiency", "rested",
             *COSTS, "gpus_per_node", "memory_gib")  # fmt: skip


def constant(machine: Machine, name: str) -> float:
    """Its value, in the unit of the file."""
    m = machine
    return {
        "peak": max(m.peaks.values()) / 1e12, "memory": m.memory / 1e9, "flash": max((f for f, _ in m.flash.values()),
        default=0),
        "kernel_us": 1e6 * m.kernel, "host_us": 1e6 * m.host, "inside_gbs": m.inside.gbs, "inside_us": m.inside.alpha_us[0],
        "p2p_gbs": m.inside.p2p_gbs, "p2p_us": m.inside.p2p_us, "node_gbs": m.between.node_gbs,
        "efficiency": m.between.efficiency, "between_us": m.between.alpha_us[0],
    }.get(name) or getattr(m, name, 0.0)  # fmt: skip


def changed(machine: Machine, name: str, factor: float) -> Machine:
    """The machine with this constant so many times what it is. Raises ValueError for a name that is none."""
    m, inside, between = machine, machine.inside, machine.between
    scaled = tuple(tuple((n, gbs * factor) for n, gbs in curve) for curve in (inside.ranks_gbs, between.nodes_gbs))
    within = {
        "inside_gbs": {"gbs": inside.gbs * factor, "ranks_gbs": scaled[0]},
        "inside_us": {"alpha_us": tuple(a * factor for a in inside.alpha_us)},
        "p2p_gbs": {"p2p_gbs": inside.p2p_gbs * factor},
        "p2p_us": {"p2p_us": inside.p2p_us * factor},
    }
    beyond = {
        "node_gbs": {"node_gbs": between.node_gbs * factor, "nodes_gbs": scaled[1]},
        "efficiency": {"efficiency": between.efficiency * factor},
        "between_us": {"alpha_us": tuple(a * factor for a in between.alpha_us)},
    }
    if name in within:
        return replace(m, inside=replace(inside, **within[name]))
    if name in beyond:
        return replace(m, between=replace(between, **beyond[name]))
    if name == "peak":
        return replace(m, peaks={k: v * factor for k, v in m.peaks.items()})
    if name == "flash":
        return replace(m, flash={k: (f * factor, b * factor) for k, (f, b) in m.flash.items()})
    if name == "sms":
        # More of them, each as fast as before.
        m = replace(m, peaks={k: v * factor for k, v in m.peaks.items()})
    own = {"kernel_us": "kernel", "host_us": "host"}.get(name, name)
    if name not in CONSTANTS or own not in {f.name for f in fields(Machine)}:
        raise ValueError(f"there is no constant {name}: use one of {', '.join(CONSTANTS)}")
    value = getattr(m, own) * factor
    return replace(m, **{own: max(1, round(value)) if isinstance(getattr(m, own), int) else value})
