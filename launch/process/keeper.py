"""A process between the launcher and a rank, so that no death of a rank goes unsaid, and none leaves the others waiting.

Launchers kill the ranks that are left as soon as one is gone, without saying where it was; and before MPI runs they let the
others wait for one that has left with a status. The keeper is what the launcher started; the rank is its child. Of a death
that the rank could not report (SIGKILL, SIGSEGV, os._exit) it first holds back the news, so that another rank can say where
that was. If none does, or none can yet, the keeper says it, and has the launcher end all. Standard library only: it forks
before anything else is imported.
"""

from __future__ import annotations

import atexit
import mmap
import os
import signal
import sys
from contextlib import suppress
from errno import EADDRINUSE
from time import sleep, time
from types import TracebackType
from typing import NoReturn

from launch.process import launcher, starting, words
from parallel import remains

# Seconds for the other ranks to notice and report a death; they end the job themselves then.
MOMENT = 1.5
# Seconds for the launcher to end all ranks, before it is made to.
OBEYED = 1.0
# Seconds for the launcher to pass on what was printed: it drops the rest when the job is aborted.
PASSED_ON = 0.2
# Seconds for the first rank that fails to end all, before another one does so without a word: where all fail, one says it.
AFTER_THE_FIRST = 0.4
# Of several hosts each lets those before it speak first, for so many seconds a host, up to so many in all.
AFTER_OTHER_HOSTS, AT_MOST = 1.0, 1.3
# Seconds for all ranks to be gone that hold names when their launcher is.
ALL_GONE = 5.0
# Seconds until MPI must run on all ranks.
START_LIMIT = 60.0
# Launchers send these to the group of the process that they started: the rank has them already.
FOR_THE_RANK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# What a rank and its keeper share: bytes that are set when the rank's death can be reported by another one, and when it needs
# no explanation any more.
_REPORTED, _EXPLAINED = 0, 1
_shared: mmap.mmap | None = None
# In the environment of a rank, and so of all that it starts.
KEPT = "RANKWISE_KEPT"
# When this module was imported, in seconds since 1970.
_begun = time()
# The process that sweeps if this one is killed, while there is one; what started the keepers of this host; the name of the rank
# that speaks for all, held by it.
_sweeper = _launcher = 0
_speaker: object = None


def keep() -> None:
    """Returns in a child, which is the rank from here on; its parent ends as the child does.

    A system where a death cannot be seen without being reaped has no keeper, nor have the processes that a rank starts, nor a
    rank that no launcher waits for.
    """
    global _shared, _launcher
    if not hasattr(os, "waitid") or KEPT in os.environ or launcher.absent():
        return
    _shared = mmap.mmap(-1, 2)
    keeper = os.getpid()
    _launcher = os.getppid()
    if starting.orphaned(_launcher):
        # MPI would look for Open MPI's for ten seconds.
        remains.sweep(remains.MPI_NAMES, since=_begun - remains.BEFORE)
        sys.exit(f"error: {words.name()}: its launcher has gone")
    remains.die_with_parent(_launcher)
    rank = os.fork()
    if rank:
        _wait(rank)
    remains.die_with_parent(keeper)
    os.environ[KEPT] = "1"
    sys.excepthook = _failed
    # Not reached by os._exit.
    atexit.register(expected)
    if launcher.several_hosts() and launcher.local_rank() == 0:
        # Slow to import, and seldom needed.
        from launch.process import courier

        if problem := courier.begin():
            refuse(problem)
    swept()


def watches() -> bool:
    """Whether this rank has a keeper."""
    return _shared is not None


def swept() -> None:
    """From now until MPI runs, what it has named is removed if this rank is killed. One rank of a host is enough for that."""
    global _sweeper
    if not _sweeper and launcher.local_rank() == 0:
        since, patience = (_begun - remains.BEFORE, ALL_GONE) if launcher.by_open_mpi() else (None, remains.PATIENCE)
        _sweeper = remains.sweeper(remains.MPI_NAMES, since, patience, launcher.job())


def reported() -> None:
    """MPI runs, and nothing of it has a name: from now on the other ranks notice the end of this one, and report it. Names of
    Open MPI stay to the end, and so does the sweeper."""
    if not launcher.by_open_mpi():
        swept_no_more()
    if _shared is not None:
        _shared[_REPORTED] = 1


def swept_no_more() -> None:
    """Whoever has named something removes it."""
    global _sweeper
    remains.dismiss(_sweeper)
    _sweeper = 0


def expected() -> None:
    """From now on the end of this rank needs no explanation by another one."""
    if _shared is not None:
        _shared[_EXPLAINED] = 1


def replaced() -> None:
    """This rank becomes another program, which has a keeper of its own if it wants one. Its end is its own."""
    if _shared is not None:
        reported()
        expected()
        del os.environ[KEPT]


def refuse(problem: str) -> NoReturn:
    """Leave with one line and status 2 before MPI runs. Where several ranks of a host refuse, the first says it."""
    host = launcher.host()
    _say_first(f"error: {host and f'on {host}: '}{problem}", 2)
    sys.exit(2)


