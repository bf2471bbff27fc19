"""Who has which tokens: pieces of sequences, for context parallelism.

    zigzag([10], 2)       # rank 0: 0..3 and 8..10, rank 1: 3..6 and 6..8, so that both compare as many queries and keys

Any lengths will do: a piece may be short or missing, and a rank may have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from parallel.rows import cut_rows
from parallel.shard import Cut

# Where queries are among a rank's rows, and the keys that they see.
Span = tuple[slice, slice]


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a sequence."""

    sequence: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Pieces = tuple[Piece, ...]


def whole(lengths: Sequence[int]) -> Pieces:
    """All of every sequence. Raises ValueError for an empty one."""
    if lengths and min(lengths) < 1:
        raise ValueError(f"sequence {list(lengths).index(min(lengths))} has {min(lengths)} tokens: use 1 or more")
    return tuple(Piece(s, 0, n) for s, n in enumerate(lengths))


def contiguous(lengths: Sequence[int], ranks: int) -> tuple[Pieces, ...]:
    """The sequences one after another, cut once over the ranks. Early tokens see few keys: the last rank has most work."""
    starts = [*accumulate(lengths, initial=0)]
    return tuple(
        _joined(Piece(s, max(a, first) - first, min(e, last) - first) for s, (first, last) in enumerate(pairwise(starts)))
        for a, e in cut_rows(sum(lengths), ranks).bounds
    )


def zigzag(lengths: Sequence[int], ranks: int) -> tuple[Pieces, ...]:
    """Each sequence in 2p chunks, the i-th and the i-th last on one rank (Llama 3, arXiv 2407.21783, section 3.3.2): as much
    work on every rank. The sequences begin at different ranks, so that what does not divide falls to each in turn."""
    held: list[list[Piece]] = [[] for _ in range(ranks)]
    for s, (before, end) in enumerate(pairwise(accumulate(lengths, initial=0))):
        chunks = cut_rows(end - before, 2 * ranks).bounds
        for i in range(ranks):
            held[(i + before) % ranks] += [Piece(s, *chunks[i]), Piece(s, *chunks[-1 - i])]
    return tuple(map(_joined, held))


LAYOUTS: dict[str, Callable[[Sequence[int], int], tuple[Pieces, ...]]] = {"zigzag": zigzag, "contiguous": contiguous}


def _joined(pieces: Iterable[Piece]) -> Pieces:
    """Without empty ones, and neighbours as one."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].sequence == piece.sequence and joined[-1].stop == piece.start:
            piece = Piece(piece.sequence, joined.pop().start, piece.stop)
        if piece.start < piece.stop:
            joined.append(piece)
    return tuple(joined)


def count(pieces: Pieces) -> int:
    """How many tokens they are."""
    return sum(map(len, pieces))


def cut(every: Sequence[Pieces]) -> Cut:
    """Of all tokens, in the order of the ranks: which each has."""
    return Cut(sum(map(count, every)), tuple(pairwise(accumulate(map(count, every), initial=0))))


def positions(pieces: Pieces) -> np.ndarray:
    """Each token's place in its sequence."""
    return np.concatenate([np.arange(p.start, p.stop) for p in pieces] or [np.arange(0)])


def places(lengths: Sequence[int], pieces: Pieces) -> np.ndarray:
    """Where the tokens are among all, sequences one after another."""
    starts = [*accumulate(lengths, initial=0)]
    return np.concatenate(
        [np.arange(starts[p.sequence] + p.start, starts[p.sequence] + p.stop) for p in pieces] or [np.arange(0)]
    )


def _rows(pieces: Pieces) -> list[tuple[Piece, int]]:
    """Each with the row where it begins."""
    return [*zip(pieces, accumulate(map(len, pieces), initial=0), strict=False)]


def own_spans(mine: Pieces, causal: bool) -> list[Span]:
    """What a rank's queries see of its own keys. Where causal, a span's queries are the last of its keys."""
    rows, spans = _rows(mine), []
    for piece, at in rows:
        alike = [(other, row) for other, row in rows if other.sequence == piece.sequence]
        last = at + len(piece) if causal else alike[-1][1] + len(alike[-1][0])
        spans.append((slice(at, at + len(piece)), slice(alike[0][1], last)))
    return spans


def seen_spans(mine: Pieces, theirs: Pieces, causal: bool) -> list[Span]:
    """What a rank's queries see of another's keys: all of those, of a sequence, that are before them. None is seen in part."""
    spans = []
    for piece, at in _rows(mine):
        seen = [(p, row) for p, row in _rows(theirs) if p.sequence == piece.sequence and (not causal or p.stop <= piece.start)]
        if seen:
            spans.append((slice(at, at + len(piece)), slice(seen[0][1], seen[-1][1] + len(seen[-1][0]))))
    return spans


def pairs(spans: Iterable[Span], causal: bool, window: int = 0) -> int:
    """How many (query, key) pairs they are; `causal`: a span's queries are the last of its keys, of which each sees at most a
    `window` (0: all before it)."""
    sizes = [(q.stop - q.start, k.stop - k.start) for q, k in spans]
    if causal and window:
        return sum(min(n, window) for q, k in sizes for n in range(k - q + 1, k + 1))
    return sum(q * k - (q * (q - 1) // 2 if causal else 0) for q, k in sizes)


def all_spans(lengths: Sequence[int], mine: Pieces, causal: bool) -> list[Span]:
    """What a rank's queries see of all keys, sequences of `lengths` one after another."""
    starts, spans, row = [*accumulate(lengths, initial=0)], [], 0
    for s, start, stop in mine:
        last = stop if causal else lengths[s]
        spans.append((slice(row, row + stop - start), slice(starts[s], starts[s] + last)))
        row += stop - start
    return spans
