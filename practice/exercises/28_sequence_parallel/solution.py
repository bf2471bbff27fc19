"""One MLP block with sequence parallelism (arXiv 2205.05198): what is not cut by columns is cut by tokens.

    n = x / sqrt(mean over D of x^2 + eps) * g;      y = x + silu(n W1 + b1) W2 + b2

x and y: each rank has the rows tp.cut(T) (t of them), which need not be equally many. W1 (D, f) is cut by columns, W2 (f, D) by
rows; g, b2 are on every rank. The product needs all rows and gives terms of all rows: tp.all_gather(x), tp.reduce_scatter(x) along
rows. Gradients of what is on every rank are whole on every rank. Keep no array (T, D) for backward: own rows suffice, and n may be
gathered a second time. Send no more than you must. `silu` is given.
"""

import numpy as np


def silu(z):
    """-> silu(z), its derivative."""
    s = 1 / (1 + np.exp(-z))
    return z * s, s * (1 + z * (1 - s))


def block_forward(x_tD, g_D, W1_Df, b1_f, W2_fD, b2_D, eps, tp):
    """x (t, D) -> y (t, D), saved."""
    # --- yours ---
    r_t1 = 1 / np.sqrt((x_tD**2).mean(axis=1, keepdims=True) + eps)
    h_tD = x_tD * r_t1
    n_TD = tp.all_gather(h_tD * g_D)
    a_Tf, slope_Tf = silu(n_TD @ W1_Df + b1_f)
    m_tD = tp.reduce_scatter(a_Tf @ W2_fD)
    y_tD = x_tD + m_tD + b2_D
    return y_tD, (h_tD, r_t1, a_Tf, slope_Tf)
    # --- end ---


def block_backward(dy_tD, saved, g_D, W1_Df, W2_fD, tp):
    """dy (t, D) -> dx (t, D), dg (D), dW1 (D, f), db1 (f), dW2 (f, D), db2 (D)."""
    # --- yours ---
    h_tD, r_t1, a_Tf, slope_Tf = saved
    n_TD = tp.all_gather(h_tD * g_D)
    dy_TD = tp.all_gather(dy_tD)
    dW2_fD = a_Tf.T @ dy_TD
    db2_D = dy_TD.sum(axis=0)
    dz_Tf = (dy_TD @ W2_fD.T) * slope_Tf
    dW1_Df = n_TD.T @ dz_Tf
    db1_f = dz_Tf.sum(axis=0)
    dn_tD = tp.reduce_scatter(dz_Tf @ W1_Df.T)
    dg_D = tp.all_reduce((dn_tD * h_tD).sum(axis=0))
    dh_tD = dn_tD * g_D
    along_t1 = (dh_tD * h_tD).mean(axis=1, keepdims=True)
    dx_tD = dy_tD + r_t1 * (dh_tD - h_tD * along_t1)
    return dx_tD, dg_D, dW1_Df, db1_f, dW2_fD, db2_D
    # --- end ---
