"""The space that MPI needs in shared memory, asked for before it starts: without it, MPICH dies of SIGBUS and names nothing."""

from __future__ import annotations

import glob
import os
import re
from contextlib import suppress

from parallel import remains

SHARED = "/dev/shm"
# What a rank of MPICH has there, measured: 1.01 MiB.
SEGMENT = 1.04 * 2**20


def missing(vendor: str, ranks: int) -> str | None:
    """What the MPI of this vendor needs in shared memory for so many ranks of a host, and does not find; None if it is there.

    To be called before MPI starts.
    """
    if vendor != "MPICH":
        # Open MPI goes other ways where there is too little.
        return None
    # Ranks of a host meet in MPICH's own memory. UCX, which carries what goes to other hosts, would add a way of its own, with
    # 4.1 MiB a rank; where those don't fit, it goes without, or MPICH finds no room. What a user has set is kept.
    os.environ.setdefault("UCX_TLS", "^sm")
    need = ranks * SEGMENT
    for_all = f"MPICH needs {need / 2**20:.1f} MiB there for {ranks} {'rank' if ranks == 1 else 'ranks'} of this host"
    try:
        if (free := _free()) < need:
            # What killed jobs have left may be all that is missing, or what other ranks have already taken for this one too.
            remains.sweep((remains.SHARED,))
            free = _free() + _taken()
    except OSError as error:
        return f"{SHARED}: {error.strerror}: {for_all}: mount a tmpfs there"
    if not os.access(SHARED, os.W_OK):
        return f"{SHARED} cannot be written to: {for_all}: mount a tmpfs there"
    if free < need:
        larger = "make it larger (docker run --shm-size), or start fewer ranks"
        return f"{SHARED} has {free / 2**20:.1f} MiB left, and {for_all}: {larger}"
    return None


def _free() -> int:
    space = os.statvfs(SHARED)
    return space.f_bavail * space.f_frsize


def _taken() -> int:
    """Bytes of what has a name still: MPI is starting on it."""
    taken = 0
    for name in glob.glob(f"{SHARED}/*"):
        with suppress(OSError):
            taken += os.stat(name).st_blocks * 512 if re.fullmatch(remains.SHARED, name) else 0
    return taken
