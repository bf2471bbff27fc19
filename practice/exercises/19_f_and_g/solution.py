"""f and g, Megatron's two conjugates: where an array that is whole meets arrays that are parts.

    f stands before a column-parallel product:  the same x on every rank goes in, every rank uses it in its own way
    g stands after a row-parallel product:      every rank brings its own term, and every rank needs their sum

Backward turns each of them round: as matrices over all ranks' numbers, f_backward is the transpose of f_forward, and g_backward
of g_forward. After g everything is whole again, so there is one dy, the same on every rank.

`tp.all_reduce(x)` returns the sum over the ranks of tp, on every rank; tp.rank, tp.size. Arrays may have any shape.
Send no more than you must. Leave the arguments as they are.
"""


def f_forward(x, tp):
    """x, the same on every rank -> what this rank goes on with, of x's shape."""
    # --- yours ---
    return x
    # --- end ---


def f_backward(dy, tp):
    """dy, of this rank's own use of x -> dx, the gradient of x, the same on every rank."""
    # --- yours ---
    return tp.all_reduce(dy)
    # --- end ---


def g_forward(x, tp):
    """x, this rank's term -> y, the same on every rank."""
    # --- yours ---
    return tp.all_reduce(x)
    # --- end ---


def g_backward(dy, tp):
    """dy, the same on every rank -> dx, the gradient of this rank's term."""
    # --- yours ---
    return dy
    # --- end ---
