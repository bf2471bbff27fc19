"""A linear layer with a low-rank adapter (LoRA, 2106.09685), forward and backward.

    y = x W + s (x A) B        s = alpha / R

W is frozen: backward returns the gradients of the loss with respect to x, A and B only, given dy = d loss / d y.
T tokens (there may be none), D and F widths, R the adapter's rank; weights are stored (in, out). R is usually far below D and F:
forward and backward make nothing as large as W. merge folds the adapter into one matrix and leaves W as it is.
Sums over tokens are sums, not means. `saved` is yours: lora_backward gets what your lora_forward returned, and other forwards may
come between. Keep the dtype; leave the arguments as they are, `saved` too.
"""

import numpy as np


def lora_forward(x_TD, W_DF, A_DR, B_RF, alpha):
    """x (T, D), W (D, F), A (D, R), B (R, F), alpha a number -> y (T, F), saved."""
    # --- yours ---
    s = alpha / A_DR.shape[1]
    z_TR = x_TD @ A_DR
    y_TF = x_TD @ W_DF + s * (z_TR @ B_RF)
    return y_TF, (x_TD, z_TR)
    # --- end ---


def lora_backward(dy_TF, saved, W_DF, A_DR, B_RF, alpha):
    """dy (T, F), saved -> dx (T, D), dA (D, R), dB (R, F)."""
    # --- yours ---
    x_TD, z_TR = saved
    s = alpha / A_DR.shape[1]
    dz_TR = s * (dy_TF @ B_RF.T)
    dx_TD = dy_TF @ W_DF.T + dz_TR @ A_DR.T
    dA_DR = x_TD.T @ dz_TR
    dB_RF = s * (z_TR.T @ dy_TF)
    return dx_TD, dA_DR, dB_RF
    # --- end ---


def merge(W_DF, A_DR, B_RF, alpha):
    """-> the matrix (D, F) that alone gives the same y: a new array."""
    # --- yours ---
    s = alpha / A_DR.shape[1]
    return W_DF + s * np.matmul(A_DR, B_RF)
    # --- end ---
