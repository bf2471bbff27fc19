"""A KV cache, and grouped-query attention that prefills, goes on in chunks and decodes with it.

One sequence of T tokens comes in any pieces of N: all at once, chunk by chunk, or one by one; y must always be the same, that of
causal attention over the whole. H query heads share K key/value heads (h reads key head h // (H/K)); queries and keys are
rotated by their absolute positions, from 0; scores are divided by sqrt(E), and may be in the hundreds.
The cache's arrays are made once, (K, capacity, E) in `dtype`; append moves nothing that is there, k and v are views. Nothing of
the prefix is projected again. Keep the dtype; leave the arguments (but for the cache) as they are.
"""

import math

import numpy as np


def rope(x_NHE, positions_N, base=10000.0):
    """Given. Turns the pairs (i, i + E/2) of each head by position times base^(-2i/E)."""
    half = x_NHE.shape[-1] // 2
    angle = np.outer(positions_N, base ** (-np.arange(half) / half))[:, None]
    cos, sin = np.cos(angle).astype(x_NHE.dtype), np.sin(angle).astype(x_NHE.dtype)
    a, b = x_NHE[..., :half], x_NHE[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Cache:
    """Keys and values of the first `length` tokens of one sequence, in one layer."""

    def __init__(self, kv_heads, width, capacity, dtype):
        """K heads of width E, room for `capacity` tokens."""
        # --- yours ---
        self.length = 0
        self.k_KCE = np.empty((kv_heads, capacity, width), dtype)
        self.v_KCE = np.empty((kv_heads, capacity, width), dtype)
        # --- end ---

    def append(self, k_NKE, v_NKE):
        """k, v (N, K, E) become the next N tokens. Raises ValueError, and changes nothing, if they do not fit."""
        # --- yours ---
        end = self.length + len(k_NKE)
        if end > self.k_KCE.shape[1]:
            raise ValueError(f"no room for {end} tokens: the capacity is {self.k_KCE.shape[1]}")
        self.k_KCE[:, self.length : end] = k_NKE.swapaxes(0, 1)
        self.v_KCE[:, self.length : end] = v_NKE.swapaxes(0, 1)
        self.length = end
        # --- end ---

    @property
    def k(self):
        """(K, length, E), a view."""
        # --- yours ---
        return self.k_KCE[:, : self.length]
        # --- end ---

    @property
    def v(self):
        """(K, length, E), a view."""
        # --- yours ---
        return self.v_KCE[:, : self.length]
        # --- end ---


def step(x_ND, cache, weights):
    """The next N tokens, x (N, D); weights = Wq (D, H, E), Wk (D, K, E), Wv (D, K, E), Wo (H, E, D) -> y (N, D)."""
    # --- yours ---
    Wq_DHE, Wk_DKE, Wv_DKE, Wo_HED = weights
    N, (H, E, D), K = len(x_ND), Wo_HED.shape, Wk_DKE.shape[1]
    first = cache.length
    q_NHE = (x_ND @ Wq_DHE.reshape(D, H * E)).reshape(N, H, E)
    k_NKE = (x_ND @ Wk_DKE.reshape(D, K * E)).reshape(N, K, E)
    v_NKE = (x_ND @ Wv_DKE.reshape(D, K * E)).reshape(N, K, E)
    positions_N = np.arange(first, first + N)
    q_NHE = rope(q_NHE, positions_N)
    k_NKE = rope(k_NKE, positions_N)
    cache.append(k_NKE, v_NKE)
    q_NKGE = q_NHE.reshape(N, K, H // K, E)
    s_KGNS = np.einsum("nkge,kse->kgns", q_NKGE, cache.k) / math.sqrt(E)
    seen_NS = np.arange(cache.length) <= first + np.arange(N)[:, None]
    s_KGNS = np.where(seen_NS, s_KGNS, -np.inf)
    e_KGNS = np.exp(s_KGNS - s_KGNS.max(axis=-1, keepdims=True))
    p_KGNS = e_KGNS / e_KGNS.sum(axis=-1, keepdims=True)
    o_NKGE = np.einsum("kgns,kse->nkge", p_KGNS, cache.v)
    return o_NKGE.reshape(N, H * E) @ Wo_HED.reshape(H * E, D)
    # --- end ---
