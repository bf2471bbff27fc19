"""Attention as in a textbook: sequence by sequence, head by head, query by query; a query sees the keys up to its own.

There is no mask, for what a query does not see is not looked at. Weights by name: Wq (D, H, E), Wk and Wv (D, K, E), Wo
(H, E, D), biases bq, bk, bv, bo, and norms of a head's queries and keys wqn, wkn (E,). Latent attention: Wdkv (D, C), wckv
(C,), Wkr (D, R), Wukv (C, H, N+V), and Wq (D, H, N+R) or Wdq (D, Q), wcq (Q,), Wuq (Q, H, N+R).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reference.rope import rotated, softmax_factor


def rms_norm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).sum(axis=1, keepdims=True) / x.shape[1] + eps) * w


def layer_norm(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float) -> np.ndarray:
    x = x - x.sum(axis=1, keepdims=True) / x.shape[1]
    return x / np.sqrt((x * x).sum(axis=1, keepdims=True) / x.shape[1] + eps) * w + b


def head(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool) -> np.ndarray:
    """One head of one sequence: q and k (tokens, E), v (tokens, V) -> (tokens, V)."""
    rows = []
    for i in range(len(q)):
        seen = i + 1 if causal else len(k)
        score = (k[:seen] @ q[i]) * scale
        weight = np.exp(score - score.real.max())
        rows.append(weight @ v[:seen] / weight.sum())
    return np.stack(rows)


@dataclass(frozen=True)
class Options:
    """`rope`: keywords of `rotated`, or None. `qk_eps`, `latent_eps`: of the norms of heads' queries and keys, of latents."""

    lengths: Sequence[int]
    causal: bool = True
    rope: dict | None = None
    qk_eps: float = 1e-6
    latent_eps: float = 1e-6

    def turned(self, x: np.ndarray) -> np.ndarray:
        return x if self.rope is None else rotated(x, **self.rope)

    def scale(self, width: int) -> float:
        return width**-0.5 * softmax_factor((self.rope or {}).get("scaling"))

    def sequences(self) -> list[slice]:
        ends = [sum(self.lengths[: n + 1]) for n in range(len(self.lengths))]
        return [slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True)]


def grouped(W: dict, x: np.ndarray, h: int, o: Options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k and v of head h in one sequence x, multi-head, grouped or multi-query."""
    j = h * W["Wk"].shape[1] // W["Wq"].shape[1]
    q, k, v = x @ W["Wq"][:, h], x @ W["Wk"][:, j], x @ W["Wv"][:, j]
    if "bq" in W:
        q, k, v = q + W["bq"][h], k + W["bk"][j], v + W["bv"][j]
    if "wqn" in W:
        q, k = rms_norm(q, W["wqn"], o.qk_eps), rms_norm(k, W["wkn"], o.qk_eps)
    return o.turned(q), o.turned(k), v


def latent(W: dict, x: np.ndarray, h: int, o: Options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k and v of head h in one sequence x, from the latents."""
    c = rms_norm(x @ W["Wdkv"], W["wckv"], o.latent_eps)
    q = rms_norm(x @ W["Wdq"], W["wcq"], o.latent_eps) @ W["Wuq"][:, h] if "Wdq" in W else x @ W["Wq"][:, h]
    kv = c @ W["Wukv"][:, h]
    nope = q.shape[1] - W["Wkr"].shape[1]
    k = np.concatenate([kv[:, :nope], o.turned(x @ W["Wkr"])], axis=1)
    return np.concatenate([q[:, :nope], o.turned(q[:, nope:])], axis=1), k, kv[:, nope:]


def attention(W: dict, o: Options, heads: Sequence[int] | None = None, sequences: Sequence[int] | None = None) -> np.ndarray:
    """y (T, D), from W with x in it; of some heads and sequences only, if so asked. The output's bias belongs to head 0."""
    of_head: Callable = latent if "Wdkv" in W else grouped
    H = W["Wo"].shape[0]
    parts = []
    for n, at in enumerate(o.sequences()):
        x = W["x"][at]
        y = np.zeros((len(x), W["Wo"].shape[2]))
        for h in range(H) if heads is None else heads:
            if sequences is not None and n not in sequences:
                continue
            q, k, v = of_head(W, x, h, o)
            y = y + head(q, k, v, o.scale(q.shape[1]), o.causal) @ W["Wo"][h]
            if h == 0 and "bo" in W:
                y = y + W["bo"]
        parts.append(y)
    return np.concatenate(parts)


def reached(W: dict, o: Options, name: str, index: tuple[int, ...] | None) -> dict[str, list[int] | None]:
    """Which heads and sequences an entry moves, as keywords of `attention`. None: all."""
    H = W["Wo"].shape[0]
    if index is None:
        return {}
    if name == "x":
        return {"sequences": [n for n, at in enumerate(o.sequences()) if at.start <= index[0] < at.stop]}
    if name == "bo":
        return {"heads": [0]}
    dim = {"Wo": 0, "bq": 0, "bk": 0, "bv": 0}.get(name, 1)
    cut = {"Wq", "Wk", "Wv", "bq", "bk", "bv", "Wo", "Wuq", "Wukv"}
    if name not in cut:
        return {}
    group = H // W[name].shape[dim]
    return {"heads": list(range(index[dim] * group, (index[dim] + 1) * group))}
