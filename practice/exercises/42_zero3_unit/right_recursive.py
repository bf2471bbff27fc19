"""The first unit, then the rest by the same function; weights are deleted by hand, gradients go by hstack."""

import numpy as np


def gather(w_n, shapes, dp):
    rest = dp.all_gather(np.asarray(w_n))
    arrays = []
    for shape in shapes:
        n = 1
        for length in shape:
            n *= length
        arrays.append(np.reshape(rest[:n], shape).copy())
        rest = rest[n:]
    return arrays


def forward(x_tD, parts, units, dp):
    if not units:
        return x_tD, None
    arrays = gather(parts[0], units[0].shapes, dp)
    y_tD, own = units[0].forward(x_tD, arrays)
    del arrays
    y_tD, others = forward(y_tD, parts[1:], units[1:], dp)
    return y_tD, (own, others)


def backward(dy_tD, kept, parts, units, dp):
    if not units:
        return dy_tD, []
    own, others = kept
    dy_tD, behind = backward(dy_tD, others, parts[1:], units[1:], dp)
    arrays = gather(parts[0], units[0].shapes, dp)
    dx_tD, grads = units[0].backward(dy_tD, own, arrays)
    del arrays
    return dx_tD, [dp.reduce_scatter(np.hstack([g.reshape(-1) for g in grads])), *behind]
