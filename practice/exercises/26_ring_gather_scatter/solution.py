"""All-gather and reduce-scatter on a ring, from send and receive.

    all_gather:      rank r has part r of an array; every rank is to return the whole, parts in the order of ranks
    reduce_scatter:  every rank has an array x (N); rank r is to return part r of the sum over ranks

p - 1 messages a rank each, none larger than the largest part. Parts are not equally long, and one may be empty: in
reduce_scatter, part i is x[ring.cut(N, i)]; in all_gather, a rank knows the length of its own part only.

    ring.rank, ring.size     ring.send(to, array)     ring.recv(source) -> array     ring.sendrecv(to, array, source) -> array

A send waits until its receiver has taken it. Leave x as it is.
"""

import numpy as np


def all_gather(x_n, ring):
    """x (n), this rank's part -> y (N), all ranks' parts one after another."""
    # --- yours ---
    p, r = ring.size, ring.rank
    right, left = (r + 1) % p, (r - 1) % p
    parts = [x_n] * p
    for step in range(p - 1):
        out, into = (r - step) % p, (r - step - 1) % p
        parts[into] = ring.sendrecv(right, parts[out], left)
    return np.concatenate(parts)
    # --- end ---


def reduce_scatter(x_N, ring):
    """x (N), the same N on every rank -> y (n), part r of the sum over ranks on rank r."""
    # --- yours ---
    p, r = ring.size, ring.rank
    right, left = (r + 1) % p, (r - 1) % p
    sums = [x_N[ring.cut(len(x_N), i)] for i in range(p)]
    for step in range(p - 1):
        give, take = (r - step - 1) % p, (r - step - 2) % p
        sums[take] = sums[take] + ring.sendrecv(right, sums[give], left)
    return sums[r]
    # --- end ---
