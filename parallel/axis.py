"""One axis of a mesh: the verbs with which its ranks exchange arrays.

    y_TD = mesh.tp.all_reduce(partial_TD)

Every verb returns a new array (or fills `out`), leaves its argument alone, takes any memory order, and enters what it
sent in the mesh's ledger. An axis of one rank is an ordinary axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from math import prod
from time import perf_counter

import numpy as np
from mpi4py import MPI

from parallel.buffer import Held, reduction, require_own, result, sendable
from parallel.call import Call, Rows, Watcher, site
from parallel.hosts import numbered
from parallel.ledger import Ledger
from parallel.message import fill, packed
from parallel.pending import Pending
from parallel.rows import is_whole
from parallel.shard import Cut
from parallel.sums import Maker, Request
from parallel.verbs import VERBS


def group_name(axis: str, ranks: Sequence[int]) -> str:
    """What the ledger calls the group of `ranks` on `axis`: tp[1..2], pp[0,3]."""
    between = [*ranks] == [*range(ranks[0], ranks[-1] + 1)]
    return f"{axis}[{ranks[0]}..{ranks[-1]}]" if between else f"{axis}[{','.join(map(str, ranks))}]"


class Axis:
    """The ranks that differ from this one in a single mesh coordinate.

    `size`: how many ranks there are on the axis. `rank`: this one's place on it. `members`: all of them, as the mesh numbers
    its ranks. `hosts`: of each of them, a number, from 0 in the order of their first. `watchers`: the mesh's. `sums`: makes
    what adds and gathers on an axis. Verbs raise before anything is sent: TypeError for a dtype that not every MPI treats
    alike, ValueError for a shape that is not what the cut says.
    """

    def __init__(
        self,
        name: str,
        comm: MPI.Intracomm,
        ledger: Ledger,
        watchers: list[Watcher],
        members: tuple[int, ...],
        hosts: tuple[int, ...],
        sums: Maker,
    ) -> None:
        self.name, self.ledger, self.watchers, self.members = name, ledger, watchers, members
        self.size, self.rank = comm.size, comm.rank
        self._hosts, self._make_sums = hosts, sums
        self.hosts = numbered([hosts[r] for r in members])
        self._comm, self._sums = comm, sums(comm, self.hosts)
        self._collectives, self._messages = 0, Counter()
        self._sends: list[Pending] = []
        self._groups: dict[tuple[int, ...], Axis] = {}

    @property
    def place(self) -> dict[str, int]:
        """This rank's place, as a Layout asks for it."""
        return {self.name: self.rank}

    def group(self, ranks: Sequence[int]) -> Axis:
        """The axis of some ranks of this one, in ascending order. Each of them calls this; the first call makes it.

        Its name is like `tp[1..2]`, or `pp[0,3]`. A rank of several groups makes them in ascending order, so that none waits in
        a circle.
        """
        ranks = tuple(ranks)
        if self.rank not in ranks or [*ranks] != sorted({*ranks} & {*range(self.size)}):
            raise ValueError(f"rank {self.rank} of {self.name} ({self.size} ranks) cannot make a group of ranks {list(ranks)}")
        if ranks not in self._groups:
            members = self._comm.Get_group()
            chosen = members.Incl(ranks)
            name = group_name(self.name, ranks)
            comm, inside = self._comm.Create_group(chosen), tuple(self.members[r] for r in ranks)
            self._groups[ranks] = Axis(name, comm, self.ledger, self.watchers, inside, self._hosts, self._make_sums)
            chosen.Free()
            members.Free()
        return self._groups[ranks]

    def duplicate(self) -> MPI.Intracomm:
        """The ranks of the axis, for messages of a watcher's own. All of them call it together; the caller frees it."""
        return self._comm.Dup()

    def close(self) -> None:
        self.poke()
        for group in self._groups.values():
            group.close()
        for watcher in self.watchers:
            watcher.close(self)
        self._sums.close()
        self._comm.Free()

    def _run(
        self,
        verb: str,
        exchange: Callable[[], int | None],
        x: np.ndarray | None,
        y: np.ndarray | None,
        message: tuple[tuple[int, ...], np.dtype, int],
        *how: Hashable,
        what: str = "",
        rows: Rows = (),
    ) -> None:
        """Run one verb: tell the watchers, do it, and enter it in the ledger. `message`: its shape, dtype and bytes.
        `exchange` does it, and returns how many bytes it is known to have sent to other hosts."""
        call = self._begin(verb, False, x, message, how, site(), what, rows) if self.watchers else None
        entered = perf_counter()
        try:
            crossed = exchange()
        except BaseException:
            if call is not None:
                self._end(call, None, entered, perf_counter())
            raise
        left = perf_counter()
        self.ledger.add(verb, self.name, message[2], self.size, left - entered).crossed_bytes += crossed or 0
        if call is not None:
            self._end(call, y, entered, left)

    def _start(
        self,
        verb: str,
        exchange: Callable[[np.ndarray], Request],
        x: np.ndarray,
        y: np.ndarray | None,
        message: tuple[tuple[int, ...], np.dtype, int],
        *how: Hashable,
        what: str = "",
    ) -> Pending:
        """Start one verb, which goes on while the rank computes; else as _run."""
        call = self._begin(verb, True, x, message, how, site(), what) if self.watchers else None
        held = Held(x, y is x) if any(w.holds_buffers for w in self.watchers) else None
        begun = perf_counter()
        request = exchange(x if held is None else held.sent)
        if call is not None:
            for watcher in self.watchers:
                watcher.started(self, call)
        return Pending(y, request, self.ledger.add(verb, self.name, message[2], self.size, 0.0), begun, self, call, held)

    def _begin(
        self,
        verb: str,
        started: bool,
        x: np.ndarray | None,
        message: tuple[tuple[int, ...], np.dtype, int],
        how: tuple[Hashable, ...],
        place: tuple[str, str],
        what: str,
        rows: Rows = (),
    ) -> Call:
        """Describe the call and tell the watchers. Where one of them raises, those that have heard of the call hear its end."""
        if VERBS[verb].partner:
            way = verb, how[0]
            number = self._messages[way]
            self._messages[way] = number + 1
        else:
            number, self._collectives = self._collectives, self._collectives + 1
        shape, dtype, message_bytes = message
        call = Call(self.name, number, verb, started, shape, dtype, how, message_bytes, self.ledger.now, *place, what, rows)
        heard = 0
        try:
            for watcher in self.watchers:
                heard += 1
                watcher.begin(self, call, x)
        except BaseException:
            now = perf_counter()
            for watcher in self.watchers[:heard]:
                watcher.end(self, call, None, now, now)
            raise
        return call

    def _end(self, call: Call, y: np.ndarray | None, entered: float, left: float) -> None:
        for watcher in self.watchers:
            watcher.end(self, call, y, entered, left)

    def _require_cut(self, cut: Cut, shape: tuple[int, ...], dim: int, length: int) -> None:
        if cut.ranks != self.size:
            raise ValueError(f"the cut is over {cut.ranks} ranks, axis {self.name} has {self.size}")
        if shape[dim] != length:
            raise ValueError(f"rank {self.rank} of {self.name}: dim {dim} of {shape} should have {length} entries")

    def _require_rank(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"no rank {rank} on axis {self.name}: use 0 to {self.size - 1}")

    def all_reduce(self, x: np.ndarray, op: str = "sum", out: np.ndarray | None = None) -> np.ndarray:
        """The sum ('max', 'min') over the axis, on every rank. x: any shape, the same on every rank. NaN is kept."""
        x, mpi_op = sendable(x), reduction(op, x.dtype)
        y = result(x, x.shape, out)
        self._run("all_reduce", lambda: self._sums.all_reduce(x, y, op, mpi_op), x, y, (x.shape, x.dtype, x.nbytes), op)
        return y

    def start_all_reduce(self, x: np.ndarray) -> Pending:
        """Sum x over the axis while this rank computes on. In place: x is the result once `wait` returns it."""
        require_own(x)
        return self._start("all_reduce", self._sums.start_all_reduce, x, x, (x.shape, x.dtype, x.nbytes), "sum")

    def start_reduce_scatter(self, x: np.ndarray, cut: Cut) -> Pending:
        """This rank's part, along the first dim, of the sum over the axis, while it computes on. x must stay as it is."""
        require_own(x)
        self._require_cut(cut, x.shape, 0, cut.length)
        row = x[:1].size
        y = np.empty((cut.size(self.rank), *x.shape[1:]), x.dtype)
        exchange = lambda x: self._sums.start_reduce_scatter(x, y, [n * row for n in cut.sizes])  # noqa: E731
        return self._start("reduce_scatter", exchange, x, y, (x.shape, x.dtype, x.nbytes), 0, cut)

    def all_gather(self, x: np.ndarray, dim: int, cut: Cut, out: np.ndarray | None = None) -> np.ndarray:
        """The whole array on every rank, from parts cut along `dim`. x: this rank's part. `out`: for dim 0 of a partition."""
        x = sendable(x)
        self._require_cut(cut, x.shape, dim, cut.size(self.rank))
        row = prod(n for d, n in enumerate(x.shape) if d != dim)
        counts = [row * n for n in cut.sizes]
        whole_shape = (*x.shape[:dim], cut.length, *x.shape[dim + 1 :])
        if out is not None and not (cut.is_partition and dim == 0):
            raise ValueError(f"all_gather fills out only for a partition of dim 0, not {cut} of dim {dim}")
        flat = (np.empty(sum(counts), x.dtype) if out is None else result(x, whole_shape, out)).reshape(-1)
        exchange = lambda: self._sums.all_gather(x, flat, counts)  # noqa: E731
        self._run("all_gather", exchange, x, flat, (whole_shape, x.dtype, flat.nbytes), dim, cut)
        if cut.is_partition and dim == 0:
            return flat.reshape(whole_shape)
        ends = np.cumsum(counts)
        shapes = [(*x.shape[:dim], n, *x.shape[dim + 1 :]) for n in cut.sizes]
        return cut.join([flat[e - c : e].reshape(s) for e, c, s in zip(ends, counts, shapes, strict=True)], dim)

    def start_all_gather(self, x: np.ndarray, cut: Cut) -> Pending:
        """The whole array on every rank, from parts cut along the first dim, while this rank computes on. x must stay as it is.
        Raises ValueError unless the cut is a partition."""
        x = sendable(x)
        self._require_cut(cut, x.shape, 0, cut.size(self.rank))
        if not cut.is_partition:
            raise ValueError(f"start_all_gather takes only a partition of dim 0, not {cut}: use all_gather")
        row = prod(x.shape[1:])
        y = np.empty((cut.length, *x.shape[1:]), x.dtype)
        exchange = lambda x: self._sums.start_all_gather(x, y, [n * row for n in cut.sizes])  # noqa: E731
        return self._start("all_gather", exchange, x, y, (y.shape, y.dtype, y.nbytes), 0, cut)

    def reduce_scatter(self, x: np.ndarray, dim: int, cut: Cut) -> np.ndarray:
        """This rank's part, along `dim`, of the sum over the axis. x: whole, the same shape on every rank."""
        x = sendable(x)
        self._require_cut(cut, x.shape, dim, cut.length)
        parts = [x[cut.index(dim, r)] for r in range(self.size)]
        in_order = dim == 0 and cut.is_partition
        packed = x.reshape(-1) if in_order else np.concatenate([p.reshape(-1) for p in parts])
        y = np.empty(parts[self.rank].shape, x.dtype)
        exchange = lambda: self._sums.reduce_scatter(packed, y, [p.size for p in parts])  # noqa: E731
        self._run("reduce_scatter", exchange, x, y, (x.shape, x.dtype, packed.nbytes), dim, cut)
        return y

    def gather_rows(self, x: np.ndarray, rows: Cut | None) -> np.ndarray:
        """All rows (T, ...) on every rank. x: this rank's, by `rows`; where they are whole, x itself."""
        return x if is_whole(rows) else self.all_gather(x, 0, rows)

    def sum_rows(self, x: np.ndarray, rows: Cut | None) -> np.ndarray:
        """This rank's rows, by `rows`, of the sum over the axis. x: (T, ...), all rows."""
        return self.all_reduce(x) if is_whole(rows) else self.reduce_scatter(x, 0, rows)

    def start_gather_rows(self, x: np.ndarray, rows: Cut | None) -> Pending:
        """gather_rows, while this rank computes on. x must stay as it is."""
        return Pending(x) if is_whole(rows) else self.start_all_gather(x, rows)

    def start_sum_rows(self, x: np.ndarray, rows: Cut | None) -> Pending:
        """sum_rows, while this rank computes on. x must stay as it is; where the rows are whole, it becomes the result."""
        return self.start_all_reduce(x) if is_whole(rows) else self.start_reduce_scatter(x, rows)

    def all_to_all(self, x: np.ndarray, split_dim: int, split: Cut, join_dim: int, join: Cut) -> np.ndarray:
        """Move the cut from `join_dim` to `split_dim`. x: whole along split_dim, this rank's part along join_dim;
        the result: this rank's part along split_dim, whole along join_dim."""
        x = sendable(x)
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
        exchange = lambda: self._comm.Alltoallv([packed, [p.size for p in sent]], [flat, counts])  # noqa: E731
        whole = (*x.shape[:join_dim], join.length, *x.shape[join_dim + 1 :])
        self._run("all_to_all", exchange, x, flat, (whole, x.dtype, packed.nbytes), split_dim, split, join_dim, join)
        ends = np.cumsum(counts)
        return join.join([flat[e - c : e].reshape(s) for e, c, s in zip(ends, counts, shapes, strict=True)], join_dim)

    def shift(self, x: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """What the rank before had, the first rank what the last had. `counts`: rows that each rank has; x: this rank's."""
        x = sendable(x)
        y, exchange = self._around(x, counts)
        message = (sum(counts), *x.shape[1:]), x.dtype, x.nbytes
        self._run("shift", lambda: exchange(x, self._comm.Alltoallv), x, y, message, tuple(counts))
        return y

    def start_shift(self, x: np.ndarray, counts: Sequence[int]) -> Pending:
        """shift, while this rank computes on. x must stay as it is."""
        x = sendable(x)
        y, exchange = self._around(x, counts)
        message = (sum(counts), *x.shape[1:]), x.dtype, x.nbytes
        return self._start("shift", lambda x: exchange(x, self._comm.Ialltoallv), x, y, message, tuple(counts))

    def _around(self, x: np.ndarray, counts: Sequence[int]) -> tuple[np.ndarray, Callable]:
        """Room for what comes, and how it is exchanged."""
        if len(counts) != self.size or len(x) != counts[self.rank]:
            raise ValueError(
                f"rank {self.rank} of {self.name} has {len(x)} rows to shift, by {list(counts)}: use one count a rank"
            )
        before, after, row = (self.rank - 1) % self.size, (self.rank + 1) % self.size, prod(x.shape[1:])
        y = np.empty((counts[before], *x.shape[1:]), x.dtype)
        sent, received = ([0] * self.size for _ in range(2))
        sent[after], received[before] = x.size, counts[before] * row
        return y, lambda x, verb: verb([x, sent], [y, received])

    def exchange(self, x: np.ndarray, sent: Sequence[int], received: Sequence[int]) -> np.ndarray:
        """Rows to the ranks that they are for: of x (rows, ...) the first sent[0] to rank 0, then sent[1] to rank 1, ...; the
        result: received[0] rows from rank 0, then those from rank 1, ... Any of them may be 0. Its backward is the same with
        `sent` and `received` swapped. The ranks know beforehand how many rows they get: nothing is said of it here.

        Counted is what leaves this rank. On an axis of one rank nothing does: the result is x itself.
        """
        if len(sent) != self.size or len(received) != self.size or sum(sent) != len(x):
            raise ValueError(
                f"rank {self.rank} of {self.name} ({self.size} ranks) cannot send {[*sent]} of {len(x)} rows and receive "
                f"{[*received]}: use a count for each rank, those sent adding up to the rows"
            )
        if self.size == 1:
            return x
        x = sendable(x)
        row = prod(x.shape[1:])
        y = np.empty((sum(received), *x.shape[1:]), x.dtype)
        counts = ([n * row for n in sent], [n * row for n in received])
        leaving = (len(x) - sent[self.rank]) * row * x.itemsize
        exchange = lambda: self._comm.Alltoallv([x, counts[0]], [y, counts[1]])  # noqa: E731
        self._run("exchange", exchange, x, y, (x.shape[1:], x.dtype, leaving), rows=(tuple(sent), tuple(received)))
        return y

    def broadcast(self, x: np.ndarray, root: int = 0) -> np.ndarray:
        """Rank `root`'s x on every rank. x: the same shape and dtype on every rank; only the root's content is read."""
        self._require_rank(root)
        y = sendable(x).copy() if self.rank == root else np.empty(sendable(x).shape, x.dtype)
        sent = x if self.rank == root else None
        self._run("broadcast", lambda: self._comm.Bcast(y, root), sent, y, (y.shape, y.dtype, y.nbytes), root)
        return y

    def send(self, x: np.ndarray, to: int, what: str = "") -> None:
        """Send x to rank `to` of the axis, which must call receive. Returns when x may be reused.

        `what` it is meant to be stands in reports and traces; where messages are checked, the receiver must expect the same.
        """
        self._require_rank(to)
        x = sendable(x)
        data, tag = packed(x, what, self.watchers)
        self._run("send", lambda: self._comm.Send(data, to, tag), x, None, (x.shape, x.dtype, x.nbytes), to, what=what)

    def start_send(self, x: np.ndarray, to: int, what: str = "") -> Pending:
        """send, without waiting for anybody. x must stay as it is until the send is complete; the axis keeps it until then."""
        self._require_rank(to)
        x = sendable(x)
        data, tag = packed(x, what, self.watchers)
        self.poke()
        exchange = lambda _: self._comm.Isend(data, to, tag)  # noqa: E731
        self._sends.append(self._start("send", exchange, x, None, (x.shape, x.dtype, x.nbytes), to, what=what))
        return self._sends[-1]

    def operation(self, what: str) -> None:
        """Tell the watchers what this rank does from here on, such as 2F3; "": nothing that has a name."""
        for watcher in self.watchers:
            watcher.operation(self, what)

    def poke(self) -> None:
        """Let the sends that were started go on, and let go of those that are complete."""
        self._sends = [send for send in self._sends if not send.poke()]

    def receive(self, shape: tuple[int, ...], dtype: np.dtype | type | str, source: int, what: str = "") -> np.ndarray:
        """What rank `source` sent next. Raises MessageMismatch, a ValueError, when that is not of this shape's size and this
        dtype; where messages are checked, when it is not of this shape or not `what` is expected."""
        self._require_rank(source)
        y = np.empty(shape, dtype)
        exchange = lambda: fill(y, self._comm, source, what, self.name)  # noqa: E731
        self._run("receive", exchange, None, y, (y.shape, y.dtype, y.nbytes), source, what=what)
        return y
