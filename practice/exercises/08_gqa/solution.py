"""Grouped-query attention: H query heads share K key/value heads, H/K neighbours each.

gqa_forward: causal attention, several sequences one after another, as in exercise 04 without its projections:
    o = softmax over keys of (q k^T / sqrt(E))  v          query head h reads key/value head h // (H/K)
kv_grad: given the gradient of the keys (or values) as each *query head* sees it, the gradient of the K that exist.

A token sees itself and the earlier tokens of its own sequence; a sequence may have 0 tokens.
Scores may be in the hundreds: exp must not overflow. T tokens, E head width, K divides H.
Keep the inputs' dtype, float32 or float64, and leave the arguments as they are.
"""

import math

import numpy as np


def gqa_forward(q_THE, k_TKE, v_TKE, lengths):
    """q (T, H, E), k and v (T, K, E), lengths [int] -> o (T, H, E)."""
    # --- yours ---
    T, H, E = q_THE.shape
    K = k_TKE.shape[1]
    q_TKGE = q_THE.reshape(T, K, H // K, E)
    o_TKGE = np.zeros_like(q_TKGE)
    start = 0
    for n in lengths:
        if n == 0:
            continue
        s = slice(start, start + n)
        score_KGTS = np.einsum("tkge,ske->kgts", q_TKGE[s], k_TKE[s]) / math.sqrt(E)
        score_KGTS = np.where(np.tri(n, dtype=bool), score_KGTS, -np.inf)
        w_KGTS = np.exp(score_KGTS - score_KGTS.max(axis=3, keepdims=True))
        p_KGTS = w_KGTS / w_KGTS.sum(axis=3, keepdims=True)
        o_TKGE[s] = np.einsum("kgts,ske->tkge", p_KGTS, v_TKE[s])
        start += n
    return o_TKGE.reshape(T, H, E)
    # --- end ---


def kv_grad(dk_THE, kv_heads):
    """dk (T, H, E), one for each query head; kv_heads = K -> dk (T, K, E)."""
    # --- yours ---
    T, H, E = dk_THE.shape
    dk_TKGE = dk_THE.reshape(T, kv_heads, H // kv_heads, E)
    return dk_TKGE.sum(axis=2)
    # --- end ---
