"""The flight recorder: the last verbs of every rank of this host, in memory that all of them share and any of them can read.

It needs no communication, and leaves no file behind: the file is unlinked as soon as all ranks have mapped it. A rank that
hangs, is stopped or has died cannot say where it was; its slot says it. What this costs a call is in docs/performance.md.
"""

from __future__ import annotations

import mmap
import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from fcntl import LOCK_EX, LOCK_UN, lockf
from functools import cache
from threading import Lock
from time import perf_counter

import numpy as np
from mpi4py import MPI

from parallel.call import Call, Watched, Watcher, site
from parallel.shared_memory import shared_file
from parallel.slot import (
    ALARM,
    CELL,
    CELLS,
    CELLS_AT,
    CLAIMED,
    COUNT,
    COUNT_AT,
    DONE,
    DONE_AT,
    FIRST_WORDS,
    HEAD,
    KEPT,
    NOW,
    OPERATION,
    OPERATION_AT,
    RUNNING,
    SELF,
    SELF_AT,
    STACK,
    STACK_AT,
    TEXT,
    VERB,
    VERB_SIZE,
    Slot,
    base_of,
    call_key,
    copied,
    message_key,
    read,
)  # fmt: skip

_NOW_into, _VERB_into, _COUNT_into = NOW.pack_into, VERB.pack_into, COUNT.pack_into


def _text(axis: str, verb: str, what: str, place: str, function: str, ranks: Sequence[int], patient: bool = False) -> bytes:
    """What a slot says of a verb. The ranks of an axis, and of its groups, are as far apart as its first two."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    fields = axis, verb, what[:104], place[-56:], function[-40:], f"{ranks[0]}:{ranks[-1] + 1}:{step}", "*" * patient
    return "\t".join(fields).encode()[:TEXT]


def _host_names(world: MPI.Intracomm, host: MPI.Intracomm) -> list[str]:
    """By rank: the name of its host, "" where there is one host. Hosts of one name are told apart by their first rank."""
    first = host.bcast(world.rank)
    if host.size == world.size:
        return [""] * world.size
    every = world.allgather((platform.node(), first))
    twice = {name for name, _ in every if len({f for n, f in every if n == name}) > 1}
    return [f"{name}-{first}" if name in twice else name for name, first in every]


@cache
def _attribute() -> int:
    return MPI.Comm.Create_keyval(copy_fn=lambda comm, key, recorder: recorder)


class Recorder(Watcher):
    """The recorder of the ranks of `comm` (all of them make it together); as a watcher it writes this rank's slot."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank, self.size = comm.rank, comm.size
        host = comm.Split_type(MPI.COMM_TYPE_SHARED)
        # Kept open: what faulthandler writes goes to a descriptor.
        self.stack = shared_file(host, base_of(self.size))
        # By rank; "" where there is one host.
        self.hosts = _host_names(comm, host)
        host.Free()
        # Of several hosts, whether this one is the first to claim.
        self.first_of_all: Callable[[], bool] = lambda: True
        self._memory = mmap.mmap(self.stack, base_of(self.size))
        self._base = base_of(self.rank)
        self._verbs = self._base + HEAD
        os.lseek(self.stack, self._base + STACK_AT, os.SEEK_SET)
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
        _VERB_into(self._memory, self._verbs + which % KEPT * VERB_SIZE, which, call.number, now, not call.started, known[2])
        if call.started:
            self._started[call] = which
        _NOW_into(self._memory, self._base, after, after, now, self._doing)

    def _cell(self, axis: str, key: int) -> int | None:
        """Where it is counted; None when there is no more room."""
        if (axis, key) not in self._cells and len(self._cells) < CELLS:
            cell = self._base + CELLS_AT + len(self._cells) * CELL.size
            self._cells[axis, key] = cell + COUNT_AT
            CELL.pack_into(self._memory, cell, key, 0)
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
            DONE.pack_into(self._memory, self._verbs + which % KEPT * VERB_SIZE + DONE_AT, True)
        _NOW_into(self._memory, self._base, self._begun, 0, left, self._doing)

    def operation(self, axis: Watched, what: str) -> None:
        # On one rank a plan is but forward and backward by turns, which the verbs' lines say better.
        if axis.size > 1:
            OPERATION.pack_into(self._memory, self._base + OPERATION_AT, what.encode())

    def enter(self, what: str, place: tuple[str, str], ranks: Sequence[int], patient: bool) -> None:
        """This rank waits for these ranks, but in no verb of a mesh, until `leave`."""
        which, now = self._begun, perf_counter()
        self._begun = which + 1
        text = _text("", what.split(" ")[0], what, *place, ranks, patient)
        _VERB_into(self._memory, self._verbs + which % KEPT * VERB_SIZE, which, self._waits[ranks], now, True, text)
        _NOW_into(self._memory, self._base, which + 1, which + 1, now, self._doing)
        self._waits[ranks] += 1
        if (cell := self._cell("", call_key("", ranks))) is not None:
            _COUNT_into(self._memory, cell, self._waits[ranks])

    def leave(self) -> None:
        _NOW_into(self._memory, self._base, self._begun, 0, perf_counter(), self._doing)

    def now(self, doing: int) -> None:
        """From here on, this rank is RUNNING, has LEFT_MAIN, or has ENDED."""
        self._doing = doing
        NOW.pack_into(self._memory, self._base, self._begun, 0, perf_counter(), doing)

    def beat(self, ready: int) -> None:
        """The watchdog of this rank is alive."""
        SELF.pack_into(self._memory, self._base + SELF_AT, os.getpid(), perf_counter(), ready)

    # --- what any rank can read

    @property
    def alarm(self) -> float:
        """When a rank of this host raised the alarm; 0 if none has."""
        return ALARM.unpack_from(self._memory, 0)[0]

    def raise_alarm(self) -> None:
        if not self.alarm:
            ALARM.pack_into(self._memory, 0, perf_counter())

    def claim(self) -> bool:
        """Whether this rank is the first that knows why the run ends. The others then say nothing."""
        # Between processes, and between this one's threads.
        with self._claiming:
            lockf(self.stack, LOCK_EX, FIRST_WORDS)
            first = not self._memory[CLAIMED]
            self._memory[CLAIMED] = 1
            lockf(self.stack, LOCK_UN, FIRST_WORDS)
            return first and self.first_of_all()

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
        return read(self._memory, rank, self.hosts[rank])

    def gone_elsewhere(self) -> list[int]:
        """The ranks of other hosts whose processes are gone, as far as has been heard."""
        return [r for r, host in enumerate(self.hosts) if host and copied(self._memory, r)[0] in ("Z", "?")]

    def stack_of(self, rank: int) -> str:
        """What faulthandler has written of that rank's Python stack."""
        start = base_of(rank) + STACK_AT
        return self._memory[start : start + STACK].rstrip(b"\0").decode(errors="replace")


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
