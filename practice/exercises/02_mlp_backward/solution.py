"""Two-layer MLP, backward.

    forward:   a = x W1 + b1        h = GELU(a)        y = h W2 + b2

Given dy = d loss / d y, return the gradients of the loss.
GELU(a) = a/2 (1 + t), t = tanh(c (a + 0.044715 a^3)), c = sqrt(2/pi).
T tokens, D model width, F hidden width; weights are stored (in, out). Sums over tokens are sums, not means.
Keep the dtype; leave the arguments as they are.
"""

import math

import numpy as np


def mlp_backward(dy_TD, saved, W1_DF, W2_FD):
    """dy (T, D), saved = (x (T, D), a (T, F), h (T, F)) -> dx (T, D), dW1 (D, F), db1 (F), dW2 (F, D), db2 (D)."""
    # --- yours ---
    x_TD, a_TF, h_TF = saved
    c = math.sqrt(2 / math.pi)
    t_TF = np.tanh(c * (a_TF + 0.044715 * a_TF**3))
    slope_TF = 0.5 * (1 + t_TF) + 0.5 * a_TF * (1 - t_TF**2) * c * (1 + 3 * 0.044715 * a_TF**2)
    dW2_FD = h_TF.T @ dy_TD
    db2_D = dy_TD.sum(axis=0)
    dh_TF = dy_TD @ W2_FD.T
    da_TF = dh_TF * slope_TF
    dW1_DF = x_TD.T @ da_TF
    db1_F = da_TF.sum(axis=0)
    dx_TD = da_TF @ W1_DF.T
    return dx_TD, dW1_DF, db1_F, dW2_FD, db2_D
    # --- end ---
