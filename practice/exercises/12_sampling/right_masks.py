"""Filters as masks on logits, -inf where a token goes; each followed by a softmax."""

import numpy as np


def softmax(z_V):
    e_V = np.exp(z_V - np.max(z_V))
    return e_V / np.sum(e_V)


def distribution(z_V, temperature, top_k, top_p):
    if not temperature:
        return (np.arange(len(z_V)) == z_V.argmax()).astype(z_V.dtype)
    place_V = np.empty(len(z_V), int)
    order_V = np.lexsort((np.arange(len(z_V)), -z_V))
    place_V[order_V] = np.arange(len(z_V))
    z_V = np.where(place_V < (top_k or len(z_V)), z_V / temperature, -np.inf)
    p_V = softmax(z_V)
    before_V = np.concatenate([[0], np.cumsum(p_V[order_V])[:-1]])[place_V]
    return softmax(np.where((before_V < top_p) | (top_p >= 1), z_V, -np.inf))


def draw(p_V, u):
    above = (np.add.accumulate(p_V) > u) & (p_V > 0)
    return int(above.argmax()) if above.any() else int(np.nonzero(p_V)[0].max())
