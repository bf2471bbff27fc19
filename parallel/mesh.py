"""A mesh of ranks, and the verbs with which the ranks of one axis exchange arrays.

    mesh = Mesh(comm, dp=2, tp=2)      # 4 ranks; the last axis varies fastest: ranks 0 and 1 are one tp group
    y_TD = mesh.tp.all_reduce(partial_TD)

Every verb returns a new array (or fills `out`), leaves its argument alone, takes any memory order, and enters what it
sent in the mesh's ledger. An axis of one rank is an ordinary axis.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from math import prod
from time import perf_counter

import numpy as np
from mpi4py import MPI

from parallel.guard import Agreement
from parallel.ledger import Ledger, Row
from parallel.shard import Cut

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


def _reduction(op: str, dtype: np.dtype) -> MPI.Op:
    if op == "sum":
        return MPI.SUM
    if op not in ("max", "min"):
        raise ValueError(f"unknown reduction {op!r}: use 'sum', 'max' or 'min'")
    if dtype.kind == "f":
        return _nan_keeping(np.maximum if op == "max" else np.minimum, dtype)
    return MPI.MAX if op == "max" else MPI.MIN


def _sendable(x: np.ndarray) -> np.ndarray:
    """`x` itself if MPI can read it as it lies, else a C-ordered copy (MPI would read an F-ordered array permuted)."""
    if not isinstance(x, np.ndarray) or x.dtype not in _SENDABLE:
        kind = f"dtype {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"cannot send {kind}: use a NumPy array of {', '.join(d.name for d in DTYPES)}")
    return x if x.flags.c_contiguous else x.copy(order="C")


def _require_own(x: np.ndarray) -> None:
    """What goes on beside computation cannot work on a copy: x itself is its buffer."""
    if _sendable(x) is not x:
        raise ValueError(f"a verb that is started needs a C-contiguous array, got {x.shape} with strides {x.strides}")


def _result(x: np.ndarray, shape: tuple[int, ...], out: np.ndarray | None) -> np.ndarray:
    """Where a verb on `x` puts its result: `out`, if it fits, or a new array."""
    if out is None:
        return np.empty(shape, x.dtype)
    if out.shape != shape or out.dtype != x.dtype or not out.flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous {shape} {x.dtype}, got {out.shape} {out.dtype}")
    if np.may_share_memory(out, x):
        raise ValueError("out shares memory with the argument: verbs leave their argument alone")
    return out


class Pending:
    """A verb under way: `wait` for its result; until then its buffers belong to it.

    `poke` now and then while computing: some MPI libraries only move data inside MPI calls. The ledger's seconds are those
    spent in starting, poking and waiting; what the verb took beyond these was hidden behind computation.
    """

    def __init__(self, request: MPI.Request, result: np.ndarray, row: Row, begun: float) -> None:
        self._request, self._result, self._row = request, result, row
        self._begun, self._inside, self._done = begun, perf_counter() - begun, False

    def poke(self) -> None:
        if not self._done:
            self._call(self._request.Test)

    def wait(self) -> np.ndarray:
        """The result, once it is there."""
        if not self._done:
            self._call(lambda: self._request.Wait() or True)
        return self._result

    def _call(self, complete: Callable[[], bool]) -> None:
        entered = perf_counter()
        self._done = complete()
        left = perf_counter()
        self._inside += left - entered
        if self._done:
            self._row.seconds += self._inside
            self._row.hidden_seconds += left - self._begun - self._inside


def group_name(axis: str, ranks: range) -> str:
    """What the ledger calls the group of `ranks` on `axis`: tp[1..2]."""
    return f"{axis}[{ranks.start}..{ranks.stop - 1}]"


class Axis:
    """The ranks that differ from this one in a single mesh coordinate.

    `name`: str. `size`: ranks on the axis. `rank`: this one's place on it. Errors raised before anything is sent: TypeError
    for a dtype that MPI would not treat alike everywhere, ValueError for a shape that is not what the cut says.
    """

    def __init__(self, name: str, comm: MPI.Intracomm, ledger: Ledger, check: bool = False) -> None:
        self.name, self.ledger = name, ledger
        self.size, self.rank = comm.size, comm.rank
        self._comm = comm
        self._agreement = Agreement(comm) if check else None
        self._groups: dict[range, Axis] = {}

    def group(self, ranks: range) -> Axis:
        """The axis of some ranks that follow one another on this one, made at the first call: each of them calls it.

        Named `tp[1..2]`. Ranks in several groups make them in ascending order, so that none waits in a circle.
        """
        if self.rank not in ranks or ranks.step != 1 or not 0 <= ranks.start < ranks.stop <= self.size:
            raise ValueError(f"rank {self.rank} of {self.name} ({self.size} ranks) cannot make a group of ranks {list(ranks)}")
        if ranks not in self._groups:
            members = self._comm.Get_group()
            chosen = members.Incl(list(ranks))
            name = group_name(self.name, ranks)
            self._groups[ranks] = Axis(name, self._comm.Create_group(chosen), self.ledger, self._agreement is not None)
            chosen.Free()
            members.Free()
        return self._groups[ranks]

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
        if self._agreement is not None:
            self._agreement.close()
        self._comm.Free()

    def _run(self, verb: str, call: Callable[[], None], message_bytes: int, *agreed: object) -> None:
        """Run one collective: see that the ranks mean the same, do it, and enter it in the ledger."""
        if self._agreement is not None:
            self._agreement.require(verb, *agreed)
        start = perf_counter()
        call()
        self.ledger.add(verb, self.name, message_bytes, self.size, perf_counter() - start)

    def _start(
        self, verb: str, call: Callable[[], MPI.Request], result: np.ndarray, message_bytes: int, *agreed: object
    ) -> Pending:
        """Start one collective: as _run, but it goes on while the rank computes."""
        if self._agreement is not None:
            self._agreement.require(f"start_{verb}", *agreed)
        begun = perf_counter()
        request = call()
        return Pending(request, result, self.ledger.add(verb, self.name, message_bytes, self.size, 0.0), begun)

    def _require_cut(self, cut: Cut, shape: tuple[int, ...], dim: int, length: int) -> None:
        if cut.ranks != self.size:
            raise ValueError(f"the cut is over {cut.ranks} ranks, axis {self.name} has {self.size}")
        if shape[dim] != length:
            raise ValueError(f"rank {self.rank} of {self.name}: dim {dim} of {shape} should have {length} entries")

    def all_reduce(self, x: np.ndarray, op: str = "sum", out: np.ndarray | None = None) -> np.ndarray:
        """The sum ('max', 'min') over the axis, on every rank. x: any shape, the same on every rank. NaN is kept."""
        x, mpi_op = _sendable(x), _reduction(op, x.dtype)
        y = _result(x, x.shape, out)
        self._run("all_reduce", lambda: self._comm.Allreduce(x, y, mpi_op), x.nbytes, x.shape, x.dtype, op)
        return y

    def start_all_reduce(self, x: np.ndarray) -> Pending:
        """Sum x over the axis while this rank computes on. In place: x is the result once `wait` returns it."""
        _require_own(x)
        call = lambda: self._comm.Iallreduce(MPI.IN_PLACE, x, MPI.SUM)  # noqa: E731
        return self._start("all_reduce", call, x, x.nbytes, x.shape, x.dtype)

    def start_reduce_scatter(self, x: np.ndarray, cut: Cut) -> Pending:
        """This rank's part, along the first dim, of the sum over the axis, while it computes on. x must stay as it is."""
        _require_own(x)
        self._require_cut(cut, x.shape, 0, cut.length)
        row = x[:1].size
        y = np.empty((cut.size(self.rank), *x.shape[1:]), x.dtype)
        call = lambda: self._comm.Ireduce_scatter(x, y, [n * row for n in cut.sizes], MPI.SUM)  # noqa: E731
        return self._start("reduce_scatter", call, y, x.nbytes, x.shape, x.dtype, cut)

    def all_gather(self, x: np.ndarray, dim: int, cut: Cut, out: np.ndarray | None = None) -> np.ndarray:
        """The whole array on every rank, from parts cut along `dim`. x: this rank's part. `out`: for dim 0 of a partition."""
        x = _sendable(x)
        self._require_cut(cut, x.shape, dim, cut.size(self.rank))
        row = x.size // x.shape[dim]
        counts = [row * n for n in cut.sizes]
        whole_shape = (*x.shape[:dim], cut.length, *x.shape[dim + 1 :])
        if out is not None and not (cut.is_partition and dim == 0):
            raise ValueError(f"all_gather fills out only for a partition of dim 0, not {cut} of dim {dim}")
        flat = (np.empty(sum(counts), x.dtype) if out is None else _result(x, whole_shape, out)).reshape(-1)
        call = lambda: self._comm.Allgatherv(x, [flat, counts])  # noqa: E731
        self._run("all_gather", call, flat.nbytes, whole_shape, x.dtype, dim, cut)
        if cut.is_partition and dim == 0:
            return flat.reshape(whole_shape)
        ends = np.cumsum(counts)
        shapes = [(*x.shape[:dim], n, *x.shape[dim + 1 :]) for n in cut.sizes]
        return cut.join([flat[e - c : e].reshape(s) for e, c, s in zip(ends, counts, shapes, strict=True)], dim)

    def reduce_scatter(self, x: np.ndarray, dim: int, cut: Cut) -> np.ndarray:
        """This rank's part, along `dim`, of the sum over the axis. x: whole, the same shape on every rank."""
        x = _sendable(x)
        self._require_cut(cut, x.shape, dim, cut.length)
        parts = [x[cut.index(dim, r)] for r in range(self.size)]
        packed = np.concatenate([p.reshape(-1) for p in parts])
        y = np.empty(parts[self.rank].shape, x.dtype)
        call = lambda: self._comm.Reduce_scatter(packed, y, [p.size for p in parts], MPI.SUM)  # noqa: E731
        self._run("reduce_scatter", call, packed.nbytes, x.shape, x.dtype, dim, cut)
        return y

    def all_to_all(self, x: np.ndarray, split_dim: int, split: Cut, join_dim: int, join: Cut) -> np.ndarray:
        """Move the cut from `join_dim` to `split_dim`. x: whole along split_dim, this rank's part along join_dim;
        the result: this rank's part along split_dim, whole along join_dim."""
        x = _sendable(x)
        if split_dim == join_dim:
            raise ValueError(f"all_to_all moves a cut from one dim to another, both are {split_dim}")
        self._require_cut(split, x.shape, split_dim, split.length)
        self._require_cut(join, x.shape, join_dim, join.size(self.rank))
        sent = [x[split.index(split_dim, r)] for r in range(self.size)]
        packed = np.concatenate([p.reshape(-1) for p in sent])
        shapes = []
        for n in join.sizes:
            shape = list(sent[self.rank].shape)
            shape[join_dim] = n
            shapes.append(tuple(shape))
        counts = [prod(s) for s in shapes]
        flat = np.empty(sum(counts), x.dtype)
        call = lambda: self._comm.Alltoallv([packed, [p.size for p in sent]], [flat, counts])  # noqa: E731
        others = tuple(n for d, n in enumerate(x.shape) if d != join_dim)
        self._run("all_to_all", call, packed.nbytes, others, x.dtype, split_dim, split, join_dim, join)
        ends = np.cumsum(counts)
        return join.join([flat[e - c : e].reshape(s) for e, c, s in zip(ends, counts, shapes, strict=True)], join_dim)

    def broadcast(self, x: np.ndarray, root: int = 0) -> np.ndarray:
        """Rank `root`'s x on every rank. x: the same shape and dtype on every rank, its content read on root only."""
        if not 0 <= root < self.size:
            raise ValueError(f"no rank {root} on axis {self.name}: use 0 to {self.size - 1}")
        y = _sendable(x).copy() if self.rank == root else np.empty(_sendable(x).shape, x.dtype)
        self._run("broadcast", lambda: self._comm.Bcast(y, root), y.nbytes, y.shape, y.dtype, root)
        return y

    def send(self, x: np.ndarray, to: int) -> None:
        """Send x to rank `to` of the axis, which must call receive. Returns when x may be reused."""
        x = _sendable(x)
        start = perf_counter()
        # The tag carries the dtype: MPI itself would reinterpret the bytes of another one without a word.
        self._comm.Send(x, to, tag=DTYPES.index(x.dtype))
        self.ledger.add("send", self.name, x.nbytes, self.size, perf_counter() - start)

    def receive(self, shape: tuple[int, ...], dtype: np.dtype | type | str, source: int) -> np.ndarray:
        """What rank `source` sent next. Raises ValueError when that is not of this shape's size and this dtype."""
        y = np.empty(shape, dtype)
        start = perf_counter()
        status = MPI.Status()
        message = self._comm.Mprobe(source, MPI.ANY_TAG, status)
        sent_dtype = DTYPES[status.tag]
        sent = status.Get_count(MPI.BYTE) // sent_dtype.itemsize
        if (sent_dtype, sent) != (y.dtype, y.size):
            message.Recv(np.empty(sent, sent_dtype))
            raise ValueError(f"rank {source} of {self.name} sent {sent} {sent_dtype}, receive expected {shape} {y.dtype}")
        message.Recv(y)
        self.ledger.add("receive", self.name, y.nbytes, self.size, perf_counter() - start)
        return y


