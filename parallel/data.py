"""Data parallelism: gradients in one array, summed in buckets while backward goes on; and their split for ZeRO-1.

    groups = Groups({Over(mesh.dp): model.filling_order}, bucket_bytes)
    model.backward(dlogits, saved, groups)          # a full bucket is on its way while the next block computes
    groups.finish()

Gradients are of sums over this rank's tokens divided by the tokens of the whole batch, so that their sum over dp is the
gradient of the mean, however unequal the parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np

from parallel.flat import Flat, Numbering, Owned
from parallel.holder import Holder, Over
from parallel.ledger import Traffic
from parallel.parameter import Fused, Parameter
from parallel.pending import Pending
from parallel.schedule import Op
from parallel.shard import Cut, even


class Buckets:
    """Which ranges of the entries of `numbering` are summed at once, and what of them this rank owns, without their memory.

    `split`: a rank gets only its part of each bucket, `owned` (ZeRO stage 1, arXiv 1910.02054). `homes`: the range of
    numbering.homes that is meant, where others' gradients are summed over other ranks.
    """

    def __init__(
        self, numbering: Numbering, over: Over, bucket_bytes: int, split: bool = False, homes: slice = slice(None)
    ) -> None:
        self.numbering, self.over, self.split = numbering, over, split
        self.homes, self.ends = numbering.homes[homes], numbering.ends[homes]
        stop = int(self.ends[-1]) if self.homes else 0
        begin = stop - sum(home.data.size for home in self.homes)
        step = max(bucket_bytes // numbering.dtype.itemsize, over.axis.size)
        # What is left over is no bucket of its own where not every rank could own some of it.
        starts = [at for at in range(begin, stop, step) if at == begin or stop - at >= over.axis.size]
        self.buckets = [slice(a, b) for a, b in zip(starts, [*starts[1:], stop], strict=False)]
        self.cuts: list[Cut] = (
            [even(b.stop - b.start, over.axis.size, "entries of a bucket") for b in self.buckets] if split else []
        )

    @property
    def owned(self) -> list[slice]:
        """The ranges of the flat arrays whose gradients this rank gets whole, and whose weights it updates."""
        if not self.split:
            return [slice(self.buckets[0].start, self.buckets[-1].stop)] if self.buckets else []
        bounds = (cut.bounds[self.over.axis.rank] for cut in self.cuts)
        return [slice(b.start + start, b.start + stop) for b, (start, stop) in zip(self.buckets, bounds, strict=True)]

    def traffic(self) -> list[Traffic]:
        """What one step sends."""
        itemsize, axis, rest = self.numbering.dtype.itemsize, self.over.axis, self.over.rest
        size = [(b.stop - b.start) * itemsize for b in self.buckets]
        sent = [Traffic("reduce_scatter" if self.split else "all_reduce", axis.name, "backward", n) for n in size]
        if self.split and rest is not None:
            sent += [Traffic("all_reduce", rest.name, "backward", (at.stop - at.start) * itemsize) for at in self.owned]
        return sent + [Traffic("all_gather", axis.name, "step", n) for n in size if self.split]


class GradientSums(Buckets):
    """The gradients of `flat` summed over ranks, bucket by bucket, each sent as soon as backward has filled it.

    Buckets are ranges of flat.grad: as backward fills it from the front, every bucket that is full is sent. With `overlap`
    off, all are sent in `finish`. With `split` a rank updates the weights of its part, and `gather` brings the others' parts:
    as many bytes as whole sums take.
    """

    def __init__(
        self,
        flat: Flat,
        over: Over,
        bucket_bytes: int,
        overlap: bool = True,
        split: bool = False,
        homes: slice = slice(None),
    ) -> None:
        super().__init__(flat, over, bucket_bytes, split, homes)
        self.flat, self.overlap = flat, overlap
        self._forget()

    def _forget(self) -> None:
        self._filled: set[int] = set()
        self._done = self._end = 0
        self._pending: list[Pending] = []

    def filled(self, parameters: Iterable[Parameter]) -> None:
        """These gradients are complete. Sends the buckets that are full by that, in order."""
        self._filled |= {id(p.home) for p in parameters}
        for pending in self._pending:
            pending.poke()
        while self._done < len(self.homes) and id(self.homes[self._done]) in self._filled:
            self.homes[self._done].zero_where_none()
            self._end = int(self.ends[self._done])
            self._done += 1
        if self.overlap:
            self._send()

    def _send(self) -> None:
        for n in range(len(self._pending), len(self.buckets)):
            bucket = self.buckets[n]
            if bucket.stop > self._end:
                return
            grad, axis = self.flat.grad[bucket], self.over.axis
            self._pending.append(axis.start_reduce_scatter(grad, self.cuts[n]) if self.split else axis.start_all_reduce(grad))

    def finish(self) -> None:
        """Wait until every bucket is summed. Raises ValueError if backward has left gradients unfilled."""
        if self._done < len(self.homes):
            missing = [p.name for p, _ in self.homes[self._done].parts]
            raise ValueError(f"gradients of {', '.join(missing)} were never filled: give the model's backward this holder")
        self._send()
        sums = [pending.wait() for pending in self._pending]
        if self.split:
            for at, part in zip(self.owned, sums, strict=True):
                self.flat.grad[at] = part if self.over.rest is None else self.over.rest.all_reduce(part)
        self._forget()

    def gather(self, flat: np.ndarray) -> None:
        """With `split`: bring what the other ranks own of flat.data or flat.grad. Without, a rank owns all of it."""
        if self.split:
            for bucket, at, cut in zip(self.buckets, self.owned, self.cuts, strict=True):
                self.over.axis.all_gather(flat[at].copy(), 0, cut, out=flat[bucket])


class Grouped:
    """What is summed over which ranks, without its memory: as many Buckets of one numbering as there are sets of ranks.
    Gradients of experts that are cut over ep are not summed over it, as what came over it is in them already.

    `over`: each with the parameters' homes that it sums, the same on every rank, also where it has none of these. `stages`:
    the parameters of each stage; a gradient is complete with the last backward of its stage. `late`: homes whose gradients
    are complete only before `finish`, as they are owed another sum.
    """

    entries: type[Numbering] = Numbering

    def __init__(
        self,
        over: Mapping[Over, Collection[Parameter | Fused]],
        bucket_bytes: int,
        overlap: bool = True,
        split: bool = False,
        dtype: np.dtype | str | None = None,
        stages: Mapping[int, Sequence[Parameter]] | None = None,
        late: Collection[Parameter | Fused] = (),
    ) -> None:
        self.overlap, self.split, self.stages, self.late = overlap, split, stages or {}, dict.fromkeys(late)
        self.numbering = self.entries([p for homes in over.values() for home in homes for p, _ in home.parts], dtype)
        ends = [0, *accumulate(len(homes) for homes in over.values())]
        self.each = [self._sums(ranks, bucket_bytes, slice(*at)) for ranks, at in zip(over, pairwise(ends), strict=True)]
        self.over_of = {home: ranks for ranks, homes in over.items() for home in homes}

    def _sums(self, over: Over, bucket_bytes: int, homes: slice) -> Buckets:
        return Buckets(self.numbering, over, bucket_bytes, self.split, homes)

    @property
    def ranges(self) -> list[slice]:
        """The numbers of the entries that this rank updates."""
        return [at for sums in self.each for at in sums.owned]

    def traffic(self, ops: Sequence[Op], phases: Mapping[str, str]) -> list[Traffic]:
        """What a step of these operations sends."""
        return self.after()

    def within(self, ops: Sequence[Op], phases: Mapping[str, str]) -> dict[tuple[int, int, str], list[Traffic]]:
        """What of it is sent for one part: nothing."""
        return {}

    def after(self) -> list[Traffic]:
        """What of it is sent once for all: all of it."""
        return [t for sums in self.each for t in sums.traffic()]

    def gathered(self, ops: Sequence[Op], phases: Mapping[str, str]) -> list[Traffic]:
        """What is sent so that the weights are there: nothing."""
        return []

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of what stays."""
        return {"weights": self.numbering.nbytes, "gradients": self.numbering.nbytes}

    def most(self, ops: Sequence[Op]) -> dict[str, int]:
        """Bytes of what comes and goes: nothing."""
        return {}


