"""Optimizers: they read gradients and change weights, in place, each rank its own part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import cos, pi, sqrt

import numpy as np

from layers.ops import BLOCK
from parallel.axis import Axis
from parallel.flat import Numbering, Owned
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


def _blocks(size: int) -> Iterator[slice]:
    """So many entries, in blocks that stay in the cache."""
    return (slice(a, min(a + BLOCK, size)) for a in range(0, size, BLOCK))


class AdamW:
    """Adam with decoupled weight decay (Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, 1711.05101), on flat arrays.

        m  = b1 m + (1 - b1) g
        v  = b2 v + (1 - b2) g^2
        w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)          decay: of matrices and tables only

    `owned`: the entries to update; the state m, v is kept for these alone (ZeRO splits them). `numbering`: of all entries.
    """

    def __init__(
        self,
        numbering: Numbering,
        owned: Sequence[Owned],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self.dtype, self.betas, self.eps, self.weight_decay = numbering.dtype, betas, eps, weight_decay
        self.owned, self.steps = list(owned), 0
        self.m, self.v = (np.zeros(sum(len(part.data) for part in owned), self.dtype) for _ in range(2))
        # Owned ranges, cut where decay begins or ends: weights, gradients, m, v and whether they decay.
        decays = [(at.stop, home.decays) for home, at in numbering.places()]
        ends = np.array([stop for stop, _ in decays])
        self._runs: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, bool]] = []
        # A stage without blocks owns an empty one.
        for part, state in (found for found in self._parts() if len(found[0].data)):
            inside = [int(e) for e in ends if part.at.start < e < part.at.stop]
            for start, stop in pairwise([part.at.start, *inside, part.at.stop]):
                decay = decays[int(np.searchsorted(ends, start, side="right"))][1]
                here = slice(start - part.at.start, stop - part.at.start)
                there = slice(state + here.start, state + here.stop)
                self._runs.append((part.data[here], part.grad[here], self.m[there], self.v[there], decay))

    def _parts(self) -> Iterator[tuple[Owned, int]]:
        """What is owned, with where its state begins."""
        state = 0
        for part in self.owned:
            yield part, state
            state += len(part.data)

    def _overlaps(self, at: slice) -> Iterator[tuple[slice, list[np.ndarray]]]:
        """Where owned entries lie in `at`, as slices of an array of its length; their weights, m and v."""
        for part, state in self._parts():
            start, stop = max(at.start, part.at.start), min(at.stop, part.at.stop)
            if start < stop:
                here = slice(start - part.at.start, stop - part.at.start)
                there = slice(state + here.start, state + here.stop)
                yield slice(start - at.start, stop - at.start), [part.data[here], self.m[there], self.v[there]]

    def state_in(self, at: slice) -> np.ndarray:
        """Weights, m and v (3, n) of the entries `at`; zero where this rank does not own them."""
        found = np.zeros((3, at.stop - at.start), self.dtype)
        for where, held in self._overlaps(at):
            found[:, where] = held
        return found

    def take_state(self, at: slice, state: np.ndarray) -> None:
        """Set weights, m and v of the entries `at` from (3, n): what this rank owns of them."""
        for where, held in self._overlaps(at):
            for mine, given in zip(held, state, strict=True):
                mine[...] = given[where]

    def step(self, lr: float, scale: float = 1.0) -> None:
        """One update from gradients times `scale` (of clipping). One pass over memory, in blocks that stay in the cache."""
        self.steps += 1
        b1, b2 = self.betas
        of = self.dtype.type
        unbias_m, unbias_v = 1 - b1**self.steps, sqrt(1 - b2**self.steps)
        room = np.empty(BLOCK, self.dtype)
        for *arrays, decay in self._runs:
            for here in _blocks(len(arrays[0])):
                w, g, m, v = (a[here] for a in arrays)
                t = room[: len(w)]
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


def squared_norm(owned: Sequence[Owned], counted: Sequence[np.ndarray]) -> float:
    """The sum of squares of the gradients in `owned`, of the entries that are counted on this rank, as masks by part."""
    total = 0.0
    for part, mask in zip(owned, counted, strict=True):
        for at in _blocks(len(mask)):
            g, here = part.grad[at], mask[at]
            g = g if here.all() else g[here]
            total += float(np.vdot(g, g))
    return total


def global_norm(owned: Sequence[Owned], counted: Sequence[np.ndarray], everyone: Axis) -> float:
    """The norm of the whole gradient: of each entry, on the one rank that counts it."""
    return sqrt(everyone.all_reduce(np.array([squared_norm(owned, counted)])).item())


def warmup_cosine(step: int, steps: int, peak: float, warmup: int, last: float = 0.1) -> float:
    """The learning rate of step 0 <= step < steps: rising to `peak` over `warmup` steps, then a cosine down to last * peak
    (Loshchilov and Hutter, arXiv 1608.03983, one period)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    along = (step - warmup) / max(1, steps - warmup)
    return peak * (last + (1 - last) * 0.5 * (1 + cos(pi * along)))
