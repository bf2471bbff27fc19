"""Ulysses sequence parallelism (arXiv 2309.14509): tokens are cut over the ranks, and within attention heads are.

Of one sequence of T tokens rank r has the rows cp.cut(T, r), of all H heads. Attention needs all tokens, but one head does not need
another: so an exchange gives rank r all tokens of the heads cp.cut(H, r), and a second one brings the outputs back. Neither T nor H
need be a multiple of the ranks, and some ranks may have no token or no head: they take part in the exchanges all the same.
q, k, v are exchanged in one all_to_all, and so are their gradients: two exchanges forward, two backward, and no more is sent than
has to move. Keep for backward what `attend` saves, nothing else. `attend` (causal) and `attend_backward` are given.
cp.all_to_all(xs) -> ys: xs[r] goes to rank r, ys[r] came from rank r.
"""

import numpy as np


def attend(q_ThE, k_ThE, v_ThE):
    """All tokens of some heads -> o (T, h, E), saved."""
    x_hTS = np.einsum("ThE,ShE->hTS", q_ThE, k_ThE) / q_ThE.shape[2] ** 0.5
    x_hTS = np.where(np.tri(len(q_ThE), dtype=bool), x_hTS, -np.inf)
    p_hTS = np.exp(x_hTS - x_hTS.max(axis=2, keepdims=True))
    p_hTS /= p_hTS.sum(axis=2, keepdims=True)
    return np.einsum("hTS,ShE->ThE", p_hTS, v_ThE), (q_ThE, k_ThE, v_ThE, p_hTS)


def attend_backward(do_ThE, saved):
    """-> dq, dk, dv (T, h, E)."""
    q_ThE, k_ThE, v_ThE, p_hTS = saved
    dp_hTS = np.einsum("ThE,ShE->hTS", do_ThE, v_ThE)
    ds_hTS = p_hTS * (dp_hTS - (p_hTS * dp_hTS).sum(axis=2, keepdims=True)) / q_ThE.shape[2] ** 0.5
    dq_ThE, dk_ThE = np.einsum("hTS,ShE->ThE", ds_hTS, k_ThE), np.einsum("hTS,ThE->ShE", ds_hTS, q_ThE)
    return dq_ThE, dk_ThE, np.einsum("hTS,ThE->ShE", p_hTS, do_ThE)


def to_heads(x_tHE, cp):
    """x (t, H, E), this rank's tokens -> x (T, h, E), this rank's heads, tokens in order."""
    # --- yours ---
    H = x_tHE.shape[1]
    parts = [x_tHE[:, cp.cut(H, r)] for r in range(cp.size)]
    came = cp.all_to_all(parts)
    return np.concatenate(came, axis=0)
    # --- end ---


def to_tokens(x_ThE, cp):
    """x (T, h, E) -> x (t, H, E), heads in order: the way back."""
    # --- yours ---
    T = len(x_ThE)
    rows = [x_ThE[cp.cut(T, r)] for r in range(cp.size)]
    came = cp.all_to_all(rows)
    return np.concatenate(came, axis=1)
    # --- end ---


def attention_forward(q_tHE, k_tHE, v_tHE, cp):
    """q, k, v (t, H, E) -> o (t, H, E), saved."""
    # --- yours ---
    all_ThE = to_heads(np.concatenate([q_tHE, k_tHE, v_tHE], axis=2), cp)
    q_ThE, k_ThE, v_ThE = np.split(all_ThE, 3, axis=2)
    o_ThE, saved = attend(q_ThE, k_ThE, v_ThE)
    return to_tokens(o_ThE, cp), saved
    # --- end ---


def attention_backward(do_tHE, saved, cp):
    """do (t, H, E) -> dq, dk, dv (t, H, E)."""
    # --- yours ---
    do_ThE = to_heads(do_tHE, cp)
    dq_ThE, dk_ThE, dv_ThE = attend_backward(do_ThE, saved)
    all_tHE = to_tokens(np.concatenate([dq_ThE, dk_ThE, dv_ThE], axis=2), cp)
    dq_tHE, dk_tHE, dv_tHE = np.split(all_tHE, 3, axis=2)
    return dq_tHE, dk_tHE, dv_tHE
    # --- end ---
