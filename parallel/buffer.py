"""Arrays as MPI can take them: which dtypes, in which order in memory, and reductions that every MPI does alike."""

from __future__ import annotations

from functools import cache

import numpy as np
from mpi4py import MPI

# Reductions and buffers of these are the same on every MPI. float16, complex and bool are not, so they are refused.
DTYPES = tuple(np.dtype(t) for t in ("f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"))
_SENDABLE = frozenset(DTYPES)


@cache
def _nan_keeping(ufunc: np.ufunc, dtype: np.dtype) -> MPI.Op:
    """A reduction by `ufunc`. MPI's own MAX and MIN lose a NaN that one rank holds; np.maximum and np.minimum keep it."""

    def reduce(incoming: MPI.buffer, held: MPI.buffer, _: MPI.Datatype) -> None:
        held_array = np.frombuffer(held, dtype)
        ufunc(np.frombuffer(incoming, dtype), held_array, out=held_array)

    return MPI.Op.Create(reduce, commute=True)


def reduction(op: str, dtype: np.dtype) -> MPI.Op:
    if op == "sum":
        return MPI.SUM
    if op not in ("max", "min"):
        raise ValueError(f"unknown reduction {op!r}: use 'sum', 'max' or 'min'")
    if dtype.kind == "f":
        return _nan_keeping(np.maximum if op == "max" else np.minimum, dtype)
    return MPI.MAX if op == "max" else MPI.MIN


def sendable(x: np.ndarray) -> np.ndarray:
    """`x` itself if MPI can read it as it lies, else a C-ordered copy (MPI would read an F-ordered array permuted)."""
    if not isinstance(x, np.ndarray) or x.dtype not in _SENDABLE:
        kind = f"dtype {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"cannot send {kind}: use a NumPy array of {', '.join(d.name for d in DTYPES)}")
    return x if x.flags.c_contiguous else x.copy(order="C")


def require_own(x: np.ndarray) -> None:
    """What goes on beside computation cannot work on a copy: x itself is its buffer."""
    if sendable(x) is not x:
        raise ValueError(f"a verb that is started needs a C-contiguous array, got {x.shape} with strides {x.strides}")


class BufferChanged(RuntimeError):
    """A buffer was written to before its verb was complete."""


class Held:
    """The buffer x of a verb that is started, as it was then. With `in_place`, MPI works on a copy, which x gets at the end:
    until then nobody may change x."""

    def __init__(self, x: np.ndarray, in_place: bool) -> None:
        self._x, self._before, self.sent = x, x.copy(), x.copy() if in_place else x

    def release(self, what: object) -> None:
        """The verb is complete. Raises BufferChanged on this rank if x is not what it was."""
        if self._x.tobytes() != self._before.tobytes():
            at = np.unravel_index(np.flatnonzero(_apart(self._x, self._before))[0], self._x.shape)
            raise BufferChanged(
                f"{what} was under way when its buffer was changed: [{', '.join(map(str, at))}] was {self._before[at]}, "
                f"is {self._x[at]}: wait for it first"
            )
        if self.sent is not self._x:
            self._x[...] = self.sent


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether entries differ in any bit."""
    bytes_each = [np.ascontiguousarray(x).view(np.uint8).reshape(x.size, -1) for x in (a, b)]
    return (bytes_each[0] != bytes_each[1]).any(axis=1)


def result(x: np.ndarray, shape: tuple[int, ...], out: np.ndarray | None) -> np.ndarray:
    """Where a verb on `x` puts its result: `out`, if it fits, or a new array."""
    if out is None:
        return np.empty(shape, x.dtype)
    if out.shape != shape or out.dtype != x.dtype or not out.flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous {shape} {x.dtype}, got {out.shape} {out.dtype}")
    if np.may_share_memory(out, x):
        raise ValueError("out shares memory with the argument: verbs leave their argument alone")
    return out
