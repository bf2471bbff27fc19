"""The options of launch.plan, and how their texts are read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from launch.options import UsageError, layers, positive
from launch.planning import columns
from launch.planning.columns import Column
from launch.terminal import targets
from parallel.schedule import Plan
from parallel.schedule import check as check_plan
from parallel.schedule import read as read_plan
from parallel.shard import AXES
from plan import machine as machines
from plan.machine import Machine
from plan.strategy import Strategy

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
# What a search may be told of: the mesh's axes and what a layout has.
SEARCHED = (*AXES, *columns.LAYOUT, "micro_batch")


def _typed(read: Callable[[str], object]) -> Callable[[str], object]:
    """An argparse type of a column's reader."""

    def typed(text: str) -> object:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return typed


def add(group: argparse._ArgumentGroup, named: Mapping[str, Column], without: Sequence[str] = ()) -> None:
    """An option a column: dashes for underscores. What is a plain switch in a table, tied and sequence_parallel, is a flag."""
    for name, column in named.items():
        if name in without:
            continue
        option = f"--{name.replace('_', '-')}"
        if name in ("tied", "sequence_parallel"):
            group.add_argument(option, action="store_true", default=None, help=column.help)
        else:
            group.add_argument(option, type=_typed(column.read), metavar=column.metavar, help=column.help)


def add_model(p: argparse.ArgumentParser) -> None:
    m = p.add_argument_group("model")
    m.add_argument("--model", metavar="FILE", help="a config.json, a TOML file, or a known name: see docs/planning.md")
    m.add_argument("--layers", type=layers, help="blocks; or of each stage, as in 3,3,2,0")
    add(m, columns.MODEL, without=("layers",))


def add_batch_and_machine(p: argparse.ArgumentParser) -> None:
    b = p.add_argument_group("batch")
    add(b, columns.BATCH)
    b.add_argument("--batch-tokens", type=positive, metavar="N", help="instead of --batch: tokens of a step, a multiple of S")
    b.add_argument("--micro-batches", type=positive, metavar="M", help="instead of --micro-batch: their number")
    m = p.add_argument_group("machine")
    m.add_argument("--machine", metavar="NAME",
                   help=f"one of {', '.join(machines.known())}, a FILE.toml, or here: these ranks (default)")  # fmt: skip
    m.add_argument("--write-machine", metavar="FILE", type=targets.File, help="with --machine here: write what was measured")
    add(m, columns.MACHINE)
    m.add_argument("--account", choices=("ours", "theirs"),
                   help="whose costs: rankwise's own, with --machine here, or those of Megatron and FSDP, on GPUs")  # fmt: skip
    m.add_argument(
        "--count", choices=("causal", "whole"), default="causal", help="attention in operations: as computed, or all of it"
    )


def values(args: argparse.Namespace) -> dict[str, object]:
    """What was given, by the names of columns. Raises UsageError for what excludes one another."""
    found = {name: getattr(args, name, None) for name in columns.COLUMNS}
    if args.layers is not None:
        found["layers"] = sum(args.layers)
        found["stage_layers"] = args.layers if len(args.layers) > 1 else None
    found |= args.mesh or {}
    for a, b in (("batch", "batch_tokens"), ("micro_batch", "micro_batches")):
        if getattr(args, a) is not None and getattr(args, b) is not None:
            raise UsageError(f"--{a.replace('_', '-')} beside --{b.replace('_', '-')}: give one of them")
    found |= {"batch_tokens": args.batch_tokens, "micro_batches": args.micro_batches}
    if found["machine"] is None and args.table is None:
        found["machine"] = "here"
    return {name: value for name, value in found.items() if value is not None}


def pairs(text: str) -> Iterator[tuple[str, str]]:
    for part in text.split(","):
        name, _, value = part.partition("=")
        yield name.strip(), value.strip()


def changes(text: str) -> str:
    """An argparse type: NAME=VALUE,.. of --what-if."""
    for name, value in pairs(text):
        if not value or not (name in SEARCHED or name in columns.BATCH or name in machines.CONSTANTS):
            right = ", ".join((*machines.CONSTANTS, *SEARCHED))
            raise argparse.ArgumentTypeError(f"{name or text!r} is nothing that can be changed: use NAME=VALUE of {right}")
        if name in columns.COLUMNS and name not in columns.MACHINE:
            _typed(lambda v, name=name: columns.COLUMNS[name].read(v))(value)
        elif not re.fullmatch(r"\d+(\.\d*)?(e[+-]?\d+)?x?", value) or float(value.rstrip("x")) == 0:
            raise argparse.ArgumentTypeError(f"{name}={value} is no constant: use a number above 0, or 2x for twice as much")
    return text


def changed_machine(machine: Machine, name: str, value: str) -> Machine:
    """2x is twice as much, a plain number the constant in its file's unit."""
    if value.endswith("x"):
        return machines.changed(machine, name, float(value[:-1]))
    return machines.changed(machine, name, float(value) / machines.constant(machine, name))


def fixed(text: str) -> dict[str, str]:
    """An argparse type: NAME=VALUE,.. of --fix."""
    found = {}
    for name, value in pairs(text):
        _searched(name, value)
        found[name] = value
    return found


def tried(text: str) -> tuple[str, tuple[str, ...]]:
    """An argparse type: NAME=V,V of --try."""
    name, _, several = text.partition("=")
    for value in several.split(","):
        _searched(name, value)
    return name, tuple(dict.fromkeys(several.split(",")))


def _searched(name: str, value: str) -> None:
    if name not in SEARCHED:
        raise argparse.ArgumentTypeError(f"{name!r} is nothing that is searched: use one of {', '.join(SEARCHED)}")
    _typed(columns.COLUMNS[name].read)(value)


def sizes(text: str) -> list[int]:
    """An argparse type: bytes, as 1MiB,16MiB."""
    found = []
    for part in text.split(","):
        split = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", part.strip(), re.ASCII)
        if split is None or split[2] not in UNITS or (n := round(float(split[1]) * UNITS[split[2]])) < 1 or n > 2**50:
            raise argparse.ArgumentTypeError(f"{part!r} is no size: use for instance 1MiB, 64KiB or 1GB")
        found.append(n)
    return found


def plan(path: Path, s: Strategy) -> Plan:
    """The user's own plan of this layout. Raises UsageError."""
    try:
        made = read_plan(path.read_text("utf-8"))
        if len(made.ranks) != s.pp:
            raise ValueError(f"it is for {len(made.ranks)} ranks, pp is {s.pp}: write a line a rank of pp")
        check_plan(made, s.stages, s.micro_batches)
        if any(made.rank_of[stage] != rank for stage, rank in enumerate(s.rank_of)):
            raise ValueError(f"its stages lie otherwise than {s.schedule}'s: give the --schedule and --chunks that it is like")
    except UnicodeDecodeError:
        raise UsageError(f"--plan {path}: it is no text: write a line a rank, such as 0F0,0B0") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--plan {path}: {getattr(error, 'strerror', None) or error}") from None
    return made
