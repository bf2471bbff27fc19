"""Choice by choice with lists: a parcel for each expert, counts as they are in the lists, everything a dict by rank."""

import numpy as np


def exchange(parts, ep):
    p, me = ep.size, ep.rank
    got = {me: parts[me]}
    for distance in range(p - 1, 0, -1):
        to, source = (me - distance) % p, (me + distance) % p
        got[source] = ep.sendrecv(to, parts[to], source)
    return [got[rank] for rank in sorted(got)]


def stacked(rows, width, dtype):
    return np.array(rows, dtype).reshape(-1, width)


def silu(a):
    return a / (1 + np.exp(-a))


def moe_forward(x_tD, id_tk, gate_tk, W1_nDF, W2_nFD, N, ep):
    D, kind = x_tD.shape[1], x_tD.dtype
    chosen = {n: [(t, j) for t, row in enumerate(id_tk) for j, other in enumerate(row) if other == n] for n in range(N)}
    homes = [range(*ep.cut(N, rank).indices(N)) for rank in range(ep.size)]
    counts = exchange([np.array([len(chosen[n]) for n in home], np.int64) for home in homes], ep)
    pairs = [[pair for n in home for pair in chosen[n]] for home in homes]
    came = exchange([stacked([x_tD[t] for t, _ in some], D, kind) for some in pairs], ep)
    by_expert = [[] for _ in homes[ep.rank]]
    for rank, count in enumerate(counts):
        begin = 0
        for n, rows in enumerate(count.tolist()):
            by_expert[n].append((rank, slice(begin, begin + rows)))
            begin += rows
    results = [np.zeros_like(x) for x in came]
    inputs = []
    for n, places in enumerate(by_expert):
        x = np.vstack([came[rank][rows] for rank, rows in places])
        o = silu(x @ W1_nDF[n]) @ W2_nFD[n]
        for (rank, rows), some in zip(places, np.split(o, np.cumsum([s.stop - s.start for _, s in places])[:-1]), strict=True):
            results[rank][rows] = some
        inputs.append(x)
    home_again = exchange(results, ep)
    y_tD = 0 * x_tD
    for some, rows in zip(pairs, home_again, strict=True):
        for (t, j), row in zip(some, rows, strict=True):
            y_tD[t] = y_tD[t] + gate_tk[t, j] * row
    return y_tD, (pairs, by_expert, inputs, home_again, gate_tk.copy())


def moe_backward(dy_tD, saved, W1_nDF, W2_nFD, ep):
    pairs, by_expert, inputs, outputs, gate_tk = saved
    D, kind = dy_tD.shape[1], dy_tD.dtype
    dgate_tk = 0 * gate_tk
    for some, rows in zip(pairs, outputs, strict=True):
        for (t, j), row in zip(some, rows, strict=True):
            dgate_tk[t, j] = row @ dy_tD[t]
    came = exchange([stacked([gate_tk[t, j] * dy_tD[t] for t, j in some], D, kind) for some in pairs], ep)
    answers = [np.zeros_like(x) for x in came]
    dW1, dW2 = [], []
    for n, places in enumerate(by_expert):
        do = np.concatenate([came[rank][rows] for rank, rows in places])
        a = inputs[n] @ W1_nDF[n]
        s = silu(a)
        gate = 1 / (1 + np.exp(-a))
        da = (do @ W2_nFD[n].T) * (gate + s - s * gate)
        dW1.append(inputs[n].T @ da)
        dW2.append(s.T @ do)
        back = da @ W1_nDF[n].T
        for rank, rows in places:
            size = rows.stop - rows.start
            answers[rank][rows], back = back[:size], back[size:]
    dx_tD = 0 * dy_tD
    for some, rows in zip(pairs, exchange(answers, ep), strict=True):
        for (t, _), row in zip(some, rows, strict=True):
            dx_tD[t] += row
    return dx_tD, dgate_tk, np.array(dW1, kind).reshape(W1_nDF.shape), np.array(dW2, kind).reshape(W2_nFD.shape)
