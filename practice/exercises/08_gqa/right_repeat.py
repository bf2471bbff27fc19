"""Keys and values repeated for each query head (more memory, the same result); gradients by adding at indices."""

import numpy as np


def gqa_forward(q_THE, k_TKE, v_TKE, lengths):
    T, H, E = q_THE.shape
    group = H // k_TKE.shape[1]
    k_THE, v_THE = np.repeat(k_TKE, group, axis=1), np.repeat(v_TKE, group, axis=1)
    at_T = np.repeat(np.arange(len(lengths)), lengths)
    seen_TS = (at_T[:, None] == at_T) & (np.arange(T)[:, None] >= np.arange(T))
    score_HTS = np.matmul(q_THE.transpose(1, 0, 2), k_THE.transpose(1, 2, 0)) * float(E**-0.5)
    score_HTS[:, ~seen_TS] = -np.inf
    p_HTS = np.exp(score_HTS - np.max(score_HTS, axis=-1, keepdims=True))
    p_HTS /= p_HTS.sum(axis=-1, keepdims=True)
    return np.matmul(p_HTS, v_THE.transpose(1, 0, 2)).transpose(1, 0, 2)


def kv_grad(dk_THE, kv_heads):
    T, H, E = dk_THE.shape
    dk_TKE = np.zeros((T, kv_heads, E), dk_THE.dtype)
    np.add.at(dk_TKE, (slice(None), np.arange(H) * kv_heads // H), dk_THE)
    return dk_TKE
