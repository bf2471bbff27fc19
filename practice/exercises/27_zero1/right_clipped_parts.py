"""Clips with np.where on the sum and divides afterwards; the step is written as a difference that is added."""

import numpy as np


def step(w_N, g_N, m_n, v_n, t, hyper, dp):
    total = dp.reduce_scatter(g_N)
    power = dp.all_reduce(np.sum(total**2).reshape(1))
    norm = np.sqrt(power) / dp.size
    scale = np.where(norm > hyper["clip"], hyper["clip"] / norm, 1).astype(g_N.dtype)
    g = total * scale / dp.size
    m = hyper["b1"] * m_n + g - hyper["b1"] * g
    v = hyper["b2"] * v_n + g * g - hyper["b2"] * g * g
    corrected_m, corrected_v = m / (1 - hyper["b1"] ** t), v / (1 - hyper["b2"] ** t)
    w = w_N[dp.cut(len(w_N))]
    change = hyper["wd"] * w + corrected_m / (corrected_v**0.5 + hyper["eps"])
    return dp.all_gather(w - hyper["lr"] * change), m, v
