"""The sums in their two halves, reduce-scatter and all-gather; copies in place of the argument itself."""


def f_forward(x, tp):
    return x.copy()


def f_backward(dy, tp):
    return tp.all_gather(tp.reduce_scatter(dy.reshape(-1))).reshape(dy.shape)


def g_forward(x, tp):
    return tp.all_gather(tp.reduce_scatter(x, dim=-1), dim=-1)


def g_backward(dy, tp):
    return +dy
