"""Elementwise functions with their derivatives, in blocks that stay in the cache.

    T tokens   F hidden width   f this rank's share of F

Each takes z and returns (h, slope): `dz = slope * dh`. The slope comes out of the same pass and is all that backward needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import pi, prod, sqrt

import numpy as np

from parallel.products import note

# Elements a block: a few float32 arrays of this size fit a core's L2 cache together.
BLOCK = 16 * 1024


def blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Flat views of `arrays` (contiguous, of one size), a block of each at a time."""
    flat = [a.reshape(-1) for a in arrays]
    for start in range(0, flat[0].size, BLOCK):
        yield tuple(a[start : start + BLOCK] for a in flat)


# Up to so many rows, one product a row is faster than one for all: the BLAS would pack the whole matrix anew for each product
# of several rows, which costs as much as reading it twice more.
ROW_BY_ROW = 2
# The BLAS takes rows four at a time, and one that is left over costs as much as four: 7 rows take 1.45 times as long as 8. So
# a few rows are filled up with rows of zeros. From MANY rows on that gains nothing.
AT_ONCE, MANY = 4, 64


def flattened(x_T: np.ndarray) -> np.ndarray:
    """x (T, ...) as (T, n), whatever T is."""
    return x_T.reshape(len(x_T), prod(x_T.shape[1:]))


def product(x_TI: np.ndarray, W_IO: np.ndarray) -> np.ndarray:
    """x @ W (T, O)."""
    note(x_TI, W_IO)
    T = len(x_TI)
    if 1 < T <= ROW_BY_ROW:
        y_TO = np.empty((T, W_IO.shape[1]), x_TI.dtype)
        for x_I, y_O in zip(x_TI, y_TO, strict=True):
            np.matmul(x_I, W_IO, out=y_O)
        return y_TO
    if T % AT_ONCE and ROW_BY_ROW < T < MANY:
        filled_RI = np.zeros((T + -T % AT_ONCE, x_TI.shape[1]), x_TI.dtype)
        filled_RI[:T] = x_TI
        return (filled_RI @ W_IO)[:T]
    return x_TI @ W_IO


def _relu(z_Tf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """h = max(z, 0). The slope is a mask of one byte an entry; 0 at z = 0."""
    return np.maximum(z_Tf, 0), z_Tf > 0


def _gelu(z_Tf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """h = z/2 (1 + tanh(u)), u = sqrt(2/pi) (z + .044715 z^3), the tanh form (Hendrycks and Gimpel, arXiv 1606.08415).

    Computed as z s, s = 1 / (1 + exp(-2u)), which is the same, exact where tanh nears -1, and faster: exp takes half of tanh.
    """
    c, a = 2 * sqrt(2 / pi), 0.044715
    h_Tf, slope_Tf = np.empty_like(z_Tf), np.empty_like(z_Tf)
    room_t, room_s = np.empty((2, BLOCK), z_Tf.dtype)
    # exp(-2u) = inf where z is far below 0: s = 0 is right there.
    with np.errstate(over="ignore"):
        for z, h, slope in blocks(z_Tf, h_Tf, slope_Tf):
            t, s = room_t[: z.size], room_s[: z.size]
            np.multiply(z, z, out=t)
            np.multiply(t, -c * a, out=s)
            s -= c
            s *= z
            np.exp(s, out=s)
            s += 1
            np.divide(1, s, out=s)
            np.multiply(z, s, out=h)
            # slope = s + z s (1 - s) c (1 + 3 a z^2) = s + (h - h s) (c + 3 c a z^2)
            t *= 3 * c * a
            t += c
            np.multiply(h, s, out=slope)
            np.subtract(h, slope, out=slope)
            slope *= t
            slope += s
    return h_Tf, slope_Tf


def _silu(z_Tf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """h = z sigmoid(z) (arXiv 1702.03118), the sigmoid as (1 + tanh(z/2)) / 2, which cannot overflow."""
    h_Tf, slope_Tf = np.empty_like(z_Tf), np.empty_like(z_Tf)
    s = np.empty(BLOCK, z_Tf.dtype)
    for z, h, slope in blocks(z_Tf, h_Tf, slope_Tf):
        s = s[: z.size]
        np.multiply(z, 0.5, out=s)
        np.tanh(s, out=s)
        s += 1
        s *= 0.5
        np.multiply(z, s, out=h)
        # slope = s (1 + z (1 - s)) = s + h (1 - s)
        np.subtract(1, s, out=slope)
        slope *= h
        slope += s
    return h_Tf, slope_Tf


def _swiglu(z_T2f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """h = silu(gate) up (Shazeer, arXiv 2002.05202), z holding gate and up side by side; the slope is of both."""
    gate_Tf, up_Tf = np.ascontiguousarray(z_T2f[:, 0]), z_T2f[:, 1]
    silu_Tf, slope_Tf = _silu(gate_Tf)
    slope_Tf *= up_Tf
    return silu_Tf * up_Tf, np.stack([slope_Tf, silu_Tf], axis=1)


def _half_wave(z: np.ndarray, u: np.ndarray) -> np.ndarray:
    """z (1 + tanh(u)) / 2, written into u."""
    np.tanh(u, out=u)
    u += 1
    u *= 0.5
    u *= z
    return u


def _gelu_value(z_Tf: np.ndarray) -> np.ndarray:
    u_Tf = z_Tf * z_Tf
    u_Tf *= 0.044715 * sqrt(2 / pi)
    u_Tf += sqrt(2 / pi)
    u_Tf *= z_Tf
    return _half_wave(z_Tf, u_Tf)


def _silu_value(z_Tf: np.ndarray) -> np.ndarray:
    return _half_wave(z_Tf, z_Tf * 0.5)


@dataclass(frozen=True)
class Activation:
    """`name`. `inputs`: how many hidden arrays it takes (2 where one gates the other). `slope_bytes`: of a slope entry, or None
    for the bytes of the dtype. Called with z (T, f) or (T, 2, f), `function` returns h (T, f) and the slope, of z's shape;
    `value`, where it is cheaper, h alone."""

    name: str
    function: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    inputs: int = 1
    slope_bytes: int | None = None
    value: Callable[[np.ndarray], np.ndarray] | None = None

    def forward(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.function(z)

    def apply(self, z: np.ndarray) -> np.ndarray:
        """h alone, where there is no backward."""
        return self.function(z)[0] if self.value is None else self.value(z)

    def backward(self, dh_Tf: np.ndarray, slope: np.ndarray) -> np.ndarray:
        return slope * (dh_Tf if self.inputs == 1 else dh_Tf[:, None])


_EVERY = (
    Activation("relu", _relu, slope_bytes=1),
    Activation("gelu", _gelu, value=_gelu_value),
    Activation("silu", _silu, value=_silu_value),
    Activation("swiglu", _swiglu, inputs=2, value=lambda z_T2f: _silu_value(z_T2f[:, 0]) * z_T2f[:, 1]),
)
ACTIVATIONS = {activation.name: activation for activation in _EVERY}
