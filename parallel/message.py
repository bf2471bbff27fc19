"""A message between two ranks as it travels: its tag, its label, and what is told of one that its receiver does not expect.

The tag carries the dtype: MPI itself would take the bytes for another dtype without a word. A message with a label begins with
what it is meant to be, so that one taken for another of the same size is named instead of computed with.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

from parallel.buffer import DTYPES
from parallel.call import Watcher, site

# Bytes of a label; the tag of a message that has one is so much higher.
_LABEL, _LABELLED = 256, len(DTYPES)


class MessageMismatch(ValueError):
    """A message is not the one that its receiver expects. Raised on the receiver."""


def packed(x: np.ndarray, what: str, watchers: list[Watcher]) -> tuple[np.ndarray, int]:
    """The buffer that is sent for C-contiguous x, and its tag. `what`: what it is meant to be; a watcher may want it told."""
    tag = DTYPES.index(x.dtype)
    if not watchers or True not in [w.labels_messages for w in watchers]:
        return x, tag
    label = "\t".join((_said(x, what), " in ".join(site())[-120:])).encode()[:_LABEL]
    return np.frombuffer(label.ljust(_LABEL, b"\0") + x.tobytes(), np.uint8), tag + _LABELLED


def fill(y: np.ndarray, comm: MPI.Intracomm, source: int, what: str, axis: str) -> None:
    """Fill y with what rank `source` of `comm`, the ranks of `axis`, sent next. Raises MessageMismatch."""
    status = MPI.Status()
    message = comm.Mprobe(source, MPI.ANY_TAG, status)
    tag, nbytes = status.tag, status.Get_count(MPI.BYTE)
    if tag >= _LABELLED:
        came = np.empty(nbytes, np.uint8)
        message.Recv(came)
        meant, _, place = came[:_LABEL].tobytes().rstrip(b"\0").decode(errors="replace").partition("\t")
        if meant != _said(y, what):
            raise MessageMismatch(f"rank {source} of {axis} sent {meant} at {place}, receive expected {_said(y, what)}")
        y.reshape(-1).view(np.uint8)[...] = came[_LABEL:]
    elif DTYPES[tag] == y.dtype and nbytes == y.nbytes:
        message.Recv(y)
    else:
        message.Recv(np.empty(nbytes, np.uint8))
        sent = f"{nbytes // DTYPES[tag].itemsize} {DTYPES[tag]}"
        raise MessageMismatch(f"rank {source} of {axis} sent {sent}, receive expected {_said(y, what)}")


def _said(x: np.ndarray, what: str) -> str:
    return " ".join([*([what[:48]] if what else []), str(x.shape), str(x.dtype)])
