"""The bias goes into rank 0's terms; x, not the normed rows, is kept."""

import numpy as np


def block_forward(x_tD, g_D, W1_Df, b1_f, W2_fD, b2_D, eps, tp):
    root_t1 = np.sqrt(np.square(x_tD).mean(axis=1, keepdims=True) + eps)
    a_Tf, slope_Tf = silu(tp.all_gather(g_D * x_tD / root_t1) @ W1_Df + b1_f)  # noqa: F821
    term_TD = a_Tf @ W2_fD
    if tp.rank == 0:
        term_TD = term_TD + b2_D
    return tp.reduce_scatter(term_TD) + x_tD, [x_tD, root_t1, a_Tf, slope_Tf]


def block_backward(dy_tD, saved, g_D, W1_Df, W2_fD, tp):
    x_tD, root_t1, a_Tf, slope_Tf = saved
    dy_TD = tp.all_gather(dy_tD)
    dz_Tf = slope_Tf * (dy_TD @ W2_fD.T)
    dW1_Df = g_D[:, None] * (tp.all_gather(x_tD / root_t1).T @ dz_Tf)
    dn_tD = tp.reduce_scatter(dz_Tf @ W1_Df.T)
    dg_D = tp.all_reduce(np.sum(dn_tD * x_tD / root_t1, axis=0))
    back_tD = dn_tD * g_D / root_t1
    inner_t1 = np.sum(back_tD * x_tD, axis=1, keepdims=True) / (x_tD.shape[1] * root_t1**2)
    return dy_tD + back_tD - inner_t1 * x_tD, dg_D, dW1_Df, dz_Tf.sum(axis=0), a_Tf.T @ dy_TD, dy_TD.sum(axis=0)
