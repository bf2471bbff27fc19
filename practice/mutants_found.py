"""What `dev check` found of each exercise, kept in mutants.json: for docs/practice.md, and to see what has changed since."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Sequence

from practice.dev import Report
from practice.exercise import FOLDER, Exercise
from practice.workbook import replace

FILE = FOLDER.parent / "mutants.json"
COLUMNS = ("exercise", "right answers", "mistakes", "pairs", "mutants", "that differ", "rejected", "share")


def digest(e: Exercise) -> str:
    """A hash of what decides the figures: the solution, its check, the other right answers."""
    return hashlib.sha256(b"\0".join(p.read_bytes() for p in sorted(e.folder.glob("*.py")))).hexdigest()[:16]


def recorded() -> dict[str, dict]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def record(e: Exercise, report: Report) -> None:
    """Keep the figures of an exercise; several may be checked at once."""
    figures = {
        "rights": len(e.rights) + 1,
        "mistakes": report.mistakes,
        "pairs": report.pairs,
        "mutants": report.mutants,
        "differ": report.mutants - report.equivalent,
        "rejected": report.rejected,
        "problems": len(report.problems),
        "of": digest(e),
    }
    with open(FOLDER.parent / "dev.py") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        all_of_them = dict(sorted((recorded() | {e.name: figures}).items()))
        lines = ",\n ".join(f"{json.dumps(n)}: {json.dumps(f)}" for n, f in all_of_them.items())
        replace(FILE, f"{{\n {lines}\n}}\n")


def rows(exercises: Sequence[Exercise]) -> list[tuple[object, ...]]:
    """One row an exercise that has figures, then the sum of all."""
    kept = recorded()
    figures = [(e.name, kept[e.name]) for e in exercises if e.name in kept]
    total = {k: sum(f[k] for _, f in figures) for k in ("rights", "mistakes", "pairs", "mutants", "differ", "rejected")}
    return [
        (n, f["rights"], f["mistakes"], f["pairs"], f["mutants"], f["differ"], f["rejected"], share(f))
        for n, f in [*figures, ("all", total)]
    ]


def share(figures: dict) -> str:
    # Rounded down, so that 100 % means all.
    return f"{figures['rejected'] * 1000 // figures['differ'] / 10}%" if figures["differ"] else "-"
