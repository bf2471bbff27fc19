"""What is right in exercise 21 (the whole MLP, its gradients by complex step), and what is often wrong."""

from practice.part import Part, mistake

NAMES = ("x", "W1", "b1", "W2", "b2")


def inputs(draw, T, D, F):
    # Beyond |a| = 6 the GELU is flat to float32 but not to float64, so that roundings in one say nothing of those in the other.
    return {
        "x": draw(T, D),
        "W1": draw(D, F, scale=1.3 * D**-0.5),
        "b1": draw(F, scale=0.5),
        "W2": draw(F, D),
        "b2": draw(D),
        "dy": draw(T, D),
    }


def cut(a, tp):
    """This rank's share, in the order of the arguments."""
    f = tp.cut(a["b1"].size)
    return a["x"], a["W1"][:, f], a["b1"][f], a["W2"][f], a["b2"]


def forward(code, a, tp):
    y_TD, _ = code.tp_mlp_forward(*cut(a, tp), tp)
    return {"y": y_TD}


def backward(code, a, tp):
    x, W1, b1, W2, b2 = cut(a, tp)
    _, saved = code.tp_mlp_forward(x, W1, b1, W2, b2, tp)
    dx, dW1, db1, dW2, db2 = code.tp_mlp_backward(a["dy"], saved, W1, W2, tp)
    return {"dx": dx, "dW1": dW1, "db1": db1, "dW2": dW2, "db2": db2}


def branch(ref, a, x, W1, b1, W2, b2):
    """The gradients of the MLP without its residual connection, by complex step."""
    grid = ref.mlp.grid(len(x), len(W1), len(W2), W2.shape[1])
    return ref.mlp.gradients(x, W1, b1, W2, b2, "gelu", a["dy"], grid)


def want_forward(a, ref, tp):
    return {"y": a["x"] + ref.mlp.forward(*(a[n] for n in NAMES), "gelu")}


def want_backward(a, ref, tp):
    found, f = branch(ref, a, *(a[n] for n in NAMES)), tp.cut(a["b1"].size)
    found |= {"x": found["x"] + a["dy"], "W1": found["W1"][:, f], "b1": found["b1"][f], "W2": found["W2"][f]}
    return {f"d{n}": found[n] for n in NAMES}


def with_units(a, tp):
    """The ranks that have hidden units."""
    return [q for q in tp.others() if q.rank < a["b1"].size]


def forward_parts(a, ref, tp):
    parts = {f"part {q.rank}": ref.mlp.forward(*cut(a, q)[:4], None, "gelu") for q in with_units(a, tp)}
    return {"y": {"x": a["x"]} | parts | {"b2": a["b2"]}}


def backward_parts(a, ref, tp):
    parts = {f"part {q.rank}": branch(ref, a, *cut(a, q)[:4], None)["x"] for q in with_units(a, tp)}
    return {"dx": {"dy": a["dy"]} | parts}


