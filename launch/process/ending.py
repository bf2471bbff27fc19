"""How a rank ends: by an exception, a signal, a hang. Its end is the end of all, and one of them prints the first cause."""

from __future__ import annotations

import atexit
import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

from mpi4py import MPI

from launch.process import keeper, signals, words
from launch.process.watchdog import Watchdog, at_operation, on
from parallel import remains
from parallel.call import path_in_project
from parallel.recorder import Recorder
from parallel.slot import ENDED

# Not SIGUSR1: Open MPI's mpirun passes that on, and the server is ended by it.
STACK_SIGNAL = signal.SIGUSR2
# Seconds for a rank that knows the cause to print it, before another ends the job.
EXPLAINED = 1.5
# Seconds for a watchdog to name a rank that is gone, where MPI met it first: a message is read out of its sender's memory.
HEARD = 0.5


class Ending:
    """Made once MPI runs, on all ranks of `comm` (the world) together; `recorder` is the flight recorder of the process."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        # First: what ends before it leaves its segments behind.
        remains.unlink_names(comm)
        self.comm = comm
        self.recorder = Recorder(comm)
        self.recorder.attach(comm)
        if self.recorder.hosts[0]:
            from launch.process import courier

            courier.join(comm, self.recorder, STACK_SIGNAL)
        # What of the work is kept, in words.
        self.kept = ""
        sys.excepthook = self.failed
        threading.excepthook = lambda t: self.failed(t.exc_type, t.exc_value, t.exc_traceback)
        faulthandler.register(STACK_SIGNAL, file=self.recorder.stack, all_threads=False)
        # The stack of a crash: another rank prints it, led by this one's number. A rank that is alone prints its own.
        faulthandler.enable(file=self.recorder.stack if comm.size > 1 else 2, all_threads=False)
        # What is said when there is no memory left to say more.
        self._name = f"rank {comm.rank} of {comm.size}{on(self.recorder.hosts[comm.rank])}"
        self._starved = f"[{comm.rank}] {self._name} failed: MemoryError"
        # From here on, all ranks end when one is gone: each must be in the recorder, so that the others can watch it.
        comm.Barrier()
        self._watchdog = Watchdog(self.recorder, STACK_SIGNAL, self.tell) if comm.size > 1 else None
        atexit.register(self.over)
        keeper.reported()

    def watch(self, limit: float) -> None:
        """From here on, end all ranks when a verb takes more than `limit` seconds (0: never)."""
        if self._watchdog is not None:
            self._watchdog.limit = limit

    def over(self) -> None:
        """This rank has come to its end as it should."""
        if self.recorder.alarm and self.comm.size > 1:
            # Too late: the others are already being ended.
            self.quietly()
        atexit.unregister(self.over)
        keeper.swept_no_more()
        self._expected()
        if self._watchdog is not None:
            self._watchdog.stop()

    def failed(self, kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> NoReturn:
        """This rank's traceback, each line led by its rank, in one write; then the end of all ranks. Memory that is not there
        is bad input: one line, and the status of that."""
        self._expected()
        if isinstance(value, MPI.Exception) and self.comm.size > 1:
            time.sleep(HEARD)
        if not self.recorder.claim():
            self.quietly()
        text, status = self._starved, 2
        with suppress(MemoryError):
            at = at_operation(self.recorder.slot(self.comm.rank))
            text, status = words.led(self._name, kind, value, trace, at), 1
            if (lacking := lacks_memory(value)) is not None:
                text, status = f"error: {self._name} {lacking}{_at(trace)}: use smaller sizes", 2
        self.tell(text, status)

    def refused(self, problem: str) -> NoReturn:
        """This rank cannot go on, for a reason that its user can mend: one line, the status of bad input, the end of all."""
        self._expected()
        if not self.recorder.claim():
            self.quietly()
        self.tell(f"error: {problem}", 2)

    def interrupted(self, number: int) -> NoReturn:
        """This rank has got a signal that ends it, and mostly all others too: one of them says so."""
        self._expected()
        if not self.recorder.claim():
            time.sleep(EXPLAINED)
            self._abort(signals.status_of(number))
        self.tell(words.said(number), signals.status_of(number))

    def tell(self, text: str, status: int = 1) -> NoReturn:
        """Print why and what is kept, in one write, and end all ranks. Only for the rank whose claim to do so was the first."""
        self._expected()
        with suppress(OSError, ValueError, MemoryError):
            sys.stdout.flush()
        with suppress(MemoryError):
            signals.say(f"{text}\n{self.kept}" if self.kept else text)
        time.sleep(keeper.PASSED_ON)
        self._abort(status)

    def quietly(self) -> NoReturn:
        """End all ranks without a word: another prints why, or nothing needs to be said."""
        self._expected()
        if not self.recorder.claim():
            time.sleep(EXPLAINED)
        self._abort()

    def _expected(self) -> None:
        """No other rank needs to look for why this one is gone."""
        self.recorder.now(ENDED)
        keeper.expected()

    def _abort(self, status: int = 1) -> NoReturn:
        if status > 1:
            keeper.end_all(status)
        # An abort may wait for the main thread, which may be in a long computation. A rank that starves can start no thread.
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        self.comm.Abort(1)
        os._exit(1)


def lacks_memory(error: BaseException) -> str | None:
    """How much memory was asked for in vain, and for what, in words; None if it is another error."""
    # NumPy counts no further than 63 bits, and calls that a wrong value.
    if not isinstance(error, MemoryError) and not re.match("array is too big|Maximum allowed", str(error)):
        return None
    return re.sub("^Unable to", "cannot", str(error)) if "allocate" in str(error) else "has not the memory for an array"


def _at(trace: TracebackType | None) -> str:
    """The innermost line of ours that asked for an array: in parallel/ they are made for any layer."""
    asking = [
        f"{path}:{f.lineno} in {f.name}"
        for f in traceback.extract_tb(trace)
        if re.match("(launch|layers|models|training|inference|reference)/", path := path_in_project(f.filename))
    ]
    return f", at {asking[-1]}" if asking else ""
