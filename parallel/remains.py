"""What would outlive a job that is killed: the processes that it has started, and its names in shared memory and in temporary
folders. Standard library only: a rank's keeper needs it before anything else is imported.

A name is removed when no process holds it: those who use it have it mapped or open.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from time import sleep, time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from mpi4py import MPI

# Patterns of whole paths. What MPICH names, and keeps until its own orderly end: memory that ranks of a host share (versions
# before 5 call it shar_tmp), and the host's topology, which its launcher writes for them, in this folder whatever TMPDIR says.
# What UCX and Open MPI name.
SHARED = r"/dev/shm/mpich_((shm|vci)_[0-9a-f]+_\d+|shar_tmp\w{6})"
TOPOLOGY = r"/tmp/hydra_hwloc_xmlfile_\w{6}"
OF_OPEN_MPI = (r"/dev/shm/ucx_shm_posix_[0-9a-f]+", r"/dev/shm/sm_segment\..+\.\d+\.[0-9a-f]+\.\d+", r"/tmp/ompi\.\d+")
MPI_NAMES = (SHARED, TOPOLOGY, *OF_OPEN_MPI)
# Seconds by which a launcher begins before its ranks do, and by which the clock of files may be behind.
BEFORE, CLOCK = 5.0, 0.1
# Seconds after which no rank is still starting. Where containers share a folder, not all who hold a name can be seen.
OLD = 60.0
# Seconds from one look at what a killed process has left to the next, until two have found nothing, and how long that may take:
# those that it had started end meanwhile, and another job that starts just then may hold such names.
PAUSE, PATIENCE = 0.15, 0.7

# Looked up beforehand: between fork and exec, another thread's lock on the loader would never be released.
_prctl = getattr(ctypes.CDLL(None), "prctl", None)


def die_with_parent(parent: int) -> None:
    """Linux: when the parent is killed outright, so is this process."""
    if _prctl is not None:
        pr_set_pdeathsig = 1
        _prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


@contextmanager
def swept(*names: str, patience: float = PATIENCE) -> Iterator[None]:
    """With a sweeper. An exception counts as the end of this process: it then waits for that."""
    process = sweeper(names, patience=patience)
    yield
    dismiss(process)


def sweeper(names: tuple[str, ...], since: float | None = None, patience: float = PATIENCE, of: str = "") -> int:
    """Another process, which removes what is named like this and that a job has left long ago, and, if this process is
    killed, those of its job. `since`: when that began; else now. `of`: an entry of the environment that none but the job's
    processes have; what only others hold is not waited for. 0 where that cannot be seen, or there is no room for it."""
    parent, begun = os.getpid(), time() if since is None else since
    try:
        parents = os.pidfd_open(parent)
        process = os.fork()
    except (OSError, AttributeError):
        return 0
    if process == 0:
        _wait_and_sweep(parents, names, begun, patience, of)
    os.close(parents)
    return process


def dismiss(process: int) -> None:
    """The sweeper is needed no more."""
    if process:
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _wait_and_sweep(parents: int, names: tuple[str, ...], begun: float, patience: float, of: str) -> NoReturn:
    try:
        # Out of reach of what ends the job, and holding nothing of it: launchers wait until its output is closed.
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.closerange(0, parents)
        os.closerange(parents + 1, 65536)
        sweep(names, until=begun - OLD)
        select.select([parents], [], [])
        clean, end = 0, time() + patience
        while clean < 2 and time() < end:
            sleep(PAUSE)
            clean += not sweep(names, since=begun - CLOCK, of=of)
    finally:
        os._exit(0)


def sweep(names: tuple[str, ...], since: float = 0.0, until: float = float("inf"), of: str = "") -> bool:
    """Remove the files and folders of this user whose whole paths fit one of these patterns, were changed in this time, and
    are held by no process. Returns whether there were any but those that only processes without this entry `of` in their
    environment hold."""
    found = set()
    for pattern in names:
        # Of the folder, too, only what is no letter is written with a backslash.
        folder = os.path.dirname(pattern).replace("\\", "")
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if re.fullmatch(pattern, entry.path):
                    with suppress(OSError):
                        status = entry.stat(follow_symlinks=False)
                        if status.st_uid == os.getuid() and since <= status.st_mtime <= until:
                            found.add(entry.path)
    foreign: set[str] = set()
    # Where processes cannot be seen, nothing is removed.
    with suppress(OSError):
        held = _held(found) if found else {}
        for name in found - held.keys():
            if os.path.isdir(name):
                # Slow to import, and seldom needed.
                import shutil

                shutil.rmtree(name, ignore_errors=True)
            else:
                with suppress(OSError):
                    os.unlink(name)
        foreign = {name for name, pids in held.items() if not any(_has(pid, of) for pid in pids)}
    return bool(found - foreign)


def _held(names: set[str]) -> dict[str, set[str]]:
    """Those of the names that processes hold, and which processes do."""
    held: dict[str, set[str]] = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        # A file is open before it is mapped, and mapped before it is closed: looked at in this order, none slips through.
        for path in chain(_open(pid), _mapped(pid)):
            for name in names:
                if path == name or path.startswith(f"{name}/"):
                    held.setdefault(name, set()).add(pid)
    return held


def _has(pid: str, entry: str) -> bool:
    """Whether a process has this entry in its environment, as far as can be seen."""
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return not entry or entry.encode() in file.read().split(b"\0")
    return True


def _open(pid: str | int) -> list[str]:
    """The paths that a process has open."""
    paths = []
    with suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                paths.append(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return paths


def _mapped(pid: str | int) -> list[str]:
    """The paths that a process has mapped."""
    with suppress(OSError), open(f"/proc/{pid}/maps", errors="replace") as maps:
        return [fields[5].strip() for line in maps if len(fields := line.split(maxsplit=5)) == 6]
    return []


def unlink_names(comm: MPI.Intracomm) -> None:
    """Once all ranks of `comm`, the world, have opened what MPI has named, the names are not needed."""
    comm.Barrier()
    # Open MPI's ranks open one another's later; a rank that is alone can spare them.
    ours = MPI_NAMES if comm.size == 1 else (SHARED,)
    names = {p for p in _mapped("self") if p.startswith("/dev/shm/") and any(re.fullmatch(name, p) for name in ours)}
    # Its launcher is the parent, or a keeper's.
    for pid in (os.getppid(), _parent(os.getppid())):
        names |= {path for path in _open(pid) if re.fullmatch(TOPOLOGY, path)}
    for name in names:
        with suppress(OSError):
            os.unlink(name)
    comm.Barrier()


def _parent(pid: int) -> int:
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])
    return 0
