"""Matrix products: every one of a layer is made here, so that it can be counted.

with counted() as made:
    y_TO = matmul(x_TI, W_IO)
made[T, O, I, 1]                    # 1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod

import numpy as np

# (M, N, K, batch): so many products of M K by K N entries at once.
Product = tuple[int, int, int, int]
_MADE: ContextVar[Counter[Product] | None] = ContextVar("made", default=None)


@contextmanager
def counted() -> Iterator[Counter[Product]]:
    """How often this thread makes each product meanwhile, but those of nothing."""
    made: Counter[Product] = Counter()
    token = _MADE.set(made)
    try:
        yield made
    finally:
        _MADE.reset(token)


def note(a: np.ndarray, b: np.ndarray) -> None:
    """The product a @ b is made, in whatever way."""
    if (made := _MADE.get()) is not None:
        product = *a.shape[-2:-1], b.shape[-1], a.shape[-1], prod(a.shape[:-2])
        if all(product):
            made[product] += 1


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """a @ b, of matrices or stacks of them."""
    note(a, b)
    return np.matmul(a, b, out=out)
