"""Multi-head attention, forward: causal, several sequences one after another.

    q, k, v = x Wq, x Wk, x Wv              for each head
    p = softmax over keys of (q k^T / sqrt(E))
    y = sum over heads of  (p v) Wo

A token sees itself and the earlier tokens of its own sequence. lengths: tokens of each sequence, may be 0; they add to T.
T tokens, D model width, H heads, E head width. Scores may be as large as 1e5: exp must not overflow.
No padding. Keep the inputs' dtype, float32 or float64, and leave the arguments as they are.
"""

import math

import numpy as np


def mha_forward(x_TD, Wq_DHE, Wk_DHE, Wv_DHE, Wo_HED, lengths):
    """x (T, D), Wq, Wk, Wv (D, H, E), Wo (H, E, D), lengths [int] -> y (T, D), saved: whatever your backward would need."""
    # --- yours ---
    T, D = x_TD.shape
    H, E = Wo_HED.shape[:2]
    q_HTE = np.einsum("td,dhe->hte", x_TD, Wq_DHE)
    k_HTE = np.einsum("td,dhe->hte", x_TD, Wk_DHE)
    v_HTE = np.einsum("td,dhe->hte", x_TD, Wv_DHE)
    o_HTE = np.zeros_like(v_HTE)
    start = 0
    for n in lengths:
        if n == 0:
            continue
        s = slice(start, start + n)
        score_HTS = q_HTE[:, s] @ k_HTE[:, s].transpose(0, 2, 1) / math.sqrt(E)
        seen_TS = np.tri(n, dtype=bool)
        score_HTS = np.where(seen_TS, score_HTS, -np.inf)
        w_HTS = np.exp(score_HTS - score_HTS.max(axis=2, keepdims=True))
        p_HTS = w_HTS / w_HTS.sum(axis=2, keepdims=True)
        o_HTE[:, s] = p_HTS @ v_HTE[:, s]
        start += n
    o_THE = o_HTE.transpose(1, 0, 2)
    y_TD = o_THE.reshape(T, H * E) @ Wo_HED.reshape(H * E, D)
    return y_TD, (q_HTE, k_HTE, v_HTE, o_THE)
    # --- end ---
