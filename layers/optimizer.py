"""Optimizers: they read gradients and change weights, in place, each rank its own part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import cos, pi, sqrt

import numpy as np

from layers.ops import BLOCK
from parallel.axis import Axis
from parallel.data import Flat
from parallel.parameter import Parameter


class SGD:
    """v = momentum v + g; w -= lr v (Sutskever et al., 2013, as PyTorch writes it). `lr` may be changed between steps."""

    def __init__(self, parameters: list[Parameter], lr: float, momentum: float = 0.9) -> None:
        self.parameters, self.lr, self.momentum = parameters, lr, momentum
        self._velocity = [np.zeros_like(p.data) for p in parameters]

    def step(self) -> None:
        """One update from the gradients that backward has added since zero_grad."""
        for p, v in zip(self.parameters, self._velocity, strict=True):
            v *= self.momentum
            v += p.grad
            p.data -= p.data.dtype.type(self.lr) * v

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.zero_grad()


def _blocks(ranges: Sequence[slice]) -> Iterator[slice]:
    """The ranges in pieces that stay in the cache."""
    for at in ranges:
        yield from (slice(a, min(a + BLOCK, at.stop)) for a in range(at.start, at.stop, BLOCK))


class AdamW:
    """Adam with decoupled weight decay (Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, 1711.05101), on flat arrays.

        m  = b1 m + (1 - b1) g
        v  = b2 v + (1 - b2) g^2
        w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)          decay: of matrices and tables only

    `owned`: the ranges of the flat arrays to update; the state m, v is kept for these alone (ZeRO stage 1 splits them).
    """

    def __init__(
        self,
        flat: Flat,
        owned: Sequence[slice],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self.flat, self.betas, self.eps, self.weight_decay = flat, betas, eps, weight_decay
        self.owned, self.steps = list(owned), 0
        size = sum(at.stop - at.start for at in owned)
        self.m, self.v = (np.zeros(size, flat.data.dtype) for _ in range(2))
        # Owned ranges, cut where decay begins or ends.
        decays = [(at.stop, home.decays) for home, at in flat.places()]
        ends = np.array([stop for stop, _ in decays])
        self._runs: list[tuple[slice, slice, bool]] = []
        state = 0
        # A stage without blocks owns an empty one.
        for at in (at for at in self.owned if at.start < at.stop):
            inside = [int(e) for e in ends if at.start < e < at.stop]
            for start, stop in pairwise([at.start, *inside, at.stop]):
                decay = decays[int(np.searchsorted(ends, start, side="right"))][1]
                self._runs.append((slice(start, stop), slice(state, state + stop - start), decay))
                state += stop - start

    def _overlaps(self, at: slice) -> Iterator[tuple[slice, slice]]:
        """Where owned ranges lie in `at`: as slices of an array of its length, and of the state."""
        state = 0
        for owned in self.owned:
            start, stop = max(at.start, owned.start), min(at.stop, owned.stop)
            if start < stop:
                yield slice(start - at.start, stop - at.start), slice(state + start - owned.start, state + stop - owned.start)
            state += owned.stop - owned.start

    def state_in(self, at: slice) -> np.ndarray:
        """m and v (2, n) of the range `at` of the flat arrays; zero where this rank does not own it."""
        found = np.zeros((2, at.stop - at.start), self.m.dtype)
        for there, here in self._overlaps(at):
            found[0, there], found[1, there] = self.m[here], self.v[here]
        return found

    def take_state(self, at: slice, moments: np.ndarray) -> None:
        """Set m and v in the range `at` from (2, n): what this rank owns of it."""
        for there, here in self._overlaps(at):
            self.m[here], self.v[here] = moments[:, there]

    def step(self, lr: float, scale: float = 1.0) -> None:
        """One update from flat.grad times `scale` (of clipping). One pass over memory, in blocks that stay in the cache."""
        self.steps += 1
        b1, b2 = self.betas
        of = self.flat.data.dtype.type
        unbias_m, unbias_v = 1 - b1**self.steps, sqrt(1 - b2**self.steps)
        room = np.empty(BLOCK, self.flat.data.dtype)
        for at, state, decay in self._runs:
            for here in _blocks([at]):
                n = here.stop - here.start
                offset = here.start - at.start + state.start
                w, g, t = self.flat.data[here], self.flat.grad[here], room[:n]
                m, v = self.m[offset : offset + n], self.v[offset : offset + n]
                np.multiply(g, of((1 - b1) * scale), out=t)
                m *= of(b1)
                m += t
                np.multiply(g, g, out=t)
                t *= of((1 - b2) * scale**2)
                v *= of(b2)
                v += t
                # m / unbias_m / (sqrt(v) / unbias_v + eps), with one number before and one after the division
                np.sqrt(v, out=t)
                t += of(self.eps * unbias_v)
                np.divide(m, t, out=t)
                t *= of(lr * unbias_v / unbias_m)
                if decay:
                    w *= of(1 - lr * self.weight_decay)
                w -= t


def squared_norm(flat: Flat, owned: Sequence[slice], counted: np.ndarray) -> float:
    """The sum of squares of flat.grad in `owned`, of the entries that are counted on this rank."""
    total = 0.0
    for at in _blocks(owned):
        g, here = flat.grad[at], counted[at]
        g = g if here.all() else g[here]
        total += float(np.vdot(g, g))
    return total


def global_norm(flat: Flat, owned: Sequence[slice], counted: np.ndarray, everyone: Axis) -> float:
    """The norm of the whole gradient: of each entry, on the one rank that counts it."""
    return sqrt(everyone.all_reduce(np.array([squared_norm(flat, owned, counted)])).item())


def warmup_cosine(step: int, steps: int, peak: float, warmup: int, last: float = 0.1) -> float:
    """The learning rate of step 0 <= step < steps: rising to `peak` over `warmup` steps, then a cosine down to last * peak
    (Loshchilov and Hutter, arXiv 1608.03983, one period)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    along = (step - warmup) / max(1, steps - warmup)
    return peak * (last + (1 - last) * 0.5 * (1 + cos(pi * along)))
