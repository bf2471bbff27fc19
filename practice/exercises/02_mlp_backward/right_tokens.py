"""Token by token, adding up outer products."""

import numpy as np


def mlp_backward(dy_TD, saved, W1_DF, W2_FD):
    x_TD, a_TF, h_TF = saved
    dx, dW1, dW2 = np.zeros_like(x_TD), np.zeros_like(W1_DF), np.zeros_like(W2_FD)
    db1, db2 = np.zeros_like(W1_DF[0]), np.zeros_like(W2_FD[0])
    for n, (x, a, h, dy) in enumerate(zip(x_TD, a_TF, h_TF, dy_TD, strict=True)):
        u = 0.7978845608028654 * (a + 0.044715 * a**3)
        slope = 0.5 + 0.5 * np.tanh(u) + 0.5 * a / np.cosh(u) ** 2 * 0.7978845608028654 * (1 + 0.134145 * a**2)
        da = (W2_FD @ dy) * slope
        dW1 += np.outer(x, da)
        dW2 += np.outer(h, dy)
        db1, db2 = db1 + da, db2 + dy
        dx[n] = W1_DF @ da
    return dx, dW1, db1, dW2, db2
