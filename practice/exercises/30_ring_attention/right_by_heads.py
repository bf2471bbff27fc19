"""Head by head; later blocks are computed and hidden; the mask is added; even ranks send first."""

import math

import numpy as np


def ring_attention(q_tHE, k_tHE, v_tHE, starts, ring):
    p, r, (t, H, E) = ring.size, ring.rank, q_tHE.shape
    state = [[np.full((t, 1), -np.inf), np.zeros((t, 1)), np.zeros((t, E))] for _ in range(H)]
    pair, whose = np.concatenate([k_tHE, v_tHE], axis=2), r
    for turn in range(p):
        rows, columns = np.arange(t) + starts[r], np.arange(starts[whose], starts[whose + 1])
        mask = np.where(columns[None] > rows[:, None], -np.inf, 0.0)
        for h in range(H):
            x = q_tHE[:, h] @ pair[:, h, :E].T / math.sqrt(E) + mask
            high, total, out = state[h]
            peak = np.maximum(high, x.max(axis=1, keepdims=True))
            w, old = np.exp(x - peak), np.exp(high - peak)
            state[h] = [peak, total * old + w.sum(axis=1, keepdims=True), out * old + w @ pair[:, h, E:]]
        if turn == p - 1:
            break
        if r % 2:
            new = ring.recv((r - 1) % p)
            ring.send((r + 1) % p, pair)
        else:
            ring.send((r + 1) % p, pair)
            new = ring.recv((r - 1) % p)
        pair, whose = new, (whose - 1) % p
    o = np.stack([out / total for _, total, out in state], axis=1)
    lse = np.concatenate([high + np.log(total) for high, total, _ in state], axis=1)
    return o.astype(q_tHE.dtype), lse.astype(q_tHE.dtype)
