"""Results are filled in place by place; attention head by head, of which the log-sum-exp is kept and not the weights."""

import numpy as np


def to_heads(x_tHE, cp):
    heads = range(x_tHE.shape[1])
    pieces = cp.all_to_all([x_tHE.take(heads[cp.cut(len(heads), r)], axis=1) for r in range(cp.size)])
    T = sum(len(piece) for piece in pieces)
    whole = np.empty((T, *pieces[0].shape[1:]), x_tHE.dtype)
    for r, piece in enumerate(pieces):
        whole[cp.cut(T, r)] = piece
    return whole


def to_tokens(x_ThE, cp):
    pieces = cp.all_to_all([x_ThE[cp.cut(x_ThE.shape[0], r)] for r in range(cp.size)])
    H = sum(piece.shape[1] for piece in pieces)
    own = np.empty((pieces[0].shape[0], H, x_ThE.shape[2]), x_ThE.dtype)
    for r, piece in enumerate(pieces):
        own[:, cp.cut(H, r)] = piece
    return own


def weights(q, k, lse=None):
    x = q @ k.T * float(q.shape[1]) ** -0.5 + np.triu(np.full((len(q), len(q)), -np.inf, q.dtype), 1)
    if lse is None:
        top = x.max(axis=1)
        lse = top + np.log(np.exp(x - top[:, None]).sum(axis=1))
    return np.exp(x - lse[:, None]), lse


def attention_forward(q_tHE, k_tHE, v_tHE, cp):
    E = q_tHE.shape[2]
    qkv = to_heads(np.dstack([q_tHE, k_tHE, v_tHE]), cp)
    q, k, v = qkv[..., :E], qkv[..., E : 2 * E], qkv[..., 2 * E :]
    o, lses = np.zeros_like(q), []
    for h in range(q.shape[1]):
        p, lse = weights(q[:, h], k[:, h])
        o[:, h] = p @ v[:, h]
        lses.append(lse)
    return to_tokens(o, cp), {"qkv": qkv, "lses": lses}


def attention_backward(do_tHE, saved, cp):
    do, qkv = to_heads(do_tHE, cp), saved["qkv"]
    E = do.shape[2]
    d = np.zeros_like(qkv)
    for h, lse in enumerate(saved["lses"]):
        q, k, v = (qkv[:, h, n * E : (n + 1) * E] for n in range(3))
        p, _ = weights(q, k, lse)
        dp = do[:, h] @ v.T
        ds = p * (dp - np.sum(p * dp, axis=1)[:, None]) / float(E) ** 0.5
        d[:, h] = np.hstack([ds @ k, ds.T @ q, p.T @ do[:, h]])
    d = to_tokens(d, cp)
    return d[..., :E], d[..., E : 2 * E], d[..., 2 * E :]
