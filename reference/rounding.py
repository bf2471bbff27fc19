"""How far may rounding move a result? The reference's own forward program, run on values that carry a bound.

`Traced` is an array that the reference computes with as with any other: beside each value it keeps the variance of its
rounding error, to first order and in units of u^2 (u: unit roundoff), and the steps that led to it. Walking these steps back
with the same arithmetic gives that of every derivative: a rounding of an intermediate value counts where that value is read
again. A sum of n products counts n (sum|terms|)^2 for its own roundings, and errors that meet add as squares, both as in
`tolerance`; the result may be off by CONFIDENCE u times the root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from reference.compare import CONFIDENCE


class Rounded(NamedTuple):
    """Values, and the variances of their errors in units of u^2."""

    value: np.ndarray
    variance: np.ndarray


def _plus(a: Rounded, b: Rounded) -> Rounded:
    v = a.value + b.value
    return Rounded(v, a.variance + b.variance + v * v)


def _times(a: Rounded, b: Rounded) -> Rounded:
    v = a.value * b.value
    return Rounded(v, a.variance * b.value**2 + a.value**2 * b.variance + v * v)


def _product(a: Rounded, b: Rounded) -> Rounded:
    own = a.value.shape[-1] * (np.abs(a.value) @ np.abs(b.value)) ** 2
    return Rounded(a.value @ b.value, a.variance @ b.value**2 + a.value**2 @ b.variance + own)


def _sum_to(a: Rounded, shape: tuple[int, ...]) -> Rounded:
    """Undo broadcasting from `shape`."""
    extra = a.value.ndim - len(shape)
    axes = tuple(d for d in range(a.value.ndim) if d < extra or (shape[d - extra] == 1 != a.value.shape[d]))
    if not axes:
        return a
    n = a.value.size // max(int(np.prod(shape)), 1)
    variance = a.variance.sum(axis=axes) + n * np.abs(a.value).sum(axis=axes) ** 2
    return Rounded(a.value.sum(axis=axes).reshape(shape), variance.reshape(shape))


def _function(a: Rounded, value: np.ndarray, slope: np.ndarray) -> Rounded:
    """An elementwise function: its slope times the error of the argument, and four roundings of its own."""
    return Rounded(value, slope**2 * a.variance + (4 * value) ** 2)


def _turned(a: Rounded) -> Rounded:
    return Rounded(a.value.T, a.variance.T)


class Traced:
    """An array for the reference to compute with. `at`: a Rounded; after `walk_back`, `gradient`, a Rounded."""

    __array_priority__ = 1000

    def __init__(
        self, at: Rounded, steps: Sequence[tuple[Traced, Callable[[Rounded], Rounded]]] = (), index: object = ...
    ) -> None:
        self.at, self.steps, self.index = at, steps, index
        self.gradient: Rounded | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.at.value.shape

    def __len__(self) -> int:
        return len(self.at.value)

    @property
    def real(self) -> np.ndarray:
        return self.at.value

    @property
    def T(self) -> Traced:
        return Traced(_turned(self.at), ((self, _turned),))

    def __getitem__(self, index: object) -> Traced:
        part = Rounded(self.at.value[index], self.at.variance[index])
        return Traced(part, ((self, lambda g: g),), index)

    def sum(self, axis: int | None = None, keepdims: bool = False) -> Traced:
        v, e = self.at
        n = v.size if axis is None else v.shape[axis]
        variance = e.sum(axis=axis, keepdims=keepdims) + n * np.abs(v).sum(axis=axis, keepdims=keepdims) ** 2

        def back(g: Rounded) -> Rounded:
            spread = (lambda a: a) if keepdims or axis is None else (lambda a: np.expand_dims(a, axis))
            return Rounded(*(np.broadcast_to(spread(part), v.shape) for part in g))

        return Traced(Rounded(v.sum(axis=axis, keepdims=keepdims), variance), ((self, back),))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: object, **kwargs: object) -> Traced:
        if method != "__call__" or kwargs or ufunc not in _UFUNCS:
            return NotImplemented
        return _UFUNCS[ufunc](*(exact(a) for a in args))

    def __array_function__(self, function: Callable, types: object, args: tuple, kwargs: dict) -> Traced:
        if function not in (np.stack, np.concatenate):
            return NotImplemented
        parts = [exact(a) for a in args[0]]
        at = Rounded(function([p.at.value for p in parts], **kwargs), function([p.at.variance for p in parts], **kwargs))
        axis, steps, start = kwargs.get("axis", 0), [], 0
        for n, part in enumerate(parts):
            if function is np.stack:
                index = (slice(None),) * (axis % at.value.ndim) + (n,)
            else:
                index = (slice(None),) * (axis % at.value.ndim) + (slice(start, start + part.shape[axis]),)
                start += part.shape[axis]
            steps.append((part, lambda g, index=index: Rounded(g.value[index], g.variance[index])))
        return Traced(at, tuple(steps))

    def __add__(self, other: object) -> Traced:
        return np.add(self, other)

    __radd__ = __add__

    def __sub__(self, other: object) -> Traced:
        return np.subtract(self, other)

    def __rsub__(self, other: object) -> Traced:
        return np.subtract(other, self)

    def __mul__(self, other: object) -> Traced:
        return np.multiply(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: object) -> Traced:
        return np.divide(self, other)

    def __rtruediv__(self, other: object) -> Traced:
        return np.divide(other, self)

    def __pow__(self, n: int) -> Traced:
        return self if n == 1 else self * self ** (n - 1)

    def __neg__(self) -> Traced:
        return np.multiply(self, -1.0)

    def __matmul__(self, other: object) -> Traced:
        return np.matmul(self, other)

    def __rmatmul__(self, other: object) -> Traced:
        return np.matmul(other, self)


def exact(a: object) -> Traced:
    """`a` as it is given: without error."""
    if isinstance(a, Traced):
        return a
    v = np.asarray(a, np.float64)
    return Traced(Rounded(v, np.zeros_like(v)))


def _add(a: Traced, b: Traced) -> Traced:
    steps = tuple((x, lambda g, x=x: _sum_to(g, x.shape)) for x in (a, b))
    return Traced(_plus(a.at, b.at), steps)


def _multiply(a: Traced, b: Traced) -> Traced:
    steps = tuple((x, lambda g, x=x, y=y: _sum_to(_times(g, y.at), x.shape)) for x, y in ((a, b), (b, a)))
    return Traced(_times(a.at, b.at), steps)


def _reciprocal(a: Traced) -> Traced:
    v = 1 / a.at.value
    at = _function(a.at, v, v * v)
    minus = Rounded(-at.value, at.variance)
    return Traced(at, ((a, lambda g: _times(g, _times(minus, at))),))


def _matmul(a: Traced, b: Traced) -> Traced:
    """Of matrices and vectors, a vector on either side."""
    A, B = (Rounded(*(p[None] for p in a.at)) if len(a.shape) == 1 else a.at), b.at
    B = Rounded(*(p[:, None] for p in B)) if len(b.shape) == 1 else B
    at = _product(A, B)
    shape = a.shape[:-1] + b.shape[1:]

    def whole(g: Rounded) -> Rounded:
        return Rounded(*(p.reshape(A.value.shape[0], B.value.shape[1]) for p in g))

    def to_a(g: Rounded) -> Rounded:
        return Rounded(*(p.reshape(a.shape) for p in _product(whole(g), _turned(B))))

    def to_b(g: Rounded) -> Rounded:
        return Rounded(*(p.reshape(b.shape) for p in _product(_turned(A), whole(g))))

    return Traced(Rounded(*(p.reshape(shape) for p in at)), ((a, to_a), (b, to_b)))


def _exp(a: Traced) -> Traced:
    v = np.exp(a.at.value)
    at = _function(a.at, v, v)
    return Traced(at, ((a, lambda g: _times(g, at)),))


def _log(a: Traced) -> Traced:
    v = 1 / a.at.value
    slope = Rounded(v, v**4 * a.at.variance + v**2)
    return Traced(_function(a.at, np.log(a.at.value), v), ((a, lambda g: _times(g, slope)),))


def _sqrt(a: Traced) -> Traced:
    v = np.sqrt(a.at.value)
    half = 0.5 / v
    at = _function(a.at, v, half)
    slope = Rounded(half, half**2 * at.variance / v**2 + half**2)
    return Traced(at, ((a, lambda g: _times(g, slope)),))


def _tanh(a: Traced) -> Traced:
    v = np.tanh(a.at.value)
    at = _function(a.at, v, 1 - v * v)
    slope = Rounded(1 - v * v, (2 * v) ** 2 * at.variance + 1)
    return Traced(at, ((a, lambda g: _times(g, slope)),))


_UFUNCS: dict[np.ufunc, Callable[..., Traced]] = {
    np.add: _add,
    np.subtract: lambda a, b: _add(a, _multiply(b, exact(-1.0))),
    np.multiply: _multiply,
    np.divide: lambda a, b: _multiply(a, _reciprocal(b)),
    np.matmul: _matmul,
    np.exp: _exp,
    np.log: _log,
    np.sqrt: _sqrt,
    np.tanh: _tanh,
}


def walk_back(y: Traced, dy: np.ndarray) -> None:
    """Leave with every array that led to y the gradient of sum(dy * y) and its error's variance."""
    order, seen = [], set()
    stack: list[tuple[Traced, bool]] = [(y, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack += [(parent, False) for parent, _ in node.steps]
    y.gradient = exact(dy).at
    for node in reversed(order):
        if node.gradient is None:
            continue
        for parent, back in node.steps:
            g = back(node.gradient)
            if parent.gradient is None:
                parent.gradient = Rounded(np.zeros(parent.shape), np.zeros(parent.shape))
            at = parent.gradient
            at.value[node.index] += g.value
            at.variance[node.index] += g.variance + g.value**2
        if node.steps:
            node.gradient = None


def bounds(
    parts: Iterable[Callable[[dict], Traced]], arrays: dict[str, np.ndarray], dy: np.ndarray, dtype: np.dtype | str
) -> dict[str, np.ndarray]:
    """By how much rounding may move y and the gradient of sum(dy * y) for each of `arrays`, entry by entry, by name.

    `parts`: forward programs, called with the arrays, whose results add up to y (one a head, to save memory).
    """
    variances = {name: np.zeros(np.shape(a)) for name, a in arrays.items()} | {"y": np.zeros(np.shape(dy))}
    for part in parts:
        traced = {name: exact(a) for name, a in arrays.items()}
        y = part(traced)
        variances["y"] += y.at.variance + y.at.value**2
        walk_back(y, dy)
        for name, a in traced.items():
            if a.gradient is not None:
                variances[name] += a.gradient.variance + a.gradient.value**2
    return {name: CONFIDENCE * np.finfo(dtype).eps / 2 * np.sqrt(variance) for name, variance in variances.items()}
