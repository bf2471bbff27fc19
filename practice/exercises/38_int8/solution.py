"""A linear layer in int8: weights and activations quantised by their largest magnitude (absmax; LLM.int8(), 2208.07339).

    quantise along a dim:   scale = max |x| / 127 over that dim,   q = x / scale, rounded to the nearest whole number
    linear:                 y = (xq Wq) * (x's scale of the token) * (W's scale of the column) + b

x is quantised when it comes, a scale a token (over D); W once, a scale an output column (over D). The product xq Wq is one of whole numbers
and is exact: sums of many int8 products do not fit into int8 or int16. Where all of a row or column is 0, its scale is 1.
The largest magnitude becomes 127 or -127; -128 never occurs. No test has a quotient near a half: how halves are rounded is free.
T tokens (there may be none), D and F widths. Floats keep x's dtype, float32 or float64; leave the arguments as they are.
"""

import numpy as np


def quantise(x, dim):
    """x (M, N), dim 0 or 1 -> q (M, N) int8, scale with length 1 along dim: (1, N) or (M, 1)."""
    # --- yours ---
    most = np.abs(x).max(axis=dim, keepdims=True)
    scale = np.where(most > 0, most / 127, 1).astype(x.dtype)
    q = np.rint(x / scale).astype(np.int8)
    return q, scale
    # --- end ---


def dequantise(q, scale):
    """q int8, scale as quantise returns them -> floats of scale's dtype, near what was quantised."""
    # --- yours ---
    return q.astype(scale.dtype) * scale
    # --- end ---


def linear(x_TD, Wq_DF, scale_1F, b_F):
    """x (T, D) floats, Wq (D, F) int8, scale (1, F), b (F) -> y (T, F)."""
    # --- yours ---
    xq_TD, scale_T1 = quantise(x_TD, 1)
    sum_TF = xq_TD.astype(np.int32) @ Wq_DF.astype(np.int32)
    return sum_TF.astype(x_TD.dtype) * scale_T1 * scale_1F + b_F
    # --- end ---
