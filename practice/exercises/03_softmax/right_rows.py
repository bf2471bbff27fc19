"""Query by query, key by key; rows that see nothing are left as they were made."""

import math

import numpy as np


def softmax(x_TS):
    p_TS = np.zeros_like(x_TS)
    for p_S, x_S in zip(p_TS, x_TS, strict=True):
        live = np.isfinite(x_S)
        if live.any():
            p_S[live] = np.exp(x_S[live] - x_S[live].max())
            p_S /= p_S.sum()
    return p_TS


def attend_online(q_TE, blocks):
    o_TE = np.zeros_like(q_TE)
    top_T = np.full(len(q_TE), -np.inf, q_TE.dtype)
    sum_T = np.zeros(len(q_TE), q_TE.dtype)
    for k_SE, v_SE, seen_TS in blocks:
        for t, q_E in enumerate(q_TE):
            live = seen_TS[t]
            if not live.any():
                continue
            x_S = k_SE[live] @ q_E / math.sqrt(len(q_E))
            if x_S.max() > top_T[t]:
                o_TE[t] *= np.exp(top_T[t] - x_S.max())
                sum_T[t] *= np.exp(top_T[t] - x_S.max())
                top_T[t] = x_S.max()
            w_S = np.exp(x_S - top_T[t])
            sum_T[t] += w_S.sum()
            o_TE[t] += w_S @ v_SE[live]
    live = sum_T > 0
    o_TE[live] /= sum_T[live, None]
    lse_T = np.full(len(q_TE), -np.inf, q_TE.dtype)
    lse_T[live] = top_T[live] + np.log(sum_T[live])
    return o_TE, lse_T
