"""Tensor-parallel attention with grouped key/value heads, forward and backward.

H query heads are cut over the ranks as evenly as it goes: `tp.cut(H)` is this rank's slice. Query head i reads key/value head
i // (H/K), and a rank keeps every key/value head that one of its query heads reads: one that is read on several ranks lies on
each of them, whole. H = 6, K = 2 on 3 ranks: queries 0 1 | 2 3 | 4 5, key/value heads 0 | 0 1 | 1.

    per head: o = softmax(q k^T / sqrt(E), causal) v         y = sum over heads of o Wo + bo

x (T, D) is one sequence. x, y, bo are whole on every rank; h, k: this rank's query and key/value heads. Weights: q = x Wq.
dx and dbo are whole on every rank; every copy of a weight gets its whole gradient, summed over the ranks that hold a copy.
`tp.all_reduce(x)` sums over the ranks. One sum of T x D each way is enough, and one for the weights that have copies.
"""

import math

import numpy as np


def attend(q_hTE, k_hTE, v_hTE, scale):
    """Causal attention, head by head: o (h, T, E) and the weights p (h, T, T). Given: exercise 04."""
    T = q_hTE.shape[1]
    s_hTT = np.where(np.tri(T, dtype=bool), scale * (q_hTE @ k_hTE.swapaxes(1, 2)), -np.inf)
    e_hTT = np.exp(s_hTT - s_hTT.max(axis=2, keepdims=True))
    p_hTT = e_hTT / e_hTT.sum(axis=2, keepdims=True)
    return p_hTT @ v_hTE, p_hTT


def attend_backward(do_hTE, q_hTE, k_hTE, v_hTE, p_hTT, scale):
    """dq, dk, dv (h, T, E), head by head. Given: exercise 05."""
    dp_hTT = do_hTE @ v_hTE.swapaxes(1, 2)
    ds_hTT = scale * p_hTT * (dp_hTT - (p_hTT * dp_hTT).sum(axis=2, keepdims=True))
    return ds_hTT @ k_hTE, ds_hTT.swapaxes(1, 2) @ q_hTE, p_hTT.swapaxes(1, 2) @ do_hTE


def own_heads(H, K, tp):
    """-> two slices: this rank's of the H query heads, and of the K key/value heads (none where it has no query heads)."""
    # --- yours ---
    group = H // K
    h = tp.cut(H)
    k = slice(h.start // group, -(-h.stop // group))
    return h, k
    # --- end ---


def tp_attention_forward(x_TD, Wq_DhE, Wk_DkE, Wv_DkE, Wo_hED, bo_D, heads, tp):
    """x (T, D), Wq (D, h, E), Wk, Wv (D, k, E), Wo (h, E, D), bo (D), heads = (H, K) -> y (T, D), saved."""
    # --- yours ---
    H, K = heads
    h, k = own_heads(H, K, tp)
    kv_h = np.arange(h.start, h.stop) // (H // K) - k.start
    q_hTE = np.einsum("td,dhe->hte", x_TD, Wq_DhE)
    k_kTE = np.einsum("td,dke->kte", x_TD, Wk_DkE)
    v_kTE = np.einsum("td,dke->kte", x_TD, Wv_DkE)
    scale = 1 / math.sqrt(Wq_DhE.shape[2])
    o_hTE, p_hTT = attend(q_hTE, k_kTE[kv_h], v_kTE[kv_h], scale)
    part_TD = np.einsum("hte,hed->td", o_hTE, Wo_hED)
    y_TD = tp.all_reduce(part_TD) + bo_D
    return y_TD, (x_TD, q_hTE, k_kTE, v_kTE, p_hTT, o_hTE, kv_h, scale)
    # --- end ---


def tp_attention_backward(dy_TD, saved, Wq_DhE, Wk_DkE, Wv_DkE, Wo_hED, heads, tp):
    """dy (T, D) -> dx (T, D), dWq (D, h, E), dWk, dWv (D, k, E), dWo (h, E, D), dbo (D)."""
    # --- yours ---
    x_TD, q_hTE, k_kTE, v_kTE, p_hTT, o_hTE, kv_h, scale = saved
    dbo_D = dy_TD.sum(axis=0)
    dWo_hED = np.einsum("hte,td->hed", o_hTE, dy_TD)
    do_hTE = np.einsum("td,hed->hte", dy_TD, Wo_hED)
    dq_hTE, dk_hTE, dv_hTE = attend_backward(do_hTE, q_hTE, k_kTE[kv_h], v_kTE[kv_h], p_hTT, scale)
    dk_kTE, dv_kTE = np.zeros_like(k_kTE), np.zeros_like(v_kTE)
    np.add.at(dk_kTE, kv_h, dk_hTE)
    np.add.at(dv_kTE, kv_h, dv_hTE)
    q_TD = np.einsum("hte,dhe->td", dq_hTE, Wq_DhE)
    k_TD = np.einsum("kte,dke->td", dk_kTE, Wk_DkE)
    v_TD = np.einsum("kte,dke->td", dv_kTE, Wv_DkE)
    dx_TD = tp.all_reduce(q_TD + k_TD + v_TD)
    dWq_DhE = np.einsum("td,hte->dhe", x_TD, dq_hTE)
    H, K = heads
    _, k = own_heads(H, K, tp)
    both_2DKE = np.zeros((2, x_TD.shape[1], K, Wk_DkE.shape[2]), x_TD.dtype)
    both_2DKE[0, :, k] = np.einsum("td,kte->dke", x_TD, dk_kTE)
    both_2DKE[1, :, k] = np.einsum("td,kte->dke", x_TD, dv_kTE)
    dWk_DkE, dWv_DkE = tp.all_reduce(both_2DKE)[:, :, k]
    return dx_TD, dWq_DhE, dWk_DkE, dWv_DkE, dWo_hED, dbo_D
    # --- end ---
