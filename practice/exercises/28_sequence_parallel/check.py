"""What is right in exercise 28 (whole arrays; gradients by complex step), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake

NAMES = ("x", "g", "W1", "b1", "W2", "b2")


def inputs(draw, T, D, F):
    # One row is small, so that eps is seen.
    size = np.ones((T, 1))
    size[T // 2] = 0.02
    return {"x_TD": draw.cast(draw(T, D) * size), "g_D": draw(D), "W1_DF": draw(D, F, scale=0.7), "b1_F": draw(F),
            "W2_FD": draw(F, D), "b2_D": draw(D), "dy_TD": draw(T, D), "eps": float(draw.rng.uniform(1e-3, 1e-2))}  # fmt: skip


def mine(a, tp):
    """This rank's part of each, in the order of NAMES."""
    f, t = tp.cut(a["b1_F"].size), tp.cut(len(a["x_TD"]))
    return a["x_TD"][t], a["g_D"], a["W1_DF"][:, f], a["b1_F"][f], a["W2_FD"][f], a["b2_D"]


def forward(code, a, tp):
    y_tD, _ = code.block_forward(*mine(a, tp), a["eps"], tp)
    return {"y": y_tD}


def kept(saved, weights):
    """Numbers in what was saved, weights not counted."""
    if isinstance(saved, np.ndarray):
        return 0 if any(np.shares_memory(saved, w) for w in weights) else saved.size
    if isinstance(saved, dict):
        saved = list(saved.values())
    return sum(kept(part, weights) for part in saved) if isinstance(saved, (tuple, list)) else 0


def backward(code, a, tp):
    x, g, W1, b1, W2, b2 = mine(a, tp)
    _, saved = code.block_forward(x, g, W1, b1, W2, b2, a["eps"], tp)
    code.counts["numbers saved"] += kept(saved, (g, W1, b1, W2, b2))
    found = code.block_backward(a["dy_TD"][tp.cut(len(a["dy_TD"]))], saved, g, W1, W2, tp)
    dx, dg, dW1, db1, dW2, db2 = found
    return {"dx": dx, "dg": dg, "dW1": dW1, "db1": db1, "dW2": dW2, "db2": db2}


def block(x, g, W1, b1, W2, b2, eps):
    n = x / ((x * x).sum(axis=1, keepdims=True) / x.shape[1] + eps) ** 0.5 * g
    z = n @ W1 + b1
    return x + (z / (1 + np.exp(-z))) @ W2 + b2


def arrays(a):
    return dict(zip(NAMES, (a["x_TD"], a["g_D"], a["W1_DF"], a["b1_F"], a["W2_FD"], a["b2_D"]), strict=True))


def want_forward(a, ref, tp):
    return {"y": block(*arrays(a).values(), a["eps"])[tp.cut(len(a["x_TD"]))]}


def want_backward(a, ref, tp):
    whole = arrays(a)

    def loss(moved, name, index):
        return (block(*moved.values(), a["eps"]) * a["dy_TD"]).sum()

    d = {n: ref.gradient.at_entries(loss, whole, n) for n in NAMES}
    f, t = tp.cut(a["b1_F"].size), tp.cut(len(a["x_TD"]))
    return {"dx": d["x"][t], "dg": d["g"], "dW1": d["W1"][:, f], "db1": d["b1"][f], "dW2": d["W2"][f], "db2": d["b2"]}


def terms_forward(a, ref, tp):
    """y's linear places: the residual, each rank's part of the product, the bias."""
    x, g, W1, b1, W2, b2 = arrays(a).values()
    n = x / ((x * x).mean(axis=1, keepdims=True) + a["eps"]) ** 0.5 * g
    z, t = n @ W1 + b1, tp.cut(len(x))
    h = z / (1 + np.exp(-z))
    parts = {f"part {q.rank}": (h[:, q.cut(b1.size)] @ W2[q.cut(b1.size)])[t] for q in tp.others()}
    return {"y": {"x": x[t], **parts, "bias": np.broadcast_to(b2, x[t].shape)}}


def terms_backward(a, ref, tp):
    """db2 is a sum over the rows of all ranks."""
    return {"db2": {f"rows of rank {q.rank}": a["dy_TD"][q.cut(len(a["dy_TD"]))].sum(axis=0) for q in tp.others()}}


def share(a, tp):
    return (tp.size - 1) * a["x_TD"].size // tp.size + 1


def limits_forward(a, tp):
    return {"numbers sent": 2 * share(a, tp), "rounds": 2}


