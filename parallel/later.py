"""Backward in two halves: what only weights wait for may be put off.

    later = Later()
    dx = layer.backward(dy, saved, later)       # what earlier stages of a pipeline wait for
    later.do()                                  # dW += a^T dz, in the order in which it was put off

(Zero bubble pipeline parallelism, arXiv 2401.10241, section 2.)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class Later:
    """Sums into gradients that were put off, with the arrays that they need. These must not be written any more.

    The products of weights are put off, and the rows of tables. Sums over tokens (biases, norms) are small and are made at
    once; so are the products of routed experts.
    """

    def __init__(self) -> None:
        self._put: list[tuple[Callable[..., None], tuple[np.ndarray, ...]]] = []

    def put(self, add: Callable[..., None], *arrays: np.ndarray) -> None:
        """Call add(*arrays) in `do`."""
        self._put.append((add, arrays))

    @property
    def nbytes(self) -> int:
        """Of the arrays that are kept, each counted once."""
        return sum({id(a): a.nbytes for _, arrays in self._put for a in arrays}.values())

    def do(self) -> None:
        """All that was put off, in its order."""
        put, self._put = self._put, []
        for add, arrays in put:
            add(*arrays)


def put_off(later: Later | None, add: Callable[..., None], *arrays: np.ndarray) -> None:
    """Call add(*arrays): now, or in `later.do` where there is such a thing."""
    if later is None:
        add(*arrays)
    else:
        later.put(add, *arrays)
