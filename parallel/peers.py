"""The memory of the other ranks of a host, read where it is (Linux: process_vm_readv), as MPIs do with large messages."""

from __future__ import annotations

import ctypes
import os

import numpy as np
from mpi4py import MPI


class _Range(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


_read = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
if _read is not None:
    _ranges = ctypes.POINTER(_Range)
    _read.argtypes = [ctypes.c_int, _ranges, ctypes.c_ulong, _ranges, ctypes.c_ulong, ctypes.c_ulong]
    _read.restype = ctypes.c_ssize_t


def address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


class Peers:
    """The ranks of `host`, which make it together. `readable`: whether each may read the others' memory: a kernel, a container
    or a user of their own can forbid that."""

    def __init__(self, host: MPI.Intracomm) -> None:
        known = np.array([os.getpid(), host.rank])
        every = host.allgather((os.getpid(), address(known)))
        self._pids = [pid for pid, _ in every]
        try:
            found = np.empty_like(known)
            for rank, (pid, at) in enumerate(every):
                self.read(rank, at, found)
                if found.tolist() != [pid, rank]:
                    raise OSError
            mine = True
        except OSError:
            mine = False
        # Together, and after the others have read what is known here.
        self.readable = host.allreduce(mine, MPI.LAND)

    def read(self, rank: int, at: int, into: np.ndarray) -> None:
        """Fill an array, C-contiguous, with what that rank has at this address. Raises OSError."""
        if _read is None:
            raise OSError("this system reads no other process's memory")
        done, to = 0, address(into)
        while done < into.nbytes:
            here, there = _Range(to + done, into.nbytes - done), _Range(at + done, into.nbytes - done)
            n = _read(self._pids[rank], here, 1, there, 1, 0)
            if n <= 0:
                raise OSError(ctypes.get_errno(), f"cannot read the memory of process {self._pids[rank]}")
            done += n
