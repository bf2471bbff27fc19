"""Token by token and choice by choice; the k largest are found one at a time, sigmoid by tanh."""

import numpy as np


def route(z_TN, k):
    left = z_TN.astype(np.float64)
    ids = np.zeros((len(z_TN), k), dtype=np.int32)
    for j in range(k):
        ids[:, j] = np.argmax(left, axis=1)
        left[np.arange(len(left)), ids[:, j]] = -np.inf
    chosen = np.stack([z_TN[np.arange(len(ids)), ids[:, j]] for j in range(k)], axis=1)
    lse = np.logaddexp.reduce(chosen, axis=1, keepdims=True)
    return ids, np.exp(chosen - lse)


def moe_forward(x_TD, Wr_DN, W1_NDF, W2_NFD, k):
    ids, gates = route(x_TD @ Wr_DN, k)
    y = np.empty_like(x_TD)
    for t, x in enumerate(x_TD):
        y[t] = 0
        for n, g in zip(ids[t], gates[t], strict=True):
            a = x @ W1_NDF[n]
            y[t] += g * (a * (1 + np.tanh(a / 2)) / 2) @ W2_NFD[n]
    return y, (x_TD, ids, gates)


def moe_backward(dy_TD, saved, Wr_DN, W1_NDF, W2_NFD):
    x_TD, ids, gates = saved
    dx, dWr, dW1, dW2 = (np.zeros(w.shape, x_TD.dtype) for w in (x_TD, Wr_DN, W1_NDF, W2_NFD))
    for t, x in enumerate(x_TD):
        through = []
        for n, g in zip(ids[t], gates[t], strict=True):
            a = x @ W1_NDF[n]
            s = (1 + np.tanh(a / 2)) / 2
            dh = W2_NFD[n] @ dy_TD[t]
            through.append((a * s) @ dh)
            da = g * dh * s * (1 + a * (1 - s))
            dW1[n] += np.outer(x, da)
            dW2[n] += np.outer(a * s, g * dy_TD[t])
            dx[t] += W1_NDF[n] @ da
        jacobian = np.diag(gates[t]) - np.outer(gates[t], gates[t])
        dz = jacobian @ np.array(through, x_TD.dtype)
        dWr[:, ids[t]] += np.outer(x, dz)
        dx[t] += Wr_DN[:, ids[t]] @ dz
    return dx, dWr, dW1, dW2
