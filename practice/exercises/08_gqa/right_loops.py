"""Head by head, query by query; gradients by slices."""

import math

import numpy as np


def gqa_forward(q_THE, k_TKE, v_TKE, lengths):
    o_THE = np.empty_like(q_THE)
    group = q_THE.shape[1] // k_TKE.shape[1]
    first = 0
    for n in lengths:
        for t in range(first, first + n):
            for h in range(q_THE.shape[1]):
                score_S = k_TKE[first : t + 1, h // group] @ q_THE[t, h] / math.sqrt(q_THE.shape[2])
                w_S = np.exp(score_S - score_S.max())
                o_THE[t, h] = (w_S / w_S.sum()) @ v_TKE[first : t + 1, h // group]
        first += n
    return o_THE


def kv_grad(dk_THE, kv_heads):
    group = dk_THE.shape[1] // kv_heads
    return np.stack([sum(dk_THE[:, j * group + g] for g in range(group)) for j in range(kv_heads)], axis=1)
