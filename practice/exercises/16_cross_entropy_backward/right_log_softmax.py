"""By log-softmax and a one-hot matrix; the gradient is made forward."""

import numpy as np


def cross_entropy(z_TV, target_T, ignore=-1):
    far_TV = z_TV - np.max(z_TV, axis=1)[:, None]
    logp_TV = far_TV - np.log(np.einsum("tv->t", np.exp(far_TV)))[:, None]
    hot_TV = ((target_T[:, None] == np.arange(z_TV.shape[1])) & (target_T != ignore)[:, None]).astype(z_TV.dtype)
    n = max(1.0, float(hot_TV.sum()))
    dz_TV = (np.exp(logp_TV) * hot_TV.sum(axis=1, keepdims=True) - hot_TV) / n
    return float(-np.where(hot_TV > 0, logp_TV, 0).sum() / n), dz_TV


def backward(saved):
    return saved
