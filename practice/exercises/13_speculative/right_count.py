"""First how many are accepted, all at once; then one draw: q of the row after the last draft is 0, so its residual is p."""

import numpy as np


def accept(p_NV, q_GV, draft_G, u_G, u_next):
    G, V = q_GV.shape
    row_G = np.arange(G)
    kept_G = u_G * q_GV[row_G, draft_G] < p_NV[row_G, draft_G]
    n = int(np.cumprod(kept_G).sum())
    q_NV = np.concatenate([q_GV, np.zeros((1, V), q_GV.dtype)])
    rest_V = (p_NV[n] - q_NV[n]).clip(min=0)
    up_to_V = np.cumsum(rest_V)
    return [*draft_G[:n].tolist(), int(np.argmax(up_to_V > u_next * up_to_V[-1]))]
