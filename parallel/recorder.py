"""The flight recorder: the last verbs of every rank of this host, in memory that all of them share and any of them can read.

It needs no communication, and leaves no file behind: the file is unlinked as soon as all ranks have mapped it. A rank that
hangs, is stopped or has died cannot say where it was; its slot says it. What this costs a call is in docs/performance.md.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_UN, lockf
from functools import cache
from math import inf
from struct import Struct
from threading import Lock
from time import perf_counter
from zlib import crc32

import numpy as np
from mpi4py import MPI

from parallel.call import Call, Watched, Watcher, site
from parallel.shared_memory import shared_file
from parallel.text import named

# Of a rank's verbs, as many as the last.
KEPT = 16
# What a rank is doing when it is in no verb. ENDED: it has said why, or need not.
RUNNING, LEFT_MAIN, ENDED = 0, 1, 2

# verbs begun; 1 + the one waited in, or 0; since when it waits or computes; what it is doing
_NOW = Struct("qqdq")
# process; watchdog's last beat; readiness to report
_SELF = Struct("qdq")
# what it is at, as an operation of a plan
_OPERATION, _OPERATION_AT = Struct("48s"), _NOW.size + _SELF.size
# which verb, its number on the axis, when it was entered, whether it is done once the rank waits for it no more, what it is
_TEXT = 240
_VERB = Struct(f"qqd?{_TEXT}s")
_VERB_SIZE = 272
_DONE, _DONE_AT = Struct("?"), 24
_ALARM = Struct("d")
_NOW_into, _VERB_into = _NOW.pack_into, _VERB.pack_into
# How many messages a rank has begun to send or receive, and how many other calls on each axis: rings of verbs forget.
_CELL, _COUNT, _COUNT_AT = Struct("qq"), Struct("q"), 8
_COUNT_into = _COUNT.pack_into
CELLS, _CELLS_AT = 64, 128
_HEAD = _CELLS_AT + CELLS * _CELL.size
_STACK = 16384
_SLOT = _HEAD + KEPT * _VERB_SIZE + _STACK
# Before the slots: when a rank first raised the alarm, and whether one has claimed to say why the run ends.
_FIRST = mmap.PAGESIZE
_CLAIMED, _FIRST_WORDS = 8, 9


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
    `operation`: of a plan, that it is at."""

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


