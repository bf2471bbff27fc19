"""Ctrl-C and SIGTERM: heard at once, also while NumPy loads and while a rank waits in MPI. Standard library only.

Python's handlers run in the main thread, after the call of MPI that it waits in. So the signals' numbers go through a pipe to a
thread, which ends the rank by `end`; a signal for which a command has set a handler of its own is that handler's.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from time import sleep
from types import FrameType
from typing import NoReturn

from launch.process import keeper, words

SHOW_CURSOR = "\x1b[?25h"


class Signals:
    """Listens from its making on. `end`: is called in a thread with a signal's number, and must end the process."""

    def __init__(self) -> None:
        self.end: Callable[[int], NoReturn] = before_mpi
        self._heard, self._said = os.pipe()
        os.set_blocking(self._said, False)
        for number in words.SAID:
            signal.signal(number, self._pass_on)
        signal.set_wakeup_fd(self._said, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._deaf)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        # An event loop has a pipe of its own, through which the number went then.
        with suppress(BlockingIOError):
            os.write(self._said, bytes([number]))

    def _listen(self) -> None:
        while True:
            for number in os.read(self._heard, 1):
                if number in words.SAID and signal.getsignal(number) == self._pass_on:
                    self.end(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While MPI holds the interpreter, and no thread listens, a signal ends the rank at once, and its keeper speaks."""
        ours = [n for n in words.SAID if keeper.watches() and signal.getsignal(n) == self._pass_on]
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        yield
        for number in ours:
            signal.signal(number, self._pass_on)

    def _deaf(self) -> None:
        """In a forked process, whose signals are not the rank's."""
        signal.set_wakeup_fd(-1)
        for number in words.SAID:
            if signal.getsignal(number) == self._pass_on:
                signal.signal(number, signal.SIG_DFL)


def status_of(number: int) -> int:
    """The exit status by which shells know it: 130 for Ctrl-C, 143 for SIGTERM. Not a death by the signal: of one, MPICH's
    mpirun would print a page."""
    return 128 + number


@cache
def listen() -> Signals:
    """From now on. Further calls return the same."""
    return Signals()


def before_mpi(number: int) -> NoReturn:
    """The end of a rank that knows no others yet: the first speaks, and the others let it, as the first to leave ends all."""
    keeper.expected()
    if keeper.first_to_speak():
        say(words.said(number))
    else:
        sleep(keeper.AFTER_THE_FIRST)
    os._exit(status_of(number))


def say(line: str) -> None:
    """A line on standard error, and the cursor if a progress bar has hidden it."""
    with suppress(OSError, ValueError):
        sys.stderr.write((SHOW_CURSOR if sys.stderr.isatty() else "") + line + "\n")
        sys.stderr.flush()
