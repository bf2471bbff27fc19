"""The ledger: everything that crosses a process, counted where it is sent.

A row is (verb, axis, phase). *Message bytes* are those of the buffer reduced or exchanged, or of the whole array gathered; of
rows that go where each is for (`exchange`), those that leave the rank. *Wire bytes* are what one rank sends, on average, when
the verb runs on a ring of p ranks (Patarasuk and Yuan, 2009). *Crossed bytes* are what a rank sends to other hosts where sums
know of hosts (`parallel.host_sums`). Those of all ranks of a host are together the wire bytes of a ring of hosts. Of what MPI
itself sends there nothing is known, and none are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

from parallel.verbs import VERBS


def wire_bytes(verb: str, message_bytes: int, ranks: int) -> int | float:
    """Bytes that one rank of `ranks` sends for `message_bytes`; a whole number wherever it is one."""
    exact = VERBS[verb].share(ranks) * message_bytes
    return exact.numerator if exact.denominator == 1 else float(exact)


@dataclass(frozen=True)
class Traffic:
    """What a layer says that this rank will send: the closed form that its ledger is held to."""

    verb: str
    axis: str
    phase: str
    message_bytes: int
    calls: int = 1


def message(shape: Iterable[int], dtype_bytes: int) -> int:
    """Bytes of an array of `shape`."""
    return prod(shape) * dtype_bytes


def sums(traffic: Iterable[Traffic]) -> dict[tuple[str, str, str], tuple[int, int]]:
    """Calls and bytes by (verb, axis, phase)."""
    sent: dict[tuple[str, str, str], tuple[int, int]] = {}
    for t in traffic:
        calls, size = sent.get(key := (t.verb, t.axis, t.phase), (0, 0))
        sent[key] = calls + t.calls, size + t.calls * t.message_bytes
    return sent


def condensed(traffic: Iterable[Traffic]) -> list[Traffic]:
    """The same calls and bytes in at most two entries for each verb, axis and phase: one has all bytes."""
    both = ((Traffic(*key, size), Traffic(*key, 0, calls - 1)) for key, (calls, size) in sums(traffic).items())
    return [t for pair in both for t in pair if t.calls]


@dataclass
class Row:
    """`ranks`: of the axis. `seconds`: that the rank spent in the verb. `hidden_seconds`: that one went on beside computation,
    for those that can. `crossed_bytes`: that this rank sent to other hosts, in sums that know them."""

    ranks: int = 1
    calls: int = 0
    message_bytes: int = 0
    seconds: float = 0.0
    hidden_seconds: float = 0.0
    crossed_bytes: int = 0


class Ledger:
    """Rows by (verb, axis, phase). The phase, `now`, is that of the innermost `with ledger.phase(...)`."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.now = "none"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer, self.now = self.now, name
        try:
            yield
        finally:
            self.now = outer

    def add(self, verb: str, axis: str, message_bytes: int, ranks: int, seconds: float) -> Row:
        """Enter one call; returns its row, for what becomes known later."""
        key = verb, axis, self.now
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = Row(ranks)
        row.calls += 1
        row.message_bytes += message_bytes
        row.seconds += seconds
        return row

    def report(self, predicted: Iterable[Traffic]) -> list[dict]:
        """Counted beside predicted, a dict a row. A row on one side only appears with zeros on the other."""
        sent = sums(predicted)
        keys = list(dict.fromkeys([*sent, *self.rows]))
        return [
            {
                "verb": key[0],
                "axis": key[1],
                "phase": key[2],
                "calls": row.calls,
                "predicted_calls": calls,
                "message_bytes": row.message_bytes,
                "predicted_message_bytes": size,
                "wire_bytes": wire_bytes(key[0], row.message_bytes, row.ranks),
                "seconds": row.seconds,
                "hidden_seconds": row.hidden_seconds,
                "crossed_bytes": row.crossed_bytes,
            }
            for key in keys
            for row, (calls, size) in [(self.rows.get(key, Row()), sent.get(key, (0, 0)))]
        ]


def merged(reports: Sequence[list[dict]]) -> list[dict]:
    """One report of every rank's own, each of which was counted beside its own closed form.

    A row is that of the ranks that have it, its seconds the longest, its crossed bytes those of all together. Where these sent
    different amounts, it is that of a rank that sent most, with `message_bytes_sum` and `message_bytes_range` over them. Where
    a rank did not send what was predicted, the row is its own and names it as `rank`.
    """
    rows: dict[tuple[str, str, str], list[tuple[int, dict]]] = {}
    for rank, report in enumerate(reports):
        for r in report:
            rows.setdefault((r["verb"], r["axis"], r["phase"]), []).append((rank, r))
    found = []
    for of_ranks in rows.values():
        every = [r for _, r in of_ranks]
        wrong = [r | {"rank": rank} for rank, r in of_ranks if not agrees([r])]
        row = dict((wrong or sorted(every, key=lambda r: -r["message_bytes"]))[0])
        row |= {kind: max(r[kind] for r in every) for kind in ("seconds", "hidden_seconds")}
        row["crossed_bytes"] = sum(r["crossed_bytes"] for r in every)
        size = [r["message_bytes"] for r in every]
        if len({(r["calls"], r["message_bytes"]) for r in every}) > 1:
            row |= {"message_bytes_sum": sum(size), "message_bytes_range": [min(size), max(size)]}
        found.append(row)
    return found


def agrees(report: Iterable[dict]) -> bool:
    """Whether every row was sent exactly as predicted: calls and bytes."""
    return all(r["calls"] == r["predicted_calls"] and r["message_bytes"] == r["predicted_message_bytes"] for r in report)
