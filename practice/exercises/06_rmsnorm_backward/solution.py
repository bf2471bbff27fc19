"""RMSNorm, forward and backward.

    r[t] = 1 / sqrt(mean over D of x[t]^2 + eps)       y = g x r

Backward: given dy = d loss / d y, return the gradients of x and of g.
T tokens, D model width. eps stands inside the root. `saved` is yours: rmsnorm_backward gets what your rmsnorm returned.
Keep the inputs' dtype, float32 or float64, and leave the arguments as they are.
"""

import numpy as np


def rmsnorm(x_TD, g_D, eps):
    """x (T, D), g (D), eps a number -> y (T, D), saved."""
    # --- yours ---
    r_T = 1 / np.sqrt((x_TD**2).mean(axis=1) + eps)
    n_TD = x_TD * r_T[:, None]
    y_TD = n_TD * g_D
    return y_TD, (n_TD, r_T)
    # --- end ---


def rmsnorm_backward(dy_TD, saved, g_D):
    """dy (T, D), saved, g (D) -> dx (T, D), dg (D)."""
    # --- yours ---
    n_TD, r_T = saved
    dn_TD = dy_TD * g_D
    along_T = (dn_TD * n_TD).mean(axis=1)
    dx_TD = r_T[:, None] * (dn_TD - n_TD * along_T[:, None])
    dg_D = (dy_TD * n_TD).sum(axis=0)
    return dx_TD, dg_D
    # --- end ---
