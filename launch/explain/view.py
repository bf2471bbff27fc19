"""One rank's view of a step as plain data: what it holds, the steps that a witness saw, and what they sent together.

    {"rank", "mesh": sizes, "place": on each axis, "holds": [...], "steps": [...], "sent": [...]}

`steps`: as `Witness` says. `sent`: sums over them, as the ledger has them. An entry of `holds` is a parameter: `name`, `part`
(W1[:, 256:512]), `whole` (its shape), `shape` and `bytes` of the part, `bounds` of each rank: where its part starts and stops,
in each dim; `also_on`: other ranks that hold any of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from math import prod

from launch.options import UsageError, only_with
from launch.terminal import targets
from launch.terminal.lines import width
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import Parameter
from parallel.shard import Place

# What the options are called in a command's arguments.
OPTIONS = ("explain", "rank", "explain_picture")


def add_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("one rank's view of a step")
    g.add_argument(
        "--explain",
        action="store_true",
        help="in place of the tables: what the rank holds, and line by line what it computes, on which shapes, "
        "and which ranks it meets in which verb",
    )
    g.add_argument("--rank", type=int, metavar="R", help="the rank that is explained (default: 0)")
    g.add_argument(
        "--explain-picture", metavar="FILE", type=targets.Picture, help="also draw its shards and its step, as a PNG"
    )
    only_with(p, "--rank", "--explain-picture", explain=True)


def check(args: argparse.Namespace, ranks: int) -> None:
    """Raises UsageError for a rank that there is not."""
    if args.rank is not None and not 0 <= args.rank < ranks:
        there = f"0 to {ranks - 1}" if ranks > 1 else "only 0"
        raise UsageError(f"--rank {args.rank}: no such rank among {ranks}: use {there}, or start more ranks")


def explained(
    args: argparse.Namespace,
    control: Control,
    mesh: Mesh,
    parameters: Sequence[Parameter],
    step: Callable[[], object],
) -> dict | None:
    """The view of the rank asked for, on rank 0; None on others, and where none is asked for.

    All ranks call it together: they take one more `step`.
    """
    if not args.explain:
        return None
    from launch.explain.witness import Witness

    rank = args.rank or 0
    view = None
    if control.rank == rank:
        with Witness(mesh, lambda p: _part(p, mesh.place)) as witness:
            step()
        view = {
            "rank": rank,
            "mesh": mesh.sizes,
            "place": {name: mesh.place[name] for name in mesh.sizes},
            "holds": [*_holds(mesh, parameters, rank)],
        }
        view |= {"steps": witness.steps, "sent": sent(witness.steps)}
    else:
        step()
    views = control.to_first(view)
    return None if views is None else views[rank]


def sent(steps: Iterable[dict]) -> list[dict]:
    """What the verbs among the steps sent, a row for each verb, axis and phase."""
    rows: dict[tuple[str, str, str], dict] = {}
    for s in steps:
        if s["kind"] == "verb":
            key = {k: s[k] for k in ("verb", "axis", "phase")}
            row = rows.setdefault(tuple(key.values()), key | {"calls": 0, "message_bytes": 0, "wire_bytes": 0})
            row["calls"] += 1
            for count in ("message_bytes", "wire_bytes"):
                row[count] += s[count]
    return [*rows.values()]


def show(view: dict | None, otherwise: Callable[[], None]) -> None:
    """Print the view, or where there is none what is printed otherwise."""
    if view is None:
        otherwise()
    else:
        from launch.explain import text

        print(*text.lines(view, width()), sep="\n")


def draw(args: argparse.Namespace, view: dict | None) -> list[str | None]:
    """Draw the picture where one is asked for. Returns why it could not be written."""
    if view is None or args.explain_picture is None:
        return []
    from launch.pictures import shards

    return [targets.write(args.explain_picture, lambda file: shards.draw(file, view))]


def _holds(mesh: Mesh, parameters: Iterable[Parameter], rank: int) -> Iterable[dict]:
    places = [mesh.place_of(r) for r in range(prod(mesh.sizes.values()))]
    for p in parameters:
        bounds = [p.layout.bounds(place) for place in places]
        also = [r for r, other in enumerate(bounds) if r != rank and _overlap(other, bounds[rank])]
        yield {
            "name": p.name,
            "part": _part(p, places[rank]),
            "whole": [*p.layout.shape],
            "shape": [*p.data.shape],
            "bytes": p.data.nbytes,
            "bounds": [[[*dim] for dim in held] for held in bounds],
            "also_on": also,
        }


def _overlap(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> bool:
    return all(max(x[0], y[0]) < min(x[1], y[1]) for x, y in zip(a, b, strict=True))


def _part(p: Parameter, place: Place) -> str:
    """W1[:, 256:512]; the name alone where it is whole."""
    whole = [(0, n) for n in p.layout.shape]
    bounds = p.layout.bounds(place)
    if [*bounds] == whole:
        return p.name
    index = (":" if b == w else f"{b[0]}:{b[1]}" for b, w in zip(bounds, whole, strict=True))
    return f"{p.name}[{', '.join(index)}]"
