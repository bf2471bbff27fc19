"""Sends and receives apart: where two neighbours exchange, results go on before gradients go back."""

import numpy as np


def schedule(stage, stages, m):
    forwards, backwards, plan = 0, 0, []
    while backwards < m:
        if forwards < m and forwards - backwards < stages - stage:
            plan.append(("F", forwards))
            forwards += 1
        else:
            plan.append(("B", backwards))
            backwards += 1
    return plan


def run(W_DD, xs, targets, m, pipe):
    s, p = pipe.rank, pipe.size

    def exchange(other, array):
        if other > s:
            pipe.send(other, array)
            return pipe.recv(other)
        got = pipe.recv(other)
        pipe.send(other, array)
        return got

    plan = schedule(s, p, m)
    nexts = [kind for kind, _ in plan[1:]] + [""]
    kept, parts, ready = [None] * m, [], None
    for (kind, i), following in zip(plan, nexts, strict=True):
        first_or_last = s == (0 if kind == "F" else p - 1)
        got = ready if ready is not None else None if first_or_last else pipe.recv(s - 1 if kind == "F" else s + 1)
        ready = None
        if kind == "F":
            y, kept[i] = forward(xs[i] if s == 0 else got, W_DD)  # noqa: F821
            to, gone = s + 1, y
        else:
            dy = (kept[i][1] - targets[i]) / m if s == p - 1 else got
            gone, dW = backward(dy, kept[i], W_DD)  # noqa: F821
            parts.append(dW)
            to = s - 1
        if 0 <= to < p:
            if following and following != kind:
                ready = exchange(to, gone)
            else:
                pipe.send(to, gone)
    return np.sum(parts, axis=0)
