"""What is right in exercise 20, and what is often wrong."""

from practice.part import Part, mistake


def inputs(draw, T, D, F):
    return {
        "x_TD": draw(T, D), "W_DF": draw(D, F), "b_F": draw(F), "dy_TF": draw(T, F),
        "x_TF": draw(T, F), "V_FD": draw(F, D), "c_D": draw(D), "dy_TD": draw(T, D),
    }  # fmt: skip


def column(a, tp):
    f = tp.cut(a["b_F"].size)
    return a["x_TD"], a["W_DF"][:, f], a["b_F"][f], a["dy_TF"][:, f]


def row(a, tp):
    f = tp.cut(a["b_F"].size)
    return a["x_TF"][:, f], a["V_FD"][f], a["c_D"], a["dy_TD"]


def column_forward(code, a, tp):
    x_TD, W_Df, b_f, _ = column(a, tp)
    y_Tf, _ = code.column_forward(x_TD, W_Df, b_f, tp)
    return {"y": y_Tf}


def column_backward(code, a, tp):
    x_TD, W_Df, b_f, dy_Tf = column(a, tp)
    _, saved = code.column_forward(x_TD, W_Df, b_f, tp)
    dx_TD, dW_Df, db_f = code.column_backward(dy_Tf, saved, W_Df, tp)
    return {"dx": dx_TD, "dW": dW_Df, "db": db_f}


def row_forward(code, a, tp):
    x_Tf, W_fD, b_D, _ = row(a, tp)
    y_TD, _ = code.row_forward(x_Tf, W_fD, b_D, tp)
    return {"y": y_TD}


def row_backward(code, a, tp):
    x_Tf, W_fD, b_D, dy_TD = row(a, tp)
    _, saved = code.row_forward(x_Tf, W_fD, b_D, tp)
    dx_Tf, dW_fD, db_D = code.row_backward(dy_TD, saved, W_fD, tp)
    return {"dx": dx_Tf, "dW": dW_fD, "db": db_D}


def want_column_forward(a, ref, tp):
    return {"y": linear(*column(a, tp)[:3])}


def want_column_backward(a, ref, tp):
    dx, dW, db = gradients(ref, a["x_TD"], a["W_DF"], a["b_F"], a["dy_TF"])
    f = tp.cut(db.size)
    return {"dx": dx, "dW": dW[:, f], "db": db[f]}


def want_row_forward(a, ref, tp):
    return {"y": linear(a["x_TF"], a["V_FD"], a["c_D"])}


def want_row_backward(a, ref, tp):
    dx, dW, db = gradients(ref, a["x_TF"], a["V_FD"], a["c_D"], a["dy_TD"])
    f = tp.cut(dx.shape[1])
    return {"dx": dx[:, f], "dW": dW[f], "db": db}


def linear(x, W, b):
    return (x[:, :, None] * W).sum(axis=1) + b


def gradients(ref, x, W, b, dy):
    """By complex step, on the whole arrays."""
    arrays = {"x": x, "W": W, "b": b}

    def loss(moved, name, index):
        return (linear(moved["x"], moved["W"], moved["b"]) * dy).sum()

    return [ref.gradient.at_entries(loss, arrays, n) for n in arrays]


def row_parts(a, ref, tp):
    cuts = [(q.rank, q.cut(a["b_F"].size)) for q in tp.others()]
    return {"y": {f"part {r}": a["x_TF"][:, f] @ a["V_FD"][f] for r, f in cuts} | {"bias": a["c_D"]}}


def column_parts(a, ref, tp):
    cuts = [(q.rank, q.cut(a["b_F"].size)) for q in tp.others()]
    return {"dx": {f"part {r}": a["dy_TF"][:, f] @ a["W_DF"][:, f].T for r, f in cuts}}


