"""Indices clipped to this part and what is not here masked; three all-reduces; log-softmax kept in place of the softmax."""

import numpy as np


def embed(ids_T, W_vD, first, tp):
    rows = np.clip(ids_T - first, 0, len(W_vD) - 1)
    here = (rows == ids_T - first).astype(W_vD.dtype)
    return tp.all_gather(tp.reduce_scatter(W_vD[rows] * here[:, None]))


def loss(z_Tv, target_T, first, tp):
    high = tp.all_reduce(np.max(z_Tv, 1, keepdims=True), "max")
    total = tp.all_reduce(np.exp(z_Tv - high).sum(1, keepdims=True))
    logp = z_Tv - high - np.log(total)
    columns = np.clip(target_T - first, 0, z_Tv.shape[1] - 1)
    here = columns == target_T - first
    own = logp[np.arange(len(logp)), columns]
    own[~here] = 0
    return -tp.all_reduce(own).sum() / len(own), (logp, columns, here)


def backward(saved):
    logp, columns, here = saved
    dz = np.exp(logp)
    np.subtract.at(dz, (np.flatnonzero(here), columns[here]), 1)
    dz /= len(dz)
    return dz
