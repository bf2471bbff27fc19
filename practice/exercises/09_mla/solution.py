"""Latent attention (MLA), one new token against S cached: keys and values from a latent c, a rotary key kr for all heads.

    k[s, h] = (c[s] Wuk[:, h], kr[s])    q[h] = (qn[h], qr[h])    v[s, h] = c[s] Wuv[:, h]
    p = softmax over s of (q[h] . k[s, h] / sqrt(E + R))          o[h] = sum over s of p v[s, h]

expanded: make the keys and values, then attend.   absorbed: the same o, but nothing of S x H x E numbers is made.
S cached tokens, H heads, E head width (of qn and of o), R rotary width, C latent width. qr and kr are rotated already.
The new token sees the whole cache. Scores may be in the hundreds: exp must not overflow.
Keep the inputs' dtype, float32 or float64, and leave the arguments as they are.
"""

import math

import numpy as np


def mla_expanded(qn_HE, qr_HR, c_SC, kr_SR, Wuk_CHE, Wuv_CHE):
    """qn (H, E), qr (H, R), c (S, C), kr (S, R), Wuk and Wuv (C, H, E) -> o (H, E)."""
    # --- yours ---
    E, R = qn_HE.shape[1], qr_HR.shape[1]
    k_SHE = np.einsum("sc,che->she", c_SC, Wuk_CHE)
    v_SHE = np.einsum("sc,che->she", c_SC, Wuv_CHE)
    content_HS = np.einsum("he,she->hs", qn_HE, k_SHE)
    rotary_HS = qr_HR @ kr_SR.T
    score_HS = (content_HS + rotary_HS) / math.sqrt(E + R)
    w_HS = np.exp(score_HS - score_HS.max(axis=1, keepdims=True))
    p_HS = w_HS / w_HS.sum(axis=1, keepdims=True)
    return np.einsum("hs,she->he", p_HS, v_SHE)
    # --- end ---


def mla_absorbed(qn_HE, qr_HR, c_SC, kr_SR, Wuk_CHE, Wuv_CHE):
    """As mla_expanded, with nothing of S x H x E numbers."""
    # --- yours ---
    E, R = qn_HE.shape[1], qr_HR.shape[1]
    qc_HC = np.einsum("he,che->hc", qn_HE, Wuk_CHE)
    latent_HS = qc_HC @ c_SC.T
    rotated_HS = qr_HR @ kr_SR.T
    sum_HS = (latent_HS + rotated_HS) / math.sqrt(E + R)
    weight_HS = np.exp(sum_HS - sum_HS.max(axis=1, keepdims=True))
    weight_HS = weight_HS / weight_HS.sum(axis=1, keepdims=True)
    oc_HC = weight_HS @ c_SC
    return np.einsum("hc,che->he", oc_HC, Wuv_CHE)
    # --- end ---
