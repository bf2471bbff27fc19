"""Before a collective: do all ranks of the axis mean the same one?

MPI itself gives wrong numbers without a word when ranks differ in dtype, reduction or root. So each rank first sends the number
of its call and a hash of eight bytes to all others, on a communicator of the guard's own. Only where these differ are the calls
themselves exchanged.

What must agree: number, verb, shape, dtype, reduction, dim and cut, root, and the line that calls; of an exchange the shape of
a row, and that each rank expects as many rows as it is sent. By the line, two sums of one shape that a rank makes in another
order are seen. A broadcast may stand on two lines of a function, as only its root has something to say. The order in memory may
differ: verbs take any, and send in C order.

Messages between two have no such exchange, as a sender need not wait: they say themselves what they are (`parallel.message`).
"""

from __future__ import annotations

from collections.abc import Hashable
from hashlib import blake2b
from math import prod

import numpy as np
from mpi4py import MPI

from parallel.call import Call, Watched, Watcher
from parallel.text import aligned, named
from parallel.verbs import VERBS


class CollectiveMismatch(RuntimeError):
    """The ranks of an axis called different collectives. Raised on all of them."""


class Agreement(Watcher):
    """Checks every collective, and lets messages say what they are. With `most_bytes`, it checks the collectives of an axis
    (or group) until so many bytes were reduced or gathered on it, and no message: all ranks stop at the same call."""

    def __init__(self, most_bytes: int | None = None) -> None:
        self.most_bytes, self.labels_messages = most_bytes, most_bytes is None
        self._comms: dict[Watched, MPI.Intracomm] = {}
        self._bytes: dict[Watched, int] = {}
        self._digests: dict[tuple[Hashable, ...], int] = {}

    def begin(self, axis: Watched, call: Call, x: np.ndarray | None) -> None:
        """Raise CollectiveMismatch on every rank of the axis unless all have made the same call."""
        if axis.size == 1 or VERBS[call.verb].partner:
            return
        if self.most_bytes is not None:
            done = self._bytes.get(axis, 0)
            if done >= self.most_bytes:
                return
            self._bytes[axis] = done + prod(call.shape) * call.dtype.itemsize
        comm = self._comms.get(axis)
        if comm is None:
            comm = self._comms[axis] = axis.duplicate()
        every = np.empty((axis.size, 2), np.int64)
        comm.Allgather(np.array((call.number, self._digest(call)), np.int64), every)
        if (every != every[0]).any():
            order = "-" if x is None else "C" if x.flags.c_contiguous else "F" if x.flags.f_contiguous else "strided"
            raise CollectiveMismatch(explained(axis.name, axis.members, comm.allgather((call, order))))
        if call.rows:
            told = np.empty((axis.size, 2, axis.size), np.int64)
            comm.Allgather(np.array(call.rows, np.int64), told)
            _require_as_expected(axis, call, told)

    def _digest(self, call: Call) -> int:
        key = call.verb, call.started, call.shape, call.dtype, call.how, call.function, call.site
        digest = self._digests.get(key)
        if digest is None:
            file = call.site.rpartition(":")[0]
            text = repr((*key[:-1], file if VERBS[call.verb].one_speaks else call.site))
            digest = self._digests[key] = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
        return digest

    def close(self, axis: Watched) -> None:
        comm = self._comms.pop(axis, None)
        if comm is not None:
            comm.Free()


def _require_as_expected(axis: Watched, call: Call, told: np.ndarray) -> None:
    """Raise CollectiveMismatch unless each rank expects as many rows as it is sent. `told`: (rank, sent or received, rank)."""
    for source, to in np.argwhere(told[:, 0] != told[:, 1].T).tolist():
        raise CollectiveMismatch(
            f"on {axis.name}, rank {axis.members[source]} sends {told[source, 0, to]} rows to rank {axis.members[to]}, which "
            f"expects {told[to, 1, source]}, in {call} at {call.site} in {call.function}"
        )


def explained(axis: str, members: tuple[int, ...], calls: list[tuple[Call, str]]) -> str:
    """Who called what: a sentence that begins with the fewest ranks, and a table of all."""
    same_verb = len({str(call) for call, _ in calls}) == 1
    groups: dict[tuple, list[int]] = {}
    said: dict[int, str] = {}
    rows = [("rank", "call", "verb", "order", "at")]
    for rank, (call, order) in zip(members, calls, strict=True):
        key = (call.function, call.site) if same_verb else (str(call), call.number)
        groups.setdefault(key, []).append(rank)
        said[rank] = f"{call} at {call.site} in {call.function}"
        rows.append((str(rank), f"#{call.number}", str(call), order, f"{call.site} in {call.function}"))
    by_size = sorted(groups.values(), key=lambda g: (len(g), g))
    fewest, *others = [f"{named(g)} called {said[g[0]]}" for g in by_size]
    return "\n".join([f"on {axis}, {fewest} where {' and '.join(others)}", *aligned(rows)])


def require_same_layout(comm: MPI.Intracomm, sizes: dict[str, int]) -> None:
    """Raise CollectiveMismatch on every rank of `comm` unless all lay it out as the same mesh."""
    every = comm.allgather(" x ".join(f"{name}={n}" for name, n in sizes.items()))
    if len(set(every)) > 1:
        groups = {text: [r for r, other in enumerate(every) if other == text] for text in every}
        said = [f"{named(g)} as {text}" for text, g in sorted(groups.items(), key=lambda i: (len(i[1]), i[1]))]
        raise CollectiveMismatch(f"the ranks lay out different meshes: {', '.join(said)}")
