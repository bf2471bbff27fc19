"""The corrections folded into the step's length and eps (Kingma and Ba, end of section 2); moments by interpolation."""

import math


def adamw(w, g, m, v, t, lr, b1, b2, eps, wd):
    m = m + (1 - b1) * (g - m)
    v = v + (1 - b2) * (g**2 - v)
    root = math.sqrt(1 - b2**t)
    length = lr * root / (1 - b1**t)
    return (1 - lr * wd) * w - length * m / (v**0.5 + eps * root), m, v
