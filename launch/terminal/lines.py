"""Lines that fit: prose and tables no wider than the terminal, and one unit a column."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

NARROWEST, UNKNOWN = 40, 80
# Between two columns of a table, and where it has no room.
GAP, NARROW = 3, 2
# A cell of several words is folded to this and no narrower: 5 tokens, 38.2 of 40.1.
FOLDED = 20
BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SECONDS = {"ms": 1e-3, "s": 1}


def width() -> int:
    """Columns of a line: COLUMNS where it is set, else the terminal's, else 80, as under mpirun and in files."""
    return max(NARROWEST, shutil.get_terminal_size((UNKNOWN, 24)).columns)


def fold(text: str, indent: str = "") -> str:
    """The text, with the lines that are too wide folded between words; what follows the first part of one gets `indent`."""
    plain = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
    folded = [line if len(line) <= width() else textwrap.fill(line, width(), **plain) for line in text.split("\n")]
    return "\n".join(folded)


def say(*lines: str, indent: str = "") -> None:
    """Print lines of prose, each folded where it is too wide."""
    for line in lines:
        print(fold(line, indent))


def counted(n: int, noun: str) -> str:
    """1 token, 1,024 tokens."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def size(n: float) -> str:
    """Bytes for people: 1.5 MiB."""
    unit = _unit([n], BYTES)
    return f"{_number(n, unit, BYTES)} {unit}"


def column(name: str, values: Sequence[float | None], units: dict[str, float], digits: int = 1) -> tuple[str, list[str]]:
    """The heading of a column, with its unit, and its cells: `units` is BYTES or SECONDS, None has no number.

    The unit is the largest in which no number is below 1, so that none is lost beside a larger one.
    """
    unit = _unit([v for v in values if v], units)
    return f"{name} {unit}".strip(), ["-" if v is None else _number(v, unit, units, digits) for v in values]


def _unit(values: Iterable[float], units: dict[str, float]) -> str:
    least = min(map(abs, values), default=0.0)
    smallest = next(iter(units))
    return next((unit for unit, n in reversed(units.items()) if least >= n), smallest)


def _number(value: float, unit: str, units: dict[str, float], digits: int = 1) -> str:
    return f"{value / units[unit]:,.{0 if unit == 'B' else digits}f}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], keys: int = 1) -> None:
    """Print a table, numbers to the right. Where it is too wide, headings are folded, then cells of several words; columns that
    still have no room follow below, beside the first `keys` columns again."""
    cells = [[str(cell) for cell in row] for row in rows]
    print(fold(title))
    for chosen, widths, gap in _parts(columns, cells, keys):
        # Between two columns the box has one blank.
        t = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, gap - 2))
        for i, wide in zip(chosen, widths, strict=True):
            t.add_column(columns[i], justify="left" if i == 0 else "right", width=wide, overflow="fold")
        for row in cells:
            t.add_row(*(row[i] for i in chosen))
        # Not to standard output: where its reader has gone, rich would end the process.
        text = StringIO()
        Console(file=text, highlight=False, markup=False, width=1000).print(t)
        print(*(line.rstrip() for line in text.getvalue().splitlines()), "", sep="\n")


def _parts(columns: Sequence[str], cells: Sequence[Sequence[str]], keys: int) -> list[tuple[list[int], list[int], int]]:
    """Which columns stand beside one another, how wide each is, and the gap between them."""
    natural, headed, least = [], [], []
    for i, heading in enumerate(columns):
        mine = [row[i] for row in cells]
        whole, word = max(map(len, mine), default=0), _word(heading)
        natural.append(max(whole, len(heading)))
        headed.append(max(whole, word))
        least.append(max(min(whole, FOLDED), word, *map(_word, mine)))
    gap = GAP if _across(least, range(len(columns)), GAP) <= width() else NARROW
    parts, chosen = [], list(range(min(keys, len(columns))))
    for i in range(keys, len(columns)):
        if len(chosen) > keys and _across(least, [*chosen, i], gap) > width():
            parts.append(chosen)
            chosen = list(range(keys))
        chosen.append(i)
    return [(part, _widths(part, gap, natural, headed, least), gap) for part in [*parts, chosen]]


def _word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _across(widths: Sequence[int], chosen: Sequence[int], gap: int) -> int:
    return sum(widths[i] for i in chosen) + gap * (len(chosen) - 1)


def _widths(chosen: Sequence[int], gap: int, natural: list[int], headed: list[int], least: list[int]) -> list[int]:
    """As wide as the columns would be, less what is too much: first of headings, then of cells, the widest first."""
    widths = {i: natural[i] for i in chosen}
    for floor in (headed, least):
        while _across(widths, chosen, gap) > width():
            widest = max(chosen, key=lambda i: widths[i] - floor[i])
            if widths[widest] == floor[widest]:
                break
            widths[widest] -= 1
    return [widths[i] for i in chosen]
