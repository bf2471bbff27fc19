"""The mask by triangles; prefill gathers each query's keys through an index array; the cache counts what it has by a list."""

import numpy as np


def mask(T, window, sinks):
    band = np.tril(np.ones((T, T), bool)) & ~np.tril(np.ones((T, T), bool), -window)
    band[:, :sinks] |= np.tril(np.ones((T, T), bool))[:, :sinks]
    return band


def prefill(q_THE, k_THE, v_THE, window, sinks):
    T, _, E = q_THE.shape
    near = np.arange(T)[:, None] + np.arange(-window + 1, 1)
    sink = np.broadcast_to(np.arange(sinks), (T, sinks))
    index = np.concatenate([sink, near], axis=1)
    good = np.concatenate([sink < near[:, :1], near >= 0], axis=1)
    index = np.where(good, index, 0)
    s = np.einsum("the,tshe->ths", q_THE / E**0.5, k_THE[index])
    s = np.where(good[:, None], s, -np.inf)
    p = np.exp(s - np.logaddexp.reduce(s, axis=-1, keepdims=True))
    return np.einsum("ths,tshe->the", p, v_THE[index])


class Cache:
    def __init__(self, heads, width, window, sinks, dtype):
        self.window, self.sinks, self.length = window, sinks, 0
        self.k_HSE = np.full((heads, sinks + window, width), np.nan, dtype)
        self.v_HSE = np.full((heads, sinks + window, width), np.nan, dtype)

    def slot(self, n):
        while n >= self.sinks + self.window:
            n -= self.window
        return n

    def append(self, k_HE, v_HE):
        n = self.length
        np.copyto(self.k_HSE[:, self.slot(n)], k_HE)
        np.copyto(self.v_HSE[:, self.slot(n)], v_HE)
        self.length = n + 1

    def attend(self, q_HE):
        newest = self.length - 1
        order = sorted({n for n in range(self.length) if n < self.sinks or newest - n < self.window}, reverse=True)
        slots = [self.slot(n) for n in order]
        out = np.empty_like(q_HE)
        for h, q in enumerate(q_HE):
            s = self.k_HSE[h, slots] @ q / float(np.sqrt(len(q)))
            w = np.exp(s - s.max())
            out[h] = w @ self.v_HSE[h, slots] / w.sum()
        return out
