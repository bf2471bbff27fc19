"""Gradients by complex step, at a grid of entries and along directions that reach all of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np

STEP = 1e-30

# `loss(arrays, name, index)`: called with the arrays, of which `name` is moved at `index` (None: everywhere). It may leave out
# terms that this does not move.
Loss = Callable[[dict[str, np.ndarray], str, tuple[int, ...] | None], complex]


def grid(shape: tuple[int, ...], most: int) -> tuple[np.ndarray, ...]:
    """Which entries to derive, as indices of each dim: all, if at most `most`, else evenly, both ends included."""
    keep = list(shape)
    while np.prod(keep) > most and max(keep) > 2:
        longest = int(np.argmax(keep))
        keep[longest] = max(2, keep[longest] * 3 // 4)
    return tuple(np.linspace(0, n - 1, k).round().astype(int) for n, k in zip(shape, keep, strict=True))


def at_entries(loss: Loss, arrays: dict[str, np.ndarray], name: str, at: tuple[np.ndarray, ...] | None = None) -> np.ndarray:
    """Derivatives of the loss with respect to arrays[name] on the grid `at` (None: all entries), one evaluation an entry."""
    at = [np.arange(n) for n in arrays[name].shape] if at is None else at
    moved = arrays[name].astype(complex)
    gradient = np.empty([len(a) for a in at])
    for place in product(*(range(len(a)) for a in at)):
        index = tuple(int(a[p]) for a, p in zip(at, place, strict=True))
        moved[index] += 1j * STEP
        gradient[place] = loss(arrays | {name: moved}, name, index).imag / STEP
        moved[index] = moved[index].real
    return gradient


def along(loss: Loss, arrays: dict[str, np.ndarray], name: str, direction: np.ndarray) -> float:
    """The derivative of the loss as arrays[name] moves along `direction`: sum(gradient * direction)."""
    return loss(arrays | {name: arrays[name] + 1j * STEP * direction}, name, None).imag / STEP
