"""Vocabulary-parallel embedding and cross-entropy.

The V ids are cut over the ranks of `tp`: this rank has rows `first` .. `first + v - 1` of the embedding, and the logits of these ids.
Whole logits are T x V numbers: nobody ever has them all.

    embed:   x = W[ids], on every rank
    loss:    mean over tokens of  log(sum over all V ids of exp(z)) - z[target], the same on every rank
    backward:  this rank's columns of (softmax(z) - one-hot(target)) / T

T tokens, D model width. Ids and targets are those of the whole vocabulary, the same on all ranks. Logits may be as large as 1e4,
and one rank's much larger than another's. Send three numbers a token in the loss, none in backward.
`tp.all_reduce(x, op="sum")`, op "sum" or "max". `saved` is yours. Keep the dtype; leave the arguments as they are, `saved` too.
"""

import numpy as np


def embed(ids_T, W_vD, first, tp):
    """ids (T) integers, W (v, D), this rank's rows -> x (T, D)."""
    # --- yours ---
    here_T = (ids_T >= first) & (ids_T < first + len(W_vD))
    row_T = np.where(here_T, ids_T - first, 0)
    part_TD = np.where(here_T[:, None], W_vD[row_T], 0)
    return tp.all_reduce(part_TD)
    # --- end ---


def loss(z_Tv, target_T, first, tp):
    """z (T, v), this rank's logits, target (T) integers -> loss (a number), saved."""
    # --- yours ---
    T, v = z_Tv.shape
    high_T = tp.all_reduce(z_Tv.max(axis=1), op="max")
    far_Tv = z_Tv - high_T[:, None]
    e_Tv = np.exp(far_Tv)
    mine_T = (target_T >= first) & (target_T < first + v)
    column_T = np.where(mine_T, target_T - first, 0)
    hit_T = np.where(mine_T, far_Tv[np.arange(T), column_T], 0)
    sum_T, at_T = tp.all_reduce(np.stack([e_Tv.sum(axis=1), hit_T]))
    mean = (np.log(sum_T) - at_T).mean()
    return mean, (e_Tv / sum_T[:, None], mine_T, column_T)
    # --- end ---


def backward(saved):
    """-> dz (T, v), the gradient of the loss by this rank's logits."""
    # --- yours ---
    p_Tv, mine_T, column_T = saved
    dz_Tv = p_Tv.copy()
    dz_Tv[mine_T, column_T[mine_T]] -= 1
    return dz_Tv / len(p_Tv)
    # --- end ---
