"""A mixture of experts: router, dispatch and combine, forward and backward (GShard, 2006.16668; Mixtral, 2401.04088).

    z = x Wr          the k largest z[t] choose token t's experts; its gates are the softmax of those k logits alone
    y[t] = sum over token t's experts n of gate[t, n] f_n(x[t])        f_n(x) = h W2[n],  h = a sigmoid(a),  a = x W1[n]

T tokens, D model width, F hidden width, N experts. Of equal logits the lower expert's comes first. No token is dropped, and
an expert multiplies the rows of its own tokens only: T k rows forward; backward may do twice that with W1 and W2, not more.
The choice itself has no gradient, gates have. Gradients are sums over tokens; T may be 0, and an expert may have no token.
`saved` is yours: moe_backward gets what your moe_forward returned. Logits given to route may be as large as 1e4.
Keep the dtype; leave the arguments as they are.
"""

import numpy as np


def route(z_TN, k):
    """z (T, N) -> id (T, k) integers, the largest logit's first, gate (T, k), each row adding to 1."""
    # --- yours ---
    id_TK = np.argsort(-z_TN, axis=1, kind="stable")[:, :k]
    top_TK = np.take_along_axis(z_TN, id_TK, axis=1)
    e_TK = np.exp(top_TK - top_TK[:, :1])
    gate_TK = e_TK / e_TK.sum(axis=1, keepdims=True)
    return id_TK, gate_TK
    # --- end ---


def moe_forward(x_TD, Wr_DN, W1_NDF, W2_NFD, k):
    """x (T, D), Wr (D, N), W1 (N, D, F), W2 (N, F, D), k experts a token -> y (T, D), saved."""
    # --- yours ---
    id_TK, gate_TK = route(x_TD @ Wr_DN, k)
    y_TD = np.zeros(x_TD.shape, x_TD.dtype)
    kept = []
    for n in range(len(W1_NDF)):
        token, slot = np.nonzero(id_TK == n)
        a = x_TD[token] @ W1_NDF[n]
        s = 1 / (1 + np.exp(-a))
        o = (a * s) @ W2_NFD[n]
        y_TD[token] += gate_TK[token, slot, None] * o
        kept.append((token, slot, a, s, o))
    return y_TD, (x_TD, id_TK, gate_TK, kept)
    # --- end ---


def moe_backward(dy_TD, saved, Wr_DN, W1_NDF, W2_NFD):
    """dy (T, D), saved -> dx (T, D), dWr (D, N), dW1 (N, D, F), dW2 (N, F, D)."""
    # --- yours ---
    x_TD, id_TK, gate_TK, kept = saved
    dx_TD = np.zeros(x_TD.shape, x_TD.dtype)
    dW1_NDF, dW2_NFD = np.zeros(W1_NDF.shape, x_TD.dtype), np.zeros(W2_NFD.shape, x_TD.dtype)
    dgate_TK = np.zeros(gate_TK.shape, x_TD.dtype)
    for n, (token, slot, a, s, o) in enumerate(kept):
        dy = dy_TD[token]
        dgate_TK[token, slot] = (dy * o).sum(axis=1)
        do = gate_TK[token, slot, None] * dy
        dh = do @ W2_NFD[n].T
        da = dh * (s + a * s * (1 - s))
        dW2_NFD[n] = (a * s).T @ do
        dW1_NDF[n] = x_TD[token].T @ da
        dx_TD[token] += da @ W1_NDF[n].T
    dz_TK = gate_TK * (dgate_TK - (gate_TK * dgate_TK).sum(axis=1, keepdims=True))
    dz_TN = np.zeros((len(x_TD), Wr_DN.shape[1]), x_TD.dtype)
    np.put_along_axis(dz_TN, id_TK, dz_TK, axis=1)
    dWr_DN = x_TD.T @ dz_TN
    dx_TD += dz_TN @ Wr_DN.T
    return dx_TD, dWr_DN, dW1_NDF, dW2_NFD
    # --- end ---
