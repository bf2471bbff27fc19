"""When a rank waits too long, or another is gone: what every rank of this host is doing instead, from the flight recorder.

The watchdog is a thread on every rank. Only a verb in flight counts: a rank that computes for an hour raises no alarm unless
another waits for it.
"""

from __future__ import annotations

import os
import re
import select
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from time import perf_counter, sleep

from launch.process import words
from parallel.call import path_in_project
from parallel.recorder import Recorder
from parallel.slot import ENDED, HOST_GONE, LEFT_MAIN, RecordedCall, Slot
from parallel.text import aligned, named
from parallel.verbs import VERBS

TICK = 0.1
# For how long nothing may have moved before ranks that wait for one another in a circle are called deadlocked.
STILL = 0.8
# How long ranks may take to say that they are able to report, and to write their stack.
ANSWER = 0.25
# How often a rank that seems to be asleep is looked at.
LOOKS = 5
# For how long a watchdog must have been silent.
HELD = 2.0
# For how long the ranks of a host may be the ones to report a death there, before those of others do; and how long another
# host may be silent before it is said to be.
THEIRS, SILENT = 0.3, 1.0
STOPPED = "stopped (SIGSTOP)"


class Watchdog:
    """Ends all ranks through `end(report)`, which is called on one of them. It does so when this rank has waited for
    `limit` seconds, or another has been stopped for as long; sooner when ranks wait for one another in a circle (neither while
    the limit is 0); at once when another rank of this host is gone and has not said why. faulthandler must be set to write the
    stack of a rank that gets `stack_signal` to `recorder.stack`."""

    def __init__(self, recorder: Recorder, stack_signal: int, end: Callable[[str], None]) -> None:
        self.recorder, self.stack_signal, self.end = recorder, stack_signal, end
        self.limit = 0.0
        self._waited, self._verb = 0.0, -1
        self._stopped, self._still = [0.0] * recorder.size, 0.0
        self._seen: list[tuple] = []
        # When this rank heard that one of another host is gone.
        self._heard_gone: dict[int, float] = {}
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        poll, of = _processes(self.recorder)
        before = looked = perf_counter()
        while not self._over.is_set():
            for handle, _ in poll.poll(1000 * TICK):
                poll.unregister(handle)
                self._gone(of[handle])
            self.recorder.beat(0)
            now = perf_counter()
            for rank in self.recorder.gone_elsewhere():
                if now - self._heard_gone.setdefault(rank, now) >= THEIRS:
                    self._gone(rank)
            # Seconds in which this process was stopped itself, as by Ctrl-Z, are nobody's fault.
            alarm = self._waits_too_long(min(now - before, 5 * TICK))
            before = now
            if now - looked > (2 * TICK if self._waited > 4 * TICK else 10 * TICK):
                alarm = self._others_stand_still(min(now - looked, 11 * TICK)) or alarm
                looked = now
            if alarm:
                self.recorder.raise_alarm()
            if self.recorder.alarm:
                self._report()

    def _waits_too_long(self, passed: float) -> bool:
        waiting = self.recorder.slot(self.recorder.rank).waiting
        if waiting is None or waiting.which != self._verb:
            self._waited, self._verb = 0.0, -1 if waiting is None else waiting.which
            return False
        self._waited += passed
        return bool(self.limit and self._waited > self.limit and not waiting.patient)

    def _others_stand_still(self, passed: float) -> bool:
        slots = [self.recorder.slot(r) for r in range(self.recorder.size)]
        for slot in slots:
            stopped = slot.pid and slot.rank != self.recorder.rank and _state(slot).letter in "tT"
            self._stopped[slot.rank] = self._stopped[slot.rank] + passed if stopped else 0.0
        seen = [(s.waiting, s.since) for s in slots]
        cut_off = any(slot.silent > SILENT for slot in slots)
        self._still = self._still + passed if seen == self._seen and not cut_off and in_a_circle(slots) else 0.0
        self._seen = seen
        return bool(self.limit) and (max(self._stopped) > self.limit or self._still > STILL)

    def _gone(self, rank: int) -> None:
        state = _state(self.recorder.slot(rank))
        if state.ended or not self.recorder.claim():
            return
        slot, stack = state.slot, _indented(self.recorder.stack_of(rank))
        who = f"rank {rank} of {self.recorder.size}{on(slot.host)} {state.how}"
        if slot.letter and slot.code == HOST_GONE:
            there = [r for r, host in enumerate(self.recorder.hosts) if host == slot.host]
            who = f"{slot.host} is gone, with {named(there)}: rank {rank}"
        self.end(f"{who}{_after(slot)}{stack}")

    def _report(self) -> None:
        """The lowest rank that is able to reports: a stopped one is not able, nor one whose interpreter a library holds."""
        # As it is now: a rank that comes late may come while the others answer.
        states = seen(self.recorder)
        self.recorder.beat(1)
        sleep(ANSWER)
        able = [r for r in range(self.recorder.size) if self.recorder.slot(r).ready]
        if able[0] == self.recorder.rank and self.recorder.claim():
            # Where there are several hosts, couriers do.
            if not self.recorder.hosts[0]:
                self.recorder.signal(self.stack_signal)
            sleep(ANSWER)
            states = states if not self.recorder.hosts[0] else seen(self.recorder)
            self.end(report(states, [self.recorder.stack_of(r) for r in range(self.recorder.size)]))
        # The one that reports ends all ranks.
        if not self._over.wait(10):
            self.end("the rank that was to report this hang is itself stuck")


