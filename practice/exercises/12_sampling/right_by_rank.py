"""With a rank for each id instead of a sorted copy; float sums token by token; the draw walks."""

import numpy as np


def distribution(z_V, temperature, top_k, top_p):
    ids = sorted(range(len(z_V)), key=lambda i: -z_V[i])  # stable: lower ids first
    p_V = np.zeros(len(z_V), z_V.dtype)
    if temperature == 0:
        p_V[ids[0]] = 1.0
        return p_V
    ids = ids[: top_k or len(ids)]
    weights = np.exp((z_V[ids] - z_V[ids[0]]) / temperature)
    mass, kept = 0.0, []
    for i, w in zip(ids, weights / np.sum(weights), strict=True):
        if mass < top_p or top_p == 1:
            kept.append(i)
            p_V[i] = w
        mass += w
    p_V[kept] /= np.sum(p_V[kept])
    return p_V


def draw(p_V, u):
    left, token = u, 0
    for i, p in enumerate(p_V):
        if p > 0:
            token = i
            if left < p:
                break
        left -= p
    return token
