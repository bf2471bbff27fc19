"""Experts on ranks: rows go to their experts and come back, forward and backward (GShard, arXiv 2006.16668; silu is a sigmoid(a)).

This rank has its own tokens x (t, D), t may be 0, and for each of them k different experts id (t, k) with gates gate (t, k). Of the N experts
it has those of ep.cut(N), in order, maybe none: W1 (n, D, F), W2 (n, F, D).
    y[t] = sum over the k choices of gate f(x[t]), f of the chosen expert:   f(x) = h W2, h = silu(x W1)
A row of x goes to the rank of its expert once for each choice, what comes out of the expert comes back: forward and backward rows of D numbers
go out once and come back once, and no gates, ids or counts go with those of backward. Beside the rows how many there are for each expert must be
sent. A rank multiplies the rows that chose its experts, each with its own expert only.
A send waits until its receiver has taken it. Every rank calls exchange each time, also with nothing to send: then arrays of no rows go to
the others, even where both sides know that there are none. Sums over tokens are sums over all ranks' tokens. Keep the dtype; leave the
arguments as they are.
"""

import numpy as np


def exchange(parts, ep):
    """parts[r]: an array for rank r, of any length -> list: its r-th is what rank r had for this one. One message to each other rank."""
    # --- yours ---
    p, r = ep.size, ep.rank
    came = [None] * p
    came[r] = parts[r]
    for step in range(1, p):
        to, source = (r + step) % p, (r - step) % p
        came[source] = ep.sendrecv(to, parts[to], source)
    return came
    # --- end ---


def moe_forward(x_tD, id_tk, gate_tk, W1_nDF, W2_nFD, N, ep):
    """-> y (t, D), saved: whatever your backward needs."""
    # --- yours ---
    k = id_tk.shape[1]
    order = np.argsort(id_tk.ravel(), kind="stable")
    token = order // k
    gate_c1 = gate_tk.ravel()[order][:, None]
    count_N = np.bincount(id_tk.ravel(), minlength=N)
    out = [count_N[ep.cut(N, rank)] for rank in range(ep.size)]
    back = exchange(out, ep)
    sent = [count_n.sum() for count_n in out]
    came = [count_n.sum() for count_n in back]
    x_gD = np.concatenate(exchange(cut(x_tD[token], sent), ep))
    expert_g = np.concatenate([np.repeat(np.arange(len(W1_nDF)), count_n) for count_n in back])
    o_gD = np.empty_like(x_gD)
    kept = []
    for n in range(len(W1_nDF)):
        rows = np.flatnonzero(expert_g == n)
        a = x_gD[rows] @ W1_nDF[n]
        s = 1 / (1 + np.exp(-a))
        o_gD[rows] = (a * s) @ W2_nFD[n]
        kept.append((rows, a, s))
    o_cD = np.concatenate(exchange(cut(o_gD, came), ep))
    y_tD = np.zeros_like(x_tD)
    np.add.at(y_tD, token, gate_c1 * o_cD)
    return y_tD, (token, order, gate_tk, gate_c1, sent, came, x_gD, o_cD, kept)
    # --- end ---


def moe_backward(dy_tD, saved, W1_nDF, W2_nFD, ep):
    """-> dx (t, D), dgate (t, k), dW1 (n, D, F), dW2 (n, F, D)."""
    # --- yours ---
    token, order, gate_tk, gate_c1, sent, came, x_gD, o_cD, kept = saved
    dgate_tk = np.zeros_like(gate_tk)
    dgate_tk.ravel()[order] = (dy_tD[token] * o_cD).sum(axis=1)
    do_gD = np.concatenate(exchange(cut(gate_c1 * dy_tD[token], sent), ep))
    dx_gD = np.empty_like(do_gD)
    dW1_nDF, dW2_nFD = np.zeros_like(W1_nDF), np.zeros_like(W2_nFD)
    for n, (rows, a, s) in enumerate(kept):
        dW2_nFD[n] = (a * s).T @ do_gD[rows]
        da = (do_gD[rows] @ W2_nFD[n].T) * (s + a * s * (1 - s))
        dW1_nDF[n] = x_gD[rows].T @ da
        dx_gD[rows] = da @ W1_nDF[n].T
    dx_cD = np.concatenate(exchange(cut(dx_gD, came), ep))
    dx_tD = np.zeros_like(dy_tD)
    np.add.at(dx_tD, token, dx_cD)
    return dx_tD, dgate_tk, dW1_nDF, dW2_nFD
    # --- end ---


def cut(x_gD, counts):
    """Given: x's rows as a list of arrays, of so many rows each."""
    return np.split(x_gD, np.cumsum(counts)[:-1])
