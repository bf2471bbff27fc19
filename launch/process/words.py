"""What is said of a rank and of its end. Standard library only."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from traceback import format_exception, format_exception_only
from types import TracebackType

from launch.process import launcher

SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}


def name(rank: int | None = None) -> str:
    """A rank of this host among all, as people read it; this one by default."""
    host = launcher.host()
    return f"rank {launcher.rank() if rank is None else rank} of {launcher.size()}{host and f' on {host}'}"


def how(code: int) -> str:
    """How a process has left, of its exit code; below 0: the signal that killed it."""
    if code >= 0:
        return f"has left by os._exit({code}), its own or a library's,"
    known = -code in {s.value for s in signal.Signals}
    lacked = _lacked() if -code == signal.SIGBUS else ""
    return f"was killed by {signal.Signals(-code).name if known else f'signal {-code}'}{lacked}"


def _lacked() -> str:
    """What mostly stands behind a SIGBUS: the memory that a rank has mapped is not there."""
    with suppress(OSError):
        shared = os.statvfs("/dev/shm")
        left = shared.f_bavail * shared.f_frsize / 2**20
        return f" (/dev/shm was full, or a file that it read was cut short: {left:.1f} MiB of /dev/shm are left)"
    return ""


def said(number: int) -> str:
    """What a rank says of this signal. Ctrl-C is for all; SIGTERM may have been sent to this one among several."""
    several = number == signal.SIGTERM and (launcher.size() or 1) > 1
    return f"{name()} was {SAID[number]}" if several else SAID[number]


def led(first: str, kind: type[BaseException], value: BaseException, trace: TracebackType | None, at: str = "") -> str:
    """The traceback of this rank's exception, each line led by its rank. `first`: who failed; `at`: where."""
    cause = format_exception_only(kind, value)[-1].splitlines()
    lines = "".join(format_exception(kind, value, trace)).splitlines()
    whole = (f"{first} failed{at}: {cause[0] if cause else kind.__name__}", *lines)
    return "\n".join(f"[{launcher.rank()}] {line}" for line in whole)
