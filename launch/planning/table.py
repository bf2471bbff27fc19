"""`--table`: a row a layout, predicted; a row that cannot be says why and stops nothing."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from launch.options import UsageError
from launch.planning import columns, here, question
from launch.planning.told import rank_number
from parallel.shard import AXES
from plan.scores import Row, Score, score
from plan.step import Estimate, Planner

PREDICTED = ("iteration_seconds", "memory_bytes", "fits", "tokens_per_second", "tflops_per_gpu", "mfu", "hfu",
             "bubble_fraction", "exposed_tp", "exposed_cp", "exposed_ep", "exposed_pp", "exposed_dp", "error")  # fmt: skip


class Table(NamedTuple):
    header: list[str]
    rows: list[dict[str, str]]


class Predicted(NamedTuple):
    """Of each row what was predicted, or why it could not be; the scores, where something was measured."""

    cells: list[dict[str, object]]
    estimates: list[Estimate | None]
    score: Score | None

    @property
    def failed(self) -> int:
        return sum(1 for e in self.estimates if e is None)


def require(account: str | None, given: Mapping[str, object]) -> None:
    """Raises UsageError, or ValueError, for options that no row could use."""
    if account == "ours":
        raise UsageError("--account ours measures these ranks, --table is about GPUs: use --account theirs, or leave it out")
    if given.get("machine") == here.NAME:
        raise UsageError("--machine here measures one layout at a time, --table has many: use a GPU, as in --machine h100-sxm")
    if "machine" in given:
        question.machine_of(given)


def read(path: Path) -> Table:
    """Raises UsageError for a file that is no table."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise UsageError(f"--table {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--table {path}: it is no text: use a comma-separated file with a header line") from None
    try:
        lines = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error as error:
        raise UsageError(f"--table {path}: {error}") from None
    if not lines:
        raise UsageError(f"--table {path}: it is empty: use a header line, then a row a line")
    header = [name.strip() for name in lines[0]]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UsageError(f"--table {path}: the column {twice!r} is there twice: leave one out")
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(header):
            raise UsageError(f"--table {path}: row {number} has {len(line)} cells, the header {len(header)}")
    if not set(header) & columns.COLUMNS.keys():
        raise UsageError(f"--table {path}: its header has no column that is known: use for instance model,machine,batch,dp")
    return Table(header, [dict(zip(header, line, strict=True)) for line in lines[1:]])


def predict(table: Table, given: Mapping[str, object], planner_of: Callable[[Mapping[str, object]], Planner]) -> Predicted:
    """`given`: what options say where a row says nothing."""
    cells, estimates, measured = [], [], []
    for n, row in enumerate(table.rows):
        try:
            estimate = _row(row, given, planner_of)
        except (ValueError, OverflowError, ZeroDivisionError, MemoryError) as error:
            cells.append({"error": str(error) or type(error).__name__})
            estimates.append(None)
            continue
        cells.append(_cells(estimate))
        estimates.append(estimate)
        if (seconds := _seconds(row.get("measured_seconds", ""))) is not None:
            machine = estimate.machine
            reached = estimate.whole_hfu * estimate.iteration / seconds
            name = row.get("id") or f"row {n + 2}"
            measured.append(Row(name, row.get("group", ""), machine.name, estimate.iteration, seconds, reached))
    return Predicted(cells, estimates, score(measured) if measured else None)


def _row(
    row: Mapping[str, str], given: Mapping[str, object], planner_of: Callable[[Mapping[str, object]], Planner]
) -> Estimate:
    own = {name: columns.read(name, text) for name, text in row.items() if name in columns.COLUMNS and text.strip()}
    values = {**given, **own}
    if any(name in own for name in AXES):
        # What a row says of the mesh is all of it.
        values |= {name: own.get(name, 1) for name in AXES}
    _, config = question.config_of(values)
    planner = planner_of(values)
    return planner.estimate(question.strategy_of(values, config, planner.machine))


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _cells(e: Estimate) -> dict[str, object]:
    exposed = {f"exposed_{axis}": seconds for axis, seconds in e.exposed.items()}
    return {
        "iteration_seconds": e.iteration,
        "memory_bytes": round(e.peak_bytes),
        "fits": int(e.fits),
        "tokens_per_second": e.tokens_per_second,
        "tflops_per_gpu": e.tflops,
        "mfu": e.mfu,
        "hfu": e.hfu,
        "bubble_fraction": e.bubble,
        **exposed,
    }


def written(table: Table, predicted: Predicted) -> bytes:
    """The table with what was predicted behind its columns; columns of that name are written anew."""
    own = [f"predicted_{name}" for name in PREDICTED]
    kept = [name for name in table.header if name not in own]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*kept, *own])
    for row, cells in zip(table.rows, predicted.cells, strict=True):
        writer.writerow([*(row[name] for name in kept), *(cells.get(name, "") for name in PREDICTED)])
    return text.getvalue().encode()


def as_json(table: Table, predicted: Predicted, path: Path) -> dict:
    rows = [{"id": row.get("id"), **{f"predicted_{name}": cells.get(name) for name in PREDICTED},
             "slowest_rank": None if e is None else rank_number(e.strategy, e.slowest)}
            for row, cells, e in zip(table.rows, predicted.cells, predicted.estimates, strict=True)]  # fmt: skip
    found = {"table": {"rows": len(rows), "failed": predicted.failed, "output": str(path), "predictions": rows}}
    return found | {"score": None if predicted.score is None else predicted.score._asdict()}
