"""The options that every command has, and how options are read: each error is one line that names the value."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Container, Sequence
from math import prod
from typing import NoReturn

from launch.terminal import targets
from launch.terminal.help import Parser, epilog
from parallel.shard import AXES, DATA

# Options of every command that change no number, or that its JSON has in a place of its own.
COMMON = ("json", "dtype", "seed", "trace", "check_collectives", "timeout", "sums")


# Of a size: an array of two such dims has a number of bytes that NumPy can count.
MOST = 10**9


class UsageError(ValueError):
    """Options or input that cannot be used; the text names the value and what would be right. Exit status 2."""


class _NotGiven(list):
    """In place of a default: what is another after parsing was given. A list, as options that may be repeated add to theirs."""


class _Parser(Parser):
    """Raises what is wrong as one line, so that one rank prints it."""

    def __init__(self, **more: object) -> None:
        super().__init__(**more)
        self.bound: list[tuple[tuple[str, ...], dict[str, bool | tuple]]] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: object = None) -> tuple:
        parsed, rest = super().parse_known_args(args, namespace)
        if self.bound:
            defaults = {name: _NotGiven() for name in vars(parsed)}
            asked, _ = super().parse_known_args(args, argparse.Namespace(**defaults))
            self._see_that_all_do_something(vars(parsed), {n for n, v in vars(asked).items() if v is not defaults[n]})
        return parsed, rest

    def _see_that_all_do_something(self, values: dict[str, object], given: set[str]) -> None:
        typed = {a.dest: " ".join(a.option_strings[-1:]) for a in self._actions}
        for options, needed in self.bound:
            useless = [typed[name] for name in given if typed[name] in options]
            if useless and not any(_met(values[name], wanted) for name, wanted in needed.items()):
                why = _without({typed[name]: wanted for name, wanted in needed.items()})
                raise UsageError(f"{useless[0]} does nothing {why}: leave {useless[0]} out")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def only_with(p: argparse.ArgumentParser, *options: str, **needed: bool | tuple) -> None:
    """Refuse these options where none of the others is as they need it: True, it is given; False, it is not; or one of the
    values of a tuple. A name that is no option's is that of a positional argument.

    `only_with(p, "--gamma", speculate=True, draft=True)`: only with --speculate or with --draft.
    """
    p.bound.append((options, needed))


def _met(value: object, wanted: bool | tuple) -> bool:
    return value in wanted if isinstance(wanted, tuple) else bool(value) == wanted


def _without(needed: dict[str, bool | tuple]) -> str:
    """What is missing, or too much, in words."""
    if False in needed.values():
        return f"with {' and '.join(needed)}"
    said = (option if wanted is True else f"{option} {' or '.join(wanted)}".lstrip() for option, wanted in needed.items())
    return f"without {' or '.join(said)}"


def _whole(least: int, what: str) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}: use a whole number of {least} or more")
        if what != "seed" and int(text) > MOST:
            raise argparse.ArgumentTypeError(f"{text!r} is too large a {what}: use at most {MOST}")
        return int(text)

    read.metavar = "N"
    return read


positive, natural, _seed = _whole(1, "size"), _whole(0, "count"), _whole(0, "seed")


def amount(text: str) -> float:
    """An argparse type: a number of at least 0, and not infinite."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount: use a number of 0 or more, such as 0.5")
    return value


amount.metavar = "X"


def layers(text: str) -> tuple[int, ...]:
    """An argparse type: how many blocks there are, or how many each stage of a pipeline has: 8, or 3,3,2,0."""
    counts = tuple(int(part) if part.isdecimal() else -1 for part in text.split(","))
    if min(counts) < 0 or not 0 < sum(counts) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of layers: use for instance 8, or 3,3,2,0 for four stages")
    return counts


layers.metavar = "N[,N...]"


def axis_sizes(text: str) -> dict[str, int]:
    """An argparse type: ranks along axes, dp=2,tp=2."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, ranks = part.partition("=")
        if name not in AXES or name in sizes or not ranks.isdecimal() or int(ranks) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is no axis of a mesh: use for instance dp=2,tp=2")
        sizes[name] = int(ranks)
    return sizes


axis_sizes.metavar = "dp=N,tp=N"


# What ZeRO splits, by stage.
ZERO = {1: "the optimizer's state", 2: "gradients too", 3: "weights too"}


def _zero(text: str) -> int:
    if text not in map(str, (0, *ZERO)):
        raise argparse.ArgumentTypeError(f"{text!r} is no stage of ZeRO: use 0, 1, 2 or 3")
    return int(text)


def data_axes(text: str) -> tuple[str, ...]:
    """An argparse type: data axes, joined: cp, or dp,ep."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in DATA or names.count(name) > 1]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no data axis, or is named twice: use some of {', '.join(DATA)}")
    return names


data_axes.metavar = "cp[,dp...]"


