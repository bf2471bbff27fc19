"""Round the ring the other way, messages apart: even ranks send first, odd ranks receive first; parts kept in a dict."""

import numpy as np


def swap(a, ring):
    right, left = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
    if ring.rank % 2 == 0:
        ring.send(left, a)
        return ring.recv(right)
    got = ring.recv(right)
    ring.send(left, a)
    return got


def all_gather(x_n, ring):
    have, last = {ring.rank: x_n}, x_n
    for n in range(1, ring.size):
        last = swap(last, ring)
        have[(ring.rank + n) % ring.size] = last
    return np.concatenate([have[i] for i in sorted(have)])


def reduce_scatter(x_N, ring):
    mine = lambda i: x_N[ring.cut(len(x_N), i % ring.size)]  # noqa: E731
    total = mine(ring.rank + 1)
    for n in range(2, ring.size + 1):
        total = swap(total, ring) + mine(ring.rank + n)
    return total
