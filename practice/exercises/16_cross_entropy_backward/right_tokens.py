"""Token by token, with what backward needs recomputed there."""

import numpy as np


def cross_entropy(z_TV, target_T, ignore=-1):
    total, n = 0.0, 0
    for z_V, t in zip(z_TV, target_T, strict=True):
        if t == ignore:
            continue
        n += 1
        far_V = z_V - np.max(z_V)
        total += np.log(np.sum(np.exp(far_V))) - far_V[t]
    return (total / n if n else 0.0), (z_TV, target_T, ignore, n)


def backward(saved):
    z_TV, target_T, ignore, n = saved
    dz_TV = np.zeros_like(z_TV)
    for z_V, t, dz_V in zip(z_TV, target_T, dz_TV, strict=True):
        if t != ignore:
            e_V = np.exp(z_V - np.max(z_V))
            dz_V[:] = e_V / np.sum(e_V) / n
            dz_V[t] -= 1 / n
    return dz_TV
