"""One function that sums and one that does not: f and g are the same pair, turned round."""

import numpy as np


def total(a, tp):
    whole = np.ascontiguousarray(a)
    return tp.all_reduce(whole.T).T if whole.ndim else tp.all_reduce(whole)


def same(a, tp):
    return np.array(a)


def f_forward(x, tp):
    return same(x, tp)


def f_backward(dy, tp):
    return total(dy, tp)


def g_forward(x, tp):
    return total(x, tp)


def g_backward(dy, tp):
    return same(dy, tp)
