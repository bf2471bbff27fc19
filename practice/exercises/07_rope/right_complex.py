"""By complex numbers: pairs viewed as one, times exp(i angle)."""

import numpy as np


def rope(x_THE, positions_T, base, pairing):
    T, H, E = x_THE.shape
    turn_TP = np.exp(1j * np.outer(positions_T, 1 / base ** (np.arange(0, E, 2) / E)))
    if pairing == "half":
        pairs_THP2 = np.stack([x_THE[..., : E // 2], x_THE[..., E // 2 :]], axis=-1)
    else:
        pairs_THP2 = x_THE.reshape(T, H, E // 2, 2)
    z_THP = (pairs_THP2[..., 0] + 1j * pairs_THP2[..., 1]) * turn_TP[:, None]
    parts = [z_THP.real, z_THP.imag]
    y_THE = np.concatenate(parts, axis=-1) if pairing == "half" else np.stack(parts, axis=-1).reshape(T, H, E)
    return y_THE.astype(x_THE.dtype)