def limits_backward(a, tp):
    (T, D), F = a["x_TD"].shape, a["b1_F"].size
    t, f = (s.stop - s.start for s in (tp.cut(T), tp.cut(F)))
    # Small sums of D numbers, of which two may be needed.
    sums = 2 * (2 * (tp.size - 1) * D // tp.size + 1)
    return {"numbers sent": 3 * share(a, tp) + sums, "rounds": 7, "numbers saved": 2 * t * D + 2 * t + 3 * T * f}


SIZES = ((13, 8, 7), (7, 11, 4), (4, 9, 5))


def random_size(rng):
    return int(rng.choice([5, 7, 8, 10, 11])), int(rng.choice([9, 12])), int(rng.choice([4, 5]))


PARTS = (
    Part("block_forward", SIZES, inputs, forward, want_forward, terms_forward, limits_forward, random_size=random_size),
    Part("block_backward", SIZES, inputs, backward, want_backward, terms_backward, limits_backward, random_size=random_size),
)

MISTAKES = (
    mistake("dg_not_summed", "dg is of this rank's rows only: g has worked on every rank's rows, so its gradient is summed over tp.",
            ("tp.all_reduce((dn_tD * h_tD).sum(axis=0))", "(dn_tD * h_tD).sum(axis=0)"), seen="NVIDIA/Megatron-LM #1446"),
    mistake("dg_mean", "dg is averaged over tp: the ranks' rows are different tokens of one sum.",
            ("tp.all_reduce((dn_tD * h_tD).sum(axis=0))", "tp.all_reduce((dn_tD * h_tD).sum(axis=0)) / tp.size"),
            seen="EleutherAI/gpt-neox #1259"),
    mistake("bias_before", "b2 is added before the reduce-scatter, on every rank, so it arrives tp times.",
            ("tp.reduce_scatter(a_Tf @ W2_fD)", "tp.reduce_scatter(a_Tf @ W2_fD + b2_D)"), ("x_tD + m_tD + b2_D", "x_tD + m_tD")),
    mistake("db2_own_rows", "db2 is of this rank's rows only: b2 is added to every rank's rows.",
            ("db2_D = dy_TD.sum(axis=0)", "db2_D = dy_tD.sum(axis=0)")),
    mistake("db2_summed", "db2 is summed over tp although dy has been gathered already: it is tp times too large.",
            ("db2_D = dy_TD.sum(axis=0)", "db2_D = tp.all_reduce(dy_TD.sum(axis=0))")),
    mistake("all_reduce_forward", "Forward is right, but the product is all-reduced and cut: a reduce-scatter sends half of that.",
            ("tp.reduce_scatter(a_Tf @ W2_fD)", "tp.all_reduce(a_Tf @ W2_fD)[tp.cut(len(a_Tf))]")),
    mistake("all_reduce_backward", "Backward is right, but dn is all-reduced and cut: a reduce-scatter sends half of that.",
            ("tp.reduce_scatter(dz_Tf @ W1_Df.T)", "tp.all_reduce(dz_Tf @ W1_Df.T)[tp.cut(len(dz_Tf))]")),
    mistake("gathered_saved", "This is right, but the gathered n (T, D) is kept for backward: keep your own rows and gather again.",
            ("(h_tD, r_t1, a_Tf, slope_Tf)\n    # --- end", "(h_tD, r_t1, a_Tf, slope_Tf, n_TD)\n    # --- end"),
            ("h_tD, r_t1, a_Tf, slope_Tf = saved\n    n_TD = tp.all_gather(h_tD * g_D)", "h_tD, r_t1, a_Tf, slope_Tf, n_TD = saved")),
    mistake("residual_of_n", "The residual adds n: it is x itself, before the norm.", ("x_tD + m_tD + b2_D", "h_tD * g_D + m_tD + b2_D")),
    mistake("residual_unscaled", "The residual adds the normed x: it is x itself, before the norm.", ("x_tD + m_tD + b2_D", "h_tD + m_tD + b2_D")),
    mistake("no_residual", "The residual is missing forward: y = x + ...", ("x_tD + m_tD + b2_D", "m_tD + b2_D")),
    mistake("no_residual_gradient", "The residual is missing backward: dx has dy itself beside what comes through the norm.",
            ("dx_tD = dy_tD + r_t1", "dx_tD = r_t1")),
    mistake("part_not_summed", "The product is cut but not summed: a rank's columns give one term of each row.",
            ("tp.reduce_scatter(a_Tf @ W2_fD)", "(a_Tf @ W2_fD)[tp.cut(len(a_Tf))]")),
    mistake("dn_not_summed", "dn is cut but not summed: all ranks' columns have read n.",
            ("tp.reduce_scatter(dz_Tf @ W1_Df.T)", "(dz_Tf @ W1_Df.T)[tp.cut(len(dz_Tf))]")),
    mistake("dW1_own_rows", "dW1 is of this rank's rows only: its columns have multiplied every rank's rows.",
            ("dW1_Df = n_TD.T @ dz_Tf", "dW1_Df = (h_tD * g_D).T @ dz_Tf[tp.cut(len(dz_Tf))]")),
    mistake("db1_own_rows", "db1 is of this rank's rows only: b1 was added to every rank's rows.",
            ("db1_f = dz_Tf.sum(axis=0)", "db1_f = dz_Tf[tp.cut(len(dz_Tf))].sum(axis=0)")),
    mistake("eps_outside", "eps is added outside the root: it belongs inside, sqrt(mean of x^2 + eps).",
            ("np.sqrt((x_tD**2).mean(axis=1, keepdims=True) + eps)", "(np.sqrt((x_tD**2).mean(axis=1, keepdims=True)) + eps)")),
    mistake("norm_constant", "The norm's factor r is treated as a constant in backward: it depends on x too.",
            ("r_t1 * (dh_tD - h_tD * along_t1)", "r_t1 * dh_tD")),
    mistake("g_left_out", "g is left out on the way to dx: dn times g is the gradient of what was normed.",
            ("dh_tD = dn_tD * g_D", "dh_tD = dn_tD")),
    mistake("no_slope", "The derivative of silu is missing in backward.", ("(dy_TD @ W2_fD.T) * slope_Tf", "dy_TD @ W2_fD.T")),
    mistake("dg_with_g", "g is multiplied into dg: dg is the sum of dn times the normed x, before the product with g.",
            ("(dn_tD * h_tD).sum(axis=0)", "(dn_tD * g_D * h_tD).sum(axis=0)")),
)  # fmt: skip
