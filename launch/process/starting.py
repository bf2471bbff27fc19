"""The other ranks of this host until MPI runs, as a keeper sees them: one that ends before it has a keeper can say nothing, and
MPICH's launcher lets the others wait for it for ever. Standard library only, and Linux: elsewhere nothing is seen.
"""

from __future__ import annotations

from contextlib import suppress

from launch.process import launcher

# What starts ranks; another parent, as a shell, has not all of them.
LAUNCHERS = ("hydra_pmi_proxy", "mpirun", "mpiexec", "prterun", "prted")
# Seconds from one look to the next, and looks without anything new after which a rank that is not there does not come.
LOOK, SURE = 0.1, 10


class Others:
    """Of the ranks that this host's launcher has started: who has come, who has a keeper, who is gone."""

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._local = launcher.local_size() if named(parent) in LAUNCHERS else 0
        # Where all ranks are here, one that was never seen is known by its absence.
        self._expected = set(range(self._local)) if self._local == launcher.size() else set()
        self._ranks: dict[int, int] = {}
        self._kept: set[int] = set()
        self._missed = 0

    def gone(self) -> int | None:
        """A rank that has ended, or never came, and had no keeper to say so; None if there is none. To be asked each LOOK."""
        if self._local < 2:
            return None
        there, known = set(_children(self._parent)), len(self._ranks)
        for pid in there - self._kept:
            if (rank := self._ranks.get(pid, _rank(pid))) is not None:
                self._ranks[pid] = rank
                # Its child is the rank, and speaks for itself.
                if _children(pid):
                    self._kept.add(pid)
        kept = {self._ranks[pid] for pid in self._kept}
        here = {self._ranks[pid] for pid in there if pid in self._ranks}
        missing = (self._expected | {*self._ranks.values()}) - kept - here
        self._missed = self._missed + 1 if missing and there and len(self._ranks) == known else 0
        return min(missing) if self._missed >= SURE else None


def orphaned(parent: int) -> bool:
    """Whether what had started this rank was gone before the rank could look: then its parent is init, or a session's. Else it
    is a launcher, or a script that a launcher has started in the rank's place."""
    name = named(parent)
    return (parent == 1 or name == "systemd") and name not in LAUNCHERS and _rank(parent) is None


def named(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/comm") as file:
        return file.read().strip()
    return ""


def _children(pid: int) -> list[int]:
    """Of its first thread: launchers fork there."""
    with suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]
    return []


def _rank(pid: int) -> int | None:
    """As the launcher has told it; None before it is the program that was asked for, or when it is gone."""
    with suppress(OSError), open(f"/proc/{pid}/environ", errors="replace") as file:
        environ = dict(entry.split("=", 1) for entry in file.read().split("\0") if "=" in entry)
        return launcher.rank(environ) if launcher.size(environ) is not None else None
    return None
