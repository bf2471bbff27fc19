"""All tokens at once: one mask (T, T) that says both 'same sequence' and 'not later'; einsum throughout."""

import numpy as np


def mha_forward(x_TD, Wq_DHE, Wk_DHE, Wv_DHE, Wo_HED, lengths):
    q_THE, k_THE, v_THE = (np.tensordot(x_TD, W_DHE, axes=1) for W_DHE in (Wq_DHE, Wk_DHE, Wv_DHE))
    at_T = np.repeat(np.arange(len(lengths)), lengths)
    t_T = np.arange(len(x_TD))
    hidden_TS = (at_T[:, None] != at_T) | (t_T[:, None] < t_T)
    score_THS = np.einsum("the,she->ths", q_THE, k_THE) / float(np.sqrt(q_THE.shape[2]))
    score_THS = score_THS + np.where(hidden_TS, -np.inf, 0).astype(x_TD.dtype)[:, None]
    lse_TH = np.logaddexp.reduce(score_THS, axis=2)
    p_THS = np.exp(score_THS - lse_TH[:, :, None])
    o_THE = np.einsum("ths,she->the", p_THS, v_THE)
    return np.einsum("the,hed->td", o_THE, Wo_HED), (p_THS, o_THE)
