"""When are two results equal? One tolerance function, one comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

import numpy as np

# The chance that a right result is called wrong is at most 2 exp(-CONFIDENCE^2 / 2) an entry: 5e-11.
CONFIDENCE = 7


def tolerance(dtype: np.dtype | str, sums: Sequence[tuple[int, float]], jumps: float = 0.0) -> float:
    """By how much rounding may move a result that is made of `sums`: (length n, size M of the terms' sum of magnitudes).

    A sum of n products computed with unit roundoff u is off by at most `c sqrt(n) u sum|terms|` with probability
    1 - 2 exp(-c^2 / 2) (Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput.
    41, 2019, theorem 2.4). For a sum that feeds another, M is its error's size in the result: as the errors of different
    entries are independent, the root of the sum of their squares (Hoeffding's inequality, with the same c). `jumps` is what
    the result may move where rounding may carry an input over a discontinuity (ReLU's slope at 0).
    """
    u = np.finfo(dtype).eps / 2
    return float(jumps + CONFIDENCE * u * sum(sqrt(n) * size for n, size in sums))


@dataclass(frozen=True)
class Comparison:
    tensor: str
    phase: str
    max_abs_error: float
    relative_error: float
    tolerance: float
    ok: bool
    entries: int
    worst: str

    def as_json(self) -> dict:
        """For --json; what is not finite has no number in JSON and becomes null."""
        number = lambda v: v if isfinite(v) else None  # noqa: E731
        return {
            "tensor": self.tensor,
            "phase": self.phase,
            "max_abs_error": number(self.max_abs_error),
            "relative_error": number(self.relative_error),
            "tolerance": self.tolerance,
            "ok": self.ok,
            "entries": self.entries,
        }


def compare(
    tensor: str,
    phase: str,
    got: np.ndarray,
    want: np.ndarray,
    allowed: float | np.ndarray,
    at: tuple[np.ndarray, ...] | None = None,
    owner: Callable[[tuple[int, ...]], int | None] = lambda index: None,
) -> Comparison:
    """Compare entry by entry. got: whole; want: whole, or where `at` (index arrays, one a dim) is given, the grid at it.

    `max_abs_error` must be within `allowed`: one number, or one an entry (then the worst entry is the one furthest beyond its
    own). `relative_error` is that over the largest magnitude of `want`, or, where `want` is zero to rounding (all of it within
    `allowed`), over the size of the terms that cancel in it. A NaN or an infinity in `got` is an infinite error. `worst` names
    the entry that is furthest off, by its index in the whole.
    """
    if at is not None:
        got = got[np.ix_(*at)]
    if got.shape != want.shape:
        shapes = f"shape {got.shape}, expected {want.shape}"
        return Comparison(tensor, phase, np.inf, np.inf, float(np.max(allowed)), False, 0, shapes)
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64) - want)
    error = np.where(np.isfinite(error), error, np.inf)
    beyond = error / np.maximum(allowed, np.finfo(float).tiny) if np.ndim(allowed) else error
    place = np.unravel_index(int(beyond.argmax()), error.shape)
    allowed = float(np.broadcast_to(allowed, error.shape)[place])
    index = tuple(int(p if at is None else at[d][p]) for d, p in enumerate(place))
    rank = owner(index)
    held = "every rank" if rank is None else f"rank {rank}"
    worst = f"{tensor}{list(index)} on {held}: got {got[place]:.9g}, expected {want[place]:.9g}"
    largest = float(error[place])
    scale = float(np.abs(want).max())
    if scale <= allowed:
        scale = allowed / (CONFIDENCE * float(np.finfo(got.dtype).eps) / 2) or 1.0
    return Comparison(tensor, phase, largest, largest / scale, allowed, largest <= allowed, error.size, worst)
