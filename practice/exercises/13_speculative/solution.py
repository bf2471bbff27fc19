"""Speculative sampling: which tokens come of one run of the target over G drafts (arXiv 2211.17192, algorithm 1).

Draft n, a token x drawn from q[n], is accepted with probability min(1, p[n, x] / q[n, x]): if u[n] is below that. The first that
is rejected ends it: in its place comes a token drawn with u_next from max(0, p[n] - q[n]), normalised. If all are accepted, one
more is drawn with u_next from p[G]. So what comes is distributed exactly as if drawn from p, whatever q is.
p and q may have zeros, but q[n, x] > 0 for a draft x; all u are in [0, 1). G may be 0.
"""

import numpy as np


def draw(p_V, u):
    """Given (exercise 12). The first id with p[0] + ... + p[id] > u, never one of probability 0."""
    return int(min(np.searchsorted(np.cumsum(p_V), u, side="right"), np.flatnonzero(p_V)[-1]))


def accept(p_NV, q_GV, draft_G, u_G, u_next):
    """p (G + 1, V), q (G, V), draft (G) ids, u (G) and u_next in [0, 1) -> list of 1 to G + 1 ids."""
    # --- yours ---
    ids = []
    for n, x in enumerate(draft_G):
        ratio = p_NV[n, x] / q_GV[n, x]
        if u_G[n] < ratio:
            ids.append(int(x))
            continue
        rest_V = np.maximum(p_NV[n] - q_GV[n], 0)
        rest_V = rest_V / rest_V.sum()
        ids.append(draw(rest_V, u_next))
        return ids
    ids.append(draw(p_NV[len(draft_G)], u_next))
    return ids
    # --- end ---
