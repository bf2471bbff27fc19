"""Two losses that teach preferences, and their gradients: DPO (2305.18290) and GRPO (2402.03300).

DPO, N pairs of a chosen and a rejected answer, by log-probabilities of whole answers, of the policy (w, l) and of the reference:
    loss = mean over pairs of  -log sigmoid(m),     m = beta ((w - ref_w) - (l - ref_l))       m may be as large as +-1e4
GRPO, one group of G answers to one question, tokens one after another, lengths[i] of them answer i's (0 is possible):
    A = (reward - mean) / (std + 1e-4)      mean and std (divided by G) over the group; A[i] goes for every token of answer i
    ratio = exp(logp - old)                 gain = min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)
    kl = exp(ref - logp) - (ref - logp) - 1
    loss = - mean over the G answers of the mean over its tokens of (gain - beta kl)            an empty answer's mean is 0
Rewards may all be near 1e4. Only w, l and logp have gradients. Keep the dtype of the arrays, float32 or float64, in the gradients;
leave the arguments alone.
"""

import numpy as np


def dpo(w_N, l_N, ref_w_N, ref_l_N, beta):
    """Four arrays (N), beta a number -> loss (a number), dw (N), dl (N)."""
    # --- yours ---
    m_N = beta * ((w_N - ref_w_N) - (l_N - ref_l_N))
    loss = np.logaddexp(0, -m_N).mean()
    wrong_N = np.exp(-np.logaddexp(0, m_N))
    dw_N = -beta * wrong_N / len(m_N)
    dl_N = -dw_N
    return loss, dw_N, dl_N
    # --- end ---


def grpo(logp_T, old_T, ref_T, lengths, reward_G, eps, beta):
    """logp, old, ref (T), lengths (G) integers that add to T, reward (G), eps, beta numbers -> loss (a number), dlogp (T)."""
    # --- yours ---
    G = len(reward_G)
    answer_T = np.repeat(np.arange(G), lengths)
    std = reward_G.std()
    A_T = ((reward_G - reward_G.mean()) / (std + 1e-4))[answer_T]
    share_T = (1 / (G * np.asarray(lengths)[answer_T])).astype(logp_T.dtype)
    ratio_T = np.exp(logp_T - old_T)
    limited_T = np.clip(ratio_T, 1 - eps, 1 + eps)
    gain_T = np.minimum(ratio_T * A_T, limited_T * A_T)
    off_T = ref_T - logp_T
    kl_T = np.exp(off_T) - off_T - 1
    loss = -(share_T * (gain_T - beta * kl_T)).sum()
    dgain_T = np.where(ratio_T * A_T <= limited_T * A_T, ratio_T * A_T, 0)
    dkl_T = 1 - np.exp(off_T)
    dlogp_T = -share_T * (dgain_T - beta * dkl_T)
    return loss, dlogp_T
    # --- end ---
