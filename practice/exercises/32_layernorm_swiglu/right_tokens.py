"""Token by token, the norm's backward by its Jacobian; sigmoid by tanh."""

import numpy as np


def layernorm(x_TD, g_D, b_D, eps):
    y, kept = np.empty_like(x_TD), []
    for t, x in enumerate(x_TD):
        r = (np.var(x) + eps) ** -0.5
        y[t] = g_D * (x - np.mean(x)) * r + b_D
        kept.append((x, r))
    return y, kept


def layernorm_backward(dy_TD, saved, g_D):
    D = len(g_D)
    dx, dg, db = np.zeros_like(dy_TD), np.zeros_like(g_D), np.zeros_like(g_D)
    center = np.eye(D, dtype=g_D.dtype) - np.full((D, D), 1 / D, g_D.dtype)
    for t, (dy, (x, r)) in enumerate(zip(dy_TD, saved, strict=True)):
        c = center @ x
        jacobian = (r * center - np.outer(c, c) * (r**3 / D)) * g_D[:, None]
        dx[t] = dy @ jacobian
        dg += dy * c * r
        db += dy
    return dx, dg, db


def swiglu(x_TD, Wg_DF, Wu_DF, Wd_FD):
    def one(x):
        gate = x @ Wg_DF
        return (gate * 0.5 * (1 + np.tanh(gate / 2)) * (x @ Wu_DF)) @ Wd_FD

    return np.array([one(x) for x in x_TD], x_TD.dtype).reshape(len(x_TD), Wd_FD.shape[1]), x_TD


def swiglu_backward(dy_TD, saved, Wg_DF, Wu_DF, Wd_FD):
    dx, dWg, dWu, dWd = (np.zeros_like(w) for w in (saved, Wg_DF, Wu_DF, Wd_FD))
    for t, (x, dy) in enumerate(zip(saved, dy_TD, strict=True)):
        gate, up = Wg_DF.T @ x, Wu_DF.T @ x
        s = 0.5 * (1 + np.tanh(gate / 2))
        dWd += np.outer(gate * s * up, dy)
        dh = Wd_FD @ dy
        dgate, dup = dh * up * s * (1 + gate * (1 - s)), dh * gate * s
        dWg += np.outer(x, dgate)
        dWu += np.outer(x, dup)
        dx[t] = Wg_DF @ dgate + Wu_DF @ dup
    return dx, dWg, dWu, dWd
