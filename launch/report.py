"""What commands print on rank 0's standard output: aligned tables for people, or one JSON document."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from time import perf_counter

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table

from parallel.ledger import agrees
from parallel.mesh import Mesh
from reference.compare import Comparison


def header(command: str, args: argparse.Namespace | None = None, mesh: Mesh | None = None) -> dict:
    """How the JSON document of every command begins. One that computes nothing on ranks has no mesh."""
    begun = {"command": command, "ok": True}
    if mesh is None:
        return begun
    return begun | {"ranks": prod(mesh.sizes.values()), "mesh": mesh.sizes, "dtype": args.dtype, "seed": args.seed}


def publish(
    as_json: bool,
    result: dict,
    show: Callable[[], None],
    wrong: Sequence[str] = (),
    agreed: str | None = "all agreed",
    between: str = ", ",
) -> int:
    """Settle `ok`, print the JSON, or what `show` prints and a last line, and return the exit status.

    `wrong`: what does not agree, listed with `between` between. `agreed`: the last line if all does; None where nothing is
    compared.
    """
    result["ok"] = not wrong
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        show()
        if wrong:
            print(f"NOT ALL AGREED: {between.join(wrong)}")
        elif agreed is not None:
            print(agreed)
    return 1 if wrong else 0


def of_ranks(what: str, agree: Iterable[bool]) -> list[str]:
    """The ranks that do not agree on it, in words."""
    return [f"{what} of rank {rank}" for rank, ok in enumerate(agree) if not ok]


def by_rank(memory: Sequence[dict[str, int]]) -> dict[str, list[int]]:
    """The memory of all ranks, counted by kind on each, as JSON has it."""
    return {f"{kind}_bytes_per_rank": [m[kind] for m in memory] for kind in memory[0]}


def wrong(checks: Sequence[Comparison], result: dict) -> list[str]:
    """What does not agree: tensors, communication or memory."""
    held = result["memory"]
    tensors = [c.tensor for c in checks if not c.ok]
    sent = [] if agrees(result["communication"]) else ["communication"]
    kinds = [k for k in ("weights", "saved") if held[f"{k}_bytes_per_rank"] != held[f"predicted_{k}_bytes_per_rank"]]
    return [*tensors, *sent, *kinds]


def size(n: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table, numbers to the right, as wide as it needs to be."""
    t = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        t.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        t.add_row(*(str(cell) for cell in row))
    # Never wrapped or cut: a report that goes to a file or through a pipe keeps its columns.
    console = Console(highlight=False, width=1000)
    with console.capture() as text:
        console.print(t)
    print(title, *(line.rstrip() for line in text.get().splitlines()), "", sep="\n")


def comparisons(title: str, checks: Sequence[Comparison]) -> None:
    table(
        title,
        ("tensor", "phase", "entries", "max abs error", "tolerance", "relative error", ""),
        [
            (c.tensor, c.phase, f"{c.entries:,}", *map("{:.1e}".format, numbers), "ok" if c.ok else "WRONG")
            for c in checks
            for numbers in [(c.max_abs_error, c.tolerance, c.relative_error)]
        ],
    )
    for c in checks:
        if not c.ok:
            print(f"WRONG: {c.worst}")


def communication(rows: Sequence[dict], what: str = "one step") -> None:
    times = {"ms": "seconds"} | ({"hidden ms": "hidden_seconds"} if any(r["hidden_seconds"] for r in rows) else {})
    table(
        f"Communication of {what}, counted beside predicted (wire: sent by one rank on a ring)",
        ("verb", "axis", "phase", "calls", "message bytes", "predicted", "wire bytes", *times),
        [
            (
                *(r[k] for k in ("verb", "axis", "phase", "calls")),
                *("-" if r[k] is None else f"{r[k]:,.0f}" for k in ("message_bytes", "predicted_message_bytes", "wire_bytes")),
                *(f"{1e3 * r[k]:.2f}" for k in times.values()),
            )
            for r in rows
        ],
    )


# What a rank holds, as commands name it in JSON (..._bytes_per_rank) and to people.
MEMORY = {
    "weights": "weights",
    "predicted_weights": "  predicted",
    "gradients": "gradients",
    "optimizer": "optimizer's state",
    "saved": "saved for backward",
    "predicted_saved": "  predicted",
    "peak": "most held at once, by the system's count",
}


def memory(counted: dict[str, list[int]]) -> None:
    rows = [(label, counted[f"{kind}_bytes_per_rank"]) for kind, label in MEMORY.items() if f"{kind}_bytes_per_rank" in counted]
    table(
        "Memory by rank, counted beside predicted",
        ("", *(f"rank {r}" for r in range(len(rows[0][1])))),
        [(label, *(size(n) for n in by_rank)) for label, by_rank in rows],
    )


def seconds(medians: dict[str, float], repeats: int, ranks: int, of: str = "") -> None:
    """`of`: what was run, where that is not what the report is about."""
    rows = {f"sharded over {ranks} rank{'s' if ranks > 1 else ''}": "sharded", "its matrix products alone": "matmul_only"}
    rows["unsharded, one process"] = "unsharded"
    table(
        f"Seconds of forward and backward{of}, median of {repeats}",
        ("", "ms", "of the products"),
        [(row, f"{1e3 * medians[k]:.2f}", f"{medians[k] / medians['matmul_only']:.2f}") for row, k in rows.items()],
    )


def progress(label: str, here: bool, total: int | None = None) -> Callable[[Iterable], Iterable]:
    """A bar over items, on standard error, if that is a terminal and this rank is the one that prints (`here`).

    `total`: how many items, where they have no length.
    """
    shown = here and sys.stderr.isatty()
    return lambda items: track(items, label, total, console=Console(stderr=True), transient=True) if shown else items


@contextmanager
def steps(label: str, total: int, done: int, tokens: int, here: bool) -> Iterator[Callable[[float], None]]:
    """A bar for a training run: loss, tokens a second, time to go. Shown as `progress` is.

    Yields what is to be called with the loss after each step. `done`: steps before the first; `tokens`: of a step.
    """
    if not (here and sys.stderr.isatty()):
        yield lambda loss: None
        return
    numbers = map(TextColumn, ("loss {task.fields[loss]:.3f}", "{task.fields[rate]:,.0f} tokens/s"))
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), *numbers, TimeRemainingColumn())
    begun = perf_counter()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done, loss=float("nan"), rate=0.0)

        def advance(loss: float) -> None:
            steps = bar.tasks[0].completed - done + 1
            bar.update(task, advance=1, loss=loss, rate=steps * tokens / (perf_counter() - begun))

        yield advance
