"""Each block's attention by itself, merged by its lse: blocks stand in order, so no position is needed. k and v go one by one."""

import math

import numpy as np


def block_attention(q_tHE, k_sHE, v_sHE, own):
    """-> o (t, H, E), lse (t, H): of this block alone."""
    x_Hts = q_tHE.swapaxes(0, 1) @ k_sHE.transpose(1, 2, 0) / math.sqrt(q_tHE.shape[2])
    if own:
        x_Hts[:, ~np.tri(len(q_tHE), dtype=bool)] = -np.inf
    lse_Ht = np.logaddexp.reduce(x_Hts, axis=2)
    return (np.exp(x_Hts - lse_Ht[..., None]) @ v_sHE.swapaxes(0, 1)).swapaxes(0, 1), lse_Ht.T


def merged(o_tHE, lse_tH, other_tHE, other_tH):
    both_tH = np.logaddexp(lse_tH, other_tH)
    return o_tHE * np.exp(lse_tH - both_tH)[..., None] + other_tHE * np.exp(other_tH - both_tH)[..., None], both_tH


def ring_attention(q_tHE, k_tHE, v_tHE, starts, ring):
    p, r = ring.size, ring.rank
    o_tHE, lse_tH = block_attention(q_tHE, k_tHE, v_tHE, own=True)
    for step in range(1, p):
        k_tHE = ring.sendrecv((r + 1) % p, k_tHE, (r - 1) % p)
        v_tHE = ring.sendrecv((r + 1) % p, v_tHE, (r - 1) % p)
        if step <= r and len(k_tHE):
            o_tHE, lse_tH = merged(o_tHE, lse_tH, *block_attention(q_tHE, k_tHE, v_tHE, own=False))
    return o_tHE, lse_tH
