"""A process between the launcher and a rank, so that a rank's death can be reported before the launcher ends the others.

Launchers kill the ranks that are left as soon as one is gone, without saying where it was. The keeper is what the launcher
started; the rank is its child. For a moment it holds back the news of a death that the rank could not report (SIGKILL,
SIGSEGV, os._exit), so that another rank reports it. Standard library only: it forks before NumPy and MPI are loaded.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import signal
from contextlib import suppress
from time import sleep

# Seconds for the other ranks to notice and report a death; they end the job themselves then.
MOMENT = 1.0
# Launchers send these to the group of the process that they started: the rank has them already.
FOR_THE_RANK = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_expected: mmap.mmap | None = None


def keep() -> None:
    """Returns in a child, which is the rank from here on; its parent ends as the child does.

    A system where a death cannot be seen without being reaped has no keeper.
    """
    global _expected
    if not hasattr(os, "waitid"):
        return
    _expected = mmap.mmap(-1, 1)
    keeper = os.getpid()
    die_with_parent(os.getppid())
    rank = os.fork()
    if rank:
        _wait(rank)
    die_with_parent(keeper)
    # Not reached by os._exit.
    atexit.register(expected)


def expected() -> None:
    """From now on the end of this rank needs no explanation by another one."""
    if _expected is not None:
        _expected[0] = 1


def die_with_parent(parent: int) -> None:
    """Linux: when the parent is killed outright, so is this process. Open MPI's ranks would live on."""
    with suppress(OSError, AttributeError):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _wait(rank: int) -> None:
    asked: list[int] = []
    for number in FOR_THE_RANK:
        signal.signal(number, lambda n, _: asked.append(n))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.waitid(os.P_PID, rank, os.WEXITED | os.WNOWAIT)
    if not _expected[0] and not asked:
        sleep(MOMENT)
    _, status = os.waitpid(rank, 0)
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
