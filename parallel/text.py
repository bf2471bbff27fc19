"""How ranks are named, and how rows are laid out, in what people read of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def named(ranks: Sequence[int]) -> str:
    """rank 2; ranks 0, 2 and 3; ranks 0..7."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 4 and tuple(ranks) == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}..{ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}" if ranks else "no rank"


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """A line a row, its cells under one another, two blanks between them and none at the end."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
