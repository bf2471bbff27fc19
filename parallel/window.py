"""A window of memory that the ranks of a host share, through which arrays of any size go in rounds.

In a round each rank *puts* something into a slot of its own, *takes* what it wants out of all ranks' slots, and says so. A
slot is written to again when all have taken. All that keeps ranks in step are two counters a rank: how many rounds it has put,
and how many it has taken. One rank alone writes a counter, the others read it.

Everything here is a generator that yields where it has to wait for other ranks, so that a rank may do something else meanwhile.
All ranks go through the same rounds in the same order.
"""

from __future__ import annotations

import mmap
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from zlib import crc32

import numpy as np
from mpi4py import MPI

from parallel.peers import Peers, address
from parallel.shared_memory import shared_file

# Of a rank, so many slots of so many bytes: small enough to stay in the caches, large enough that rounds are few.
SLOTS, SLOT = 2, 2**21
# A sum for all, or a rank's part, of so many bytes goes from memory to memory where that is allowed, in pieces that stay in
# the caches.
DIRECT, PIECE = 2**20, 2**18
# Counters stand apart by a line of the cache, in words.
_LINE = 16
# Whether this processor lets no other see what it writes, nor sees what others write, in another order.
IN_ORDER = platform.machine() in ("x86_64", "AMD64")
Steps = Iterator[None]
_WORD = np.dtype("i8")


