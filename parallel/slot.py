"""A rank's slot in the flight recorder: how it is laid out, and what can be read in it. Standard library only: processes read
it that are no ranks.

A slot is bytes that its rank writes and that others read, at any time. On a host of several, the slots of ranks of other hosts
are copies, which the host's courier (launch/process/courier.py) writes.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from struct import Struct
from time import perf_counter
from zlib import crc32

from parallel.text import named

# Of a rank's verbs, as many as the last.
KEPT = 16
# What a rank is doing when it is in no verb. ENDED: it has said why, or need not.
RUNNING, LEFT_MAIN, ENDED = 0, 1, 2

# verbs begun; 1 + the one waited in, or 0; since when it waits or computes; what it is doing
NOW = Struct("qqdq")
# process; watchdog's last beat; readiness to report
SELF, SELF_AT = Struct("qdq"), NOW.size
# what it is at, as an operation of a plan
OPERATION, OPERATION_AT = Struct("48s"), SELF_AT + SELF.size
# which verb, its number on the axis, when it was entered, whether it is done once the rank waits for it no more, what it is
TEXT = 240
VERB = Struct(f"qqd?{TEXT}s")
VERB_SIZE = 272
DONE, DONE_AT = Struct("?"), 24
ALARM = Struct("d")
# Of a copy, by the courier: what the process is doing, as /proc has it; its exit code; when its host was last heard of
COPIED, COPIED_AT = Struct("=cid"), OPERATION_AT + OPERATION.size
# The exit code of a rank whose host is gone with all that was there.
HOST_GONE = -1
# How many messages a rank has begun to send or receive, and how many other calls on each axis: rings of verbs forget.
CELL, COUNT, COUNT_AT = Struct("qq"), Struct("q"), 8
CELLS, CELLS_AT = 64, 128
HEAD = CELLS_AT + CELLS * CELL.size
STACK, STACK_AT = 16384, HEAD + KEPT * VERB_SIZE
SLOT = STACK_AT + STACK
# Before the slots: when a rank first raised the alarm, and whether one has claimed to say why the run ends.
FIRST = mmap.PAGESIZE
CLAIMED, FIRST_WORDS = 8, 9


@dataclass(frozen=True)
class RecordedCall:
    """A verb in the recorder. `done`: it has been left. `verb`: its name in VERBS. `what`: the call, as people read it.
    `ranks`: those of its axis; of a verb between two, the other one. A wait that is no verb of a mesh has `axis` "", and as
    `verb` the first word of `what`; `patient`: it may take as long as it likes."""

    which: int
    number: int
    entered: float
    done: bool
    verb: str
    what: str
    axis: str
    ranks: tuple[int, ...]
    site: str
    function: str
    patient: bool

    def __str__(self) -> str:
        on = f" #{self.number} on {self.axis} ({named(self.ranks)})" if self.axis else ""
        return f"{self.what}{on} at {self.site} in {self.function}"


@dataclass(frozen=True)
class Slot:
    """What a rank last did. `verbs`: its last ones, oldest first. `waiting`: the one that it is in, if any. `since`: when it
    entered it, or left the last, in perf_counter seconds. `pid`: 0 for a rank of another host. `counts`: see `begun`.
    `operation`: of a plan, that it is at. `host`: its name, where there are several. Of a copy, `letter` and `code`: how its
    process is, as /proc has it; `silent`: for how many seconds its host has not been heard of."""

    rank: int
    pid: int
    beat: float
    ready: int
    doing: int
    since: float
    verbs: list[RecordedCall]
    waiting: RecordedCall | None
    counts: dict[int, int]
    operation: str = ""
    host: str = ""
    letter: str = ""
    code: int = 0
    silent: float = 0.0

    def begun(self, verb: str, axis: str, peer: int) -> float:
        """How many messages to or from rank `peer` it has begun to send or receive; infinite where its slot has no room."""
        return self._count(message_key(verb, axis, peer))

    def entered(self, axis: str, ranks: Sequence[int]) -> float:
        """How many calls of all these ranks together it has begun; infinite where its slot has no room."""
        return self._count(call_key(axis, ranks))

    def _count(self, key: int) -> float:
        return self.counts.get(key, inf if len(self.counts) == CELLS else 0)

    @property
    def last(self) -> RecordedCall | None:
        """The verb that it left last; one that was started may still be under way."""
        return next((v for v in reversed(self.verbs) if v is not self.waiting), None)


def message_key(verb: str, axis: str, peer: int) -> int:
    """What stands for the messages to or from rank `peer` of all, on this axis. Never 0."""
    return 1 + crc32(f"{verb} {axis} {peer}".encode())


def call_key(axis: str, ranks: Sequence[int]) -> int:
    """What stands for the calls of all these ranks together. Never 0."""
    return 1 + crc32(f"{axis} {ranks[0]} {ranks[-1]}".encode())


def base_of(rank: int) -> int:
    """Where the slot of a rank begins; of the number of ranks, where the last one ends."""
    return FIRST + SLOT * rank


def read(memory: mmap.mmap, rank: int, host: str = "") -> Slot:
    """What a rank's slot says. Read while its rank writes it, a verb can be anything."""
    base = base_of(rank)
    begun, waiting, since, doing = NOW.unpack_from(memory, base)
    pid, beat, ready = SELF.unpack_from(memory, base + SELF_AT)
    verbs = []
    for n in range(max(0, begun - KEPT), begun):
        which, number, entered, done, text = VERB.unpack_from(memory, base + HEAD + n % KEPT * VERB_SIZE)
        done = done and which != waiting - 1
        fields = text.rstrip(b"\0").decode(errors="replace").split("\t")
        axis, verb, what, place, function, ranks, patient = (fields + [""] * 7)[:7]
        on = ()
        with suppress(ValueError, TypeError):
            on = tuple(range(*map(int, ranks.split(":"))))
        verbs.append(RecordedCall(which, number, entered, done, verb, what, axis, on, place, function, patient == "*"))
    cells = memory[base + CELLS_AT : base + HEAD]
    counts = {key: count for key, count in CELL.iter_unpack(cells) if key}
    current = next((v for v in verbs if v.which == waiting - 1), None)
    operation = OPERATION.unpack_from(memory, base + OPERATION_AT)[0].rstrip(b"\0").decode(errors="replace")
    letter, code, heard = copied(memory, rank)
    silent = perf_counter() - heard if letter else 0.0
    return Slot(rank, pid, beat, ready, doing, since, verbs, current, counts, operation, host, letter, code, silent)


def copied(memory: mmap.mmap, rank: int) -> tuple[str, int, float]:
    """How the process of another host's rank is, its exit code, and when its host was last heard of; "" of one of this host."""
    letter, code, heard = COPIED.unpack_from(memory, base_of(rank) + COPIED_AT)
    return letter.rstrip(b"\0").decode(), code, heard
