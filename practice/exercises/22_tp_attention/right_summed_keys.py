"""dk and dv of copied heads are summed over ranks for the weights, and used as they are for dx; groups by a matrix of ones."""

import numpy as np


def own_heads(H, K, tp):
    queries = range(H)[tp.cut(H)]
    held = sorted({i * K // H for i in queries})
    return slice(queries.start, queries.stop), slice(held[0], held[-1] + 1) if held else slice(0, 0)


def reads(H, K, tp):
    """(h, k): 1 where a query head reads a key/value head."""
    h, k = own_heads(H, K, tp)
    return (np.arange(H)[h, None] * K // H == np.arange(K)[k]).astype(float)


def tp_attention_forward(x_TD, Wq_DhE, Wk_DkE, Wv_DkE, Wo_hED, bo_D, heads, tp):
    reads_hk = reads(*heads, tp).astype(x_TD.dtype)
    q, k, v = (np.tensordot(x_TD, W, 1).transpose(1, 0, 2) for W in (Wq_DhE, Wk_DkE, Wv_DkE))
    k, v = (np.tensordot(reads_hk, a, 1) for a in (k, v))
    scale = float(q.shape[2]) ** -0.5
    o, p = attend(q, k, v, scale)  # noqa: F821
    part = np.tensordot(o.transpose(1, 0, 2), Wo_hED, 2)
    if tp.rank == 1:
        part = part + bo_D
    return tp.all_reduce(part), (x_TD, q, k, v, p, o, reads_hk, scale)


def tp_attention_backward(dy_TD, saved, Wq_DhE, Wk_DkE, Wv_DkE, Wo_hED, heads, tp):
    x, q, k, v, p, o, reads_hk, scale = saved
    do = np.tensordot(Wo_hED, dy_TD.T, 1).swapaxes(1, 2)
    dq, dk, dv = attend_backward(do, q, k, v, p, scale)  # noqa: F821
    dk, dv = (np.tensordot(reads_hk.T, a, 1) for a in (dk, dv))
    pairs = ((dq, Wq_DhE), (dk, Wk_DkE), (dv, Wv_DkE))
    dx = tp.all_reduce(sum(np.einsum("nte,dne->td", a, W) for a, W in pairs))
    mine = own_heads(*heads, tp)[1]
    whole = np.zeros((heads[1], 2, *dk.shape[1:]), x.dtype)
    whole[mine, 0], whole[mine, 1] = dk, dv
    whole = tp.all_reduce(whole)[mine]
    dWq, dWk, dWv = (np.einsum("td,nte->dne", x, a) for a in (dq, whole[:, 0], whole[:, 1]))
    return dx, dWq, dWk, dWv, np.einsum("hte,td->hed", o, dy_TD), dy_TD.sum(0)
