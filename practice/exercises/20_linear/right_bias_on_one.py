"""The bias is added before the sum, on rank 0 only; einsum."""

import numpy as np


def row_forward(x_Tf, W_fD, b_D, tp):
    part = np.einsum("tf,fd->td", x_Tf, W_fD)
    if tp.rank == 0:
        part = part + b_D
    return tp.all_reduce(part), (x_Tf,)


def row_backward(dy_TD, saved, W_fD, tp):
    (x_Tf,) = saved
    return np.einsum("td,fd->tf", dy_TD, W_fD), np.einsum("tf,td->fd", x_Tf, dy_TD), np.add.reduce(dy_TD)
