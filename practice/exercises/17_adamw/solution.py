"""One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101; the order of PyTorch's torch.optim.AdamW).

    w <- w - lr wd w                                decay, on the weight and not through the gradient
    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
    w <- w - lr mc / (sqrt(vc) + eps)               mc = m / (1 - b1^t), vc = v / (1 - b2^t)

t counts steps from 1. All arrays have w's shape, whatever it is; the hyperparameters are Python numbers.
Keep the dtype; leave the arguments as they are: the new w, m, v are new arrays.
"""

import numpy as np


def adamw(w, g, m, v, t, lr, b1, b2, eps, wd):
    """-> w, m, v after step t."""
    # --- yours ---
    w = w - lr * wd * w
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    mc = m / (1 - b1**t)
    vc = v / (1 - b2**t)
    w = w - lr * mc / (np.sqrt(vc) + eps)
    return w, m, v
    # --- end ---
