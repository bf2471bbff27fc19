"""Head by head, with a loop; sums in two halves; each head's weight gradients put where they belong in a whole array."""

import numpy as np


def reads(heads, tp):
    """(local query head, local key/value head) pairs."""
    h, k = own_heads(*heads, tp)  # noqa: F821
    return [(n, i // (heads[0] // heads[1]) - k.start) for n, i in enumerate(range(h.start, h.stop))]


def total(a, tp):
    return tp.all_gather(tp.reduce_scatter(a))


def tp_attention_forward(x_TD, Wq_DhE, Wk_DkE, Wv_DkE, Wo_hED, bo_D, heads, tp):
    y, kept = np.zeros_like(x_TD), []
    for n, j in reads(heads, tp):
        q, k, v = x_TD @ Wq_DhE[:, n], x_TD @ Wk_DkE[:, j], x_TD @ Wv_DkE[:, j]
        o, p = attend(q[None], k[None], v[None], q.shape[1] ** -0.5)  # noqa: F821
        y += o[0] @ Wo_hED[n]
        kept.append((q, k, v, p, o[0]))
    return total(y, tp) + bo_D, (x_TD, kept)


def tp_attention_backward(dy_TD, saved, Wq_DhE, Wk_DkE, Wv_DkE, Wo_hED, heads, tp):
    x, kept = saved
    dx, dWq, dWo = np.zeros_like(x), np.zeros_like(Wq_DhE), np.zeros_like(Wo_hED)
    _, mine = own_heads(*heads, tp)  # noqa: F821
    dW = np.zeros((heads[1], 2, x.shape[1], Wk_DkE.shape[2]), x.dtype)
    for (n, j), (q, k, v, p, o) in zip(reads(heads, tp), kept, strict=True):
        dWo[n] = o.T @ dy_TD
        do = dy_TD @ Wo_hED[n].T
        dq, dk, dv = attend_backward(do[None], q[None], k[None], v[None], p, q.shape[1] ** -0.5)  # noqa: F821
        dx += dq[0] @ Wq_DhE[:, n].T + dk[0] @ Wk_DkE[:, j].T + dv[0] @ Wv_DkE[:, j].T
        dWq[:, n] = x.T @ dq[0]
        dW[mine.start + j] += x.T @ dk[0], x.T @ dv[0]
    dx, dW = total(dx, tp), total(dW, tp)[mine]
    return dx, dWq, dW[:, 0].swapaxes(0, 1), dW[:, 1].swapaxes(0, 1), dWo, dy_TD.sum(axis=0)
