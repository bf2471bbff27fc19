"""The pre-norm transformer block: y = h + mlp(norm(h)), h = x + attention(norm(x)). Weights by name, as `reference.attention`
and the MLP have them, and the norms' wn1, bn1, wn2, bn2; without biases the norms are RMS norms."""

from __future__ import annotations

import numpy as np

from reference.attention import Options, attention, layer_norm, rms_norm
from reference.mlp import gelu, swiglu


def norm(W: dict, n: int, x: np.ndarray, eps: float) -> np.ndarray:
    if f"bn{n}" in W:
        return layer_norm(x, W[f"wn{n}"], W[f"bn{n}"], eps)
    return rms_norm(x, W[f"wn{n}"], eps)


def mlp(W: dict, x: np.ndarray) -> np.ndarray:
    """W1 (D, F): gelu. W1 (D, 2, F): swiglu, gate and up."""
    if len(W["W1"].shape) == 3:
        gate, up = (x @ W["W1"][:, i] + (W["b1"][i] if "b1" in W else 0.0) for i in range(2))
        z = swiglu(gate, up)
    else:
        z = gelu(x @ W["W1"] + W.get("b1", 0.0))
    return z @ W["W2"] + W.get("b2", 0.0)


def block(W: dict, o: Options, eps: float) -> np.ndarray:
    """y (T, D), from W with x in it."""
    h = W["x"] + attention({**W, "x": norm(W, 1, W["x"], eps)}, o)
    return h + mlp(W, norm(W, 2, h, eps))