def add_zero(p: argparse._ArgumentGroup | argparse.ArgumentParser, over: str, named: bool = False) -> None:
    """The option that splits what a rank keeps `over` others; `named`: and the one that names these."""
    said = "; ".join(f"{stage}, {what}" for stage, what in ZERO.items())
    p.add_argument(
        "--zero", nargs="?", type=_zero, const=1, default=0, metavar="1|2|3",
        help=f"split over {over}: {said} (ZeRO; without a number 1)",
    )  # fmt: skip
    if named:
        more = "split over these alone; over the others there are copies"
        p.add_argument("--zero-over", type=data_axes, default=DATA, help=more)


# How ranks add and gather.
WAYS = ("mpi", "shared", "auto")
# In place of a mesh: the planner chooses one.
AUTO = "auto"


def mesh_or_auto(text: str) -> dict[str, int] | str:
    """An argparse type: ranks along axes, or auto."""
    return AUTO if text == AUTO else axis_sizes(text)


def add_mesh_or_auto(p: argparse.ArgumentParser) -> None:
    """--mesh and what goes with auto."""
    p.add_argument(
        "--mesh",
        type=mesh_or_auto,
        metavar=f"{axis_sizes.metavar}|auto",
        help="ranks along each axis, as in pp=2,dp=2,tp=2 (default: all along dp); auto: the fastest by launch.plan",
    )
    p.add_argument("--memory-mib", type=amount, metavar="N", help="of a rank at most, for --mesh auto: MiB by the closed forms")
    only_with(p, "--memory-mib", mesh=(AUTO,))


def settled(sizes: dict[str, int] | None, ranks: int, rest: str = "dp", along: Sequence[str] = ("dp", "tp")) -> dict[str, int]:
    """Ranks along the axes that a command knows, `along`. Of those that are not given dp, or where there is none `rest`, takes
    the ranks that are left, the others have 1. If none is given, all ranks lie along `rest`. Axes beyond these and tp are named
    only where they are given.

    Raises UsageError where the product is not the number of ranks, or for more than 1 along an axis that is not known here.
    """
    given, fills = {rest: ranks} if sizes is None else sizes, "dp" if "dp" in along else rest
    if unknown := [name for name, n in given.items() if n > 1 and name not in along]:
        known = f"{', '.join(along[:-1])} and {along[-1]}"
        raise UsageError(f"--mesh {unknown[0]}={given[unknown[0]]}: this command lays ranks out along {known}")
    others = prod(n for name, n in given.items() if name != fills)
    found = {name: given.get(name, max(1, ranks // others) if name == fills else 1)
             for name in along if name in given or name in (fills, "tp")}  # fmt: skip
    if prod(found.values()) != ranks:
        right = found | ({fills: ranks // others} if ranks % others == 0 else {**dict.fromkeys(found, 1), fills: ranks})
        said, use = (",".join(f"{name}={n}" for name, n in axes.items()) for axes in (found, right))
        raise UsageError(f"--mesh {said} is for {prod(found.values())} ranks, these are {ranks}: use for instance {use}")
    return found


def parser(
    name: str,
    description: str,
    examples: Sequence[str] = (),
    needs: str = "",
    without: Container[str] = (),
    check_collectives: str = "auto",
) -> argparse.ArgumentParser:
    """The parser of `python -m launch.NAME`, with the options that mean the same in every command.

    `needs`: what must be given, as the line of usage has it. `without`: what the command has no use for: "dtype", "seed", and
    "ranks" if it communicates nothing. `check_collectives`: the default of that option.
    """
    alone = "ranks" in without
    p = _Parser(
        prog=f"python -m launch.{name}",
        usage=f"{'' if alone else 'mpirun -n N '}python -m launch.{name} [options] {needs}".rstrip(),
        description=description,
        epilog=epilog(examples),
        allow_abbrev=False,
    )
    if "dtype" not in without:
        p.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of weights and activations")
    if "seed" not in without:
        p.add_argument("--seed", type=_seed, default=0, help="of weights and inputs")
    p.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    if alone:
        p.set_defaults(trace=None, timeout=0.0)
        return p
    p.add_argument(
        "--trace", metavar="FILE", type=targets.File, help="write what each rank did when, for ui.perfetto.dev and launch.trace"
    )
    w = p.add_argument_group("when ranks disagree")
    w.add_argument(
        "--check-collectives",
        choices=("auto", "on", "off"),
        default=check_collectives,
        help="before each collective, see that all ranks mean the same one, at the price of a small message more; "
        "auto: for the first 64 MiB of each axis; on: for all, and for each message between two",
    )
    w.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=amount,
        default=60.0,
        help="end all ranks, and say who did not come, when a collective takes longer; 0: never",
    )
    w.add_argument("--deterministic", action="store_true", help="sum in rank order: the same bits on every MPI library")
    p.add_argument(
        "--sums",
        choices=WAYS,
        default="auto",
        help="how ranks add and gather: mpi, as its library does; shared, through memory that a host's ranks share, and as "
        "little between hosts as can be; auto: shared where there are enough bytes",
    )
    return p


def add_replicas(p: argparse.ArgumentParser, what: str) -> None:
    """The option of commands that repeat something: `what`."""
    p.add_argument(
        "--check-replicas",
        type=natural,
        default=0,
        help=f"every N {what} see that what several ranks hold is the same, and always that no NaN is sent; 0: never",
    )
