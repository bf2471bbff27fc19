"""Chunks of equal length, padded with zeros; the finished chunks collected in a dict."""

import numpy as np


def all_reduce(x_N, ring):
    p, r = ring.size, ring.rank
    n = -(-x_N.size // p)
    padded = np.zeros(n * p, x_N.dtype)
    padded[: x_N.size] = x_N
    parts = padded.reshape(p, n)
    held = parts[r]
    for step in range(1, p):
        held = ring.sendrecv((r + 1) % p, held, (r - 1) % p) + parts[(r - step) % p]
    done = {(r + 1) % p: held}
    for step in range(p - 1):
        held = ring.sendrecv((r + 1) % p, held, (r - 1) % p)
        done[(r - step) % p] = held
    return np.concatenate([done[i] for i in range(p)])[: x_N.size]
