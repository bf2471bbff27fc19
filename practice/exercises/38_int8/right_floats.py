"""Rounds by floor; the integer product is done in float64, where it is exact too; scales by division with 127."""

import numpy as np


def quantise(x, dim):
    top = np.amax(np.absolute(x), axis=dim, keepdims=True)
    top = np.where(top == 0, np.array(127, x.dtype), top)
    q = np.clip(np.floor(x * (127 / top) + 0.5), -127, 127)
    return q.astype("int8"), top / 127


def dequantise(q, scale):
    return np.multiply(q, scale, dtype=scale.dtype)


def linear(x_TD, Wq_DF, scale_1F, b_F):
    xq, s = quantise(x_TD, 1)
    total = np.einsum("td,df->tf", xq.astype(np.float64), Wq_DF.astype(np.float64))
    return (total * (s.astype(np.float64) @ scale_1F) + b_F).astype(x_TD.dtype)
