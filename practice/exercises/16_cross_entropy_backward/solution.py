"""Cross-entropy of logits, and its gradient.

    loss = mean over the tokens that count of  -log softmax(z)[target]

T tokens, V ids. A token whose target is `ignore` does not count: nothing in the loss, and a row of zeros in dz; `ignore` may be
any integer, -1 or a real id. If no token counts, loss and dz are 0. Logits may be as large as 1e4.
`saved` is yours: whatever backward needs. Keep the dtype; leave the arguments as they are.
"""

import numpy as np


def cross_entropy(z_TV, target_T, ignore=-1):
    """z (T, V), target (T) integers -> loss (a number), saved."""
    # --- yours ---
    counts_T = target_T != ignore
    count = max(int(counts_T.sum()), 1)
    row_T = np.arange(len(z_TV))
    id_T = np.where(counts_T, target_T, 0)
    high_T1 = z_TV.max(axis=1, keepdims=True)
    e_TV = np.exp(z_TV - high_T1)
    sum_T1 = e_TV.sum(axis=1, keepdims=True)
    logp_T = z_TV[row_T, id_T] - high_T1[:, 0] - np.log(sum_T1[:, 0])
    loss = -logp_T[counts_T].sum() / count
    return loss, (e_TV / sum_T1, row_T, id_T, counts_T, count)
    # --- end ---


def backward(saved):
    """-> dz (T, V), the gradient of the loss."""
    # --- yours ---
    p_TV, row_T, id_T, counts_T, count = saved
    dz_TV = p_TV.copy()
    dz_TV[row_T, id_T] -= 1
    dz_TV[~counts_T] = 0
    return dz_TV / count
    # --- end ---
