"""The records of all ranks as one file in the JSON format of Chrome's trace viewer, which the Perfetto UI reads too.

A process is a rank. Its first track has what the rank did: phases, layers, verbs, one inside the other; the others have the
verbs that it started and that went on beside it. Times are on rank 0's clock, from the first event, in microseconds.

The ranks of one collective are linked (a flow), and their time in it has two parts: a rank *waits* until the last of them has
entered; the rest is *transfer*. A receive and the send that it waits for are linked too. Differences below the clocks'
uncertainty mean nothing.

Format: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from parallel.atomic import write_atomically
from parallel.ledger import wire_bytes
from parallel.verbs import VERBS
from parallel.watch.trace import Record, TracedCall

FORMAT = "rankwise trace 1"


class _Timed(NamedTuple):
    """A call of a verb on the common clock, in ns. `waited`: as in `TracedCall`."""

    rank: int
    verb: TracedCall
    entered: int
    left: int
    waited: int | None


def document(records: Sequence[Record], run: dict) -> Iterator[str]:
    """The text of the file, in parts. `run`: what else is known of the run, for the file's otherData."""
    origin = min((r.clock.on_first(at) for r in records for at in _moments(r)), default=0.0)
    about = {
        "format": FORMAT,
        **run,
        "ranks": records[0].size,
        "hosts": [r.host for r in records],
        "clocks": [
            {
                "rank": r.rank,
                "offset_us": 1e6 * r.clock.start.offset,
                "drift_us_per_second": 1e6 * r.clock.drift,
                "uncertainty_us": 1e6 * r.clock.uncertainty,
            }
            for r in records
        ],
        "uncertainty_us": 1e6 * max(r.clock.uncertainty for r in records),
        "dropped": [r.dropped for r in records],
        "failed": {str(r.rank): r.failed for r in records if r.failed},
    }
    yield f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(about)}, "traceEvents": [\n'
    lines = (json.dumps(e, separators=(",", ":")) for e in _events(records, origin))
    yield next(lines)
    for line in lines:
        yield ",\n" + line
    yield "\n]}\n"


def write(path: Path, records: Sequence[Record], run: dict) -> None:
    """Write the file; it is there whole or not at all. Raises OSError."""
    with write_atomically(path) as file:
        file.writelines(document(records, run))


def _moments(r: Record) -> Iterator[float]:
    yield from (s.begun for s in r.spans)
    yield from (v.entered for v in r.verbs)
    yield from (at for _, at, _ in r.counters)


def _events(records: Sequence[Record], origin: float) -> Iterator[dict]:
    def ns(r: Record, at: float) -> int:
        return round(1e9 * (r.clock.on_first(at) - origin))

    timed = [
        _Timed(r.rank, v, ns(r, v.entered), ns(r, v.left), None if v.waited is None else ns(r, v.waited))
        for r in records
        for v in r.verbs
    ]
    lanes = _lanes(timed)
    yield from _names(records, timed, lanes)
    # Sorted by when they begin, an outer one before the inner ones.
    events: list[tuple[int, int, dict]] = []

    def add(rank: int, lane: int, begun: int, ended: int, event: dict) -> None:
        whole = {"ph": "X", "pid": rank + 1, "tid": _tid(rank, lane), "ts": begun / 1000, **event}
        if whole["ph"] == "X":
            whole["dur"] = (ended - begun) / 1000
        events.append((begun, begun - ended, whole))

    for r in records:
        for name, kind, begun, ended in r.spans:
            add(r.rank, 0, ns(r, begun), ns(r, ended), {"name": name, "cat": kind})
        for name, at, value in r.counters:
            add(r.rank, 0, ns(r, at), ns(r, at), {"ph": "C", "name": name, "args": {"bytes": value}})
    for link, together in enumerate(_linked(timed)):
        ready = max(t.entered for t in together)
        together.sort(key=lambda t: (t.entered, t.rank))
        for n, t in enumerate(together):
            lane, verb = lanes.get(id(t), 0), f"{t.verb.name} {t.verb.axis}"
            since = t.waited if t.verb.started else t.entered
            wait = 0 if since is None else min(max(ready - since, 0), t.left - since)
            transfer = 0 if since is None else t.left - since - wait
            event = {"name": verb, "cat": "started" if lane else "verb", "args": _args(t, wait, transfer, ready)}
            if len(together) > 1:
                ends = {"flow_in": n > 0, "flow_out": n < len(together) - 1}
                event |= {"bind_id": hex(link + 1), **{end: True for end, is_one in ends.items() if is_one}}
            add(t.rank, lane, t.entered, t.left, event)
            if lane and t.waited is not None:
                args = {"wait_us": wait / 1000, "transfer_us": transfer / 1000}
                add(t.rank, 0, t.waited, t.left, {"name": f"wait for {verb}", "cat": "exposed", "args": args})
            elif wait:
                add(t.rank, 0, t.entered, t.entered + wait, {"name": "wait", "cat": "wait"})
    events.sort(key=lambda e: e[:2])
    yield from (event for *_, event in events)


def _tid(rank: int, lane: int) -> int:
    # Unique among all processes, and never 0, which is the idle thread's.
    return 1000 * (rank + 1) + lane


def _names(records: Sequence[Record], timed: Iterable[_Timed], lanes: dict[int, int]) -> Iterator[dict]:
    used = sorted({(t.rank, lanes[id(t)]) for t in timed if id(t) in lanes})
    for r in records:
        pid = r.rank + 1
        name = {"ph": "M", "pid": pid, "tid": _tid(r.rank, 0)}
        yield {**name, "name": "process_name", "args": {"name": f"rank {r.rank} on {r.host}"}}
        yield {**name, "name": "process_sort_index", "args": {"sort_index": r.rank}}
        yield {**name, "name": "thread_name", "args": {"name": f"rank {r.rank}"}}
    for rank, lane in used:
        name = {"ph": "M", "pid": rank + 1, "tid": _tid(rank, lane), "name": "thread_name"}
        yield {**name, "args": {"name": f"started verbs {lane}"}}


def _lanes(timed: Iterable[_Timed]) -> dict[int, int]:
    """A track, from 1, for each started verb, so that those of one track do not overlap. The key is the identity."""
    ends: dict[int, list[int]] = defaultdict(list)
    lanes = {}
    for t in sorted((t for t in timed if t.verb.started), key=lambda t: t.entered):
        mine = ends[t.rank]
        free = next((n for n, end in enumerate(mine) if end <= t.entered), len(mine))
        mine[free : free + 1] = [t.left]
        lanes[id(t)] = free + 1
    return lanes


def _linked(timed: Iterable[_Timed]) -> Iterator[list[_Timed]]:
    """Verbs that belong together: the calls of one collective, a send and its receive, or one alone."""
    groups: dict[tuple, list[_Timed]] = defaultdict(list)
    for t in timed:
        v = t.verb
        ends: tuple = ()
        if v.peer is not None:
            ends = (t.rank, v.ranks[v.peer]) if "to" in VERBS[v.verb].how else (v.ranks[v.peer], t.rank)
        groups[v.axis, v.ranks, v.mesh, ends, v.number].append(t)
    yield from groups.values()


def _args(t: _Timed, wait: int, transfer: int, ready: int) -> dict:
    v = t.verb
    wire = wire_bytes(v.verb, v.message_bytes, len(v.ranks))
    moved = t.left - max(ready, t.entered)
    args = {
        "verb": v.name,
        "axis": v.axis,
        "ranks": list(v.ranks),
        "number": v.number,
        "shape": list(v.shape),
        "dtype": v.dtype,
        "how": v.how,
        **({"what": v.what} if v.what else {}),
        "phase": v.phase,
        "site": v.site,
        "message_bytes": v.message_bytes,
        "wire_bytes": wire,
        "wire_bytes_per_second": round(1e9 * wire / moved) if moved > 0 else None,
        "wait_us": wait / 1000,
        "transfer_us": transfer / 1000,
    }
    if v.started:
        args["hidden_us"] = (t.left - t.entered - wait - transfer) / 1000
    return args
