"""Attention, backward: from lse, with the weights made anew.

    forward, per head and query t:   s = q[t] . k / sqrt(E)     p = exp(s - lse[t])     o[t] = sum of p v
    lse = log of the sum of exp(s) over the keys that t sees: itself and the earlier tokens of its own sequence

Given do = d loss / d o, return the gradients of q, k and v.
lengths: tokens of each sequence, may be 0; they add to T. T tokens, H heads, E head width.
Scores may be in the hundreds, those of later keys too. They may be held for one sequence at a time; nothing of T x T numbers.
Keep the inputs' dtype, float32 or float64, and leave the arguments as they are.
"""

import math

import numpy as np


def attention_backward(do_THE, q_THE, k_THE, v_THE, o_THE, lse_TH, lengths):
    """do, q, k, v, o (T, H, E), lse (T, H), lengths [int] -> dq, dk, dv (T, H, E)."""
    # --- yours ---
    scale = 1 / math.sqrt(q_THE.shape[2])
    dq_THE, dk_THE, dv_THE = np.zeros_like(q_THE), np.zeros_like(k_THE), np.zeros_like(v_THE)
    row_TH = (do_THE * o_THE).sum(axis=2)
    start = 0
    for n in lengths:
        t = slice(start, start + n)
        for h in range(q_THE.shape[1]):
            q_TE, k_SE, v_SE, do_TE = q_THE[t, h], k_THE[t, h], v_THE[t, h], do_THE[t, h]
            s_TS = q_TE @ k_SE.T * scale
            s_TS = np.where(np.tri(n, dtype=bool), s_TS, -np.inf)
            p_TS = np.exp(s_TS - lse_TH[t, h, None])
            dv_THE[t, h] = p_TS.T @ do_TE
            dp_TS = do_TE @ v_SE.T
            ds_TS = p_TS * (dp_TS - row_TH[t, h, None])
            dq_THE[t, h] = ds_TS @ k_SE * scale
            dk_THE[t, h] = ds_TS.T @ q_TE * scale
        start += n
    return dq_THE, dk_THE, dv_THE
    # --- end ---
