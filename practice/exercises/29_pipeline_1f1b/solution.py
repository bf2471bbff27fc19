"""One forward, one backward: a pipeline's schedule (PipeDream, 1806.03377; Megatron, 2104.04473), and running it.

p stages, one a rank; stage s gets micro-batch i from s - 1 and, backward, its gradient from s + 1. A stage runs as many forwards
first as stages come after it, then a forward and a backward in turn, then the backwards that are left; micro-batches in order.

`run` is to return d loss / d W of this rank's stage, loss = mean over the m micro-batches of sum((y - target)^2) / 2, y what the
last stage gives. `forward` and `backward` of a stage are given. xs is a list on stage 0, targets on the last, elsewhere None.
pipe.rank, pipe.size; pipe.send(to, x), pipe.recv(source), pipe.sendrecv(to, x, source): a send waits for its receiver.
"""

import numpy as np


def forward(x_TD, W_DD):
    """-> y (T, D), saved."""
    y_TD = np.tanh(x_TD @ W_DD)
    return y_TD, (x_TD, y_TD)


def backward(dy_TD, saved, W_DD):
    """-> dx (T, D), dW (D, D)."""
    x_TD, y_TD = saved
    dz_TD = dy_TD * (1 - y_TD * y_TD)
    return dz_TD @ W_DD.T, x_TD.T @ dz_TD


def schedule(stage, stages, m):
    """-> what the stage does, in order: a list of ("F", i) and ("B", i), each i below m once."""
    # --- yours ---
    first = min(stages - 1 - stage, m)
    plan = [("F", i) for i in range(first)]
    for i in range(m - first):
        plan += [("F", first + i), ("B", i)]
    return plan + [("B", i) for i in range(m - first, m)]
    # --- end ---


def run(W_DD, xs, targets, m, pipe):
    """W (D, D); xs: m arrays (T, D) on stage 0; targets: m arrays on the last stage -> dW (D, D)."""
    # --- yours ---
    s, last = pipe.rank, pipe.size - 1
    plan = schedule(s, pipe.size, m)
    saved, dys, came = {}, {}, {}
    dW_DD = np.zeros_like(W_DD)
    for at, (kind, i) in enumerate(plan):
        # After a forward that a backward follows, the two neighbours have something for each other; and the other way round.
        turn = at + 1 < len(plan) and plan[at + 1][0] != kind
        if kind == "F":
            x = xs[i] if s == 0 else came.pop("F") if "F" in came else pipe.recv(s - 1)
            y, saved[i] = forward(x, W_DD)
            if s == last:
                dys[i] = (y - targets[i]) / m
            elif turn:
                came["B"] = pipe.sendrecv(s + 1, y, s + 1)
            else:
                pipe.send(s + 1, y)
        else:
            dy = dys.pop(i) if s == last else came.pop("B") if "B" in came else pipe.recv(s + 1)
            dx, dW = backward(dy, saved.pop(i), W_DD)
            dW_DD += dW
            if s > 0 and turn:
                came["F"] = pipe.sendrecv(s - 1, dx, s - 1)
            elif s > 0:
                pipe.send(s - 1, dx)
    return dW_DD
    # --- end ---