def _failed(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> NoReturn:
    """The excepthook of a rank until MPI runs. Its keeper ends all ranks when it has left with a status."""
    _say_first(words.led(words.name(), kind, value, trace), 1)
    expected()
    # No further: the end of a process that has begun to start MPI would wait for the others.
    os._exit(1)


def _say_first(text: str, status: int) -> None:
    """Print why this rank ends, unless another of its host has done so; and have MPICH's launcher end all, before that one's
    name is free again."""
    if not first_to_speak():
        sleep(AFTER_THE_FIRST)
        return
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    if _launcher and "PMI_FD" in os.environ:
        expected()
        _end_all("", status)


def first_to_speak() -> bool:
    """Whether no other rank of this host has asked this. All that ranks share yet is the names of sockets, which vanish with
    those that hold them. Ranks of several hosts share nothing yet: this returns on the first of them first, and the launcher
    ends the others meanwhile."""
    global _speaker
    if not _launcher:
        return True
    try:
        import socket

        _speaker = socket.socket(socket.AF_UNIX)
        _speaker.bind(f"\0rankwise-{_launcher}")
    except (OSError, ImportError, MemoryError) as error:
        return getattr(error, "errno", None) != EADDRINUSE
    if launcher.several_hosts():
        sleep(min(AFTER_OTHER_HOSTS * (launcher.rank() // launcher.local_size()), AT_MOST))
    return True


def _wait(rank: int) -> NoReturn:
    asked: list[int] = []
    for number in FOR_THE_RANK:
        signal.signal(number, lambda n, _: asked.append(n))
    others = starting.Others(_launcher)
    signal.signal(signal.SIGALRM, lambda *_: _look(rank, others))
    signal.setitimer(signal.ITIMER_REAL, starting.LOOK)
    ended = os.waitid(os.P_PID, rank, os.WEXITED | os.WNOWAIT)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    # Where a library has had the launcher end all, in starting MPI, the rank has left by itself all the same.
    itself = ended.si_code == os.CLD_EXITED and not _shared[_REPORTED]
    explained = bool(_shared[_EXPLAINED] or (asked and not itself))
    if not explained and _shared[_REPORTED] and launcher.size() > 1:
        sleep(MOMENT)
    _, status = os.waitpid(rank, 0)
    code = os.waitstatus_to_exitcode(status)
    if -code in words.SAID and not _shared[_REPORTED]:
        _end_by(-code, -code in asked)
    if not explained:
        when = "after MPI had started" if _shared[_REPORTED] else "before MPI ran"
        _end_all(f"{words.name()} {words.how(code)} {when}", 128 - code if code < 0 else code or 1)
    if code and not _shared[_REPORTED]:
        _end_all("", 128 - code if code < 0 else code)
    if code < 0:
        _die(-code)
    os._exit(code)


def _end_by(number: int, asked: bool) -> NoReturn:
    """A signal has ended the rank while MPI started, when it cannot listen. `asked`: the keeper has got it too, as all do of
    Open MPI's launcher when another rank has ended."""
    speaks = first_to_speak() and not (asked and launcher.by_open_mpi() and number == signal.SIGTERM)
    if not speaks:
        sleep(AFTER_THE_FIRST)
    _end_all(words.said(number) if speaks else "", 128 + number)


def _look(rank: int, others: starting.Others) -> None:
    """At what happens until MPI runs; again and again."""
    if _shared[_REPORTED]:
        return
    if (gone := others.gone()) is not None and first_to_speak():
        _end_all(f"{words.name(gone)} ended before it ran the command: what it printed, if anything, says why", 1)
    if time() - _begun > START_LIMIT:
        _too_late(rank)
    signal.setitimer(signal.ITIMER_REAL, starting.LOOK)


def _too_late(rank: int) -> NoReturn:
    stopped = os.waitid(os.P_PID, rank, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    if not stopped:
        # The keeper of a rank that is stopped says so first.
        sleep(AFTER_THE_FIRST)
    why = "it is stopped" if stopped else "another rank did not come"
    _end_all(f"{words.name()}: MPI has not started within {START_LIMIT:g} s: {why}", 1)


def _end_all(why: str, status: int) -> NoReturn:
    """Print why, and have the launcher end all ranks with this status."""
    if not _shared[_REPORTED]:
        # Other ranks may still be making what this one has named.
        remains.sweeper(remains.MPI_NAMES, _begun)
    if why:
        with suppress(OSError):
            os.write(2, f"{why}\n".encode())
    sleep(PASSED_ON)
    _ask_for_the_end(status)
    # Any launcher ends all when a signal has killed one; Open MPI's also for a status.
    if launcher.by_open_mpi():
        _outlive(os.getppid())
        os._exit(status)
    _die(signal.SIGKILL)


def _ask_for_the_end(status: int) -> None:
    """Of MPICH's launcher, as one of its ranks would; it must not wait for a rank that came to an end before MPI ran. It then
    says nothing of its own, and leaves with this status, as it does not where ranks leave one after another."""
    with suppress(OSError, ValueError, KeyError):
        os.write(int(os.environ["PMI_FD"]), f"cmd=abort exitcode={status}\n".encode())
        sleep(OBEYED)


def end_all(status: int) -> NoReturn:
    """End all ranks while MPI runs, with this status and without a word. Of an abort MPI would print a line of its own."""
    _ask_for_the_end(status)
    os._exit(status)


def _outlive(started: int) -> None:
    """End Open MPI's launcher if it does not end itself: it sometimes waits for ever when a rank has left while MPI starts."""
    with suppress(OSError):
        if starting.named(started) in starting.LAUNCHERS and os.fork() == 0:
            os.setsid()
            sleep(OBEYED)
            os.kill(started, signal.SIGKILL)
            sleep(PASSED_ON)
            remains.sweep(remains.MPI_NAMES, since=_begun - remains.BEFORE)
            os._exit(0)


def _die(number: int) -> NoReturn:
    """End by this signal, as the rank did."""
    with suppress(OSError):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(1)
