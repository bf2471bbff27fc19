"""Averaging gradients over data-parallel ranks that have unequal numbers of tokens.

Every rank has the same weights and other tokens. It has computed its gradients as means over its own n tokens:

    g_r = (1 / n_r) x sum over its tokens of the token's gradient

Return what one process with all tokens would have: the mean over all tokens of all ranks, on every rank.

grads: a list of arrays (the weights' shapes, the same on all ranks). n: this rank's number of tokens, may be 0; then its means
are 0/0, that is NaN, and mean nothing. If no rank has tokens, the gradients are 0.
`dp.all_reduce(x)` returns the sum over the ranks of dp; all ranks must call it alike. Use one for all arrays (a bucket), not one
an array: each message costs its latency. The numbers of tokens may go in it or in one of their own. Keep shapes and dtype; leave
the arguments as they are.
"""

import numpy as np


def average(grads, n, dp):
    """grads: list of arrays, means over this rank's n tokens -> list of arrays, means over all ranks' tokens."""
    # --- yours ---
    dtype = grads[0].dtype
    sums = [g * n if n else np.zeros_like(g) for g in grads]
    count = np.array([n], dtype)
    bucket = np.concatenate([count, *(s.ravel() for s in sums)])
    total = dp.all_reduce(bucket)
    means = total[1:] / max(total[0], 1)
    averaged, start = [], 0
    for g in grads:
        averaged.append(means[start : start + g.size].reshape(g.shape))
        start += g.size
    return averaged
    # --- end ---
