"""Readable reports: aligned tables on rank 0's standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table

from parallel.ledger import agrees
from reference.compare import Comparison


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
            (
                c.tensor,
                c.phase,
                f"{c.entries:,}",
                f"{c.max_abs_error:.1e}",
                f"{c.tolerance:.1e}",
                f"{c.relative_error:.1e}",
                "ok" if c.ok else "WRONG",
            )
            for c in checks
        ],
    )
    for c in checks:
        if not c.ok:
            print(f"WRONG: {c.worst}")


def communication(rows: Sequence[dict], what: str = "one step") -> None:
    hidden = ("hidden ms",) if any(r["hidden_seconds"] for r in rows) else ()
    table(
        f"Communication of {what}, counted beside predicted (wire: sent by one rank on a ring)",
        (
            "verb",
            "axis",
            "phase",
            "calls",
            "message bytes",
            "predicted",
            "wire bytes",
            "ms",
            *(("hidden ms",) if hidden else ()),
        ),
        [
            (
                r["verb"],
                r["axis"],
                r["phase"],
                r["calls"],
                f"{r['message_bytes']:,}",
                "-" if r["predicted_message_bytes"] is None else f"{r['predicted_message_bytes']:,}",
                f"{r['wire_bytes']:,.0f}",
                f"{1e3 * r['seconds']:.2f}",
                *((f"{1e3 * r['hidden_seconds']:.2f}",) if hidden else ()),
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


def seconds(medians: dict[str, float], repeats: int, ranks: int) -> None:
    table(
        f"Seconds of forward and backward, median of {repeats}",
        ("", "ms", "of the products"),
        [
            (label, f"{1e3 * medians[key]:.2f}", f"{medians[key] / medians['matmul_only']:.2f}")
            for label, key in (
                (f"sharded over {ranks} rank{'s' if ranks > 1 else ''}", "sharded"),
                ("its matrix products alone", "matmul_only"),
                ("unsharded, one process", "unsharded"),
            )
        ],
    )


def wrong(checks: Sequence[Comparison], result: dict) -> list[str]:
    """What does not agree: tensors, communication or memory."""
    held = result["memory"]
    found = [c.tensor for c in checks if not c.ok]
    if not agrees(result["communication"]):
        found.append("communication")
    return found + [k for k in ("weights", "saved") if held[f"{k}_bytes_per_rank"] != held[f"predicted_{k}_bytes_per_rank"]]


def publish(as_json: bool, result: dict, checks: Sequence[Comparison], wrong: Sequence[str], show: Callable[[], None]) -> int:
    """Settle `ok`, print the JSON, or what `show` prints and whether all agreed, and return the exit status."""
    result["ok"] = not wrong
    result["checks"] = [c.as_json() for c in checks]
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        show()
        print(f"NOT ALL AGREED: {', '.join(wrong)}" if wrong else "all agreed")
    return 1 if wrong else 0


def progress(label: str, here: bool, total: int | None = None) -> Callable[[Iterable], Iterable]:
    """A bar over what is iterated, on standard error, if that is a terminal and this rank is the one that prints.

    `total`: how many items, where they have no length.
    """
    shown = here and sys.stderr.isatty()
    return lambda items: track(items, label, total, console=Console(stderr=True), transient=True) if shown else items


@contextmanager
def steps(label: str, total: int, done: int, tokens: int, here: bool) -> Iterator[Callable[[float], None]]:
    """A bar for a training run, told the loss after each step: loss, tokens a second, time to go. Shown as `progress` is."""
    if not (here and sys.stderr.isatty()):
        yield lambda loss: None
        return
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    begun = perf_counter()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done, loss=float("nan"), rate=0.0)

        def told(loss: float) -> None:
            ran = bar.tasks[0].completed - done + 1
            bar.update(task, advance=1, loss=loss, rate=ran * tokens / (perf_counter() - begun))

        yield told
