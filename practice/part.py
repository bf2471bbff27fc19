"""What a check.py is made of: parts (what is asked, how it is called, what is right) and mistakes (edits of the solution).

Everything here is plain data and pure functions; who runs a part on what is in `worker`, `simulate` and `examine`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

JITTER = 1e-7


class Draw:
    """Random inputs of one case: the same numbers for either dtype. `draw(5, 3)`: normal, of the case's dtype."""

    def __init__(self, seed: int, dtype: str) -> None:
        self.rng, self.dtype = np.random.default_rng(seed), np.dtype(dtype)

    def __call__(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * self.rng.standard_normal(shape)).astype(self.dtype)

    def cast(self, values: object) -> np.ndarray:
        """Given numbers, in the case's dtype."""
        return np.asarray(values).astype(self.dtype)

    def whole(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Integers in [low, high), as floats of the case's dtype: sums of them are exact, whatever their order.

        In float64 each has a fraction beside it that float32 cannot hold, or it would not be seen where float32 is on the way.
        All are multiples of 2^-30: so their sums stay exact.
        """
        whole, part = self.rng.integers(low, high, shape), self.rng.integers(1, 32, shape)
        return whole.astype(self.dtype) + (2.0**-30 * part if self.dtype == np.float64 else 0)

    def ids(self, high: int, *shape: int) -> np.ndarray:
        """Integers in [0, high)."""
        return self.rng.integers(0, high, shape)


@dataclass(frozen=True)
class Part:
    """One line of the learner's screen: usually one function.

    Called with `at` (an axis: rank, size and the verbs; without verbs outside a run):
      inputs(draw, *sizes) -> dict       the case's whole arrays (or plain data) by name
      call(code, a, at) -> dict          runs the learner's functions `code.NAME(...)` on this rank's part of `a`; named results
      want(a, ref, at) -> dict           what is right, by the same names, in float64; a: inputs in float64
      ingredients(a, ref, at) -> dict    result name -> {ingredient: array}: the arrays whose plain sum the right answer is
      limits(a, at) -> dict              what may be counted at most, by counter
      sound(a, ref, at) -> dict          by result: the size of what other sound formulations round, beside the solution's own
      advice(a, at) -> dict              as limits, but going beyond is only remarked on
    """

    name: str
    sizes: tuple[tuple[int, ...], ...]
    inputs: Callable[..., dict]
    call: Callable[..., dict]
    want: Callable[..., dict]
    ingredients: Callable[..., dict] | None = None
    limits: Callable[..., dict] | None = None
    advice: Callable[..., dict] | None = None
    random_size: Callable[[np.random.Generator], tuple[int, ...]] | None = None
    # (input, result): moving one row of the input may move only those rows of the result that it moves in the right answer.
    influence: tuple[tuple[str, str], ...] = ()
    dtypes: tuple[str, ...] = ("float64", "float32")
    # Results that are compared without tolerance (exact integer sums, permutations).
    exact: tuple[str, ...] = ()
    # Results whose dtype need not be the inputs'.
    any_dtype: tuple[str, ...] = ()
    # Names of numbers that a result may be off by, beside the sizes and ranks: size names -> {text: value}.
    factors: Callable[..., dict[str, float]] | None = None
    count_memory: bool = False
    # Arguments, as the scaffold names them, that the learner's functions are to change in place.
    changes: tuple[str, ...] = ()
    # (a, ref, at) -> {result: array}: by how many roundings of what magnitude another sound formulation may be off, where the
    # solution's own numbers don't show it. In exp(z - lse) a z of 1e4 is rounded by 1e4 u, and where p is 1 no input moves it.
    sound: Callable[..., dict] | None = None

    @cached_property
    def size_names(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.inputs).parameters)[1:]


@dataclass(frozen=True)
class Case:
    """One set of inputs of one part. `moved`: (input, row) of it that is changed, for the influence probe."""

    part: str
    size: tuple[int, ...]
    dtype: str
    seed: int
    moved: tuple[str, int] | None = None
    # Not 0: every float is moved by a random part of JITTER of itself, to see how much that matters.
    jitter: int = 0

    def label(self, part: Part) -> str:
        sizes = " ".join(f"{n}={v}" for n, v in zip(part.size_names, self.size, strict=True))
        return f"{sizes} {self.dtype}"

    def arrays(self, part: Part) -> dict[str, Any]:
        a = part.inputs(Draw(self.seed, self.dtype), *self.size)
        if self.moved:
            name, row = self.moved
            a[name] = a[name].copy()
            a[name][row] += np.random.default_rng(self.seed + 1).standard_normal(a[name][row].shape)
        if self.jitter:
            rng = np.random.default_rng([self.seed, self.jitter])
            floats = {k: v for k, v in a.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"}
            a |= {k: v * (1 + JITTER * rng.standard_normal(v.shape)).astype(v.dtype) for k, v in floats.items()}
        return a


def cases(parts: tuple[Part, ...], seed: int) -> list[Case]:
    """All of a check's cases: each size in float64, the first two in float32, random sizes, other numbers of the first size,
    and the first case once more."""
    every = []
    for number, part in enumerate(parts):
        rng = np.random.default_rng([seed, number])
        # Small seeds of their own, so that sizes that are alike still get different numbers.
        draw = lambda rng=rng: int(rng.integers(2**31))  # noqa: E731
        first = part.dtypes[0]
        own = [Case(part.name, tuple(size), first, draw()) for size in part.sizes]
        if part.random_size:
            own += [Case(part.name, tuple(part.random_size(rng)), first, draw()) for _ in range(2)]
        own += [Case(part.name, tuple(size), dtype, draw()) for dtype in part.dtypes[1:] for size in part.sizes[:2]]
        # Other numbers of a size that was there, then the first ones again: what is kept between calls is seen.
        own += [replace(own[0], seed=draw()), own[0]]
        for name, _ in part.influence:
            rows = len(own[0].arrays(part)[name])
            own += [Case(part.name, own[0].size, first, own[0].seed, (name, row)) for row in range(rows)]
        every += own
    return every


@dataclass(frozen=True)
class Mistake:
    """A known mistake: an edit of the solution, and what is said when an answer equals the edited solution's.

    `edits`: (old, new) texts; each old text must occur in solution.py, and every occurrence is replaced.
    `seen`: where it was made in public.
    """

    name: str
    sentence: str
    edits: tuple[tuple[str, str], ...]
    seen: str = ""

    def apply(self, solution: str) -> str:
        for old, new in self.edits:
            if old not in solution:
                raise ValueError(f"mistake {self.name}: the solution has no {old!r}: give a text that occurs in solution.py")
            solution = solution.replace(old, new)
        return solution


def mistake(name: str, sentence: str, *edits: tuple[str, str], seen: str = "") -> Mistake:
    return Mistake(name, sentence, edits, seen)


@dataclass
class Outcome:
    """The outcome of one case on one rank. kind: ok, error, hang (waits for ever), silent (no answer: ended or too slow)."""

    kind: str
    results: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)  # type, message, function, line, text, shapes
    waits: str = ""
    noted: list[dict[str, Any]] = field(default_factory=list)  # floating-point errors: what, in, line, text
    sent: dict[int, int] = field(default_factory=dict)  # by line of the learner's file: how many numbers it sends
    returned: dict[str, tuple[int, str]] = field(default_factory=dict)  # by function: how many values, and what in words
    origins: dict[str, dict[str, Any]] = field(default_factory=dict)  # by result: the line that made it float64

    def over(self, limits: dict[str, int]) -> dict[str, int]:
        """The limits beyond which something was counted."""
        return {c: most for c, most in limits.items() if self.counts.get(c, 0) > most}


def float64(a: dict[str, Any]) -> dict[str, Any]:
    """Inputs for the truth: float arrays in float64, all else as it is."""
    return {k: v.astype(np.float64) if isinstance(v, np.ndarray) and v.dtype.kind == "f" else v for k, v in a.items()}
