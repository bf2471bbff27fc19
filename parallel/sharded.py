"""Gradients and weights of which a rank keeps its share only: ZeRO stages 2 and 3 (arXiv 1910.02054; PyTorch calls the last
fully sharded data parallel, 2304.11277).

    units = Units(homes_of_units, over, stages, gathers=True)
    trainer: begin(ops), forwards and backwards, finish(), the update of `owned`, spread()

What is summed over the same ranks lies in one flat array a unit, cut evenly over them. With `gathers` (stage 3) it is gathered
before its part is computed, the next unit's beside the computation, and let go after; else (stage 2) all weights stay. The
gradients of a unit are made in an array that is there for this alone: each micro-batch's are summed and split as soon as they
are complete, and added to this rank's share. `parallel.residence` says when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from parallel import residence
from parallel.flat import Owned
from parallel.holder import Holder
from parallel.parameter import Fused, Parameter
from parallel.pending import Pending
from parallel.residence import Fill, Use
from parallel.schedule import Op
from parallel.shares import Share, Shares


class FlatShard(Share):
    """A Share and its arrays. The rest is somewhere else until it is gathered, where it is: until then the parameters' data are
    NaN, in the memory of one."""

    def __init__(self, *share: object) -> None:
        """As Share."""
        super().__init__(*share)
        here, homes = slice(*self.cut.bounds[self.over.axis.rank]), self.numbering.homes
        self.whole: np.ndarray | None = np.concatenate([home.data.reshape(-1) for home in homes])
        self.data = self.whole[here]
        self.grad = np.zeros_like(self.data)
        self.filling: np.ndarray | None = None
        if self.gathers:
            self.data = self.data.copy()
            self.drop()
        else:
            self.attach(self.whole)
        if self.late:
            self.open()

    def attach(self, whole: np.ndarray) -> None:
        """The parameters live in `whole`."""
        self.whole = whole
        for home, at in self.numbering.places():
            home.attach(whole[at].reshape(home.data.shape))

    def drop(self) -> None:
        self.whole = None
        nothing = np.array(np.nan, self.numbering.dtype)
        for home in self.numbering.homes:
            home.attach(np.broadcast_to(nothing, home.data.shape))

    def open(self) -> None:
        """Gradients are made in an array of their own."""
        self.filling = np.empty(self.numbering.size, self.numbering.dtype)
        for home, at in self.numbering.places():
            home.lend(self.filling[at].reshape(home.data.shape))

    def leave(self) -> Pending:
        """Sum and split what was filled, beside computation. Unless it is late, the parameters have no gradients after."""
        for home in self.numbering.homes:
            home.zero_where_none()
        pending = self.over.axis.start_reduce_scatter(self.filling, self.cut)
        if not self.late:
            self.filling = None
            for home in self.numbering.homes:
                home.forget()
        return pending

    def gathered(self, own: np.ndarray) -> np.ndarray:
        """The whole array, of `data` or `grad`."""
        return self.over.axis.all_gather(own, 0, self.cut)


class Units(Shares, Holder):
    """Shares with their arrays. `release` is told of arrays that are let go."""

    share = FlatShard

    def __init__(self, *shares: object, release: Callable[[np.ndarray], None] = lambda whole: None) -> None:
        """As Shares."""
        super().__init__(*shares)
        self.release = release
        self._uses: deque[Use] = deque()
        self._fills: deque[Fill] = deque()
        self._coming: dict[int, list[Pending]] = {}
        self._leaving: deque[tuple[list[FlatShard], list[Pending], list[np.ndarray]]] = deque()
        self._peaks = {"gathered": 0, "unsummed": 0}

    @property
    def owned(self) -> list[Owned]:
        return [Owned(shard.at, shard.data, shard.grad) for shard in self.shards]

    def zero_grad(self) -> None:
        for shard in self.shards:
            shard.grad[...] = 0
            for p in shard.numbering.parameters:
                p.zero_grad()

    def begin(self, ops: Sequence[Op], phases: Mapping[str, str]) -> None:
        self._uses = deque(residence.uses(ops, self.parts, phases) if self.gathers else ())
        self._fills = deque(residence.fills(ops, self.parts, phases))

    # --- weights

    @contextmanager
    def using(self, parameters: Iterable[Parameter]) -> Iterator[None]:
        if not self.gathers:
            yield
            return
        use = self._uses.popleft()
        self._gather(use)
        for shard, pending in zip(self.units[use.unit], self._coming.pop(use.unit, ()), strict=False):
            shard.attach(pending.wait())
        if self.ahead and self._uses:
            self._gather(self._uses[0])
        self._count()
        yield
        if use.drops:
            for shard in self.units[use.unit]:
                whole = shard.whole
                shard.drop()
                self.release(whole)

    def _gather(self, use: Use) -> None:
        """Start to gather a unit, unless it is there or on its way."""
        there = all(shard.whole is not None for shard in self.units[use.unit])
        if use.gathers and not there and use.unit not in self._coming:
            pending = self._coming[use.unit] = []
            for shard in self.units[use.unit]:
                with shard.over.axis.ledger.phase(use.phase):
                    pending.append(shard.over.axis.start_all_gather(shard.data, shard.cut))

    # --- gradients

    def filling(self, parameters: Iterable[Parameter]) -> None:
        unit = [shard for shard in self.units[self._unit(parameters)] if not shard.late]
        if any(shard.filling is None for shard in unit):
            # One unit's sums may still be under way.
            self._settle(1)
            for shard in unit:
                shard.open()
        self._count()

    def filled(self, parameters: Iterable[Parameter]) -> None:
        for _, pending, _ in self._leaving:
            for one in pending:
                one.poke()
        fill = self._fills.popleft()
        if fill.sends:
            unit = [shard for shard in self.units[fill.unit] if not shard.late]
            arrays = [shard.filling for shard in unit]
            self._leaving.append((unit, [shard.leave() for shard in unit], arrays))
            if not self.ahead:
                self._settle(0)

    def _settle(self, left: int) -> None:
        """Wait for sums until so many units' are under way."""
        while len(self._leaving) > left:
            unit, pending, arrays = self._leaving.popleft()
            for shard, one, whole in zip(unit, pending, arrays, strict=True):
                shard.grad += one.wait()
                self.release(whole)

    def _count(self) -> None:
        there = sum(s.numbering.nbytes for s in self.shards if self.gathers and s.whole is not None)
        there += sum(self._size(unit) for unit in self._coming)
        filling = [s for s in self.shards if not s.late and s.filling is not None]
        filling += [shard for unit, *_ in self._leaving for shard in unit]
        most = {"gathered": there, "unsummed": sum(s.numbering.nbytes for s in filling)}
        self._peaks = {kind: max(self._peaks[kind], now) for kind, now in most.items()}

    def finish(self) -> None:
        """Wait until all is summed. Raises ValueError if backward has left gradients unfilled."""
        if self._fills:
            missing = [p.name for shard in self.units[self._fills[0].unit] for p in shard.numbering.parameters]
            raise ValueError(f"gradients of {', '.join(missing)} were never filled: give the model's backward this holder")
        self._settle(0)
        late = [shard for shard in self.shards if shard.late]
        for shard, pending in [(shard, shard.leave()) for shard in late]:
            shard.grad += pending.wait()
        for shard in self.shards:
            if shard.over.rest is not None:
                shard.grad[...] = shard.over.rest.all_reduce(shard.grad)

    # --- between steps

    def spread(self) -> None:
        """After an update: bring the weights that others have updated, where all weights stay."""
        if not self.gathers:
            for shard in self.shards:
                shard.over.axis.all_gather(shard.data.copy(), 0, shard.cut, out=shard.whole)

    def take(self, home: Parameter | Fused, whole: np.ndarray) -> None:
        """Set its weights, where all of them stay; `owned` has this rank's share."""
        if not self.gathers:
            home.data[...] = whole

    def wholes(self, kind: str) -> dict[str, np.ndarray]:
        """Copies of the weights ("data") or of their gradients' sums ("grad"), by name. All ranks call it together."""
        found = {}
        for shard in self.shards:
            whole = shard.gathered(getattr(shard, kind))
            for home, at in shard.numbering.places():
                found |= {p.name: whole[at].reshape(home.data.shape)[index] for p, index in home.parts}
        return found

    @property
    def held(self) -> dict[str, int]:
        """Bytes of what stays, as the arrays have them."""
        late = sum(shard.filling.nbytes for shard in self.shards if shard.late)
        weights = sum((shard.data if self.gathers else shard.whole).nbytes for shard in self.shards)
        return {"weights": weights, "gradients": late + sum(shard.grad.nbytes for shard in self.shards)}

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes of what has come and gone, at most: units that were gathered, gradients that were not summed yet."""
        return dict(self._peaks)
