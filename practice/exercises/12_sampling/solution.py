"""From logits to the distribution that is sampled, and from that to a token.

    1. temperature    z / temperature, then softmax; 0 means greedy: all mass on the largest logit, whatever top_k and top_p
    2. top_k          only the k most probable stay; 0 means all
    3. top_p          of what then stays, renormalised and in descending order: a token stays if the mass before it is < top_p,
                      so the one that crosses top_p does; 1 means all
    4. renormalise    the rest is 0
Of equal logits the lower id comes first. Logits may be as large as 1e4. Keep the dtype; leave the arguments as they are.
"""

import numpy as np


def distribution(z_V, temperature, top_k, top_p):
    """z (V) -> p (V), by id, adding to 1."""
    # --- yours ---
    if temperature == 0:
        p_V = np.zeros_like(z_V)
        p_V[np.argmax(z_V)] = 1
        return p_V
    z_V = z_V / temperature
    e_V = np.exp(z_V - z_V.max())
    order_V = np.argsort(-z_V, kind="stable")
    sorted_V = e_V[order_V]
    if top_k > 0:
        sorted_V[top_k:] = 0
    sorted_V = sorted_V / sorted_V.sum()
    before_V = np.cumsum(sorted_V) - sorted_V
    if top_p < 1:
        sorted_V[before_V >= top_p] = 0
    p_V = np.zeros_like(z_V)
    p_V[order_V] = sorted_V
    return p_V / p_V.sum()
    # --- end ---


def draw(p_V, u):
    """The token at u, 0 <= u < 1: the first id with p[0] + ... + p[id] > u. Never one of probability 0, although rounding may
    leave the sum below u."""
    # --- yours ---
    up_to_V = np.cumsum(p_V)
    token = np.searchsorted(up_to_V, u, side="right")
    last = np.flatnonzero(p_V)[-1]
    return int(min(token, last))
    # --- end ---