class Groups(Grouped, Holder):
    """GradientSums of one flat array. The sums are made once a step."""

    entries = Flat

    def __init__(self, *grouped: object, **more: object) -> None:
        """As Grouped."""
        super().__init__(*grouped, **more)
        self.flat: Flat = self.numbering
        # How many more backwards of this step add to a gradient.
        self._left: Counter[Parameter | Fused] = Counter()

    def _sums(self, over: Over, bucket_bytes: int, homes: slice) -> GradientSums:
        return GradientSums(self.numbering, over, bucket_bytes, self.overlap, self.split, homes)

    @property
    def owned(self) -> list[Owned]:
        return self.flat.owned(self.ranges)

    def zero_grad(self) -> None:
        self.flat.zero_grad()

    def begin(self, ops: Sequence[Op], phases: Mapping[str, str]) -> None:
        backwards = Counter(op.stage for op in ops if op.kind in "BW")
        self._left = Counter({p.home: n for stage, n in backwards.items() for p in self.stages[stage]})

    def filled(self, parameters: Iterable[Parameter]) -> None:
        homes = {p.home: 1 for p in parameters}
        self._left.subtract(homes)
        complete = [p for home in homes if self._left[home] <= 0 and home not in self.late for p, _ in home.parts]
        for sums in self.each:
            sums.filled(complete)

    def finish(self) -> None:
        """Wait until all is summed."""
        late = [p for home in self.late for p, _ in home.parts]
        for sums in self.each:
            if late:
                sums.filled(late)
            sums.finish()

    def spread(self) -> None:
        """After an update: bring the weights that others have updated."""
        for sums in self.each:
            sums.gather(self.flat.data)

    def take(self, home: Parameter | Fused, whole: np.ndarray) -> None:
        """Set its weights, all of them."""
        home.data[...] = whole

    def wholes(self, kind: str) -> dict[str, np.ndarray]:
        """Copies of the weights ("data") or of their gradients' sums ("grad"), by name. All ranks call it together."""
        if kind == "grad":
            for sums in self.each:
                sums.gather(self.flat.grad)
        return {p.name: getattr(p, kind).copy() for p in self.flat.parameters}

    @property
    def held(self) -> dict[str, int]:
        """Bytes of what stays, as the arrays have them."""
        return {"weights": self.flat.data.nbytes, "gradients": self.flat.grad.nbytes}

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes of what has come and gone, at most: nothing."""
        return {}
