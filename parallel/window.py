"""A window of memory that the ranks of a host share, through which arrays of any size go in rounds.

In a round each rank *puts* something into a slot of its own, *takes* what it wants out of all ranks' slots, and says so. A slot is
written to again when all have taken. That is all that keeps ranks in step: two counters a rank, how many rounds it has put and how
many it has taken, each written by one rank alone and read by the others. No rank waits for another that it needs nothing of.

Everything here is a generator that yields where it has to wait for other ranks, so that a rank may do something else meanwhile.
All ranks go through the same rounds in the same order.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from threading import Lock

import numpy as np
from mpi4py import MPI

from parallel.shared_memory import shared_file

# Of a rank, so many slots of so many bytes: small enough to stay in the caches, large enough that rounds are few.
SLOTS, SLOT = 2, 2**20
# Counters stand apart by a line of the cache, in words.
_LINE = 16
Steps = Iterator[None]


class Window:
    """Of the ranks of `host`, which make it together. It has no name, and is gone with the last of them."""

    def __init__(self, host: MPI.Intracomm, slot: int = SLOT) -> None:
        self.rank, self.size = host.rank, host.size
        # Slots begin at a page, and so at a multiple of any entry.
        self._slot = -(-slot // mmap.PAGESIZE) * mmap.PAGESIZE
        head = -(-2 * self.size * _LINE * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        size = head + self.size * SLOTS * self._slot
        file = shared_file(host, size)
        memory = mmap.mmap(file, size)
        os.close(file)
        self._counters = memoryview(memory)[:head].cast("q")
        self._room = np.frombuffer(memory, np.uint8, offset=head).reshape(self.size, SLOTS, self._slot)
        self._typed: dict[np.dtype, np.ndarray] = {}
        self._rounds, self._lock = 0, Lock()

    def _of(self, rank: int, taken: bool) -> int:
        return (2 * rank + taken) * _LINE

    def _say(self, rounds: int, taken: bool) -> None:
        self._fence()
        self._counters[self._of(self.rank, taken)] = rounds

    def _all(self, rounds: int, taken: bool) -> Steps:
        """Until all ranks have put, or taken, so many rounds."""
        for rank in range(self.size):
            at = self._of(rank, taken)
            while self._counters[at] < rounds:
                yield
        self._fence()

    def _fence(self) -> None:
        """What is read or written before this line is so before what comes after it, on processors that reorder too: a lock
        keeps what comes after taking it behind, and what comes before giving it back before."""
        for _ in range(2):
            with self._lock:
                pass

    def _round(self, put: Callable[[np.ndarray], None], take: Callable[[np.ndarray], None], dtype: np.dtype) -> Steps:
        which = self._rounds
        self._rounds += 1
        slots = self._typed.get(dtype)
        if slots is None:
            slots = self._typed[dtype] = self._room.view(dtype)
        slots = slots[:, which % SLOTS]
        yield from self._all(which + 1 - SLOTS, taken=True)
        put(slots[self.rank])
        self._say(which + 1, taken=False)
        yield from self._all(which + 1, taken=False)
        take(slots)
        self._say(which + 1, taken=True)

    def reduces(self, dtype: np.dtype) -> int:
        """How many entries one round of `reduce` adds."""
        return self._slot // self.size // dtype.itemsize * self.size

    def reduce(self, parts: Sequence[np.ndarray], y: np.ndarray, add: np.ufunc) -> Steps:
        """y: the sum, in rank order, over what all ranks hold of this rank's part. `parts`: this rank's x, by whose they are,
        (entries,); y may be this rank's part itself."""
        me, width = self.rank, self._slot // self.size // y.itemsize
        for at in range(0, max(p.size for p in parts), width):

            def put(slot: np.ndarray, at: int = at) -> None:
                for rank, part in enumerate(parts):
                    if rank != me:
                        piece = part[at : at + width]
                        slot[rank * width : rank * width + piece.size] = piece

            def take(slots: np.ndarray, at: int = at) -> None:
                mine = parts[me][at : at + width]
                terms = slots[:, me * width : me * width + mine.size]
                # What this rank holds must not be overwritten before it is added.
                total = y[at : at + width] if me < 2 else terms[me]
                if self.size == 1:
                    total[...] = mine
                for rank in range(1, self.size):
                    before = total if rank > 1 else mine if me == 0 else terms[0]
                    add(before, mine if rank == me else terms[rank], out=total)
                if me >= 2:
                    y[at : at + width] = total

            yield from self._round(put, take, y.dtype)

    def gather(self, mine: np.ndarray, parts: Sequence[np.ndarray | None], sizes: Sequence[int]) -> Steps:
        """Fill `parts`, by rank, with what each rank has as `mine`, (entries,), but this one's own. None: not wanted here.
        `sizes`: entries of each."""
        me, width = self.rank, self._slot // mine.itemsize
        for at in range(0, max(sizes), width):

            def put(slot: np.ndarray, at: int = at) -> None:
                piece = mine[at : at + width]
                slot[: piece.size] = piece

            def take(slots: np.ndarray, at: int = at) -> None:
                for rank, part in enumerate(parts):
                    if rank != me and part is not None:
                        piece = part[at : at + width]
                        piece[...] = slots[rank, : piece.size]

            yield from self._round(put, take, mine.dtype)
