"""One exchange for both ways, told which dim to cut and which to join; q, k, v lie on a dim of their own in front."""

import numpy as np


def exchange(x, cut, join, cp):
    length, lists = x.shape[cut], []
    for r in range(cp.size):
        lists.append(np.take(x, range(length)[cp.cut(length, r)], axis=cut))
    return np.concatenate(cp.all_to_all(lists), axis=join)


def to_heads(x_tHE, cp):
    return exchange(x_tHE, -2, -3, cp)


def to_tokens(x_ThE, cp):
    return exchange(x_ThE, -3, -2, cp)


def attention_forward(q_tHE, k_tHE, v_tHE, cp):
    o_ThE, saved = attend(*exchange(np.stack([q_tHE, k_tHE, v_tHE]), 2, 1, cp))  # noqa: F821
    return exchange(o_ThE, 0, 1, cp), saved


def attention_backward(do_tHE, saved, cp):
    found = attend_backward(exchange(do_tHE, 1, 0, cp), saved)  # noqa: F821
    return tuple(exchange(np.stack(found), 1, 2, cp))
