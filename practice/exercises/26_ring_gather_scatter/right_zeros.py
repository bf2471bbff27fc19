"""The sum as one running array; the whole put together by growing it at the right end."""

import numpy as np


def all_gather(x_n, ring):
    p, r = ring.size, ring.rank
    before, after, passing = [], [x_n], x_n
    for distance in range(1, p):
        passing = ring.sendrecv((r + 1) % p, passing, (r - 1) % p)
        (before if distance <= r else after).append(passing)
    # Ranks below this one came nearest first; those above it, highest first.
    return np.concatenate(before[::-1] + after[:1] + after[:0:-1])


def reduce_scatter(x_N, ring):
    p, r = ring.size, ring.rank
    running = np.zeros_like(x_N)[ring.cut(x_N.size, (r - 1) % p)]
    for step in range(p):
        running = running + x_N[ring.cut(x_N.size, (r - 1 - step) % p)]
        if step < p - 1:
            running = ring.sendrecv((r + 1) % p, running, (r - 1) % p)
    return running
