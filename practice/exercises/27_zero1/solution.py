"""One AdamW step with the optimizer's state cut over dp (ZeRO stage 1, arXiv 1910.02054), gradients clipped by their global norm.

Every rank has all weights w (N), a gradient g (N) of its own and its part of the moments m, v: indices dp.cut(N). In turn:
    g   the mean over the ranks' gradients
    g   times min(1, clip / norm),  norm = sqrt(sum over all N of g^2); gradients that are all 0 stay 0
    w <- w - lr wd w;   m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)                       t counts from 1
`hyper` is a dict of lr, b1, b2, eps, wd, clip. No rank makes more than its part of m and v, and no more is sent than an all-reduce
of the gradients would, and a number or two. dp.reduce_scatter(x) sums and leaves each rank dp.cut(len(x)).
"""

import numpy as np


def step(w_N, g_N, m_n, v_n, t, hyper, dp):
    """w (N), g (N), m (n), v (n) -> w (N), the same on every rank, m (n), v (n)."""
    # --- yours ---
    lr, b1, b2, eps, wd, clip = (hyper[name] for name in ("lr", "b1", "b2", "eps", "wd", "clip"))
    w_n = w_N[dp.cut(len(w_N))]
    g_n = dp.reduce_scatter(g_N) / dp.size
    square = (g_n**2).sum(keepdims=True)
    norm = np.sqrt(dp.all_reduce(square))[0]
    g_n = g_n * min(1, clip / norm)
    m_n = b1 * m_n + (1 - b1) * g_n
    v_n = b2 * v_n + (1 - b2) * g_n**2
    w_n = w_n - lr * wd * w_n
    w_n = w_n - lr * (m_n / (1 - b1**t)) / (np.sqrt(v_n / (1 - b2**t)) + eps)
    return dp.all_gather(w_n), m_n, v_n
    # --- end ---
