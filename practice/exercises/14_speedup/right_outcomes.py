"""Outcome by outcome: how many are accepted, how probable that is."""


def alpha(p_V, q_V):
    return sum(float(q) if p >= q else float(p) for p, q in zip(p_V, q_V, strict=True))


def expected_tokens(alpha, gamma):
    mean, reached = 0.0, 1.0
    for accepted in range(gamma):
        mean += reached * (1 - alpha) * (accepted + 1)
        reached *= alpha
    return mean + reached * (gamma + 1)


def speedup(alpha, gamma, c):
    return expected_tokens(alpha, gamma) / (1.0 + c * gamma)


def best_gamma(alpha, c):
    return max(range(65), key=lambda gamma: (speedup(alpha, gamma, c), -gamma))
