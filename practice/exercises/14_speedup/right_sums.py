"""As sums: tokens as 1 + alpha + alpha^2 + ..., alpha from the distance, and a search that stops where it gets no better."""

import numpy as np


def alpha(p_V, q_V):
    return 1 - np.abs(p_V.astype(np.float64) - q_V).sum() / 2


def expected_tokens(alpha, gamma):
    return sum(alpha**n for n in range(gamma + 1))


def best_gamma(alpha, c):
    gamma = 0
    while gamma < 64 and speedup(alpha, gamma + 1, c) > speedup(alpha, gamma, c):  # noqa: F821  the solution's
        gamma += 1
    return gamma
