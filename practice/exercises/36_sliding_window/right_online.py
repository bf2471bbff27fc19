"""Row by row through the rolling cache itself: prefill is append and attend, and attend keeps a running maximum."""

import math

import numpy as np


def mask(T, window, sinks):
    rows = [[j <= i and (j > i - window or j < sinks) for j in range(T)] for i in range(T)]
    return np.array(rows, dtype=bool).reshape(T, T)


def prefill(q_THE, k_THE, v_THE, window, sinks):
    _, H, E = q_THE.shape
    cache = Cache(H, E, window, sinks, q_THE.dtype)
    rows = []
    for q, k, v in zip(q_THE, k_THE, v_THE, strict=True):
        cache.append(k, v)
        rows.append(cache.attend(q))
    return np.array(rows, q_THE.dtype).reshape(q_THE.shape)


class Cache(Cache):  # noqa: F821  as given
    def slot(self, n):
        return n if n < self.sinks + self.window else self.sinks + (n - self.sinks) % self.window

    def append(self, k_HE, v_HE):
        slot = self.slot(self.length)
        self.k_HSE[:, slot, :], self.v_HSE[:, slot, :] = k_HE, v_HE
        self.length += 1

    def attend(self, q_HE):
        H, E = q_HE.shape
        top = np.full((H, 1), -np.inf, q_HE.dtype)
        total, out = np.zeros_like(top), np.zeros_like(q_HE)
        for s in range(self.k_HSE.shape[1]):
            if s >= self.length:
                break
            score = (q_HE * self.k_HSE[:, s]).sum(axis=1, keepdims=True) / math.sqrt(E)
            new = np.maximum(top, score)
            shrink, w = np.exp(top - new), np.exp(score - new)
            total, out, top = total * shrink + w, out * shrink + w * self.v_HSE[:, s], new
        return out / total
