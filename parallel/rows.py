"""Rows: the tokens of an activation, whole on every rank of an axis or cut over it (sequence parallelism, arXiv 2205.05198).

A `Cut` of T says which; None, that they are whole. `Axis.gather_rows` and `Axis.sum_rows` are each the other's backward. Here
is what they send.
"""

from __future__ import annotations

import numpy as np

from parallel.ledger import Traffic
from parallel.shard import Cut, as_even_as_it_goes


def cut_rows(tokens: int, ranks: int) -> Cut:
    """As evenly as it goes. Of fewer tokens than ranks, some ranks have none."""
    return as_even_as_it_goes(tokens, ranks)


def gathered(axis: str, rows: Cut | None, phase: str, message_bytes: int) -> list[Traffic]:
    """What `gather_rows` sends. `message_bytes`: of the whole array."""
    return [] if is_whole(rows) else [Traffic("all_gather", axis, phase, message_bytes)]


def summed(axis: str, rows: Cut | None, phase: str, message_bytes: int) -> list[Traffic]:
    """What `sum_rows` sends. `message_bytes`: of the whole array."""
    return [Traffic("all_reduce" if is_whole(rows) else "reduce_scatter", axis, phase, message_bytes)]


def exchanged(axis: str, ranks: int, phase: str, message_bytes: int) -> list[Traffic]:
    """What `exchange` on an axis of so many ranks sends. `message_bytes`: of the rows that leave this one."""
    return [Traffic("exchange", axis, phase, message_bytes)] if ranks > 1 else []


def is_whole(rows: Cut | None) -> bool:
    """Whether every rank has all rows."""
    return rows is None or set(rows.bounds) == {(0, rows.length)}


def own(whole: np.ndarray, rows: Cut | None, rank: int) -> np.ndarray:
    """This rank's rows of an array of all, as a view."""
    return whole if rows is None else rows.take(whole, 0, rank)


def held(tokens: int, rows: Cut | None, rank: int) -> int:
    """How many of the tokens' rows a rank has."""
    return tokens if rows is None else rows.size(rank)
