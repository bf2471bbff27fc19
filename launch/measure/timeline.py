"""A trace read back: what each rank did at each moment, who kept whom waiting, and what each verb cost.

Times are in seconds, on rank 0's clock from the first event. At each moment a rank is in one state: computing (and in which
phase), waiting for others in a verb, transferring in one, in a control message, or outside of everything that the trace sees.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

from parallel.json_text import parsed
from parallel.watch.trace_file import FORMAT

WAITING, TRANSFERRING, CONTROL, OUTSIDE = "waiting", "transferring", "control", "outside"
# Phases that have a name of their own in strips and pictures; what else computes is OTHER.
PHASES = ("forward", "backward", "step", "prefill", "decode", "draft")
OTHER = "other"
COMPUTING = (*PHASES, OTHER)
STATES = (*COMPUTING, WAITING, TRANSFERRING, CONTROL, OUTSIDE)
# What is computed outside of a phase, by the kind of span.
_BY_KIND = {"forward": "forward", "apply": "forward", "cached": "forward", "cached_striped": "forward"}
_BY_KIND |= {"backward": "backward", "optimizer": "step"}


class TraceError(ValueError):
    """A file that is no trace of ours; the text says why."""


class Slice(NamedTuple):
    begun: float
    ended: float
    name: str
    kind: str
    args: dict
    link: str | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.begun

    @property
    def wait(self) -> float:
        return self.args["wait_us"] / 1e6

    @property
    def transfer(self) -> float:
        return self.args["transfer_us"] / 1e6


class Segment(NamedTuple):
    begun: float
    ended: float
    state: str


@dataclass
class Rank:
    """`work`: nested slices, an outer one before its inner ones. `started`: verbs that went on beside them."""

    work: list[Slice] = field(default_factory=list)
    started: list[Slice] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    @property
    def verbs(self) -> Iterator[Slice]:
        yield from (s for s in self.work if s.kind == "verb")
        yield from self.started


@dataclass
class Timeline:
    """`about`: the file's otherData. `ranks`: by number. `begun`, `ended`: of what is looked at."""

    about: dict
    ranks: dict[int, Rank]
    begun: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.begun

    def between(self, begun: float, ended: float) -> Timeline:
        """What lies in this time, at least in part."""

        def inside(slices: Iterable[Slice]) -> list[Slice]:
            return [s for s in slices if s.ended > begun and s.begun < ended]

        ranks = {n: Rank(inside(r.work), inside(r.started), r.memory) for n, r in self.ranks.items()}
        return Timeline(self.about, ranks, max(begun, self.begun), min(ended, self.ended))


# --- reading


