"""softmax by its logarithm; each block attended by itself, then merged by its log-sum-exp."""

import numpy as np


def lse_of(x_TS):
    return np.logaddexp.reduce(x_TS, axis=1)


def softmax(x_TS):
    lse_T = lse_of(x_TS)
    p_TS = np.exp(x_TS - np.where(np.isinf(lse_T), 0, lse_T)[:, None])
    return p_TS.astype(x_TS.dtype)


def attend_online(q_TE, blocks):
    o_TE = np.zeros_like(q_TE)
    lse_T = np.full(len(q_TE), -np.inf, q_TE.dtype)
    for k_SE, v_SE, seen_TS in blocks:
        x_TS = np.einsum("te,se->ts", q_TE, k_SE) * q_TE.shape[1] ** -0.5
        x_TS[~seen_TS] = -np.inf
        own_T = lse_of(x_TS)
        both_T = np.logaddexp(lse_T, own_T)
        safe_T = np.where(np.isinf(both_T), 0, both_T)
        o_TE = o_TE * np.exp(lse_T - safe_T)[:, None] + softmax(x_TS) @ v_SE * np.exp(own_T - safe_T)[:, None]
        lse_T = both_T
    return o_TE, lse_T
