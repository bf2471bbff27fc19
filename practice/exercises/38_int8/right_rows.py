"""Row by row, with Python's round; products by np.dot with dtype int64, token by token."""

import numpy as np


def quantise(x, dim):
    rows = x if dim == 1 else x.T
    q, scale = np.zeros(rows.shape, np.int8), np.ones((len(rows), 1), x.dtype)
    for i, row in enumerate(rows):
        most = max(abs(row))
        if most:
            scale[i] = most / 127
            q[i] = [round(float(v / scale[i, 0])) for v in row]
    return (q, scale) if dim == 1 else (q.T.copy(), scale.T.copy())


def dequantise(q, scale):
    return scale * np.asarray(q, dtype=scale.dtype)


def linear(x_TD, Wq_DF, scale_1F, b_F):
    y = np.empty((len(x_TD), Wq_DF.shape[1]), x_TD.dtype)
    for t, x in enumerate(x_TD):
        q, s = quantise(x[None], 1)
        y[t] = b_F + np.dot(q[0].astype(np.int64), Wq_DF.astype(np.int64)) * scale_1F[0] * s[0, 0]
    return y
