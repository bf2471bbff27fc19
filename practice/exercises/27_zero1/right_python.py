"""The squares go round with their gather; a dict of parts; factors computed first."""

import math

import numpy as np


def step(w_N, g_N, m_n, v_n, t, hyper, dp):
    mine = dp.cut(w_N.size)
    mean = dp.reduce_scatter(g_N)
    mean = mean / dp.size
    squares = dp.all_gather(np.array([float(mean @ mean)]))
    norm = math.sqrt(squares.sum())
    if norm > hyper["clip"]:
        mean = mean * (hyper["clip"] / norm)
    beta1, beta2 = hyper["b1"], hyper["b2"]
    m_n, v_n = m_n + (1 - beta1) * (mean - m_n), v_n + (1 - beta2) * (mean * mean - v_n)
    root = np.sqrt(v_n) / math.sqrt(1 - beta2**t) + hyper["eps"]
    update = m_n / (root * (1 - beta1**t))
    new = w_N[mine] * (1 - hyper["lr"] * hyper["wd"]) - hyper["lr"] * update
    return dp.all_gather(new), m_n, v_n