def _processes(recorder: Recorder) -> tuple[select.poll, dict[int, int]]:
    """A poll that reports at once when the process of another rank is gone (Linux), and whose each of its handles is."""
    poll, of = select.poll(), {}
    for rank in range(recorder.size):
        pid = recorder.slot(rank).pid
        if rank != recorder.rank and pid:
            with suppress(OSError, AttributeError):
                handle = os.pidfd_open(pid)
                poll.register(handle, select.POLLIN)
                of[handle] = rank
    return poll, of


class State:
    """How a rank's process is, in words. `ended`: it has said why itself, or need not."""

    def __init__(self, slot: Slot, letter: str, code: int) -> None:
        self.slot, self.letter = slot, letter
        self.read = perf_counter()
        self.gone = letter in "Z?"
        number = code & 0x7F
        self.ended = slot.doing == ENDED or number in (signal.SIGINT, signal.SIGTERM)
        self.how = "is gone" if letter == "?" else words.how(-number or code >> 8)


def on(host: str) -> str:
    return f" on {host}" if host else ""


def _named(ranks: Sequence[int], slots: Sequence[Slot]) -> str:
    """Ranks and their hosts: ranks 0 and 1 on h1, rank 2 on h2."""
    hosts = list(dict.fromkeys(slots[r].host for r in ranks)) or [""]
    return ", ".join(f"{named([r for r in ranks if slots[r].host == host])}{on(host)}" for host in hosts if ranks) or named([])


