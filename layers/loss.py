"""Softmax cross-entropy over whole logits.

T tokens (or images)   V classes
"""

from __future__ import annotations

import numpy as np


def cross_entropy(logits_TV: np.ndarray, targets_T: np.ndarray) -> tuple[float, tuple]:
    """The mean of -log softmax(logits)[target], in nats, and what backward needs. targets: integers in 0..V-1."""
    shifted_TV = logits_TV - logits_TV.max(axis=1, keepdims=True)
    exp_TV = np.exp(shifted_TV)
    sum_T = exp_TV.sum(axis=1)
    rows_T = np.arange(len(targets_T))
    loss = float(np.mean(np.log(sum_T) - shifted_TV[rows_T, targets_T]))
    return loss, (exp_TV / sum_T[:, None], targets_T)


def cross_entropy_backward(saved: tuple) -> np.ndarray:
    """dlogits (T, V) of the mean: (softmax - one-hot) / T."""
    p_TV, targets_T = saved
    dlogits_TV = p_TV.copy()
    dlogits_TV[np.arange(len(targets_T)), targets_T] -= 1
    dlogits_TV /= len(targets_T)
    return dlogits_TV
