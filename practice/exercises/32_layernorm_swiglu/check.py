"""What is right in exercise 32 (gradients by complex step: no backward is written here), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def norm_inputs(draw, T, D):
    """Rows of many sizes, not around 0: of those near 1e-3, eps is much of what is under the root. No row is nearly constant.

    The last of several has a mean of 1e4 times its spread: what is squared before the mean is taken away has lost its digits.
    """
    x_TD = draw(T, D) + draw.rng.permutation(np.arange(D) % 3 - 0.5).astype(draw.dtype) * 2
    x_TD[::2] *= draw.cast(2e-3)
    if T > 2:
        x_TD[1] *= 30
    if T > 1:
        spread, mean = draw.rng.uniform(0.7, 1.4), draw.rng.choice([-1e4, 1e4]) * draw.rng.uniform(0.8, 1.2)
        off_D = x_TD[-1].astype(np.float64) - x_TD[-1].mean(dtype=np.float64)
        x_TD[-1] = draw.cast(off_D / off_D.std() * spread + mean)
    a = {"x_TD": x_TD, "g_D": draw(D) + draw.cast(0.5), "b_D": draw(D), "eps": float(draw.rng.choice([1e-5, 1e-6]))}
    return a | {"dy_TD": draw(T, D)}


def norm_forward(code, a, at):
    y_TD, _ = code.layernorm(a["x_TD"], a["g_D"], a["b_D"], a["eps"])
    return {"y": y_TD}


def norm_backward(code, a, at):
    _, saved = code.layernorm(a["x_TD"], a["g_D"], a["b_D"], a["eps"])
    dx, dg, db = code.layernorm_backward(a["dy_TD"], saved, a["g_D"])
    return {"dx": dx, "dg": dg, "db": db}


def norm(x_TD, g_D, b_D, eps):
    """Column by column, and not squared with abs: good for complex numbers."""
    D = x_TD.shape[1]
    mean = sum(x_TD[:, d] for d in range(D)) / D
    off = [x_TD[:, d] - mean for d in range(D)]
    root = (sum(c * c for c in off) / D + eps) ** 0.5
    return np.stack([c / root * g_D[d] + b_D[d] for d, c in enumerate(off)], axis=1)


def want_norm(a, ref, at):
    return {"y": norm(a["x_TD"], a["g_D"], a["b_D"], a["eps"])}


def want_norm_backward(a, ref, at):
    arrays = {n: a[n] for n in ("x_TD", "g_D", "b_D")}

    def loss(moved, name, index):
        t = slice(index[0], index[0] + 1) if name == "x_TD" else slice(None)
        return (norm(moved["x_TD"][t], moved["g_D"], moved["b_D"], a["eps"]) * a["dy_TD"][t]).sum() + 0j

    return {f"d{n[0]}": ref.gradient.at_entries(loss, arrays, n) for n in arrays}


def by_token(a, ref, at):
    n_TD = norm(a["x_TD"], np.ones(len(a["g_D"])), np.zeros(len(a["g_D"])), a["eps"])
    dg, db = a["dy_TD"] * n_TD, a["dy_TD"]
    return {n: {f"token {t}": row for t, row in enumerate(d)} for n, d in (("dg", dg), ("db", db)) if len(d)}


WEIGHTS = ("Wg_DF", "Wu_DF", "Wd_FD")


def glu_inputs(draw, T, D, F):
    a = {"x_TD": draw(T, D), "Wg_DF": draw(D, F, scale=D**-0.5), "Wu_DF": draw(D, F), "Wd_FD": draw(F, D)}
    return a | {"dy_TD": draw(T, D)}


def glu_forward(code, a, at):
    y_TD, _ = code.swiglu(a["x_TD"], *(a[n] for n in WEIGHTS))
    return {"y": y_TD}


def glu_backward(code, a, at):
    weights = [a[n] for n in WEIGHTS]
    _, saved = code.swiglu(a["x_TD"], *weights)
    found = code.swiglu_backward(a["dy_TD"], saved, *weights)
    return dict(zip(("dx", "dWg", "dWu", "dWd"), found, strict=True))


def glu(W, x_gate, x_up):
    a = np.einsum("td,df->tf", x_gate, W["Wg_DF"])
    return (a / (1 + np.exp(-a)) * np.einsum("td,df->tf", x_up, W["Wu_DF"])) @ W["Wd_FD"]


def want_glu(a, ref, at):
    return {"y": glu(a, a["x_TD"], a["x_TD"])}


def derived(a, ref, names, paths=(True, True)):
    def loss(moved, name, index):
        """An entry of x moves its own token alone; `paths`: whether it does so through the gate, and through u."""
        t = slice(index[0], index[0] + 1) if name == "x_TD" else slice(None)
        xs = [(moved if p else a)["x_TD"][t] for p in paths]
        return (glu(moved, *xs) * a["dy_TD"][t]).sum() + 0j

    arrays = {n: a[n] for n in ("x_TD", *WEIGHTS)}
    return {f"d{n.partition('_')[0]}": ref.gradient.at_entries(loss, arrays, n) for n in names}


def want_glu_backward(a, ref, at):
    return derived(a, ref, ("x_TD", *WEIGHTS))


def two_paths(a, ref, at):
    through = {"through the gate": (True, False), "through u": (False, True)}
    return {"dx": {text: derived(a, ref, ("x_TD",), paths)["dx"] for text, paths in through.items()}}


def random_size(rng):
    return int(rng.integers(2, 8)), int(rng.choice([3, 5, 7, 11]))


def random_three(rng):
    return tuple(rng.choice([2, 3, 4, 5, 7], 3, replace=False).tolist())


NORM, GLU = ((5, 7), (4, 3), (1, 5), (0, 3)), ((5, 3, 7), (1, 4, 2), (0, 2, 3))
PARTS = (
    Part("layernorm", NORM, norm_inputs, norm_forward, want_norm, random_size=random_size, influence=(("x_TD", "y"),)),
    Part("layernorm_backward", NORM, norm_inputs, norm_backward, want_norm_backward, by_token, random_size=random_size,
         influence=(("dy_TD", "dx"),)),
    Part("swiglu", GLU, glu_inputs, glu_forward, want_glu, random_size=random_three),
    Part("swiglu_backward", GLU, glu_inputs, glu_backward, want_glu_backward, two_paths, random_size=random_three),
)  # fmt: skip

V, ROOT, DX = "(c_TD**2).mean(axis=1, keepdims=True)", "1 / np.sqrt(v_T1 + eps)", "r_T1 * (dn_TD - mean_T1 - n_TD * along_T1)"
H, SLOPE = "h_TF = a_TF * s_TF * u_TF", "(s_TF + a_TF * s_TF * (1 - s_TF))"
BACK = "da_TF @ Wg_DF.T + du_TF @ Wu_DF.T"
MISTAKES = (
    mistake("less_one", "The variance is divided by D - 1: LayerNorm divides by D.",
            (V, "(c_TD**2).sum(axis=1, keepdims=True) / max(c_TD.shape[1] - 1, 1)")),
    mistake("sum_of_squares", "The squares are summed: the variance is their mean over D.", (V, "(c_TD**2).sum(axis=1, keepdims=True)")),
    mistake("no_mean", "The mean is not subtracted: that is RMSNorm.", ("x_TD - x_TD.mean(axis=1, keepdims=True)", "x_TD")),
    mistake("mean_kept", "The variance is right, but x itself is divided by its root: x - m is.", ("n_TD = c_TD * r_T1", "n_TD = x_TD * r_T1")),
    mistake("raw_squares", "The mean of x^2 stands for the variance: the mean is taken away from x, and not before squaring.",
            (V, "(x_TD**2).mean(axis=1, keepdims=True)"), ("c_TD * r_T1", "c_TD * r_T1")),
    mistake("squares_first", "The variance is made as mean(x^2) - mean(x)^2: where the mean is large, both are, and their difference has lost its"
            " digits. Take the mean away from x first, then square.", (V, "(x_TD**2).mean(axis=1, keepdims=True) - x_TD.mean(axis=1, keepdims=True) ** 2")),
    mistake("eps_outside", "eps is added to the root: it belongs inside, to the variance.", (ROOT, "1 / (np.sqrt(v_T1) + eps)")),
    mistake("no_eps", "eps is left out.", ("np.sqrt(v_T1 + eps)", "np.sqrt(v_T1)")),
    mistake("over_tokens", "Mean and variance are over tokens: that is BatchNorm. Each token is normalised by itself, over its D numbers.",
            ("x_TD.mean(axis=1, keepdims=True)", "(x_TD.sum(axis=0, keepdims=True) / max(1, len(x_TD)))"),
            (V, "((c_TD**2).sum(axis=0, keepdims=True) / max(1, len(x_TD)) + 0 * x_TD[:, :1])")),
    mistake("no_bias", "b is not added.", ("n_TD * g_D + b_D", "n_TD * g_D")),
    mistake("no_gain", "g is left out of y.", ("n_TD * g_D + b_D", "n_TD + b_D")),
    mistake("direct", "This is the direct path only: m and r depend on x too, and both paths are missing.", (DX, "r_T1 * dn_TD")),
    mistake("r_constant", "r is treated as a constant: the path through the variance is missing.", (DX, "r_T1 * (dn_TD - mean_T1)")),
    mistake("m_constant", "The mean of dy g is not taken away: that is RMSNorm's backward.", (DX, "r_T1 * (dn_TD - n_TD * along_T1)")),
    mistake("means_without_g", "g is missing in the two means: what comes back to n is dy g, there too.",
            ("mean_T1 = dn_TD.mean(", "mean_T1 = dy_TD.mean("), ("(dn_TD * n_TD).mean(", "(dy_TD * n_TD).mean(")),
    mistake("dx_without_g", "g is missing in dx: y = g n + b, so what comes back to n is dy g.", ("dn_TD = dy_TD * g_D", "dn_TD = dy_TD")),
    mistake("sums_for_means", "The two terms taken away are sums: m and v are means, so divide by D.",
            ("dn_TD.mean(axis=1, keepdims=True)", "dn_TD.sum(axis=1, keepdims=True)"),
            ("(dn_TD * n_TD).mean(axis=1, keepdims=True)", "(dn_TD * n_TD).sum(axis=1, keepdims=True)")),
    mistake("path_added", "The path through the variance has the wrong sign: a larger spread makes r smaller.",
            ("- n_TD * along_T1)", "+ n_TD * along_T1)")),
    mistake("r_cubed", "The path through the variance has r once too often: n has it in it already.",
            (DX, "r_T1 * (dn_TD - mean_T1 - r_T1 * n_TD * along_T1)")),
    mistake("dg_without_n", "dg is the sum of dy: n is a factor of it.", ("(dy_TD * n_TD).sum(axis=0)", "dy_TD.sum(axis=0)")),
    mistake("dg_of_dn", "dg is made of dy g: the gradient of g is the sum of dy n, without g.", ("(dy_TD * n_TD).sum(axis=0)", "(dn_TD * n_TD).sum(axis=0)")),
    mistake("gains_mean", "dg and db are means over tokens: they are sums; the loss divides, if anyone does.",
            ("(dy_TD * n_TD).sum(axis=0)", "(dy_TD * n_TD).sum(axis=0) / max(1, len(dy_TD))"),
            ("db_D = dy_TD.sum(axis=0)", "db_D = dy_TD.sum(axis=0) / max(1, len(dy_TD))")),
    mistake("db_of_dn", "db is made of dy g: b is added behind g, so its gradient is the sum of dy.", ("db_D = dy_TD.sum", "db_D = dn_TD.sum")),
    mistake("branches", "silu is on the wrong branch: it is silu(x Wg) * (x Wu).", ("a_TF = x_TD @ Wg_DF\n    u_TF = x_TD @ Wu_DF",
            "a_TF = x_TD @ Wu_DF\n    u_TF = x_TD @ Wg_DF")),
    mistake("no_silu", "The gate goes in as it is: silu is missing.", (H, "h_TF = a_TF * u_TF")),
    mistake("sigmoid", "The gate is sigmoid(x Wg), that is GLU: silu(a) = a sigmoid(a).", (H, "h_TF = s_TF * u_TF")),
    mistake("added", "The branches are added: they are multiplied, entry by entry.", (H, "h_TF = a_TF * s_TF + u_TF")),
    mistake("no_slope", "silu's derivative is missing in the gate's gradient.", (SLOPE, "1")),
    mistake("slope_is_s", "silu's derivative lacks its second term: s + a s (1 - s).", (SLOPE, "s_TF")),
    mistake("slope_of_sigmoid", "The derivative is the sigmoid's: silu's is s + a s (1 - s).", (SLOPE, "s_TF * (1 - s_TF)")),
    mistake("gate_without_u", "The gate's gradient lacks the factor u: each branch is the other's slope.", ("dh_TF * u_TF * (s_TF", "dh_TF * (s_TF")),
    mistake("u_without_silu", "u's gradient is dh: what u was multiplied with is silu(a).", ("dh_TF * (a_TF * s_TF)", "dh_TF")),
    mistake("u_of_sigmoid", "u's gradient has sigmoid(a) for silu(a).", ("dh_TF * (a_TF * s_TF)", "dh_TF * s_TF")),
    mistake("same_weight_back", "Both branches go back through the same weight in dx: each through its own.", (BACK, "da_TF @ Wg_DF.T + du_TF @ Wg_DF.T")),
    mistake("gate_path_only", "dx has the gate's path alone: x goes into both products.", (BACK, "da_TF @ Wg_DF.T")),
    mistake("u_path_only", "dx has the path through u alone: x goes into both products.", (BACK, "du_TF @ Wu_DF.T")),
    mistake("weights_exchanged", "dWg and dWu are exchanged, or each is made of the other's gradient.",
            ("dWg_DF = x_TD.T @ da_TF\n    dWu_DF = x_TD.T @ du_TF", "dWg_DF = x_TD.T @ du_TF\n    dWu_DF = x_TD.T @ da_TF")),
    mistake("dWd_of_gate", "dWd is made of silu(a): what Wd was multiplied with is h.", ("h_TF.T @ dy_TD", "(a_TF * s_TF).T @ dy_TD")),
    mistake("weights_mean", "The weights' gradients are means over tokens: they are sums.",
            ("dWd_FD = h_TF.T @ dy_TD", "dWd_FD = h_TF.T @ dy_TD / max(1, len(x_TD))"),
            ("dWg_DF = x_TD.T @ da_TF", "dWg_DF = x_TD.T @ da_TF / max(1, len(x_TD))"),
            ("dWu_DF = x_TD.T @ du_TF", "dWu_DF = x_TD.T @ du_TF / max(1, len(x_TD))")),
)  # fmt: skip