def _text(axis: str, verb: str, what: str, place: str, function: str, ranks: Sequence[int], patient: bool = False) -> bytes:
    """What a slot says of a verb. The ranks of an axis, and of its groups, are as far apart as its first two."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    fields = axis, verb, what[:104], place[-56:], function[-40:], f"{ranks[0]}:{ranks[-1] + 1}:{step}", "*" * patient
    return "\t".join(fields).encode()[:_TEXT]


@cache
def _attribute() -> int:
    return MPI.Comm.Create_keyval(copy_fn=lambda comm, key, recorder: recorder)


class Recorder(Watcher):
    """The recorder of the ranks of `comm` (all of them make it together); as a watcher it writes this rank's slot."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank, self.size = comm.rank, comm.size
        host = comm.Split_type(MPI.COMM_TYPE_SHARED)
        # Kept open: what faulthandler writes goes to a descriptor.
        self.stack = shared_file(host, _FIRST + _SLOT * self.size)
        host.Free()
        self._memory = mmap.mmap(self.stack, _FIRST + _SLOT * self.size)
        self._base = _FIRST + _SLOT * self.rank
        self._verbs = self._base + _HEAD
        os.lseek(self.stack, self._verbs + KEPT * _VERB_SIZE, os.SEEK_SET)
        self._begun = self._doing = 0
        self._group, self._waits = comm.Get_group(), Counter()
        self._started: dict[Call, int] = {}
        self._claiming = Lock()
        self._texts: dict[str, tuple] = {}
        # By axis and key: where it is counted.
        self._cells: dict[tuple[str, int], int] = {}
        self.now(RUNNING)
        self.beat(0)

    def attach(self, comm: MPI.Intracomm) -> None:
        """Let what is made of `comm`, or of a duplicate of it, find this recorder: every mesh and every control."""
        comm.Set_attr(_attribute(), self)

    @staticmethod
    def of(comm: MPI.Intracomm) -> Recorder | None:
        return comm.Get_attr(_attribute())

    @classmethod
    def places(cls, comm: MPI.Intracomm, group: MPI.Group | None = None) -> tuple[int, ...]:
        """The ranks of `group`, or of `comm`, as its recorder numbers them; () without a recorder."""
        recorder = cls.of(comm)
        if recorder is None:
            return ()
        ranks = comm.Get_group() if group is None else group
        found = tuple(ranks.Translate_ranks(list(range(ranks.size)), recorder._group))
        if group is None:
            ranks.Free()
        return found

    # --- what this rank does

    def begin(self, axis: Watched, call: Call, x: np.ndarray | None) -> None:
        place, what = call.site, (call.verb, call.started, call.shape, call.dtype, call.how, call.what)
        known = self._texts.get(place)
        if known is None or known[0] is not axis or known[1] != what:
            ranks = axis.members if call.peer is None else (axis.members[call.peer],)
            text = _text(axis.name, call.verb, str(call), place, call.function, ranks)
            key = call_key(axis.name, ranks) if call.peer is None else message_key(call.verb, axis.name, ranks[0])
            known = self._texts[place] = axis, what, text, self._cell(axis.name, key)
        if known[3] is not None:
            _COUNT_into(self._memory, known[3], call.number + 1)
        which = self._begun
        self._begun = after = which + 1
        now = perf_counter()
        _VERB_into(self._memory, self._verbs + which % KEPT * _VERB_SIZE, which, call.number, now, not call.started, known[2])
        if call.started:
            self._started[call] = which
        _NOW_into(self._memory, self._base, after, after, now, self._doing)

    def _cell(self, axis: str, key: int) -> int | None:
        """Where it is counted; None when there is no more room."""
        if (axis, key) not in self._cells and len(self._cells) < CELLS:
            cell = self._base + _CELLS_AT + len(self._cells) * _CELL.size
            self._cells[axis, key] = cell + _COUNT_AT
            _CELL.pack_into(self._memory, cell, key, 0)
        return self._cells.get((axis, key))

    def close(self, axis: Watched) -> None:
        # The calls of another mesh's axis of this name are numbered from 0.
        for (name, _), cell in self._cells.items():
            if name == axis.name:
                _COUNT_into(self._memory, cell, 0)

    def started(self, axis: Watched, call: Call) -> None:
        _NOW_into(self._memory, self._base, self._begun, 0, perf_counter(), self._doing)

    def wait(self, axis: Watched, call: Call) -> None:
        which = self._started.get(call)
        if which is not None:
            _NOW_into(self._memory, self._base, self._begun, which + 1, perf_counter(), self._doing)

    def end(self, axis: Watched, call: Call, y: np.ndarray | None, entered: float, left: float) -> None:
        if self._started and (which := self._started.pop(call, -1)) >= self._begun - KEPT:
            _DONE.pack_into(self._memory, self._verbs + which % KEPT * _VERB_SIZE + _DONE_AT, True)
        _NOW_into(self._memory, self._base, self._begun, 0, left, self._doing)

    def operation(self, axis: Watched, what: str) -> None:
        # On one rank a plan is but forward and backward by turns, which the verbs' lines say better.
        if axis.size > 1:
            _OPERATION.pack_into(self._memory, self._base + _OPERATION_AT, what.encode())

    def enter(self, what: str, place: tuple[str, str], ranks: Sequence[int], patient: bool) -> None:
        """This rank waits for these ranks, but in no verb of a mesh, until `leave`."""
        which, now = self._begun, perf_counter()
        self._begun = which + 1
        text = _text("", what.split(" ")[0], what, *place, ranks, patient)
        _VERB_into(self._memory, self._verbs + which % KEPT * _VERB_SIZE, which, self._waits[ranks], now, True, text)
        _NOW_into(self._memory, self._base, which + 1, which + 1, now, self._doing)
        self._waits[ranks] += 1
        if (cell := self._cell("", call_key("", ranks))) is not None:
            _COUNT_into(self._memory, cell, self._waits[ranks])

    def leave(self) -> None:
        _NOW_into(self._memory, self._base, self._begun, 0, perf_counter(), self._doing)

    def now(self, doing: int) -> None:
        """From here on, this rank is RUNNING, has LEFT_MAIN, or has ENDED."""
        self._doing = doing
        _NOW.pack_into(self._memory, self._base, self._begun, 0, perf_counter(), doing)

    def beat(self, ready: int) -> None:
        """The watchdog of this rank is alive."""
        _SELF.pack_into(self._memory, self._base + _NOW.size, os.getpid(), perf_counter(), ready)

    # --- what any rank can read

    @property
    def alarm(self) -> float:
        """When a rank of this host raised the alarm; 0 if none has."""
        return _ALARM.unpack_from(self._memory, 0)[0]

    def raise_alarm(self) -> None:
        if not self.alarm:
            _ALARM.pack_into(self._memory, 0, perf_counter())

    def claim(self) -> bool:
        """Whether this rank is the first of its host that knows why the run ends. The others then say nothing."""
        # Between processes, and between this one's threads.
        with self._claiming:
            lockf(self.stack, LOCK_EX, _FIRST_WORDS)
            first = not self._memory[_CLAIMED]
            self._memory[_CLAIMED] = 1
            lockf(self.stack, LOCK_UN, _FIRST_WORDS)
            return first

    def signal(self, number: int) -> None:
        """Send it to every rank of this host."""
        for rank in range(self.size):
            # Process 0 would be the whole group of this one: it stands for a rank of another host.
            if pid := self.slot(rank).pid:
                with suppress(OSError):
                    os.kill(pid, number)

    def stuck(self) -> float:
        """For how many seconds this rank has been in a verb of a mesh; 0 if it is in none."""
        slot = self.slot(self.rank)
        return perf_counter() - slot.since if slot.waiting is not None and slot.waiting.axis else 0.0

    def slot(self, rank: int) -> Slot:
        base = _FIRST + _SLOT * rank
        begun, waiting, since, doing = _NOW.unpack_from(self._memory, base)
        pid, beat, ready = _SELF.unpack_from(self._memory, base + _NOW.size)
        verbs = []
        for n in range(max(0, begun - KEPT), begun):
            which, number, entered, done, text = _VERB.unpack_from(self._memory, base + _HEAD + n % KEPT * _VERB_SIZE)
            done = done and which != waiting - 1
            fields = text.rstrip(b"\0").decode(errors="replace").split("\t")
            axis, verb, what, place, function, ranks, patient = (fields + [""] * 7)[:7]
            on = ()
            # Read while its rank writes it, it can be anything.
            with suppress(ValueError, TypeError):
                on = tuple(range(*map(int, ranks.split(":"))))
            verbs.append(RecordedCall(which, number, entered, done, verb, what, axis, on, place, function, patient == "*"))
        cells = self._memory[base + _CELLS_AT : base + _HEAD]
        counts = {key: count for key, count in _CELL.iter_unpack(cells) if key}
        current = next((v for v in verbs if v.which == waiting - 1), None)
        operation = _OPERATION.unpack_from(self._memory, base + _OPERATION_AT)[0].rstrip(b"\0").decode(errors="replace")
        return Slot(rank, pid, beat, ready, doing, since, verbs, current, counts, operation)

    def stack_of(self, rank: int) -> str:
        """What faulthandler has written of that rank's Python stack."""
        start = _FIRST + _SLOT * rank + _HEAD + KEPT * _VERB_SIZE
        return self._memory[start : start + _STACK].rstrip(b"\0").decode(errors="replace")


class Waiting:
    """`with Waiting(recorder, what, ranks):` this rank waits for the others of `ranks`, but in no verb of a mesh. Without a
    recorder, this does nothing. `patient`: however long that takes, it raises no alarm."""

    def __init__(self, recorder: Recorder | None, what: str, ranks: tuple[int, ...], patient: bool = False) -> None:
        self._recorder, self._what, self._ranks, self._patient = recorder, what, ranks, patient

    def __enter__(self) -> None:
        if self._recorder is not None:
            self._recorder.enter(self._what, site(), self._ranks, self._patient)

    def __exit__(self, *_: object) -> None:
        if self._recorder is not None:
            self._recorder.leave()