class Window:
    """Of the ranks of `host`, which make it together. It has no name, and is gone with the last of them."""

    def __init__(self, host: MPI.Intracomm, slot: int = SLOT) -> None:
        self.rank, self.size = host.rank, host.size
        # Slots begin at a page, and so at a multiple of any entry.
        self._slot = -(-slot // mmap.PAGESIZE) * mmap.PAGESIZE
        self._peers = Peers(host)
        head = -(-2 * self.size * _LINE * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        size = head + self.size * SLOTS * self._slot
        file = shared_file(host, size)
        memory = mmap.mmap(file, size)
        os.close(file)
        self._counters = memoryview(memory)[:head].cast("q")
        self._room = np.frombuffer(memory, np.uint8, offset=head).reshape(self.size, SLOTS, self._slot)
        # By dtype and slot: of all ranks, (ranks, entries).
        self._typed: dict[np.dtype, list[np.ndarray]] = {}
        # Where it is counted how many rounds each rank has put, and taken; of the others, and of this one.
        places = [[(2 * r + taken) * _LINE for r in range(self.size)] for taken in (0, 1)]
        self._mine = [of_kind.pop(self.rank) for of_kind in places]
        self._put, self._taken = places
        self._rounds, self._lock = 0, Lock()
        # Arrays of this rank whose addresses others have.
        self._lent: Sequence[np.ndarray] = ()

    def _fence(self) -> None:
        """What is read or written before this line is so before what comes after it: a lock keeps what comes after taking it
        behind, and what comes before giving it back before."""
        for _ in range(2):
            with self._lock:
                pass

    def _round(self, put: Callable[[np.ndarray], None], take: Callable[[np.ndarray], None], dtype: np.dtype) -> Steps:
        which, counters = self._rounds, self._counters
        self._rounds = after = which + 1
        typed = self._typed.get(dtype)
        if typed is None:
            typed = self._typed[dtype] = [self._room[:, n].view(dtype) for n in range(SLOTS)]
        slots = typed[which % SLOTS]
        for at in self._taken:
            while counters[at] < after - SLOTS:
                yield
        if not IN_ORDER:
            self._fence()
        put(slots[self.rank])
        if not IN_ORDER:
            self._fence()
        counters[self._mine[0]] = after
        for at in self._put:
            while counters[at] < after:
                yield
        if not IN_ORDER:
            self._fence()
        take(slots)
        if not IN_ORDER:
            self._fence()
        counters[self._mine[1]] = after

    def sum(self, x: np.ndarray, y: np.ndarray, add: np.ufunc) -> Steps:
        """y: the sum, in rank order, over all ranks' x, (entries,). Every rank adds all of it; y may be x."""
        width = self._slot // y.itemsize
        for at in range(0, x.size, width):

            def put(slot: np.ndarray, at: int = at) -> None:
                piece = x[at : at + width]
                slot[: piece.size] = piece

            def take(slots: np.ndarray, at: int = at) -> None:
                total = y[at : at + width]
                terms = slots[:, : total.size]
                if self.size == 1:
                    total[...] = terms[0]
                for rank in range(1, self.size):
                    add(terms[0] if rank == 1 else total, terms[rank], out=total)

            yield from self._round(put, take, y.dtype)

    def directly(self, size: int) -> bool:
        """Whether so many bytes go from memory to memory; alike on all ranks."""
        return size >= DIRECT and self._peers.open

    def entries(self, dtype: np.dtype) -> int:
        """How many go into a slot: so many are gathered of each rank, or added over all, in one round."""
        return self._slot // dtype.itemsize

    def reduce(self, parts: Sequence[np.ndarray], y: np.ndarray, add: np.ufunc) -> Steps:
        """y: the sum, in rank order, over what all ranks hold of this rank's part. `parts`: this rank's x, by whose they are,
        (entries,); y may be this rank's part itself."""
        me, width = self.rank, self._slot // self.size // y.itemsize
        if self.directly(max(p.nbytes for p in parts)):
            yield from self._reduce_directly(parts, y, add)
            return
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
        """Fill `parts`, by rank, with what each rank has as `mine`, (entries,). None: not wanted here. `sizes`: entries of
        each."""
        me, width = self.rank, self._slot // mine.itemsize
        if self.directly(max(sizes) * mine.itemsize):
            yield from self._gather_directly(mine, parts, sizes)
            return
        for at in range(0, max(sizes), width):

            def put(slot: np.ndarray, at: int = at) -> None:
                piece = mine[at : at + width]
                slot[: piece.size] = piece
                # Now that it is in the caches.
                if parts[me] is not None:
                    parts[me][at : at + width] = piece

            def take(slots: np.ndarray, at: int = at) -> None:
                for rank, part in enumerate(parts):
                    if rank != me and part is not None:
                        piece = part[at : at + width]
                        piece[...] = slots[rank, : piece.size]

            yield from self._round(put, take, mine.dtype)

    # --- from memory to memory

    def _directly(self, what: object, arrays: Sequence[np.ndarray], take: Callable[[list[list[int]]], None]) -> Steps:
        """One round in which each rank puts where its `arrays` are, and takes by all ranks' addresses. Nobody goes on before
        all have taken. `what` the ranks do must be alike, lest one writes beyond another's array: ValueError."""
        tag = crc32(repr(what).encode())

        def put(slot: np.ndarray) -> None:
            slot[: 1 + len(arrays)] = [tag, *map(address, arrays)]

        def checked(slots: np.ndarray) -> None:
            if others := [rank for rank in range(self.size) if slots[rank, 0] != tag]:
                raise ValueError(f"rank {others[0]} of this host adds or gathers something else than {what}")
            take(slots[:, 1 : 1 + len(arrays)].tolist())

        # Others may still read and write these, whatever ends this rank's own part.
        self._lent = arrays
        yield from self._round(put, checked, _WORD)
        for at in self._taken:
            while self._counters[at] < self._rounds:
                yield
        if not IN_ORDER:
            self._fence()
        self._lent = ()

    def sum_directly(self, x: np.ndarray, y: np.ndarray, counts: Sequence[int], add: np.ufunc) -> Steps:
        """y: the sum, in rank order, over all ranks' x, (entries,). Each rank adds a part, of `counts` entries, and writes it
        into all ranks' y while it is in the caches; y may be x."""
        begin = sum(counts[: self.rank])
        mine, offset = slice(begin, begin + counts[self.rank]), begin * y.itemsize

        def take(places: list[list[int]]) -> None:
            for at, piece in self._added([x_at + offset for x_at, _ in places], x[mine], y[mine], add):
                for rank, (_, y_at) in enumerate(places):
                    if rank != self.rank:
                        self._peers.write(rank, y_at + offset + at, piece)

        yield from self._directly(("all_reduce", add.__name__, y.dtype.str, *counts), [x, y], take)

    def _reduce_directly(self, parts: Sequence[np.ndarray], y: np.ndarray, add: np.ufunc) -> Steps:
        def take(places: list[list[int]]) -> None:
            for _ in self._added([of_rank[self.rank] for of_rank in places], parts[self.rank], y, add):
                pass

        yield from self._directly(("reduce_scatter", add.__name__, y.dtype.str, *(p.size for p in parts)), parts, take)

    def _gather_directly(self, mine: np.ndarray, parts: Sequence[np.ndarray | None], sizes: Sequence[int]) -> Steps:
        def take(places: list[list[int]]) -> None:
            for rank, part in enumerate(parts):
                if part is not None and rank == self.rank:
                    part[...] = mine
                elif part is not None:
                    self._peers.read(rank, places[rank][0], part)

        yield from self._directly(("all_gather", mine.dtype.str, *sizes), [mine], take)

    def _added(self, places: Sequence[int], mine: np.ndarray, y: np.ndarray, add: np.ufunc) -> Iterator[tuple[int, np.ndarray]]:
        """Fill y, a piece at a step, with the sum over `mine` and what the others have at these addresses: of each piece where
        it begins, in bytes, and the piece."""
        me, width, apart = self.rank, PIECE // y.itemsize, address(mine) != address(y)
        read = np.empty((2, width), y.dtype)
        for at in range(0, y.size, width):
            own, total = mine[at : at + width], y[at : at + width]
            # What this rank holds must not be overwritten before it is added.
            to = total if apart or me < 2 else read[0, : own.size]
            before = None
            for rank, place in enumerate(places):
                term = own
                if rank != me:
                    # The first of the others goes where the sum will be: a piece less in the caches.
                    term = total if apart and rank == (me == 0) else read[int(rank > 0), : own.size]
                    self._peers.read(rank, place + at * y.itemsize, term)
                before = term if before is None else add(before, term, out=to)
            if before is not total:
                total[...] = before
            yield at * y.itemsize, total