def read(path: Path) -> Timeline:
    """Raises TraceError."""
    try:
        whole = parsed(path.read_text())
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise TraceError(f"{path} is not JSON: use a file that a command wrote with --trace") from None
    about = whole.get("otherData") if isinstance(whole, dict) else None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise TraceError(f"{path} is no {FORMAT!r}: use a file that a command wrote with --trace")
    try:
        ranks = _ranks(whole["traceEvents"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TraceError(f"{path} is damaged: an event is not as it was written ({error!r})") from None
    every = [s for r in ranks.values() for s in (*r.work, *r.started)]
    if not every:
        raise TraceError(f"{path} has no spans: nothing that a trace sees was run")
    return Timeline(about, ranks, min(s.begun for s in every), max(s.ended for s in every))


def _ranks(events: Iterable[dict]) -> dict[int, Rank]:
    ranks: dict[int, Rank] = defaultdict(Rank)
    for e in events:
        rank = ranks[int(e["pid"]) - 1]
        if e["ph"] == "X":
            begun, ended = float(e["ts"]), float(e["ts"]) + float(e["dur"])
            s = Slice(begun / 1e6, ended / 1e6, e["name"], e["cat"], e.get("args", {}), e.get("bind_id"))
            if s.kind in ("verb", "started"):
                # Asked for here, so that a damaged file is found out when it is read.
                s.args["verb"], s.args["axis"], s.args["shape"], s.args["message_bytes"], s.wait, s.transfer
            (rank.started if s.kind == "started" else rank.work).append(s)
        elif e["ph"] == "C" and e["name"] == "memory":
            rank.memory.append(float(e["args"]["bytes"]))
    return dict(sorted(ranks.items()))


# --- what a rank does


def segments(rank: Rank, begun: float, ended: float) -> list[Segment]:
    """The states of one rank one after another, without gaps, from `begun` to `ended`."""
    states: list[Segment] = []
    open_slices: list[tuple[float, str]] = []
    at = begun

    def until(moment: float) -> None:
        nonlocal at
        moment = min(moment, ended)
        if moment > at:
            state = open_slices[-1][1] if open_slices else OUTSIDE
            if states and states[-1].state == state:
                states[-1] = states[-1]._replace(ended=moment)
            else:
                states.append(Segment(at, moment, state))
            at = moment

    def close(moment: float) -> None:
        while open_slices and open_slices[-1][0] <= moment:
            until(open_slices[-1][0])
            open_slices.pop()

    for s in rank.work:
        close(s.begun)
        until(s.begun)
        outer = open_slices[-1][1] if open_slices else None
        open_slices.append((s.ended, _state(s, outer)))
        if s.kind == "exposed":
            # It has no slices in it: first it waits, then it transfers.
            open_slices.append((min(s.begun + s.wait, s.ended), WAITING))
    close(ended)
    until(ended)
    return states


def _state(s: Slice, outer: str | None) -> str:
    if s.kind in ("verb", "exposed"):
        return TRANSFERRING
    if s.kind == "wait":
        return WAITING
    if s.kind == "control":
        return CONTROL
    if s.kind == "phase":
        return s.name if s.name in PHASES else OTHER
    if outer in (None, OTHER):
        return _BY_KIND.get(s.kind, OTHER)
    return outer


def shares(line: Timeline) -> dict[int, dict[str, float]]:
    """Seconds in each state, by rank."""
    seconds = {n: dict.fromkeys(STATES, 0.0) for n in line.ranks}
    for n, rank in line.ranks.items():
        for s in segments(rank, line.begun, line.ended):
            seconds[n][s.state] += s.ended - s.begun
    return seconds


def strip(rank: Rank, begun: float, ended: float, columns: int) -> list[str]:
    """The state that takes the most of each of `columns` equal times."""
    each = (ended - begun) / columns
    time: list[dict[str, float]] = [defaultdict(float) for _ in range(columns)]
    for s in segments(rank, begun, ended):
        first, last = int((s.begun - begun) / each), min(int((s.ended - begun) / each), columns - 1)
        for n in range(min(first, columns - 1), last + 1):
            left = min(s.ended, begun + (n + 1) * each) - max(s.begun, begun + n * each)
            time[n][s.state] += max(0.0, left)
    return [max(t, key=t.__getitem__) if t else OUTSIDE for t in time]


# --- what the ranks do together


def kept_waiting(line: Timeline) -> dict[int, float]:
    """Seconds that the other ranks waited for each, being the last to enter a verb."""
    caused = dict.fromkeys(line.ranks, 0.0)
    together: dict[str, list[tuple[int, Slice]]] = defaultdict(list)
    for n, rank in line.ranks.items():
        for s in rank.verbs:
            if s.link is not None:
                together[s.link].append((n, s))
    for calls in together.values():
        last = max(calls, key=lambda c: c[1].begun)[0]
        caused[last] += sum(s.wait for n, s in calls if n != last)
    return caused


class Cost(NamedTuple):
    """All calls of one verb on arrays of one shape over one axis. `calls`, `message_bytes`: of a rank. `wait`, `transfer`: the
    ranks' mean, in seconds. `bandwidth`: bytes a second that a rank sent while it transferred."""

    verb: str
    axis: str
    shape: tuple[int, ...]
    calls: int
    message_bytes: int
    wait: float
    transfer: float
    bandwidth: float | None

    @property
    def seconds(self) -> float:
        return self.wait + self.transfer


def costs(line: Timeline) -> list[Cost]:
    """The most expensive first. A started verb costs what was waited for it."""
    groups: dict[tuple, list[tuple[int, Slice]]] = defaultdict(list)
    for n, rank in line.ranks.items():
        for s in rank.verbs:
            groups[s.args["verb"], s.args["axis"], tuple(s.args["shape"])].append((n, s))
    dear = []
    for key, calls in groups.items():
        ranks = len({n for n, _ in calls})
        wait, transfer = sum(s.wait for _, s in calls), sum(s.transfer for _, s in calls)
        wire = sum(s.args["wire_bytes"] for _, s in calls)
        many, size = round(len(calls) / ranks), round(sum(s.args["message_bytes"] for _, s in calls) / ranks)
        bandwidth = wire / transfer if transfer > 0 and wire and calls[0][1].kind == "verb" else None
        dear.append(Cost(*key, many, size, wait / ranks, transfer / ranks, bandwidth))
    return sorted(dear, key=lambda c: -c.seconds)


class Overlap(NamedTuple):
    """The verbs that were started, summed over ranks: seconds on their way, and the seconds of these that were waited for."""

    calls: int
    seconds: float
    exposed: float

    @property
    def hidden(self) -> float:
        """The share of their time that passed beside computation."""
        return 1 - self.exposed / self.seconds if self.seconds else 0.0


def overlap(line: Timeline) -> Overlap | None:
    calls = [s for r in line.ranks.values() for s in r.started]
    return Overlap(len(calls), sum(s.seconds for s in calls), sum(s.wait + s.transfer for s in calls)) if calls else None


def steps(line: Timeline) -> dict[str, tuple[int, float]]:
    """By name: how many steps a rank has, of those that have any, and the median of the seconds of all."""
    by_name: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for n, rank in line.ranks.items():
        for s in rank.work:
            if s.kind == "step":
                by_name[s.name].append((n, s.seconds))
    return {k: (round(len(v) / len({n for n, _ in v})), median(s for _, s in v)) for k, v in by_name.items()}


def straggler(caused: dict[int, float], waited: float) -> int | None:
    """The rank that caused more than half of all waiting, and twice what any other did, if there is one."""
    order: Sequence[int] = sorted(caused, key=caused.__getitem__, reverse=True)
    if len(order) < 2 or not waited or caused[order[0]] <= waited / 2 or caused[order[0]] < 2 * caused[order[1]]:
        return None
    return order[0]
