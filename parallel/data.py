"""Data parallelism: gradients in one array, summed over dp in buckets while backward goes on; and their split for ZeRO-1.

    flat = Flat(model.filling_order)                        # weights and gradients, in the order backward completes them
    sums = GradientSums(flat, mesh.dp, bucket_bytes)
    model.backward(dlogits, saved, filled=sums.filled)      # a full bucket is on its way while the next block computes
    sums.finish()

Gradients are of sums over this rank's tokens divided by the tokens of the whole batch, so that their sum over dp is the
gradient of the mean, however unequal the parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate, pairwise

import numpy as np

from parallel.axis import Axis
from parallel.ledger import Traffic
from parallel.parameter import Fused, Parameter
from parallel.pending import Pending
from parallel.shard import Cut, Layout, Place, even


class Flat:
    """Every parameter of this rank in one array `data`, every gradient in one array `grad`, in the order given.

    From here on each parameter's data and grad are views. Parameters that share memory (`Fused`) follow one another. `dtype`:
    needed where there may be no parameters.
    """

    def __init__(self, parameters: Iterable[Parameter], dtype: np.dtype | str | None = None) -> None:
        self.homes: list[Parameter | Fused] = list(dict.fromkeys(p.home for p in parameters))
        self.ends = np.cumsum([home.data.size for home in self.homes], dtype=np.int64)
        size, dtype = sum(home.data.size for home in self.homes), dtype or self.homes[0].data.dtype
        self.data, self.grad = np.empty(size, dtype), np.zeros(size, dtype)
        for home, at in self.places():
            home.move(self.data[at].reshape(home.data.shape), self.grad[at].reshape(home.data.shape))

    @property
    def parameters(self) -> list[Parameter]:
        return [p for home in self.homes for p, _ in home.parts]

    def places(self) -> Iterator[tuple[Parameter | Fused, slice]]:
        """Each home with where it is in the flat arrays."""
        return zip(self.homes, (slice(e - h.data.size, e) for e, h in zip(self.ends, self.homes, strict=True)), strict=True)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.zero_grad()

    def mask(self, holds: dict[str, np.ndarray | bool]) -> np.ndarray:
        """True and False for each entry of data, from what `holds` says of each parameter by name (of its shape, or one)."""
        found = np.empty(len(self.data), bool)
        for home, at in self.places():
            part = found[at].reshape(home.data.shape)
            for p, index in home.parts:
                part[index] = holds[p.name]
        return found

    def counted_once(self, place: Place, split: Collection[str] = ()) -> np.ndarray:
        """Which entries this rank counts in a sum over all weights and over the axes of `place`: those that it is the first to
        hold. Axes of `split` are left out where they do not cut: what is split over them is counted wherever it lies."""
        of = lambda cuts: {axis: at for axis, at in place.items() if axis in cuts or axis not in split}  # noqa: E731
        return self.mask({p.name: _first(p.layout, of(p.layout.cuts)) for p in self.parameters})


def _first(layout: Layout, place: Place) -> np.ndarray:
    """Of this rank's part, the entries that no lower rank holds."""
    found = np.array(True)
    for (start, stop), runs in zip(layout.bounds(place), layout.first(place), strict=True):
        here = np.zeros(stop - start, bool)
        for a, b in runs:
            here[a - start : b - start] = True
        found = found[..., None] & here
    return found


