"""Column- and row-parallel linear, forward and backward, on the ranks of `tp`.

    column:  every rank has all of x and some columns of W:   y_Tf = x_TD W_Df + b_f
    row:     every rank has some columns of x, the same rows of W, and all of b:   y_TD = x_TF W_FD + b_D, on every rank

T tokens, D whole width, F the width that is cut (f: this rank's part, as even as it goes). Weights are stored (in, out).
Gradients are whole on every rank where the array is whole. `tp.all_reduce(x)` returns the sum over ranks; tp.rank, tp.size.
A backward gets what its forward saved. Send no more than you must.
"""


def column_forward(x_TD, W_Df, b_f, tp):
    """x (T, D), W (D, f), b (f) -> y (T, f), saved."""
    # --- yours ---
    y_Tf = x_TD @ W_Df + b_f
    return y_Tf, x_TD
    # --- end ---


def column_backward(dy_Tf, saved, W_Df, tp):
    """dy (T, f) -> dx (T, D), dW (D, f), db (f)."""
    # --- yours ---
    part_TD = dy_Tf @ W_Df.T
    dx_TD = tp.all_reduce(part_TD)
    dW_Df = saved.T @ dy_Tf
    return dx_TD, dW_Df, dy_Tf.sum(axis=0)
    # --- end ---


def row_forward(x_Tf, W_fD, b_D, tp):
    """x (T, f), W (f, D), b (D) -> y (T, D), saved."""
    # --- yours ---
    y_TD = tp.all_reduce(x_Tf @ W_fD)
    return y_TD + b_D, x_Tf
    # --- end ---


def row_backward(dy_TD, saved, W_fD, tp):
    """dy (T, D) -> dx (T, f), dW (f, D), db (D)."""
    # --- yours ---
    dx_Tf = dy_TD @ W_fD.T
    dW_fD = saved.T @ dy_TD
    db_D = dy_TD.sum(axis=0)
    return dx_Tf, dW_fD, db_D
    # --- end ---
