"""As in Hugging Face: x cos + rotate_half(x) sin with full-width tables; the other pairing by a permutation round it."""

import numpy as np


def rotate_half(x):
    half = x.shape[-1] // 2
    return np.concatenate([-x[..., half:], x[..., :half]], axis=-1)


def rope(x_THE, positions_T, base, pairing):
    E = x_THE.shape[-1]
    order_E = np.arange(E) if pairing == "half" else np.arange(E).reshape(E // 2, 2).T.ravel()
    x_THE = x_THE[..., order_E]
    inverse = 1.0 / (base ** (np.arange(0, E, 2, dtype=np.float64) / E))
    angles_TE = np.tile(np.einsum("t,p->tp", positions_T.astype(np.float64), inverse), 2)
    cos, sin = (f(angles_TE)[:, None].astype(x_THE.dtype) for f in (np.cos, np.sin))
    y_THE = x_THE * cos + rotate_half(x_THE) * sin
    return y_THE[..., np.argsort(order_E)]
