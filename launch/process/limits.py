"""What this process may have, and whether MPI can start with it: without descriptors some MPIs wait for ever, without addresses
libraries end the process without a word. Standard library only.
"""

from __future__ import annotations

import os

from launch.process import launcher, words

# Measured, with descriptors that are free below the limit, for so many ranks of a host: (at all, and for each).
MPICH, OPEN_MPI = (13, 2), (18, 1)
# MiB of addresses with which NumPy and MPI start, measured: 272, and 24 more for a second BLAS thread.
ADDRESSES = 264


def too_small() -> str | None:
    """The limit with which MPI cannot start on this rank, and what would do; None if there is none. For use before NumPy."""
    try:
        import resource
    except ImportError:
        # Not a system that has such limits, or one in which nothing more can be opened.
        return f"{words.name()} can open no more files: raise `ulimit -n`" if os.name == "posix" else None
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    always, each = OPEN_MPI if launcher.by_open_mpi() else MPICH
    need = always + each * launcher.local_size()
    if descriptors < 1024 and (free := sum(map(_closed, range(descriptors)))) < need:
        return (
            f"{words.name()} may have {descriptors} files open (`ulimit -n`), and MPI needs {need - free} more: "
            f"use `ulimit -n {descriptors + need - free}` or more"
        )
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses != resource.RLIM_INFINITY and addresses < ADDRESSES * 2**20:
        return (
            f"{words.name()} may have {addresses / 2**20:.0f} MiB of addresses (`ulimit -v`), and NumPy and MPI start with "
            f"{ADDRESSES} or more: use `ulimit -v {ADDRESSES * 1024}`, and more for the work"
        )
    return None


def _closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return False
