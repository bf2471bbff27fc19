"""Dispatch by one sort of all T k choices by expert, combine by np.add.at; gates from the softmax over all, divided by the chosen sum."""

import numpy as np


def route(z_TN, k):
    order = np.lexsort((np.broadcast_to(np.arange(z_TN.shape[1]), z_TN.shape), -z_TN), axis=1)[:, :k]
    p = np.exp(z_TN - z_TN.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    chosen = np.take_along_axis(p, order, axis=1)
    return order, chosen / chosen.sum(axis=1, keepdims=True)


def moe_forward(x_TD, Wr_DN, W1_NDF, W2_NFD, k):
    ids, gates = route(x_TD @ Wr_DN, k)
    by_expert = np.argsort(ids.ravel(), kind="stable")
    token, gate = by_expert // k, gates.ravel()[by_expert]
    ends = np.cumsum(np.bincount(ids.ravel(), minlength=Wr_DN.shape[1]))
    a = np.concatenate([x @ W for x, W in zip(np.split(x_TD[token], ends[:-1]), W1_NDF, strict=True)])
    h = a / (1 + np.exp(-a))
    out = np.concatenate([x @ W for x, W in zip(np.split(h, ends[:-1]), W2_NFD, strict=True)])
    y = np.zeros_like(x_TD)
    np.add.at(y, token, gate[:, None] * out)
    kept = {"x": x_TD, "ids": ids, "gates": gates, "by_expert": by_expert, "token": token, "gate": gate}
    return y, kept | {"ends": ends, "a": a, "h": h, "out": out}


def moe_backward(dy_TD, saved, Wr_DN, W1_NDF, W2_NFD):
    x, token, gate, a, h, ends = (saved[n] for n in ("x", "token", "gate", "a", "h", "ends"))
    s = 1 / (1 + np.exp(-a))
    do = gate[:, None] * dy_TD[token]
    parts = [slice(e - c, e) for e, c in zip(ends, np.diff(ends, prepend=0), strict=True)]
    dh = np.concatenate([do[p] @ W.T for p, W in zip(parts, W2_NFD, strict=True)])
    da = dh * (s + h * (1 - s))
    dxs = np.concatenate([da[p] @ W.T for p, W in zip(parts, W1_NDF, strict=True)])
    dW1 = np.stack([x[token[p]].T @ da[p] for p in parts])
    dW2 = np.stack([h[p].T @ do[p] for p in parts])
    dgates = np.empty(saved["gates"].size, x.dtype)
    dgates[saved["by_expert"]] = np.einsum("ad,ad->a", dy_TD[token], saved["out"])
    dgates = dgates.reshape(saved["gates"].shape)
    dgates = dgates - np.einsum("tk,tk->t", dgates, saved["gates"])[:, None]
    dz = np.zeros((len(x), Wr_DN.shape[1]), x.dtype)
    np.add.at(dz, (np.arange(len(x))[:, None], saved["ids"]), saved["gates"] * dgates)
    dx = dz @ Wr_DN.T
    np.add.at(dx, token, dxs)
    return dx, x.T @ dz, dW1, dW2
