"""When is an answer right? One tolerance, derived from how much the answer moves when its inputs do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from practice.part import JITTER

Results = dict[str, Any]
# The chance that rounding alone exceeds this many standard deviations of it: 5e-11 an entry (as reference.compare).
CONFIDENCE = 7
# Roundings of a chain of elementwise functions, as the length of a sum.
STEPS = 16
# Another right solution may round so many times as much as ours.
OTHERS = 4
SINGLE = float(np.finfo(np.float32).eps) / 2


def tolerances(
    right: Results,
    moved: Sequence[Results],
    pairs: Sequence[tuple[Results, Results]],
    longest: int,
    dtype: str,
    sound: Results,
) -> Results:
    """By how much rounding may move each float array of `right`, one number for each entry of its last dim.

    `moved`: the results for inputs of which each is off by a random part of JITTER of itself. Their spread over JITTER is the
    root of the sum of squares of the terms that the result is made of, seen from its inputs; times sqrt(n) it bounds the sum of
    their magnitudes (Cauchy and Schwarz), and a sum of n terms is off by at most CONFIDENCE sqrt(n) u times that (Higham and
    Mary 2019, theorem 2.4). `longest`: the n of the longest sum.

    What cancels on the way (1 + tanh(a), far below 0) is not seen from the inputs. `pairs`: the same results computed in
    float32 and in float64; their distance, over float32's u, is what the solution's own roundings amount to, and another right
    solution may have some times as much. `sound`: what such a solution rounds that neither shows, by result.
    """
    u = np.finfo(dtype).eps / 2
    tolerances = {}
    for name, y in right.items():
        if not (isinstance(y, np.ndarray) and y.dtype.kind == "f"):
            continue
        with np.errstate(all="ignore"):
            spread = np.sqrt(np.mean([np.square(m[name] - y) for m in moved], axis=0)) / JITTER
            own = np.sqrt(np.mean([np.square(a[name] - b[name].astype(np.float64)) for a, b in pairs], axis=0)) / SINGLE
            spread, size, own = (np.where(np.isfinite(a), a, 0.0) for a in (spread, np.abs(y), own))
        allowed = CONFIDENCE * u * (longest * spread + STEPS**0.5 * size + OTHERS * own)
        allowed = allowed + CONFIDENCE * u * np.abs(sound.get(name, 0.0))
        if y.ndim and y.size:
            allowed = np.broadcast_to(allowed.max(axis=-1, keepdims=True), y.shape)
        tolerances[name] = allowed + np.finfo(dtype).tiny
    return tolerances


def wrong_entries(got: np.ndarray, want: np.ndarray, allowed: np.ndarray | float) -> np.ndarray:
    """Where two arrays of one shape differ by more than allowed. Infinities and NaN must be the same."""
    if got.dtype.kind not in "fiubc":
        return np.asarray(got != want)
    got, want = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(all="ignore"):
        off = ~(np.abs(got - want) <= allowed)
    return off & ~((got == want) | (np.isnan(got) & np.isnan(want)))


def same(got: Any, want: Any, allowed: Any) -> bool:
    """Whether two results agree: arrays by shape and entries, plain data by equality, floats in it to 12 digits."""
    if isinstance(got, np.ndarray) and isinstance(want, np.ndarray):
        return got.shape == want.shape and not wrong_entries(got, want, 0.0 if allowed is None else allowed).any()
    if isinstance(got, np.ndarray) or isinstance(want, np.ndarray):
        return _numbers(got, want) and np.ndim(got) == np.ndim(want) == 0 and same(np.asarray(got), np.asarray(want), allowed)
    return equal(got, want)


def _numbers(*values: Any) -> bool:
    return all(isinstance(v, (int, float)) or (isinstance(v, np.ndarray) and v.dtype.kind in "fiu") for v in values)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, float) or isinstance(b, float):
        numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
        return numbers and (a == b or abs(a - b) <= 1e-12 * max(abs(a), abs(b)) or (a != a and b != b))
    return a == b


def longest_sum(arrays: dict[str, Any]) -> int:
    """The longest dim of the inputs, as the length of the longest sum."""
    return max([4, *(n for a in arrays.values() if isinstance(a, np.ndarray) for n in a.shape)])


def first_wrong(wrong: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))


Judge = Callable[[Results], bool]
