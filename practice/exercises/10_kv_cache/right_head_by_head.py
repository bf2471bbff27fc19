"""Head by head, a query at a time over the keys up to its own: no mask. The cache is a view of (2, K, capacity, E)."""

import math

import numpy as np


class Cache:
    def __init__(self, kv_heads, width, capacity, dtype):
        self.both, self.length = np.zeros((2, kv_heads, capacity, width), dtype), 0

    def append(self, k_NKE, v_NKE):
        for n in range(k_NKE.shape[0]):
            if self.length + k_NKE.shape[0] - n > self.both.shape[2]:
                raise ValueError("full")
            self.both[0, :, self.length] = k_NKE[n]
            self.both[1, :, self.length] = v_NKE[n]
            self.length += 1

    k = property(lambda self: self.both[0][:, : self.length])
    v = property(lambda self: self.both[1][:, : self.length])


def step(x_ND, cache, weights):
    Wq, Wk, Wv, Wo = weights
    at = cache.length + np.arange(len(x_ND))
    heads, group = range(Wk.shape[1]), Wq.shape[1] // Wk.shape[1]
    k = rope(np.stack([x_ND @ Wk[:, j] for j in heads], axis=1), at)  # noqa: F821  given
    cache.append(k, np.stack([x_ND @ Wv[:, j] for j in heads], axis=1))
    y = np.zeros_like(x_ND)
    for h in range(Wq.shape[1]):
        q = rope((x_ND @ Wq[:, h])[:, None], at)[:, 0]  # noqa: F821  given
        for n, last in enumerate(at):
            s = cache.k[h // group, : last + 1] @ q[n] / math.sqrt(q.shape[1])
            p = np.exp(s - np.max(s))
            y[n] += (p @ cache.v[h // group, : last + 1] / np.sum(p)) @ Wo[h]
    return y
