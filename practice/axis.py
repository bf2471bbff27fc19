"""What a parallel exercise is handed: the verbs it may use, each counted, recorded, and found out when it hangs.

    all_reduce(x, op="sum"), all_gather(x, dim=0), reduce_scatter(x, dim=0), all_to_all(xs), broadcast(x, root=0)
    send(to, x), recv(source), sendrecv(to, x, source)

Sends are synchronous: they return when the receiver has taken the message. Verbs return new arrays and leave arguments alone.
Parts of all_gather may be uneven; reduce_scatter cuts as evenly as it goes, larger parts first; all_to_all takes and returns an
array a rank, of any shapes.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

VERBS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "recv", "sendrecv")
# What a verb takes and returns, in a line: every scaffold has those of its exercise.
SIGNATURES = {
    "all_reduce": 'all_reduce(x, op="sum") -> y     the sum over the ranks, on every rank; op: "sum", "max" or "min"',
    "all_gather": "all_gather(x, dim=0) -> y        the ranks' arrays one after another along dim, which may be uneven",
    "reduce_scatter": "reduce_scatter(x, dim=0) -> y    this rank's part, cut(length), of the sum over the ranks",
    "all_to_all": "all_to_all(xs) -> ys           lists of an array a rank: xs[r] goes to rank r, ys[r] came from it",
    "broadcast": "broadcast(x, root=0) -> y        rank root's array, on every rank",
    "send": "send(to, x)                      returns when rank `to` has taken x",
    "recv": "recv(source) -> x                waits for rank `source`",
    "sendrecv": "sendrecv(to, x, source) -> y     sends x to rank `to` and receives from rank `source`, both at once",
}
PLACE = (
    "rank, size",
    "cut(length) -> slice             this rank's part of `length`, as even as it goes; cut(length, rank): of that rank",
)
REDUCE = {"sum": np.add, "max": np.maximum, "min": np.minimum}


class Place:
    """A rank and the number of ranks. Cases are cut by it; an exercise of one process gets nothing more."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def cut(self, length: int, rank: int | None = None) -> slice:
        """This rank's (or `rank`'s) part of a dim, as evenly as it goes, larger parts first."""
        rank = self.rank if rank is None else rank
        least, more = divmod(length, self.size)
        start = rank * least + min(rank, more)
        return slice(start, start + least + (rank < more))

    def others(self) -> list[Place]:
        """The places of all ranks, in order."""
        return [Place(rank, self.size) for rank in range(self.size)]


# A rank's call of a collective: verb, shape, dtype, option. Of all_to_all that is the shapes of what goes to each rank.
Call = tuple[str, tuple[int, ...], str, object]


def collective(arrays: Sequence[np.ndarray], calls: Sequence[Call], place: Place) -> np.ndarray | list[np.ndarray]:
    """What a rank gets from a collective to which all ranks bring `arrays`."""
    verb, _, _, option = calls[place.rank]
    if verb == "all_to_all":
        return [pieces(x, shapes)[place.rank] for x, (*_, shapes) in zip(arrays, calls, strict=True)]
    if verb == "all_reduce":
        return REDUCE[option].reduce(np.stack(arrays), axis=0)
    if verb == "all_gather":
        return np.concatenate(arrays, axis=option)
    if verb == "broadcast":
        return np.array(arrays[option])
    whole = np.add.reduce(np.stack(arrays), axis=0)
    return np.array(np.moveaxis(np.moveaxis(whole, option, 0)[place.cut(whole.shape[option])], 0, option))


