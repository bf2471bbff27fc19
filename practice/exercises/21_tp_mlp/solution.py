"""The tensor-parallel MLP with its residual connection, forward and backward.

    a = x W1 + b1        h = GELU(a)        y = x + h W2 + b2

Rank r has some columns of W1 and b1 and the same rows of W2 (f: its share of F, maybe none); x, b2, y are whole on every rank.
So a and h are cut into different hidden units, and h W2 is one term of a sum over ranks.

T tokens, D model width, F hidden width; weights are stored (in, out). dx and db2 are whole on every rank, the other gradients
are those of this rank's share. One all-reduce of T x D forward and one backward are enough.
`tp.all_reduce(x)` returns the sum over ranks. `saved` is yours. Keep the dtype; leave the arguments as they are.
"""

import math

import numpy as np

C = math.sqrt(2 / math.pi)


def gelu(a):
    return 0.5 * a * (1 + np.tanh(C * (a + 0.044715 * a**3)))


def gelu_slope(a):
    t = np.tanh(C * (a + 0.044715 * a**3))
    return 0.5 * (1 + t) + 0.5 * a * (1 - t**2) * C * (1 + 3 * 0.044715 * a**2)


def tp_mlp_forward(x_TD, W1_Df, b1_f, W2_fD, b2_D, tp):
    """x (T, D), W1 (D, f), b1 (f), W2 (f, D), b2 (D) -> y (T, D), saved."""
    # --- yours ---
    a_Tf = x_TD @ W1_Df + b1_f
    h_Tf = gelu(a_Tf)
    sum_TD = tp.all_reduce(h_Tf @ W2_fD)
    y_TD = x_TD + sum_TD + b2_D
    return y_TD, (x_TD, a_Tf, h_Tf)
    # --- end ---


def tp_mlp_backward(dy_TD, saved, W1_Df, W2_fD, tp):
    """dy (T, D) -> dx (T, D), dW1 (D, f), db1 (f), dW2 (f, D), db2 (D)."""
    # --- yours ---
    x_TD, a_Tf, h_Tf = saved
    dW2_fD = h_Tf.T @ dy_TD
    db2_D = dy_TD.sum(axis=0)
    dh_Tf = dy_TD @ W2_fD.T
    da_Tf = dh_Tf * gelu_slope(a_Tf)
    dW1_Df = x_TD.T @ da_Tf
    db1_f = da_Tf.sum(axis=0)
    dx_TD = dy_TD + tp.all_reduce(da_Tf @ W1_Df.T)
    return dx_TD, dW1_Df, db1_f, dW2_fD, db2_D
    # --- end ---
