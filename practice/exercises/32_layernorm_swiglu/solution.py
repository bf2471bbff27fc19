"""LayerNorm and SwiGLU, forward and backward (1607.06450; 2002.05202).

    LayerNorm   y = g n + b,  n = (x - m) r,  r = 1 / sqrt(v + eps);   m mean, v variance of a token's D numbers (divided by D)
    SwiGLU      y = h Wd,  h = silu(x Wg) * (x Wu),  silu(a) = a sigmoid(a)

Backward: given dy = d loss / d y, return the gradients of the loss; sums over tokens are sums, not means.
A token may lie far from 0, its mean 1e4 times its spread: the variance must not lose its digits to it.
T tokens (there may be none), D model width, F hidden width; weights are stored (in, out). eps stands inside the root.
`saved` is yours: a backward gets what your forward returned, and other forwards may come between.
Keep the inputs' dtype, float32 or float64, and leave the arguments as they are.
"""

import numpy as np


def layernorm(x_TD, g_D, b_D, eps):
    """x (T, D), g (D), b (D), eps a number -> y (T, D), saved."""
    # --- yours ---
    c_TD = x_TD - x_TD.mean(axis=1, keepdims=True)
    v_T1 = (c_TD**2).mean(axis=1, keepdims=True)
    r_T1 = 1 / np.sqrt(v_T1 + eps)
    n_TD = c_TD * r_T1
    y_TD = n_TD * g_D + b_D
    return y_TD, (n_TD, r_T1)
    # --- end ---


def layernorm_backward(dy_TD, saved, g_D):
    """dy (T, D), saved, g (D) -> dx (T, D), dg (D), db (D)."""
    # --- yours ---
    n_TD, r_T1 = saved
    dn_TD = dy_TD * g_D
    mean_T1 = dn_TD.mean(axis=1, keepdims=True)
    along_T1 = (dn_TD * n_TD).mean(axis=1, keepdims=True)
    dx_TD = r_T1 * (dn_TD - mean_T1 - n_TD * along_T1)
    dg_D = (dy_TD * n_TD).sum(axis=0)
    db_D = dy_TD.sum(axis=0)
    return dx_TD, dg_D, db_D
    # --- end ---


def swiglu(x_TD, Wg_DF, Wu_DF, Wd_FD):
    """x (T, D), Wg (D, F), Wu (D, F), Wd (F, D) -> y (T, D), saved."""
    # --- yours ---
    a_TF = x_TD @ Wg_DF
    u_TF = x_TD @ Wu_DF
    s_TF = 1 / (1 + np.exp(-a_TF))
    h_TF = a_TF * s_TF * u_TF
    return h_TF @ Wd_FD, (x_TD, a_TF, u_TF, s_TF, h_TF)
    # --- end ---


def swiglu_backward(dy_TD, saved, Wg_DF, Wu_DF, Wd_FD):
    """dy (T, D), saved -> dx (T, D), dWg (D, F), dWu (D, F), dWd (F, D)."""
    # --- yours ---
    x_TD, a_TF, u_TF, s_TF, h_TF = saved
    dh_TF = dy_TD @ Wd_FD.T
    du_TF = dh_TF * (a_TF * s_TF)
    da_TF = dh_TF * u_TF * (s_TF + a_TF * s_TF * (1 - s_TF))
    dWd_FD = h_TF.T @ dy_TD
    dWg_DF = x_TD.T @ da_TF
    dWu_DF = x_TD.T @ du_TF
    dx_TD = da_TF @ Wg_DF.T + du_TF @ Wu_DF.T
    return dx_TD, dWg_DF, dWu_DF, dWd_FD
    # --- end ---
