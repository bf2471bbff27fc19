"""A weight that counts the multiplications of the products that it is in. See `Code.counted`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import isqrt, prod
from typing import Any

import numpy as np

COUNTER = "multiplications"
PRODUCTS = (np.dot, np.tensordot, np.inner, np.outer, np.vdot)


class Weight(np.ndarray):
    """Counts `@` and its kin, `*`, einsum, dot, tensordot, inner, outer and vdot; what these return is a plain array.

    Parts, copies and joins of a weight count too. Not seen: the method x.dot(W) of another array x.
    """

    tally: Counter | None = None

    def __array_finalize__(self, other: object) -> None:
        self.tally = getattr(other, "tally", None)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, **kwargs: Any) -> Any:
        given = [_plain(x) for x in args]
        if "out" in kwargs:
            kwargs["out"] = tuple(map(_plain, kwargs["out"]))
        result = getattr(ufunc, method)(*given, **kwargs)
        if method in ("__call__", "outer") and len(given) > 1:
            # Of matmul, vecdot, matvec and vecmat the first argument's last dim is the one that is summed over.
            inner = np.shape(given[0])[-1] if ufunc.signature else ufunc is np.multiply
            self._note(np.size(result) * inner)
        return result

    def __array_function__(self, function: Callable, types: object, args: tuple, kwargs: dict) -> Any:
        if function is np.einsum or function in PRODUCTS:
            given = [_plain(x) for x in args]
            result = function(*given, **kwargs)
            if function is np.einsum:
                self._note(_of_einsum(given))
            else:
                # (A K) (K B) (A B) is (A K B)^2.
                self._note(isqrt(prod(np.size(x) for x in given[:2]) * np.size(result)))
            return result
        result = super().__array_function__(function, types, args, kwargs)
        # All ways to stack arrays go through it.
        return counted(result, self.tally) if function is np.concatenate else result

    def _note(self, n: int) -> None:
        if self.tally is not None:
            self.tally[COUNTER] += int(n)


def counted(W: np.ndarray, tally: Counter | None) -> Weight:
    watched = W.view(Weight)
    watched.tally = tally
    return watched


def _plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, Weight) else x


def _of_einsum(args: list) -> int:
    """One for each value of all letters. args: those of np.einsum, ("td,df->tf", x, W) or (x, [0, 1], W, [1, 2], [0, 2])."""
    if isinstance(args[0], str):
        texts = args[0].replace(" ", "").replace("...", ".").partition("->")[0].split(",")
        terms = list(zip(texts, args[1:], strict=True))
    else:
        terms = [(labels, x) for x, labels in zip(args[::2], args[1::2], strict=False)]
    sizes: dict[object, int] = {}
    for labels, x in terms:
        shape = np.shape(x)
        dots = [("...", n) for n in reversed(range(len(shape) - len(labels) + 1))]
        letters = [d for c in labels for d in (dots if c in (".", Ellipsis) else [c])]
        for letter, n in zip(letters, shape, strict=True):
            sizes[letter] = n if sizes.get(letter, 1) == 1 else sizes[letter]
    return prod(sizes.values())
