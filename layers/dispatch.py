"""Which pairs (token, expert) stay on this rank, which leave for the rank that holds their expert, and which come for its own.

T tokens   D model width   A experts active for a token   X experts, x of them this rank's   R ranks that share them
N pairs of this rank's tokens, T A   P of them leave   Q pairs come from others   a pair's number: token * A + which of its A
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from parallel.shard import Cut


class Moved(NamedTuple):
    """How many pairs left this rank, and how many came: what closed forms are told, as only the choice knows it."""

    left: int
    came: int


class Dispatch(NamedTuple):
    """`pairs` (N,): the pairs' numbers, by expert. `places` (Q,): the rows that came, by expert; they came by rank. `sent`,
    `received`: how many rows go to each rank, and come from each; back it is the other way round.

    `here`: this rank's experts that have rows, each with its ranges of `pairs` and of `places`. `away`: other experts that have
    pairs, each with its ranges of `pairs` and of the rows that leave.
    """

    pairs: np.ndarray
    places: np.ndarray
    sent: tuple[int, ...]
    received: tuple[int, ...]
    here: tuple[tuple[int, slice, slice], ...]
    away: tuple[tuple[slice, slice], ...]

    @property
    def leaving_P(self) -> np.ndarray:
        """The numbers of the pairs that leave, by expert, and so by rank."""
        return np.concatenate([self.pairs[at] for at, _ in self.away]) if self.away else self.pairs[:0]

    @property
    def moved(self) -> Moved:
        return Moved(sum(self.sent), len(self.places))

    def served(self, experts: int) -> tuple[int, ...]:
        """How many rows each of this rank's `experts` has: own pairs, and those that came."""
        rows = {e: sum(at.stop - at.start for at in of) for e, *of in self.here}
        return tuple(rows.get(e, 0) for e in range(experts))

    def experts(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Each expert of this rank that has rows, counted from its first: its own pairs, and the places of rows that came."""
        return ((e, self.pairs[pairs], self.places[places]) for e, pairs, places in self.here)

    def returned(self) -> Iterator[tuple[np.ndarray, slice]]:
        """Of each other expert the pairs, no token twice, and where their rows are among those that left and are back."""
        return ((self.pairs[at], rows) for at, rows in self.away)


def by_expert(c_TA: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs (N,) by expert, each expert's ascending; and how many each of the `count` experts has (X,)."""
    return np.argsort(c_TA, axis=None, kind="stable"), np.bincount(c_TA.reshape(-1), minlength=count)


def dispatched(pairs_N: np.ndarray, n_X: np.ndarray, n_Rx: np.ndarray, cut: Cut, rank: int) -> Dispatch:
    """Pairs by expert, and how many each expert has, on this rank (X,) and on every rank of those that are this one's (R, x).
    `cut`: of X over the ranks."""
    ends, busy, (first, last) = [0, *accumulate(n_X.tolist())], np.flatnonzero(n_X).tolist(), cut.bounds[rank]
    sent = [ends[stop] - ends[start] for start, stop in cut.bounds]
    stay, sent[rank] = sent[rank], 0
    if len(pairs_N) == stay == n_Rx.sum():
        # A token alone, with all experts here, has no time for what follows.
        here = tuple((e - first, slice(ends[e], ends[e + 1]), slice(0, 0)) for e in busy)
        return Dispatch(pairs_N, pairs_N[:0], tuple(sent), (0,) * cut.ranks, here, ())
    came_Rx = n_Rx.copy()
    came_Rx[rank] = 0
    expert_Q = np.repeat(np.tile(np.arange(last - first), cut.ranks), came_Rx.reshape(-1))
    came = [0, *accumulate(came_Rx.sum(axis=0).tolist())]
    here = [(e, slice(ends[first + e], ends[first + e + 1]), slice(came[e], came[e + 1])) for e in range(last - first)]
    away = [(ends[e], ends[e + 1], stay if e >= last else 0) for e in busy if not first <= e < last]
    return Dispatch(
        pairs_N,
        np.argsort(expert_Q, kind="stable"),
        tuple(sent),
        tuple(came_Rx.sum(axis=1).tolist()),
        tuple(of for of in here if any(at.start < at.stop for at in of[1:])),
        tuple((slice(start, stop), slice(start - by, stop - by)) for start, stop, by in away),
    )


def beside(x_TD: np.ndarray, g_TA: np.ndarray, pairs_P: np.ndarray) -> np.ndarray:
    """[x | g] (P, D + 1): of each pair its token's row, and what the expert weighs there."""
    D = x_TD.shape[1]
    xg_Pn = np.empty((len(pairs_P), D + 1), x_TD.dtype)
    if not len(pairs_P):
        return xg_Pn
    xg_Pn[:, :D] = x_TD[pairs_P // g_TA.shape[1]]
    xg_Pn[:, D] = g_TA.reshape(-1)[pairs_P]
    return xg_Pn


def joined(own: np.ndarray, came: np.ndarray, places: np.ndarray) -> np.ndarray:
    """An expert's rows: of this rank's tokens first, then those at these places of what came."""
    return np.concatenate([own, came[places]]) if len(places) else own
