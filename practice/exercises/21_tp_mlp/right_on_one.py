"""Residual and bias within the sum, on one rank only; a computed again in backward."""


def tp_mlp_forward(x_TD, W1_Df, b1_f, W2_fD, b2_D, tp):
    part = gelu(x_TD @ W1_Df + b1_f) @ W2_fD  # noqa: F821
    if tp.rank == tp.size - 1:
        part += x_TD + b2_D
    return tp.all_reduce(part), [x_TD, b1_f]


def tp_mlp_backward(dy_TD, saved, W1_Df, W2_fD, tp):
    x_TD, b1_f = saved
    a = x_TD @ W1_Df + b1_f
    da = gelu_slope(a) * (W2_fD @ dy_TD.T).T  # noqa: F821
    part = da @ W1_Df.T
    if tp.rank == 0:
        part += dy_TD
    return tp.all_reduce(part), (da.T @ x_TD).T, da.sum(0), (dy_TD.T @ gelu(a)).T, dy_TD.sum(0)  # noqa: F821
