"""Biases first, hidden units in two halves, powers by np.power."""

import numpy as np


def gelu(a):
    half = np.asarray(0.5, a.dtype)
    c = np.asarray((2 / np.pi) ** 0.5, a.dtype)
    return half * a + half * a * np.tanh(c * a + c * np.asarray(0.044715, a.dtype) * np.power(a, 3))


def mlp_forward(x_TD, W1_DF, b1_F, W2_FD, b2_D):
    y_TD = np.zeros_like(x_TD) + b2_D
    half = W1_DF.shape[1] // 2
    for f in (slice(0, half), slice(half, None)):
        y_TD = y_TD + gelu(b1_F[f] + np.dot(x_TD, W1_DF[:, f])) @ W2_FD[f]
    return y_TD, None
