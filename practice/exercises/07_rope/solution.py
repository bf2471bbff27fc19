"""Rotary positions: each pair of entries of a head turned by position times frequency.

    angle[t, i] = positions[t] * base^(-2 i / E)           i = 0 .. E/2 - 1
    (a, b)  ->  (a cos - b sin,  a sin + b cos)

Pair i: entries (i, i + E/2) where pairing is "half", (2 i, 2 i + 1) where it is "interleaved"; each stays in its place.
T tokens, H heads, E head width (even). Positions are any integers, up to 100000: make the angles in float64.
The result has x's dtype, float32 or float64; leave the arguments as they are.
"""

import numpy as np


def rope(x_THE, positions_T, base, pairing):
    """x (T, H, E), positions (T) of int, base a number, pairing "half" or "interleaved" -> y (T, H, E)."""
    # --- yours ---
    E = x_THE.shape[2]
    i_P = np.arange(E // 2)
    frequency_P = float(base) ** (-2 * i_P / E)
    angle_TP = positions_T[:, None] * frequency_P
    cos_T1P = np.cos(angle_TP)[:, None, :].astype(x_THE.dtype)
    sin_T1P = np.sin(angle_TP)[:, None, :].astype(x_THE.dtype)
    if pairing == "half":
        first_P, second_P = i_P, i_P + E // 2
    else:
        first_P, second_P = 2 * i_P, 2 * i_P + 1
    a_THP, b_THP = x_THE[:, :, first_P], x_THE[:, :, second_P]
    y_THE = np.zeros_like(x_THE)
    y_THE[:, :, first_P] = a_THP * cos_T1P - b_THP * sin_T1P
    y_THE[:, :, second_P] = a_THP * sin_T1P + b_THP * cos_T1P
    return y_THE
    # --- end ---
