"""Token by token, with the Jacobian r (I - n n^T / D) written out."""

import math

import numpy as np


def rmsnorm(x_TD, g_D, eps):
    y_TD, scales = np.empty_like(x_TD), []
    for t, x_D in enumerate(x_TD):
        scales.append(1 / math.sqrt(float(x_D @ x_D) / len(x_D) + eps))
        y_TD[t] = x_D * scales[-1] * g_D
    return y_TD, (x_TD, scales)


def rmsnorm_backward(dy_TD, saved, g_D):
    x_TD, scales = saved
    dx_TD, dg_D = np.empty_like(x_TD), np.zeros_like(g_D)
    for t, (x_D, r) in enumerate(zip(x_TD, scales, strict=True)):
        n_D = x_D * r
        jacobian_DD = r * (np.eye(len(x_D), dtype=x_D.dtype) - np.outer(n_D, n_D) / len(x_D))
        dx_TD[t] = jacobian_DD @ (g_D * dy_TD[t])
        dg_D += dy_TD[t] * n_D
    return dx_TD, dg_D
