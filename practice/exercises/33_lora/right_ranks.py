"""The adapter as a sum of R outer products, one rank at a time."""

import numpy as np


def lora_forward(x_TD, W_DF, A_DR, B_RF, alpha):
    R = A_DR.shape[1]
    y = x_TD @ W_DF
    for a, b in zip(A_DR.T, B_RF, strict=True):
        y += np.outer(x_TD @ a, b) * (alpha / R)
    return y, {"x": x_TD}


def lora_backward(dy_TF, saved, W_DF, A_DR, B_RF, alpha):
    R, x = A_DR.shape[1], saved["x"]
    dx, dA, dB = dy_TF @ W_DF.T, np.empty_like(A_DR), np.empty_like(B_RF)
    for r in range(R):
        back = (dy_TF @ B_RF[r]) * alpha / R
        dx += back[:, None] * A_DR[:, r]
        dA[:, r] = back @ x
        dB[r] = (x @ A_DR[:, r]) @ dy_TF * alpha / R
    return dx, dA, dB


def merge(W_DF, A_DR, B_RF, alpha):
    return sum((np.outer(a, b) * (alpha / len(B_RF)) for a, b in zip(A_DR.T, B_RF, strict=True)), W_DF)
