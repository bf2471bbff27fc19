"""Rotary position embedding (Su et al., arXiv 2104.09864), its two pairings and its scalings.

    T tokens   n heads   E head width   R rotated width, the first R of E   P = R/2 pairs

Pair i of a token at position m is turned by the angle m f_i, f_i = base^(-2i/R). Angles are taken in float64, then cast.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi

import numpy as np

from layers.ops import BLOCK
from layers.work import Work, passes

PAIRINGS = ("half", "interleaved")


@dataclass(frozen=True)
class Linear:
    """Position interpolation (Chen et al., arXiv 2306.15595): every frequency divided by `factor`."""

    factor: float

    def frequencies(self, f_P: np.ndarray, base: float) -> np.ndarray:
        return f_P / self.factor


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1: waves longer than original / low_freq_factor divided by `factor`, those shorter than original /
    high_freq_factor kept, in between blended by the number of turns within the original context."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original: int = 8192

    def frequencies(self, f_P: np.ndarray, base: float) -> np.ndarray:
        turns_P = self.original * f_P / (2 * pi)
        keep_P = np.clip((turns_P - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return keep_P * f_P + (1 - keep_P) * f_P / self.factor


@dataclass(frozen=True)
class Divided:
    """Every frequency divided by a factor of its own, as GGUF files store Llama 3.1's."""

    factors: tuple[float, ...]

    def frequencies(self, f_P: np.ndarray, base: float) -> np.ndarray:
        if len(self.factors) != len(f_P):
            raise ValueError(f"cannot divide {len(f_P)} frequencies by {len(self.factors)} factors: give one each")
        return f_P / self.factors


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al., arXiv 2309.00071) as DeepSeek uses it, with its two separate corrections.

    Frequencies: pairs that turn more than `beta_fast` times within the original context are kept, those that turn less than
    `beta_slow` times divided by `factor`, a ramp between, from one whole pair to another if `truncate`. `table_factor`
    multiplies cos and sin: `attention_factor` if given, else what the mscales say. `softmax_factor` multiplies the scale of
    the scores.
    """

    factor: float = 40.0
    original: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def frequencies(self, f_P: np.ndarray, base: float) -> np.ndarray:
        pairs = len(f_P)
        low, high = (pairs * log(self.original / (2 * pi * turns)) / log(base) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = np.floor(low), np.ceil(high)
        low, high = max(low, 0.0), min(high, 2 * pairs - 1.0)
        divided_P = np.clip((np.arange(pairs) - low) / max(high - low, 1e-3), 0, 1)
        return (1 - divided_P) * f_P + divided_P * f_P / self.factor

    def _magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * log(self.factor) + 1 if self.factor > 1 else 1.0

    @property
    def table_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        return self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    @property
    def reach(self) -> int:
        return int(self.factor * self.original)


Scaling = Linear | Llama3 | Divided | Yarn


class Rope:
    """The angles of a rotated width R. `pairing`: "half" pairs entry i with R/2 + i, "interleaved" 2i with 2i + 1.

    Raises ValueError for an odd width or an unknown pairing.
    """

    def __init__(self, width: int, base: float = 10000.0, pairing: str = "half", scaling: Scaling | None = None) -> None:
        if width < 2 or width % 2:
            raise ValueError(f"cannot rotate a width of {width}: use an even one, 2 or more")
        if pairing not in PAIRINGS:
            raise ValueError(f"unknown pairing {pairing!r}: use one of {', '.join(PAIRINGS)}")
        self.width, self.base, self.pairing, self.scaling = width, base, pairing, scaling
        f_P = base ** (-np.arange(0, width, 2) / width)
        self.frequencies_P = f_P if scaling is None else scaling.frequencies(f_P, base)

    @property
    def softmax_factor(self) -> float:
        """By what the scores' scale is to be multiplied (yarn), else 1."""
        return getattr(self.scaling, "softmax_factor", 1.0)

    @property
    def reach(self) -> int:
        """To how many tokens the scaling stretches the original context (yarn), else 0."""
        return getattr(self.scaling, "reach", 0)

    def at(self, positions_T: np.ndarray, dtype: np.dtype | str) -> Rotation:
        """The rotation of tokens at these positions, whole numbers from 0, one a token."""
        angle_TP = np.multiply.outer(np.asarray(positions_T, np.float64), self.frequencies_P)
        factor = getattr(self.scaling, "table_factor", 1.0)
        return Rotation((factor * np.cos(angle_TP)).astype(dtype), (factor * np.sin(angle_TP)).astype(dtype), self.pairing)


class Rotation:
    """cos and sin of each token's angles, (T, P): made once for a batch, used by every layer."""

    def __init__(self, cos_TP: np.ndarray, sin_TP: np.ndarray, pairing: str) -> None:
        self.cos_TP, self.sin_TP, self.pairing = cos_TP, sin_TP, pairing

    def forward(self, x_TnE: np.ndarray) -> None:
        """Turn every head of each token, in place: (a, b) becomes (a cos - b sin, b cos + a sin)."""
        self._turn(x_TnE, self.sin_TP)

    def backward(self, dx_TnE: np.ndarray) -> None:
        """The transpose, in place: turn back."""
        self._turn(dx_TnE, -self.sin_TP)

    def work(self, heads: int) -> list[Work]:
        """What both compute for so many heads of each token."""
        entries = 2 * self.cos_TP.size * heads
        return passes("rotation", (entries, entries), (entries, entries))

    def _turn(self, x_TnE: np.ndarray, sin_TP: np.ndarray) -> None:
        pairs = self.cos_TP.shape[1]
        first, second = (
            (slice(0, pairs), slice(pairs, 2 * pairs))
            if self.pairing == "half"
            else (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
        )
        step = max(1, BLOCK // (x_TnE.shape[1] * pairs or 1))
        for at in (slice(t, t + step) for t in range(0, len(x_TnE), step)):
            a, b = x_TnE[at, :, first], x_TnE[at, :, second]
            cos, sin = self.cos_TP[at, None], sin_TP[at, None]
            turned = a * cos
            turned -= b * sin
            b *= cos
            b += a * sin
            a[...] = turned


def pairing_permutation(width: int) -> np.ndarray:
    """Where the entries of an interleaved head stand in a half-split one: `half = interleaved[..., permutation]`.

    Weights whose outputs are permuted so give, rotated half-split, the scores that they gave rotated interleaved.
    """
    return np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
