"""Keys are stored as projected and rotated when they are read, each by its own position; einsum throughout."""

import numpy as np


def step(x_ND, cache, weights):
    Wq_DHE, Wk_DKE, Wv_DKE, Wo_HED = weights
    before = cache.length
    cache.append(np.einsum("nd,dke->nke", x_ND, Wk_DKE), np.einsum("nd,dke->nke", x_ND, Wv_DKE))
    all_S = np.arange(cache.length)
    q_NHE = rope(np.einsum("nd,dhe->nhe", x_ND, Wq_DHE), all_S[before:])  # noqa: F821  given
    k_SKE = rope(np.moveaxis(cache.k, 1, 0), all_S)  # noqa: F821  given
    group = Wq_DHE.shape[1] // Wk_DKE.shape[1]
    s_HNS = np.einsum("nhe,she->hns", q_NHE, np.repeat(k_SKE, group, axis=1)) * float(q_NHE.shape[2]) ** -0.5
    s_HNS[:, all_S[before:, None] < all_S] = -np.inf
    s_HNS -= s_HNS.max(-1)[..., None]
    p_HNS = np.exp(s_HNS)
    p_HNS /= p_HNS.sum(-1)[..., None]
    return np.einsum("hns,hse,hed->nd", p_HNS, np.repeat(cache.v, group, axis=0), Wo_HED)
