"""By sequence, heads first, with the softmax's Jacobian written out: ds = (diag(p) - p p^T) dp."""

import numpy as np


def attention_backward(do_THE, q_THE, k_THE, v_THE, o_THE, lse_TH, lengths):
    parts = []
    for t in np.split(np.arange(len(q_THE)), np.cumsum(lengths)[:-1]):
        q_HTE, k_HTE, v_HTE, do_HTE = (x[t].transpose(1, 0, 2) for x in (q_THE, k_THE, v_THE, do_THE))
        root = float(np.sqrt(q_HTE.shape[2]))
        q_HTE = q_HTE / root
        s_HTS = np.matmul(q_HTE, np.swapaxes(k_HTE, 1, 2))
        later_TS = np.triu(np.ones((len(t), len(t)), bool), 1)
        s_HTS[:, later_TS] = -np.inf
        w_HTS = np.exp(s_HTS - s_HTS.max(axis=2, keepdims=True, initial=-np.inf))
        p_HTS = w_HTS / w_HTS.sum(axis=2, keepdims=True)
        dp_HTS = np.matmul(do_HTE, np.swapaxes(v_HTE, 1, 2))
        ds_HTS = p_HTS * dp_HTS - p_HTS * np.einsum("hts,hts->ht", p_HTS, dp_HTS)[:, :, None]
        dq_HTE, dk_HTE = np.matmul(ds_HTS, k_HTE) / root, np.einsum("hts,hte->hse", ds_HTS, q_HTE)
        parts.append([g.transpose(1, 0, 2) for g in (dq_HTE, dk_HTE, np.einsum("hts,hte->hse", p_HTS, do_HTE))])
    return tuple(np.concatenate(gradients) for gradients in zip(*parts, strict=True))