def pieces(x: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Copies of arrays of these shapes that lie flat in x, one after another."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [piece.reshape(shape).copy() for piece, shape in zip(np.split(x, ends[:-1]), shapes, strict=True)]


class Axis(Place):
    """The verbs over `_meet` and `_transfer`, which a subclass provides: real processes or threads of one."""

    def __init__(self, rank: int, size: int, allow: Sequence[str], file: str) -> None:
        super().__init__(rank, size)
        self.counts: Counter[str] = Counter()
        # By line of the learner's file, the numbers that it sends.
        self.sent: Counter[int] = Counter()
        self._allow, self._file = tuple(allow), file
        # With whom this rank talked, message by message: (sent to, received from), None where it did not.
        self.talk: list[tuple[int | None, int | None]] = []

    # --- provided by a subclass

    def _meet(self, x: np.ndarray, verb: str, option: object, what: str) -> np.ndarray | list[np.ndarray]:
        """Bring x to a collective of all ranks and return its result."""
        raise NotImplementedError

    def _transfer(self, to: int | None, x: np.ndarray | None, source: int | None, what: str) -> np.ndarray | None:
        """Send x, receive from source, or both at once."""
        raise NotImplementedError

    # --- verbs

    def all_reduce(self, x: np.ndarray, op: str = "sum") -> np.ndarray:
        if op not in REDUCE:
            raise ValueError(f"all_reduce: op {op!r} is none of sum, max, min")
        return self._collective("all_reduce", x, op, 2)

    def all_gather(self, x: np.ndarray, dim: int = 0) -> np.ndarray:
        return self._collective("all_gather", x, dim, 1)

    def reduce_scatter(self, x: np.ndarray, dim: int = 0) -> np.ndarray:
        return self._collective("reduce_scatter", x, dim, 1)

    def all_to_all(self, xs: Sequence[np.ndarray]) -> list[np.ndarray]:
        if not isinstance(xs, (list, tuple, np.ndarray)) or len(xs) != self.size:
            got = f"{len(xs)} of them" if isinstance(xs, (list, tuple, np.ndarray)) else type(xs).__name__
            raise TypeError(f"all_to_all takes a list of {self.size} arrays, xs[r] for rank r, got {got}")
        xs = [self._argument("all_to_all", x) for x in xs]
        if len({x.dtype for x in xs}) > 1:
            raise TypeError(f"all_to_all takes arrays of one dtype, got {', '.join(str(x.dtype) for x in xs)}")
        self.counts["all_to_all"] += 1
        self.counts["rounds"] += 1
        self._sends(sum(x.size for r, x in enumerate(xs) if r != self.rank))
        flat = np.concatenate([x.ravel() for x in xs])
        what = f"all_to_all #{self.counts['all_to_all']} of {_brief(flat)}|{self._line()}"
        return self._meet(flat, "all_to_all", tuple(x.shape for x in xs), what)

    def broadcast(self, x: np.ndarray, root: int = 0) -> np.ndarray:
        return self._collective("broadcast", x, root, 1)

    def send(self, to: int, x: np.ndarray) -> None:
        self._point("send", to, x, None)

    def recv(self, source: int) -> np.ndarray:
        return self._point("recv", None, None, source)

    def sendrecv(self, to: int, x: np.ndarray, source: int) -> np.ndarray:
        return self._point("sendrecv", to, x, source)

    # --- counting and naming

    def _collective(self, verb: str, x: np.ndarray, option: object, turns: int) -> np.ndarray:
        x = self._argument(verb, x)
        self.counts[verb] += 1
        what = f"{verb} #{self.counts[verb]} of {_brief(x)}|{self._line()}"
        y = self._meet(x, verb, option, what)
        # An all-reduce goes twice over the ranks: a reduce-scatter, then an all-gather.
        self.counts["rounds"] += turns
        # What one rank sends on a ring, in numbers: (p - 1)/p of the whole, twice for an all-reduce.
        self._sends(turns * (self.size - 1) * max(x.size, y.size) // self.size)
        return y

    def _point(self, verb: str, to: int | None, x: np.ndarray | None, source: int | None) -> np.ndarray | None:
        for rank in (to, source):
            if rank is not None and not (isinstance(rank, (int, np.integer)) and 0 <= rank < self.size):
                raise ValueError(f"{verb}: there is no rank {rank}: ranks are 0 to {self.size - 1} (use % size on a ring)")
        for rank in (to, source):
            if rank == self.rank:
                raise ValueError(f"{verb}: rank {rank} is this rank itself")
        to, source = (None if rank is None else int(rank) for rank in (to, source))
        if x is not None or to is not None:
            x = self._argument(verb, x)
        else:
            self._argument(verb, np.zeros(0))
        self.counts[verb] += 1
        self.talk.append((to, source))
        if x is not None:
            self.counts["messages"] += 1
            self._sends(x.size)
            self.counts["ranks sent to"] = len({to for to, _ in self.talk} - {None})
            self.counts["largest message"] = max(self.counts["largest message"], x.size)
        sends = "" if x is None else f"send {_brief(x)} to rank {to}"
        receives = "" if source is None else f"recv from rank {source}"
        y = self._transfer(to, x, source, f"{' and '.join(t for t in (sends, receives) if t)}|{self._line()}")
        if y is not None:
            self.counts["numbers received"] += y.size
        return y

    def _sends(self, numbers: int) -> None:
        self.counts["numbers sent"] += numbers
        self.sent[self._line()] += numbers

    def _argument(self, verb: str, x: object) -> np.ndarray:
        if verb not in self._allow:
            has = ", ".join(self._allow) or "no verbs"
            raise PermissionError(f"{verb} is not part of this exercise: build it from {has}")
        if not isinstance(x, (np.ndarray, np.generic)) or np.asarray(x).dtype.kind not in "fiub":
            raise TypeError(f"{verb} takes a NumPy array of numbers, got {type(x).__name__}")
        return np.array(x, order="C")

    def _line(self) -> int:
        """The line of the learner's file that is being executed."""
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename != self._file:
            frame = frame.f_back
        return frame.f_lineno if frame else 0


def _brief(x: np.ndarray) -> str:
    return f"{' x '.join(map(str, x.shape)) or '1'} {x.dtype}"


def disagreement(calls: Sequence[Call]) -> str:
    """What the ranks of a collective do not agree on; '' if they agree."""
    first = calls[0]
    if all(call[0] == "all_to_all" for call in calls):
        # Its arrays are of any shapes.
        calls = [(verb, (), dtype, "") for verb, _, dtype, _ in calls]
        first = calls[0]
    for rank, call in enumerate(calls):
        if call[0] != first[0]:
            return f"rank 0 calls {first[0]} while rank {rank} calls {call[0]}"
        if call[2:] != first[2:]:
            return f"{first[0]}: rank 0 has {first[2]}, {first[3]!r} and rank {rank} has {call[2]}, {call[3]!r}"
        shape = [list(c[1]) for c in (first, call)]
        if first[0] == "all_gather" and all(-len(s) <= first[3] < len(s) for s in shape):
            for s in shape:
                s[first[3]] = 0
        if shape[0] != shape[1] and first[0] != "broadcast":
            return f"{first[0]}: rank 0 has shape {first[1]} and rank {rank} has {call[1]}"
    return ""
