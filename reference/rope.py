"""Rotary positions."""

from __future__ import annotations

import math

import numpy as np


def frequency(pair: int, width: int, base: float, scaling: dict | None) -> float:
    """Radians a position, of pair number `pair`. `scaling`: as in a Hugging Face config, by "rope_type"."""
    f = 1 / base ** (2 * pair / width)
    kind = scaling["rope_type"] if scaling else "default"
    if kind == "default":
        return f
    factor = scaling["factor"]
    if kind == "linear":
        return f / factor
    original = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wave = 2 * math.pi / f
        if wave < original / high:
            return f
        if wave > original / low:
            return f / factor
        smooth = (original / wave - low) / (high - low)
        return (1 - smooth) * f / factor + smooth * f
    if kind == "yarn":

        def pair_that_turns(times: float) -> float:
            return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(pair_that_turns(scaling["beta_fast"])), 0)
        high = min(math.ceil(pair_that_turns(scaling["beta_slow"])), width - 1)
        ramp = min(max((pair - low) / (high - low or 0.001), 0.0), 1.0)
        return f / factor * ramp + f * (1 - ramp)
    raise ValueError(f"unknown rope_type {kind!r}")


def magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def table_factor(scaling: dict | None) -> float:
    """What yarn multiplies cos and sin by."""
    if not scaling or scaling["rope_type"] != "yarn":
        return 1.0
    return magnitude(scaling["factor"], scaling["mscale"]) / magnitude(scaling["factor"], scaling["mscale_all_dim"])


def softmax_factor(scaling: dict | None) -> float:
    """What yarn multiplies the scale of the scores by."""
    if not scaling or scaling["rope_type"] != "yarn" or not scaling["mscale_all_dim"]:
        return 1.0
    return magnitude(scaling["factor"], scaling["mscale_all_dim"]) ** 2


def rotated(x: np.ndarray, pairing: str, base: float = 10000.0, scaling: dict | None = None) -> np.ndarray:
    """x (tokens at positions 0, 1, ..., width): each pair of entries turned by position times frequency."""
    width = x.shape[1]
    pairs = np.arange(width // 2)
    first, second = (pairs, pairs + width // 2) if pairing == "half" else (2 * pairs, 2 * pairs + 1)
    angle = np.outer(np.arange(len(x)), [frequency(pair, width, base, scaling) for pair in pairs])
    cos, sin = table_factor(scaling) * np.cos(angle), table_factor(scaling) * np.sin(angle)
    a, b = x[:, first], x[:, second]
    turned = np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=1)
    return turned[:, np.argsort(np.concatenate([first, second]))]
