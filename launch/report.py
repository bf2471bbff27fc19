"""Readable reports: aligned tables on rank 0's standard output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

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


def communication(rows: Sequence[dict]) -> None:
    table(
        "Communication of one step, counted beside predicted (wire: sent by one rank on a ring)",
        ("verb", "axis", "phase", "calls", "message bytes", "predicted", "wire bytes", "ms"),
        [
            (
                r["verb"],
                r["axis"],
                r["phase"],
                r["calls"],
                f"{r['message_bytes']:,}",
                f"{r['predicted_message_bytes']:,}",
                f"{r['wire_bytes']:,.0f}",
                f"{1e3 * r['seconds']:.2f}",
            )
            for r in rows
        ],
    )


def progress(label: str, here: bool) -> Callable[[Iterable], Iterable]:
    """A bar over what is iterated, on standard error, if that is a terminal and this rank is the one that prints."""
    shown = here and sys.stderr.isatty()
    return lambda items: track(items, label, console=Console(stderr=True), transient=True) if shown else items
