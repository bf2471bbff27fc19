"""A search in a process of its own: what it runs is made by machine, and may take all memory or never come to an end.

A list that is put into itself is enough: NumPy, asked for an array of it, works for hours within one call and takes all memory.
The search then ends without a finding, and the verdict is given without it.
"""

from __future__ import annotations

import math
import os
import pickle
import resource
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from parallel.remains import die_with_parent

# Memory that a search may take beside what is there already.
MEBIBYTES = 256
# Seconds of computing, and times its own limit by the clock, after which a search that has not ended by itself is ended.
MORE, CLOCK = 1.0, 8.0

T = TypeVar("T")


def apart(find: Callable[[], T], seconds: float) -> T | None:
    """What find() returns; None where it fails, takes too much memory, or much longer than `seconds` of computing."""
    until = time.monotonic() + CLOCK * (seconds + MORE)
    parent = os.getpid()
    try:
        out, into = os.pipe()
        process = os.fork()
    except OSError:
        return None
    if process == 0:
        try:
            os.close(out)
            die_with_parent(parent)
            _limit(seconds)
            found = pickle.dumps(find())
            with open(into, "wb") as file:
                file.write(found)
        finally:
            # Whatever happened: the stacks and the cleaning up are the parent's.
            os._exit(0)
    os.close(into)
    try:
        found = _read(out, until)
    finally:
        os.close(out)
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return pickle.loads(found) if found else None


def _limit(seconds: float) -> None:
    """No more memory and time than a search needs, and nothing on the learner's screen."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for file in (1, 2):
        os.dup2(nowhere, file)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    # A new process has used no time.
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds + MORE), hard))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEBIBYTES * 2**20, hard))


def _read(out: int, until: float) -> bytes:
    """All that is written until the other side is closed; b"" where that takes too long."""
    read = b""
    while (left := until - time.monotonic()) > 0 and select.select([out], [], [], left)[0]:
        some = os.read(out, 2**16)
        if not some:
            return read
        read += some
    return b""