def one_sum(a, tp):
    return {"numbers sent": 2 * (tp.size - 1) * a["x_TD"].size // tp.size + 1, "rounds": 2}


def silent(a, tp):
    return {"numbers sent": 0}


SIZES = ((5, 4, 7), (2, 3, 11), (7, 5, 3), (13, 9, 2))


def random_size(rng):
    return tuple(rng.choice([4, 5, 7, 8, 11], 3, replace=False).tolist())


def part(name, call, want, ingredients, limits):
    return Part(name, SIZES, inputs, call, want, ingredients, limits, random_size=random_size)


PARTS = (
    part("column_forward", column_forward, want_column_forward, None, silent),
    part("column_backward", column_backward, want_column_backward, column_parts, one_sum),
    part("row_forward", row_forward, want_row_forward, row_parts, one_sum),
    part("row_backward", row_backward, want_row_backward, None, silent),
)

MISTAKES = (
    mistake("bias_before_sum", "The bias is added on every rank before the all-reduce, so it arrives tp times.",
            ("tp.all_reduce(x_Tf @ W_fD)", "tp.all_reduce(x_Tf @ W_fD + b_D)"), ("return y_TD + b_D", "return y_TD"),
            seen="huggingface/text-generation-inference #1036"),
    mistake("bias_divided", "db of the row-parallel layer is divided by tp: even where each rank adds b/tp forward, b's own gradient is whole.",
            ("db_D = dy_TD.sum(axis=0)", "db_D = dy_TD.sum(axis=0) / tp.size"), seen="pytorch/torchtitan #4332"),
    mistake("no_sum", "The parts of the row-parallel product are never summed: each rank has its own only.",
            ("tp.all_reduce(x_Tf @ W_fD)", "x_Tf @ W_fD")),
    mistake("mean", "The parts are averaged over the ranks; they are terms of one sum.",
            ("tp.all_reduce(x_Tf @ W_fD)", "tp.all_reduce(x_Tf @ W_fD) / tp.size")),
    mistake("dx_not_summed", "dx of the column-parallel layer is this rank's part only: each rank's columns read all of x.",
            ("tp.all_reduce(part_TD)", "part_TD")),
    mistake("dx_mean", "dx of the column-parallel layer is a mean over the ranks: it is the sum of their parts.",
            ("tp.all_reduce(part_TD)", "tp.all_reduce(part_TD) / tp.size")),
    mistake("db_summed", "db of the row-parallel layer is summed over tp: every rank has all of dy already.",
            ("db_D = dy_TD.sum(axis=0)", "db_D = tp.all_reduce(dy_TD.sum(axis=0))")),
    mistake("dW_summed", "dW of the row-parallel layer is summed over tp: the ranks' rows are different rows of W.",
            ("dW_fD = saved.T @ dy_TD", "dW_fD = tp.all_reduce(saved.T @ dy_TD)")),
    mistake("dy_summed", "dy of the row-parallel layer is summed over tp first: it is whole on every rank, so this is tp times dy.",
            ("dx_Tf = dy_TD @ W_fD.T", "dy_TD = tp.all_reduce(dy_TD)\n    dx_Tf = dy_TD @ W_fD.T")),
    mistake("gathered", "Column-parallel's y is gathered: the task leaves each rank its own columns.",
            ("return y_Tf, x_TD", "return tp.all_gather(y_Tf, 1), x_TD")),
    mistake("second_sum", "This is right, but backward sums twice over the ranks: dx is the one thing that is owed a sum.",
            ("    dx_TD = tp.all_reduce(part_TD)", "    tp.all_reduce(dy_Tf.sum(keepdims=True))\n    dx_TD = tp.all_reduce(part_TD)")),
    mistake("summed_for_nothing", "This is right, but a sum is made that nobody asked for: column's forward needs no talk at all.",
            ("y_Tf = x_TD @ W_Df + b_f", "y_Tf = x_TD @ W_Df + b_f\n    tp.all_reduce(x_TD)")),
    mistake("dW_mean", "dW of the row-parallel layer is divided by tp: the forward's sum is no mean, and each rank's rows of W are its own, with"
            " all of their gradient.", ("dW_fD = saved.T @ dy_TD", "dW_fD = saved.T @ dy_TD / tp.size")),
    mistake("dx_shared", "dx of the row-parallel layer is divided by tp: the forward's sum is no mean, so each term's gradient is all of dy.",
            ("dx_Tf = dy_TD @ W_fD.T", "dx_Tf = dy_TD @ W_fD.T / tp.size")),
    mistake("column_dW_mean", "dW of the column-parallel layer is divided by tp: each rank's columns are its own, with all of their gradient.",
            ("dW_Df = saved.T @ dy_Tf", "dW_Df = saved.T @ dy_Tf / tp.size")),
    mistake("inputs_gathered", "This is right, but all of x and W are gathered, and every rank makes the whole product: multiply the parts that"
            " are here, and sum y.", ("tp.all_reduce(x_Tf @ W_fD)", "tp.all_gather(x_Tf, 1) @ tp.all_gather(W_fD)")),
    mistake("terms_gathered", "This is right, but every rank's term of y is gathered and added up here: an all-reduce sends 2/tp of that.",
            ("tp.all_reduce(x_Tf @ W_fD)", "tp.all_gather((x_Tf @ W_fD)[None]).sum(axis=0)")),
    mistake("parts_gathered", "This is right, but every rank's part of dx is gathered and added up here: an all-reduce sends 2/tp of that.",
            ("tp.all_reduce(part_TD)", "tp.all_gather(part_TD[None]).sum(axis=0)")),
    mistake("dy_averaged", "This is right, but row's backward sends dy round and averages it, though it is alike on all ranks.",
            ("dx_Tf = dy_TD @ W_fD.T", "dy_TD = tp.all_reduce(dy_TD) / tp.size\n    dx_Tf = dy_TD @ W_fD.T")),
)  # fmt: skip
