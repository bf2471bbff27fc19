"""Each row carries its expert's number as one more column, so that nobody counts; pairs talk in order, the lower rank sends first."""

import numpy as np


def exchange(parts, ep):
    came = list(parts)
    for other in range(ep.size):
        if ep.rank < other:
            ep.send(other, parts[other])
            came[other] = ep.recv(other)
        elif other < ep.rank:
            came[other] = ep.recv(other)
            ep.send(other, parts[other])
    return came


def sigmoid(a):
    return np.tanh(a / 2) / 2 + 0.5


def moe_forward(x_tD, id_tk, gate_tk, W1_nDF, W2_nFD, N, ep):
    D = x_tD.shape[1]
    where = []
    for rank in range(ep.size):
        here = ep.cut(N, rank)
        where.append(np.nonzero((id_tk >= here.start) & (id_tk < here.stop)))
    labelled = [
        np.hstack([x_tD[t], (id_tk[t, j] - ep.cut(N, r).start)[:, None].astype(x_tD.dtype)]) for r, (t, j) in enumerate(where)
    ]
    came = exchange(labelled, ep)
    outputs, kept = [], []
    for rows in came:
        x, number = rows[:, :D], rows[:, D].astype(int)
        o = np.zeros_like(x)
        for n in set(number.tolist()):
            mine = number == n
            a = x[mine] @ W1_nDF[n]
            o[mine] = (a * sigmoid(a)) @ W2_nFD[n]
        outputs.append(o)
        kept.append((x, number))
    o_rcD = exchange(outputs, ep)
    y_tD = np.zeros(x_tD.shape, x_tD.dtype)
    for (tokens, slots), o in zip(where, o_rcD, strict=True):
        for t, j, row in zip(tokens, slots, o, strict=True):
            y_tD[t] += gate_tk[t, j] * row
    return y_tD, {"where": where, "gate": gate_tk, "outputs": o_rcD, "kept": kept}


def moe_backward(dy_tD, saved, W1_nDF, W2_nFD, ep):
    gate_tk, where = saved["gate"], saved["where"]
    dgate_tk = np.empty(gate_tk.shape, gate_tk.dtype)
    for (t, j), o in zip(where, saved["outputs"], strict=True):
        dgate_tk[t, j] = np.einsum("cd,cd->c", dy_tD[t], o)
    came = exchange([gate_tk[t, j][:, None] * dy_tD[t] for t, j in where], ep)
    dW1, dW2, answers = np.zeros_like(W1_nDF), np.zeros_like(W2_nFD), []
    for (x, number), do in zip(saved["kept"], came, strict=True):
        dx = np.zeros_like(do)
        for n in range(len(W1_nDF)):
            mine = number == n
            if mine.any():
                a = x[mine] @ W1_nDF[n]
                s = sigmoid(a)
                dW2[n] += np.einsum("cf,cd->fd", a * s, do[mine])
                da = do[mine] @ W2_nFD[n].T * s * (1 + a * (1 - s))
                dW1[n] += np.einsum("cd,cf->df", x[mine], da)
                dx[mine] = da @ W1_nDF[n].T
        answers.append(dx)
    dx_tD = np.zeros_like(dy_tD)
    for (t, _), dx in zip(where, exchange(answers, ep), strict=True):
        # A token may have several experts on one rank.
        np.add.at(dx_tD, t, dx)
    return dx_tD, dgate_tk, dW1, dW2