class GradientSums:
    """The gradients of `flat` summed over dp, bucket by bucket, each sent as soon as backward has filled it.

    Buckets are ranges of flat.grad: as backward fills it from the front, every bucket that is full is sent. With `overlap`
    off, all are sent in `finish`. With `split` (ZeRO stage 1, arXiv 1910.02054) a rank gets only its part of each bucket,
    `owned`, updates the weights there, and `gather` brings the others' parts: as many bytes as whole sums take. `homes`: the
    range of flat.homes that is meant, where others' gradients are summed over other ranks.
    """

    def __init__(
        self,
        flat: Flat,
        dp: Axis,
        bucket_bytes: int,
        overlap: bool = True,
        split: bool = False,
        homes: slice = slice(None),
    ) -> None:
        self.flat, self.dp, self.overlap, self.split = flat, dp, overlap, split
        self.homes, self.ends = flat.homes[homes], flat.ends[homes]
        stop = int(self.ends[-1]) if self.homes else 0
        begin = stop - sum(home.data.size for home in self.homes)
        step = max(bucket_bytes // flat.data.itemsize, dp.size)
        # What is left over is no bucket of its own where not every rank could own some of it.
        starts = [at for at in range(begin, stop, step) if at == begin or stop - at >= dp.size]
        self.buckets = [slice(a, b) for a, b in zip(starts, [*starts[1:], stop], strict=False)]
        self.cuts: list[Cut] = [even(b.stop - b.start, dp.size, "entries of a bucket") for b in self.buckets] if split else []
        self._forget()

    def _forget(self) -> None:
        self._filled: set[int] = set()
        self._done = self._end = 0
        self._pending: list[Pending] = []

    @property
    def owned(self) -> list[slice]:
        """The ranges of the flat arrays whose gradients this rank gets whole, and whose weights it updates."""
        if not self.split:
            return [slice(self.buckets[0].start, self.buckets[-1].stop)] if self.buckets else []
        bounds = (cut.bounds[self.dp.rank] for cut in self.cuts)
        return [slice(b.start + start, b.start + stop) for b, (start, stop) in zip(self.buckets, bounds, strict=True)]

    def filled(self, parameters: Iterable[Parameter]) -> None:
        """These gradients are complete. Sends the buckets that are full by that, in order."""
        self._filled |= {id(p.home) for p in parameters}
        for pending in self._pending:
            pending.poke()
        while self._done < len(self.homes) and id(self.homes[self._done]) in self._filled:
            self._make_zero_where_none(self.homes[self._done])
            self._end = int(self.ends[self._done])
            self._done += 1
        if self.overlap:
            self._send()

    @staticmethod
    def _make_zero_where_none(home: Parameter | Fused) -> None:
        for p, _ in home.parts:
            if p.grad is None:
                p.add_grad(np.zeros_like(p.data))

    def _send(self) -> None:
        for n in range(len(self._pending), len(self.buckets)):
            bucket = self.buckets[n]
            if bucket.stop > self._end:
                return
            grad = self.flat.grad[bucket]
            start = self.dp.start_reduce_scatter(grad, self.cuts[n]) if self.split else self.dp.start_all_reduce(grad)
            self._pending.append(start)

    def finish(self) -> None:
        """Wait until every bucket is summed. Raises ValueError if backward has left gradients unfilled."""
        if self._done < len(self.homes):
            missing = [p.name for p, _ in self.homes[self._done].parts]
            raise ValueError(f"gradients of {', '.join(missing)} were never filled: pass `filled` to backward")
        self._send()
        sums = [pending.wait() for pending in self._pending]
        if self.split:
            for at, part in zip(self.owned, sums, strict=True):
                self.flat.grad[at] = part
        self._forget()

    def gather(self, flat: np.ndarray) -> None:
        """With `split`: bring what the other ranks own of flat.data or flat.grad. Without, a rank owns all of it."""
        if self.split:
            for bucket, at, cut in zip(self.buckets, self.owned, self.cuts, strict=True):
                self.dp.all_gather(flat[at].copy(), 0, cut, out=flat[bucket])

    def traffic(self) -> list[Traffic]:
        """What one step sends over dp."""
        size = [(b.stop - b.start) * self.flat.data.itemsize for b in self.buckets]
        verb = "reduce_scatter" if self.split else "all_reduce"
        sent = [Traffic(verb, self.dp.name, "backward", n) for n in size]
        return sent + [Traffic("all_gather", self.dp.name, "step", n) for n in size if self.split]


class Groups:
    """GradientSums of a flat array whose gradients are not all summed over the same ranks: those of experts that are cut over
    ep are not summed over it, as what came over it is in them already. The verbs are those of GradientSums.

    `axes`: each with the parameters' homes that it sums, the same axes on every rank, also where it has none of these.
    """

    def __init__(
        self,
        axes: Mapping[Axis, Collection[Parameter | Fused]],
        bucket_bytes: int,
        overlap: bool = True,
        split: bool = False,
        dtype: np.dtype | str | None = None,
    ) -> None:
        self.flat = Flat([p for homes in axes.values() for home in homes for p, _ in home.parts], dtype)
        ends = [0, *accumulate(len(homes) for homes in axes.values())]
        self.each = [
            GradientSums(self.flat, axis, bucket_bytes, overlap, split, slice(*at))
            for axis, at in zip(axes, pairwise(ends), strict=True)
        ]
        self.axis_of = {home: axis for axis, homes in axes.items() for home in homes}

    @property
    def owned(self) -> list[slice]:
        return [at for sums in self.each for at in sums.owned]

    def filled(self, parameters: Iterable[Parameter]) -> None:
        parameters = list(parameters)
        for sums in self.each:
            sums.filled(parameters)

    def finish(self) -> None:
        for sums in self.each:
            sums.finish()

    def gather(self, flat: np.ndarray) -> None:
        for sums in self.each:
            sums.gather(flat)

    def traffic(self) -> list[Traffic]:
        return [t for sums in self.each for t in sums.traffic()]
