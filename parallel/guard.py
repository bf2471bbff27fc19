"""Before a collective: do all ranks of the axis mean the same one?

MPI itself gives wrong numbers without a word when ranks differ in dtype, reduction or root. Each rank's description goes,
hashed to eight bytes, to all others on a communicator of its own; only on a difference are the descriptions exchanged.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from mpi4py import MPI


class CollectiveMismatch(RuntimeError):
    """The ranks of an axis called different collectives. Raised on all of them."""


class Agreement:
    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm.Dup()

    def close(self) -> None:
        self._comm.Free()

    def require(self, *described: object) -> None:
        """Raise CollectiveMismatch on every rank unless `described` is the same on all of them."""
        text = " ".join(str(d) for d in described)
        mine = np.frombuffer(blake2b(text.encode(), digest_size=8).digest(), np.int64)
        every = np.empty(self._comm.size, np.int64)
        self._comm.Allgather(mine, every)
        if (every != every[0]).any():
            texts = self._comm.allgather(text)
            ranks = {t: [r for r, other in enumerate(texts) if other == t] for t in dict.fromkeys(texts)}
            raise CollectiveMismatch("; ".join(f"rank {', '.join(map(str, r))} called {t}" for t, r in ranks.items()))
