"""Softmax, and attention in one pass over blocks of keys.

    softmax   p[t, s] = exp(x[t, s]) / sum over s of exp(x[t, s])      a row of -inf only: zeros
    scores    x = q k^T / sqrt(E), -inf where `seen` is False
    attend    o = softmax(x) v         lse[t] = log(sum over s of exp(x[t, s]))

T queries, S keys, E head width. Scores reach +-1e4: nothing may overflow.
`blocks` is an iterator: every block comes once, in any order, of any size; a block may be unseen by some queries or by all.
Hold no more than one block's scores. A query that sees no key at all: o = 0, lse = -inf.
Keep the inputs' dtype, float32 or float64, and leave the arguments as they are.
"""

import math

import numpy as np


def softmax(x_TS):
    """x (T, S), with -inf where nothing is to be seen -> p (T, S)."""
    # --- yours ---
    top_T1 = x_TS.max(axis=1, keepdims=True)
    top_T1 = np.where(top_T1 == -np.inf, 0, top_T1)
    w_TS = np.exp(x_TS - top_T1)
    sum_T1 = w_TS.sum(axis=1, keepdims=True)
    return w_TS / np.where(sum_T1 == 0, 1, sum_T1)
    # --- end ---


def attend_online(q_TE, blocks):
    """q (T, E), blocks of (k (S, E), v (S, E), seen (T, S) of bool) -> o (T, E), lse (T)."""
    # --- yours ---
    T, E = q_TE.shape
    top_T = np.full(T, -np.inf, q_TE.dtype)
    sum_T = np.zeros(T, q_TE.dtype)
    o_TE = np.zeros_like(q_TE)
    for k_SE, v_SE, seen_TS in blocks:
        x_TS = q_TE @ k_SE.T / math.sqrt(E)
        x_TS = np.where(seen_TS, x_TS, -np.inf)
        new_T = np.maximum(top_T, x_TS.max(axis=1))
        # Nothing seen so far: any finite number will do.
        from_T = np.where(new_T == -np.inf, 0, new_T)
        shrink_T = np.exp(top_T - from_T)
        w_TS = np.exp(x_TS - from_T[:, None])
        sum_T = sum_T * shrink_T + w_TS.sum(axis=1)
        o_TE = o_TE * shrink_T[:, None] + w_TS @ v_SE
        top_T = new_T
    lse_T = top_T + np.log(sum_T)
    return o_TE / np.where(sum_T == 0, 1, sum_T)[:, None], lse_T
    # --- end ---
