"""The memory of the other ranks of a host, read and written where it is, as MPIs do with large messages: on Linux, by
process_vm_readv and process_vm_writev."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import numpy as np
from mpi4py import MPI


class _Range(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


_library, _ranges = ctypes.CDLL(None, use_errno=True), ctypes.POINTER(_Range)
_read, _write = (getattr(_library, f"process_vm_{verb}v", None) for verb in ("read", "write"))
for _function in filter(None, (_read, _write)):
    _function.argtypes = [ctypes.c_int, _ranges, ctypes.c_ulong, _ranges, ctypes.c_ulong, ctypes.c_ulong]
    _function.restype = ctypes.c_ssize_t


def address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


class Peers:
    """The ranks of `host`, which make it together. `open`: whether each may read and write the others' memory: a kernel, a
    container or a user of their own can forbid that."""

    def __init__(self, host: MPI.Intracomm) -> None:
        # What each rank knows is read there, and each writes its rank where others will find it.
        known, written = np.array([os.getpid(), host.rank]), np.full(host.size, -1)
        every = host.allgather((os.getpid(), address(known), address(written)))
        self._pids = [pid for pid, *_ in every]
        try:
            found = np.empty_like(known)
            for rank, (pid, known_at, written_at) in enumerate(every):
                self.read(rank, known_at, found)
                if found.tolist() != [pid, rank]:
                    raise OSError
                self.write(rank, written_at + host.rank * written.itemsize, known[1:])
            mine = True
        except OSError:
            mine = False
        # Together, and after the others have read and written what is here.
        self.open = host.allreduce(mine, MPI.LAND) and host.allreduce(written.tolist() == [*range(host.size)], MPI.LAND)

    def read(self, rank: int, at: int, into: np.ndarray) -> None:
        """Fill an array, C-contiguous, with what that rank has at this address. Raises OSError."""
        self._move(_read, rank, at, into)

    def write(self, rank: int, at: int, what: np.ndarray) -> None:
        """Put an array, C-contiguous, at this address of that rank's. Raises OSError."""
        self._move(_write, rank, at, what)

    def _move(self, call: Callable[..., int] | None, rank: int, at: int, x: np.ndarray) -> None:
        if call is None:
            raise OSError("this system gives no access to another process's memory")
        done, own = 0, address(x)
        while done < x.nbytes:
            here, there = _Range(own + done, x.nbytes - done), _Range(at + done, x.nbytes - done)
            n = call(self._pids[rank], here, 1, there, 1, 0)
            if n <= 0:
                raise OSError(ctypes.get_errno(), f"no access to the memory of process {self._pids[rank]}")
            done += n
