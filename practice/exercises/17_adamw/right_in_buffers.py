"""Into buffers of its own with out=, as an optimizer that walks over large arrays is written."""

import numpy as np


def adamw(w, g, m, v, t, lr, b1, b2, eps, wd):
    new_m = np.multiply(m, b1)
    new_m += g * (1 - b1)
    new_v = np.square(g)
    new_v *= 1 - b2
    new_v += b2 * v
    below = np.sqrt(new_v / (1 - b2**t))
    below += eps
    step = np.divide(new_m, below)
    step *= lr / (1 - b1**t)
    step += (lr * wd) * w
    return np.subtract(w, step), new_m, new_v