def one_sum(a, tp):
    return {"numbers sent": 2 * (tp.size - 1) * a["x"].size // tp.size + 1, "rounds": 2}


def random_size(rng):
    T, D, F = rng.choice([4, 5, 7, 8, 11], 3, replace=False)
    return int(T), int(D), int(F)


# Of 2 hidden units one rank of three has none.
SIZES = ((5, 4, 7), (7, 5, 9), (4, 3, 2))
PARTS = (
    Part("tp_mlp_forward", SIZES, inputs, forward, want_forward, forward_parts, one_sum, random_size=random_size),
    Part("tp_mlp_backward", SIZES, inputs, backward, want_backward, backward_parts, one_sum, random_size=random_size),
)

SUM, RESIDUAL, BACK = "tp.all_reduce(h_Tf @ W2_fD)", "x_TD + sum_TD + b2_D", "dy_TD + tp.all_reduce(da_Tf @ W1_Df.T)"
LAST = "return dx_TD, dW1_Df, db1_f, dW2_fD, db2_D"
MISTAKES = (
    mistake("no_sum", "g is missing: y has this rank's hidden units only; h W2 is one term of a sum over ranks.", (SUM, "h_Tf @ W2_fD")),
    mistake("mean", "The parts of h W2 are averaged; they are terms of one sum.", (SUM, SUM + " / tp.size")),
    mistake("bias_in_sum", "b2 is added on every rank before the all-reduce, so it arrives tp times.",
            (SUM, "tp.all_reduce(h_Tf @ W2_fD + b2_D)"), (RESIDUAL, "x_TD + sum_TD"),
            seen="huggingface/text-generation-inference #1036"),
    mistake("residual_in_sum", "x is added on every rank before the all-reduce, so it arrives tp times: the residual goes round the sum.",
            (SUM, "tp.all_reduce(x_TD + h_Tf @ W2_fD)"), (RESIDUAL, "sum_TD + b2_D")),
    mistake("no_residual", "The residual connection is missing in y: x is added to the MLP's output.", (RESIDUAL, "sum_TD + b2_D")),
    mistake("x_summed", "x is summed over tp first: it is whole on every rank already, so f is the identity forward.",
            ("a_Tf = x_TD @ W1_Df", "a_Tf = tp.all_reduce(x_TD) @ W1_Df")),
    mistake("summed_before_gelu", "An all-reduce stands before the GELU: a's columns on the ranks are different hidden units, each complete"
            " already. That is why W1 is cut by columns: GELU(u + v) is not GELU(u) + GELU(v), so nothing may be summed there.",
            ("h_Tf = gelu(a_Tf)", "a_Tf = tp.all_reduce(a_Tf)\n    h_Tf = gelu(a_Tf)")),
    mistake("gelu_last", "The GELU is taken of the output; it stands between the two products.",
            ("h_Tf = gelu(a_Tf)", "h_Tf = a_Tf"), (SUM, "gelu(tp.all_reduce(h_Tf @ W2_fD))")),
    mistake("gathered", "This is right, but the hidden units are gathered on every rank, and each goes on with its own.",
            ("h_Tf = gelu(a_Tf)", "h_TF = gelu(tp.all_gather(a_Tf, 1))\n    h_Tf = h_TF[:, tp.cut(h_TF.shape[1])]")),
    mistake("x_averaged", "This is right, but x is sent round and averaged though it is alike on all ranks.",
            ("a_Tf = x_TD @ W1_Df + b1_f\n    h_Tf", "a_Tf = tp.all_reduce(x_TD, op='max') @ W1_Df + b1_f\n    h_Tf")),
    mistake("no_sum_back", "f's sum is missing in backward: dx has this rank's part only, and all ranks' hidden units read x.",
            (BACK, "dy_TD + da_Tf @ W1_Df.T")),
    mistake("mean_back", "dx's parts are averaged over tp: x is used by all ranks, so its gradient is the sum of their parts.",
            (BACK, "dy_TD + tp.all_reduce(da_Tf @ W1_Df.T) / tp.size")),
    mistake("residual_forgotten", "The residual's gradient is missing in dx: y = x + ..., so dy itself is part of dx.",
            (BACK, "tp.all_reduce(da_Tf @ W1_Df.T)")),
    mistake("residual_in_sum_back", "dy is added on every rank before the all-reduce, so it arrives in dx tp times: the residual lies outside f.",
            (BACK, "tp.all_reduce(dy_TD + da_Tf @ W1_Df.T)")),
    mistake("dy_summed", "dy is summed over tp: it is the same on every rank, so everything behind it is tp times too large. g's backward"
            " is the identity.", ("x_TD, a_Tf, h_Tf = saved", "x_TD, a_Tf, h_Tf = saved\n    dy_TD = tp.all_reduce(dy_TD)"),
            seen="NVIDIA/Megatron-LM #559"),
    mistake("dW_summed", "Weight gradients are summed over tp: the ranks' slices are different weights, and nobody else has a share in yours.",
            ("dW1_Df = x_TD.T @ da_Tf", "dW1_Df = tp.all_reduce(x_TD.T @ da_Tf)"),
            ("dW2_fD = h_Tf.T @ dy_TD", "dW2_fD = tp.all_reduce(h_Tf.T @ dy_TD)")),
    mistake("db2_summed", "db2 is summed over tp: every rank has all of dy already, so it is tp times too large.",
            ("db2_D = dy_TD.sum(axis=0)", "db2_D = tp.all_reduce(dy_TD.sum(axis=0))")),
    mistake("db2_shared", "db2 is divided by tp: each rank holds b2 whole, and its gradient is whole too.",
            ("db2_D = dy_TD.sum(axis=0)", "db2_D = dy_TD.sum(axis=0) / tp.size"), seen="pytorch/torchtitan #4332"),
    mistake("no_slope", "The GELU's derivative is missing: da equals dh.", ("dh_Tf * gelu_slope(a_Tf)", "dh_Tf")),
    mistake("no_three", "The slope of the GELU lacks a factor 3: the derivative of 0.044715 a^3 is 3 x 0.044715 a^2.",
            ("3 * 0.044715", "0.044715")),
    mistake("slope_at_h", "The GELU's derivative is taken at h; it belongs at a, the GELU's input.",
            ("gelu_slope(a_Tf)", "gelu_slope(h_Tf)")),
    mistake("two_sums", "This is right, but a second sum is made in backward: weight gradients and db2 need none.",
            (LAST, "tp.all_reduce(db2_D)\n    " + LAST)),
    mistake("dy_averaged", "This is right, but backward sends dy round and averages it, though it is alike on all ranks.",
            ("x_TD, a_Tf, h_Tf = saved", "x_TD, a_Tf, h_Tf = saved\n    dy_TD = tp.all_reduce(dy_TD) / tp.size")),
    mistake("terms_gathered", "This is right, but every rank's term of y is gathered and added up here: an all-reduce sends 2/tp of that.",
            (SUM, "tp.all_gather((h_Tf @ W2_fD)[None]).sum(axis=0)")),
    mistake("parts_gathered", "This is right, but h and W2 are gathered, and the whole product is made on every rank: each makes its own term, and an"
            " all-reduce adds them up.", ("tp.all_reduce(h_Tf @ W2_fD)", "tp.all_gather(h_Tf, dim=1) @ tp.all_gather(W2_fD)")),
    mistake("dW_shared", "Weight gradients are divided by tp: each rank's slices are its own weights, with all of their gradient.",
            ("dW1_Df = x_TD.T @ da_Tf", "dW1_Df = x_TD.T @ da_Tf / tp.size"), ("dW2_fD = h_Tf.T @ dy_TD", "dW2_fD = h_Tf.T @ dy_TD / tp.size")),
)  # fmt: skip
