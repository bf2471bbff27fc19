"""Every block is looked at, and those of later ranks are hidden by the mask."""

import math

import numpy as np


def ring_attention(q_tHE, k_tHE, v_tHE, starts, ring):
    p, r = ring.size, ring.rank
    t, H, E = q_tHE.shape
    at_t = starts[r] + np.arange(t)
    top_tH = np.full((t, H), -np.inf, q_tHE.dtype)
    sum_tH = np.zeros((t, H), q_tHE.dtype)
    o_tHE = np.zeros_like(q_tHE)
    block = np.stack([k_tHE, v_tHE])
    for step in range(p):
        owner = (r - step) % p
        k_sHE, v_sHE = block
        at_s = starts[owner] + np.arange(len(k_sHE))
        x_tHs = np.einsum("tHE,sHE->tHs", q_tHE, k_sHE) / math.sqrt(E)
        seen_ts = at_s <= at_t[:, None]
        x_tHs = np.where(seen_ts[:, None], x_tHs, -np.inf)
        new_tH = np.maximum(top_tH, x_tHs.max(axis=2))
        shrink_tH = np.exp(top_tH - new_tH)
        w_tHs = np.exp(x_tHs - new_tH[..., None])
        sum_tH = sum_tH * shrink_tH + w_tHs.sum(axis=2)
        o_tHE = o_tHE * shrink_tH[..., None] + np.einsum("tHs,sHE->tHE", w_tHs, v_sHE)
        top_tH = new_tH
        if step < p - 1:
            block = ring.sendrecv((r + 1) % p, block, (r - 1) % p)
    return o_tHE / sum_tH[..., None], top_tH + np.log(sum_tH)