def _state(slot: Slot) -> State:
    if slot.letter:
        return State(slot, slot.letter, slot.code)
    try:
        with open(f"/proc/{slot.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return State(slot, fields[0], int(fields[-1]))
    except (OSError, ValueError):
        pass
    with suppress(OSError):
        if slot.pid:
            os.kill(slot.pid, 0)
        # Not Linux, or another host: it is there, and no more is known.
        return State(slot, "S", 0)
    return State(slot, "?", 0)


def at_operation(slot: Slot) -> str:
    return f" at operation {slot.operation}" if slot.operation else ""


def _after(slot: Slot) -> str:
    if slot.waiting is not None:
        return f"{at_operation(slot)} in {slot.waiting}"
    return at_operation(slot) + (f" after {slot.last}" if slot.last else " before any verb")


def _indented(stack: str) -> str:
    return "".join(f"\n  {line}" for line in stack.splitlines() if line.strip())


# --- the report of a hang


def seen(recorder: Recorder) -> list[State]:
    """Every rank as it is now. One that computes may be waiting for its interpreter or a core just then: so it is looked at
    several times."""
    slots = [recorder.slot(r) for r in range(recorder.size)]
    # A host has one silence, whenever its ranks were last written of.
    silent = {slot.host: slot.silent for slot in slots}
    states = [_state(replace(slot, silent=silent[slot.host])) for slot in slots]
    for _ in range(LOOKS):
        sleep(0.01)
        for state in states:
            if state.letter == "S" and _state(state.slot).letter == "R":
                state.letter = "R"
    return states


def report(states: Sequence[State], stacks: Sequence[str]) -> str:
    """Who did not come, what every rank is doing, and every rank's stack, as faulthandler wrote it."""
    ours = [_ours(stack) for stack in stacks]
    text = [table(states, ours)]
    for stack in dict.fromkeys(map(tuple, filter(None, ours))):
        ranks = [r for r, other in enumerate(ours) if tuple(other) == stack]
        text += ["", f"Python stack of {named(ranks)}, innermost first:", *stack]
    return "\n".join(text)


def table(states: Sequence[State], stacks: Sequence[list[str]]) -> str:
    """Who did not come, and what every rank is doing."""
    now, slots = states[0].read, [state.slot for state in states]
    doing = [_doing(state, stack) for state, stack in zip(states, stacks, strict=True)]
    rows = [("rank", "is", "for", "where")]
    for slot, (what, where) in zip(slots, doing, strict=True):
        where = f"operation {slot.operation}: {where}" if slot.operation else where
        known = slot.pid or slot.letter
        rows.append((f"{slot.rank}{on(slot.host)}", what, f"{now - slot.since:.1f} s" if known else "", where))
    return "\n".join([headline(slots, doing, now), "", *aligned(rows)])


def in_a_circle(slots: list[Slot]) -> bool:
    """Whether some ranks wait for one another, each somewhere else, so that none can ever go on."""
    missing = {s.rank: set(_missing(s, slots)) for s in slots if s.waiting is not None}
    stuck = set(missing)
    # A rank may yet go on if those that it waits for are not stuck themselves.
    while (left := {r for r in stuck if missing[r] & stuck}) != stuck:
        stuck = left
    return bool(stuck)


def headline(slots: list[Slot], doing: list[tuple[str, str]], now: float) -> str:
    waits = [s for s in slots if s.waiting is not None and s.silent <= SILENT]
    missing = {s.rank: _missing(s, slots) for s in waits}
    # Those that hold up the others are in no verb; where there are none, ranks wait for one another.
    absent = lambda s: s.doing == LEFT_MAIN or s.silent > SILENT or doing[s.rank][0] == STOPPED  # noqa: E731
    passive = {s.rank for s in slots if s.waiting is None or absent(s)}
    idle = sorted({r for s in waits for r in missing[s.rank] if r in passive})
    together = lambda s: [t.rank for t in waits if _key(t.waiting) == _key(s.waiting) and t.doing == s.doing]  # noqa: E731
    held_up = [s for s in waits if set(missing[s.rank]) & set(idle or missing[s.rank])]
    if not held_up:
        stopped = [r for r, (what, _) in enumerate(doing) if what == STOPPED]
        if not stopped:
            return "no rank waits for another"
        return f"{_named(stopped, slots)} {'is' if len(stopped) == 1 else 'are'} stopped"
    # Seen from the side of the most ranks, and from a verb rather than from another wait.
    late = min(held_up, key=lambda s: (not s.waiting.axis, -len(together(s)), s.since))
    there = idle or missing[late.rank]
    how = "; ".join(dict.fromkeys(doing[r][0] + at_operation(slots[r]) for r in idle)) if idle else "waiting elsewhere"
    others = [r for r in together(late) if r not in there]
    have = "has" if len(others) == 1 else "have"
    waited = f"{_named(others, slots)} {have} waited {now - late.since:.1f} s in {late.waiting}"
    text = f"{_named(there, slots)} did not come ({how}): {waited}"
    return text if idle else text + "".join(f"; rank {r} waits in {slots[r].waiting}" for r in there)


def _key(verb: RecordedCall) -> tuple:
    """What the ranks that take part in one call of a verb have in common."""
    return verb.axis, verb.verb, verb.ranks, verb.number


def _partner(verb: RecordedCall) -> str:
    """What the other rank of a verb between two calls."""
    return VERBS[verb.verb].partner if verb.verb in VERBS else ""


def _missing(slot: Slot, slots: list[Slot]) -> list[int]:
    """The ranks that this one waits for and that have not come."""
    return [r for r in slot.waiting.ranks if r != slot.rank and (slots[r].silent > SILENT or not _came(slots[r], slot))]


def _came(other: Slot, slot: Slot) -> bool:
    """Whether `other` has entered the verb that `slot` waits in, now or before."""
    verb = slot.waiting
    if partner := _partner(verb):
        # A send that was started and left has come.
        return other.begun(partner, verb.axis, slot.rank) > verb.number
    row = [v for v in other.verbs if (v.axis, v.ranks) == (verb.axis, verb.ranks) and not _partner(v)]
    # A rank that is through with main waits for the others' end: that is another exchange, even with the same number.
    apart = not verb.axis and other.doing != slot.doing
    if not row:
        # So long ago that its slot has forgotten the call, or not yet.
        return other.entered(verb.axis, verb.ranks) > verb.number + apart
    if apart:
        return any(v.number > verb.number for v in row)
    return any(v.number > verb.number or _key(v) == _key(verb) for v in row)


def _doing(state: State, stack: list[str]) -> tuple[str, str]:
    """What a rank is doing, and where."""
    slot = state.slot
    place = next((line.strip() for line in stack), "")
    last = f"last: {slot.last}" if slot.last else "before any verb"
    if not slot.pid and not slot.letter:
        return "on another host", ""
    if slot.silent > SILENT:
        return f"{slot.host} has not been heard of for {slot.silent:.1f} s", ""
    if state.gone:
        return f"gone: {state.how}", last
    if state.letter in "tT":
        return STOPPED, str(slot.waiting) if slot.waiting else last
    if slot.doing == LEFT_MAIN:
        return "through with main", last
    if slot.doing == ENDED:
        return "at its end", last
    if slot.waiting is not None:
        return "waiting", str(slot.waiting)
    what = "computing" if state.letter == "R" else "asleep or reading" if state.letter in "SD" else state.letter
    # Its watchdog could not run: a library computes, or waits, without letting other threads go on.
    held = "; its interpreter is held by a library" if state.read - slot.beat > HELD + slot.silent else ""
    return what, f"at {place}{held}; {last}" if place else f"{last}{held}"


_FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)')
_MACHINERY = re.compile(
    r"runpy|/launch/start|/parallel/(axis|pending|message|owned|mesh|guard|ordered|control|host_sums|window|sums)\.py|_pytest|pluggy"
)


def _ours(stack: str) -> list[str]:
    """A faulthandler stack as file:line in function, without the frames of what started the command and of what waits."""
    frames = []
    for line in stack.splitlines():
        frame = _FRAME.search(line)
        if frame and not _MACHINERY.search(frame[1]):
            frames.append(f"  {path_in_project(frame[1])}:{frame[2]} in {frame[3]}")
    return frames
