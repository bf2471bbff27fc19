"""The shards as boxes: how a parameter that is cut lies in rows and columns, which ranks hold which, and this in characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import NamedTuple

# Pieces of a dim that are drawn in characters; of more, the first, the last and those about this rank's.
MOST = 8
GAP = "   "


class Piece(NamedTuple):
    """What lies between two places where some rank's part starts or stops: where, of how many, and the ranks that hold it."""

    start: int
    stop: int
    ranks: frozenset[int]


@dataclass(frozen=True)
class Box:
    """Parameters of one shape that are cut alike. Dims before `split` lie along the rows, the others along the columns; `rows`
    and `columns` are the pieces of the one that is cut on that side, or one piece."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    split: int
    rows: tuple[Piece, ...]
    columns: tuple[Piece, ...]

    @property
    def title(self) -> str:
        names = ", ".join(self.names) if len(self.names) < 4 else f"{self.names[0]} and {len(self.names) - 1} like it"
        return f"{names}  {' x '.join(map(str, self.shape))}"


def cut(view: dict) -> list[Box]:
    """A box for each kind of parameter of which some rank holds a part."""
    found: dict[tuple, list[str]] = {}
    for h in view["holds"]:
        if not _is_whole(h):
            bounds = tuple(tuple(tuple(dim) for dim in held) for held in h["bounds"])
            found.setdefault((tuple(h["whole"]), bounds), []).append(h["name"])
    return [_box(tuple(names), shape, bounds) for (shape, bounds), names in found.items()]


def whole(view: dict) -> list[str]:
    """The parameters that every rank holds all of."""
    return [h["name"] for h in view["holds"] if _is_whole(h)]


def _is_whole(h: dict) -> bool:
    return all(start == 0 and stop == n for held in h["bounds"] for (start, stop), n in zip(held, h["whole"], strict=True))


def _box(names: tuple[str, ...], shape: tuple[int, ...], bounds: tuple) -> Box:
    """The first dim, where it is cut, leads the rows; else what is cut first leads the columns: each part is in one piece."""
    dims = [d for d, n in enumerate(shape) if any(held[d] != (0, n) for held in bounds)]
    split = 0 if len(shape) == 1 else dims[0] or len(shape) - 1
    sides = ([d for d in dims if d < split], [d for d in dims if d >= split])
    return Box(names, shape, split, *(_pieces(bounds, side[0] if side else None) for side in sides))


def _pieces(bounds: tuple, dim: int | None) -> tuple[Piece, ...]:
    if dim is None:
        return (Piece(0, 1, frozenset(range(len(bounds)))),)
    ends = sorted({end for held in bounds for end in held[dim]})
    of = lambda a, b: frozenset(r for r, held in enumerate(bounds) if held[dim][0] <= a and b <= held[dim][1])  # noqa: E731
    return tuple(Piece(a, b, of(a, b)) for a, b in pairwise(ends))


def named(ranks: frozenset[int]) -> str:
    """0; 0,1; 2-7."""
    low, high = min(ranks), max(ranks)
    following = len(ranks) > 2 and len(ranks) == high - low + 1
    return f"{low}-{high}" if following else ",".join(map(str, sorted(ranks)))


def drawn(view: dict, width: int) -> Iterator[str]:
    """Pictures of the parameters that are cut, beside one another as the width allows, in which # is what this rank holds."""
    row: list[list[str]] = []
    for box in cut(view):
        picture = _drawn(box, view["rank"])
        if row and sum(len(p[0]) + len(GAP) for p in row) + len(picture[0]) > width:
            yield from _beside(row)
            row = []
        row.append(picture)
    yield from _beside(row)


def _beside(pictures: Sequence[list[str]]) -> Iterator[str]:
    for parts in zip_longest(*pictures):
        filled = (" " * len(p[0]) if part is None else part for part, p in zip(parts, pictures, strict=True))
        yield GAP.join(filled).rstrip()


def _drawn(box: Box, rank: int) -> list[str]:
    """Lines of one width."""
    rows, columns = (_near(pieces, rank) for pieces in (box.rows, box.columns))
    held = lambda r, c: "..." if r is None or c is None else named(r.ranks & c.ranks)  # noqa: E731
    wide = max(len(held(r, c)) for r in rows for c in columns) + 2
    wide = max(wide, 5 if len(columns) > 1 else 11)
    edge = "+" + "+".join("-" * wide for _ in columns) + "+"
    lines = [edge]
    for r in rows:
        cells, beside = [], []
        for c in columns:
            mine = r is not None and c is not None and rank in r.ranks & c.ranks
            fill = "#" if mine else " "
            cells.append(f" {held(r, c)} ".center(wide, fill))
            beside.append(fill * wide)
        above = [] if len(rows) > 1 or len(box.shape) == 1 else ["|" + "|".join(beside) + "|"]
        lines += [*above, "|" + "|".join(cells) + "|", *above, edge]
    across = max(map(len, [box.title, *lines]))
    return [line.ljust(across) for line in [box.title, *lines]]


def _near(pieces: Sequence[Piece], rank: int) -> list[Piece | None]:
    """All of a few pieces; of many the first, the last, and those about this rank's, None where some are left out."""
    if len(pieces) <= MOST:
        return list(pieces)
    mine = [n for n, p in enumerate(pieces) if rank in p.ranks]
    kept = sorted({0, len(pieces) - 1, *range(max(0, mine[0] - 1), min(len(pieces), mine[0] + 3))})
    shown: list[Piece | None] = []
    for before, n in zip([-1, *kept], kept, strict=False):
        shown += [None] if n > before + 1 else []
        shown.append(pieces[n])
    return shown