class Mesh:
    """The ranks of `comm` as a grid of named axes; `mesh.tp` is the Axis of this rank along tp.

    With `check`, each collective first sees that the ranks of its axis mean the same one (verb, shape, dtype, reduction,
    root); if not, it raises CollectiveMismatch on all of them. Raises ValueError when the axes' product is not the ranks.
    """

    def __init__(self, comm: MPI.Intracomm, *, check: bool = False, **axes: int) -> None:
        if not axes or min(axes.values()) < 1 or prod(axes.values()) != comm.size:
            named = " x ".join(f"{name}={n}" for name, n in axes.items()) or "no axes"
            raise ValueError(f"cannot lay {comm.size} ranks out as {named}: the product must be {comm.size}")
        self.sizes = dict(axes)
        self.ledger = Ledger()
        place = np.unravel_index(comm.rank, tuple(axes.values()))
        self._axes = {}
        for i, name in enumerate(axes):
            others = np.ravel_multi_index([0 if j == i else int(p) for j, p in enumerate(place)], tuple(axes.values()))
            self._axes[name] = Axis(name, comm.Split(int(others), int(place[i])), self.ledger, check)

    def __getattr__(self, name: str) -> Axis:
        try:
            return self.__dict__["_axes"][name]
        except KeyError:
            raise AttributeError(f"this mesh has no axis {name!r}, only {', '.join(self.sizes)}") from None

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Enter all that is sent inside under this phase: forward, backward, step, decode."""
        return self.ledger.phase(name)

    def close(self) -> None:
        """Free the communicators. All ranks call it together."""
        for axis in self._axes.values():
            axis.close()

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # After an exception the other ranks may not come: freeing is a collective, so it is left to the end of the process.
        if kind is None:
            self.close()
