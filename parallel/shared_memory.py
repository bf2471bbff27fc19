"""Memory that the ranks of a host share, and that no folder has: nothing of it is left, whatever ends them."""

from __future__ import annotations

import os
import tempfile

from mpi4py import MPI


def shared_file(host: MPI.Intracomm, size: int) -> int:
    """An open file of so many bytes that all ranks of `host` share, and that no folder has. They call it together.

    It takes no room until it is written to.
    """
    if not hasattr(os, "memfd_create"):
        path = None
        if host.rank == 0:
            descriptor, path = tempfile.mkstemp(prefix="rankwise-")
            os.close(descriptor)
    elif host.rank == 0:
        # In memory: a temporary folder may be missing, full or read-only, and /dev/shm small.
        own = os.memfd_create("rankwise")
        path = f"/proc/{os.getpid()}/fd/{own}"
    else:
        path = None
    path = host.bcast(path)
    shared = os.open(path, os.O_RDWR)
    if host.rank == 0:
        os.truncate(shared, size)
    host.Barrier()
    if host.rank == 0:
        if path.startswith("/proc/"):
            os.close(own)
        else:
            os.unlink(path)
    return shared
