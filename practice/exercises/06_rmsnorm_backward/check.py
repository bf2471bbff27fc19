"""What is right in exercise 06 (gradients by complex step: no backward is written here), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def inputs(draw, T, D):
    """Rows of many sizes: of those near 1e-4, eps is nearly all that is under the root."""
    x_TD = draw(T, D)
    x_TD += draw.cast(0.5)
    x_TD[:: max(2, T // 2)] *= draw.cast(1e-4)
    if T > 2:
        x_TD[1] *= 100
    g_D = draw(D)
    if D > 2:
        # What is multiplied by 0 does not come back by a division.
        g_D[D // 2] = 0
    return {"x_TD": x_TD, "g_D": g_D, "eps": float(draw.rng.choice([1e-5, 1e-6])), "dy_TD": draw(T, D)}


def forward(code, a, at):
    y_TD, _ = code.rmsnorm(a["x_TD"], a["g_D"], a["eps"])
    return {"y": y_TD}


def backward(code, a, at):
    _, saved = code.rmsnorm(a["x_TD"], a["g_D"], a["eps"])
    # Another forward comes between: what backward needs is in what the first one returned, and nowhere else.
    code.rmsnorm(1 - a["x_TD"], a["g_D"], a["eps"])
    dx_TD, dg_D = code.rmsnorm_backward(a["dy_TD"], saved, a["g_D"])
    return {"dx": dx_TD, "dg": dg_D}


def want_forward(a, ref, at):
    return {"y": ref.attention.rms_norm(a["x_TD"], a["g_D"], a["eps"])}


def want_backward(a, ref, at):
    arrays = {"x": a["x_TD"], "g": a["g_D"]}

    def loss(moved, name, index):
        """An entry of x moves its own token alone."""
        t = slice(index[0], index[0] + 1) if name == "x" else slice(None)
        return (ref.attention.rms_norm(moved["x"][t], moved["g"], a["eps"]) * a["dy_TD"][t]).sum()

    return {f"d{n}": ref.gradient.at_entries(loss, arrays, n) for n in arrays}


def by_token(a, ref, at):
    n_TD = a["x_TD"] / np.sqrt((a["x_TD"] ** 2).mean(axis=1, keepdims=True) + a["eps"])
    return {"dg": {f"token {t}": dg_D for t, dg_D in enumerate(a["dy_TD"] * n_TD)}}


def random_size(rng):
    return tuple(rng.choice([2, 3, 5, 7, 11], 2, replace=False).tolist())


SIZES = ((5, 7), (4, 3), (1, 2))
PARTS = (
    Part("rmsnorm", SIZES, inputs, forward, want_forward, random_size=random_size, influence=(("x_TD", "y"),)),
    Part(
        "rmsnorm_backward",
        SIZES,
        inputs,
        backward,
        want_backward,
        by_token,
        random_size=random_size,
        influence=(("dy_TD", "dx"),),
    ),
)

MEAN, ROOT = "(x_TD**2).mean(axis=1)", "1 / np.sqrt((x_TD**2).mean(axis=1) + eps)"
DX = "r_T[:, None] * (dn_TD - n_TD * along_T[:, None])"
MISTAKES = (
    mistake("divided_by_g", "x r is got back as y / g, which is 0/0 where g is 0: save x r, or x.",
            ("return y_TD, (n_TD, r_T)", "return y_TD, (y_TD, r_T)"), ("    n_TD, r_T = saved\n", "    n_TD, r_T = saved[0] / g_D, saved[1]\n")),
    mistake("sum_of_squares", "The squares are summed: the root is of their mean over D.", (MEAN, "(x_TD**2).sum(axis=1)")),
    mistake("eps_outside", "eps is added to the root: it belongs inside, to the mean of the squares. With x near 1e-4 this is"
            " not the same.",
            (ROOT, "1 / (np.sqrt((x_TD**2).mean(axis=1)) + eps)")),
    mistake("less_one", "The squares are divided by D - 1, as for an unbiased variance: the root is of their mean, over D.",
            ("(x_TD**2).mean(axis=1)", "(x_TD**2).sum(axis=1) / max(1, x_TD.shape[1] - 1)")),
    mistake("no_eps", "eps is left out.", ("mean(axis=1) + eps", "mean(axis=1)")),
    mistake("layernorm", "The mean is subtracted: that is LayerNorm; RMSNorm divides by the root mean square and shifts"
            " nothing.",
            ("    r_T = 1 /", "    x_TD = x_TD - x_TD.mean(axis=1, keepdims=True)\n    r_T = 1 /")),
    mistake("variance", "The mean of x is subtracted before it is squared (the variance): that is LayerNorm; RMSNorm takes the mean of the squares.",
            (MEAN, "x_TD.var(axis=1)")),
    mistake("no_gain", "g is left out of y.", ("y_TD = n_TD * g_D", "y_TD = n_TD")),
    mistake("one_plus_gain", "The factor is 1 + g, as in Gemma's weights: here it is g.",
            ("y_TD = n_TD * g_D", "y_TD = n_TD * (1 + g_D)")),
    mistake("over_tokens", "The mean is over tokens: each token is normalised by itself, over its D entries.",
            (ROOT, "1 / np.sqrt((x_TD**2).mean() + eps) + np.zeros_like(x_TD[:, 0])")),
    mistake("r_constant", "This is the direct path only: r depends on x too, and that path is missing.",
            (DX, "r_T[:, None] * dn_TD")),
    mistake("sum_for_mean", "The path through r has the sum of dy g x-hat: r is made of a mean, so divide it by D.",
            ("(dn_TD * n_TD).mean(axis=1)", "(dn_TD * n_TD).sum(axis=1)")),
    mistake("projection_without_g", "g is missing in the path through r: what comes back to x-hat is dy g, there too.",
            ("(dn_TD * n_TD).mean(axis=1)", "(dy_TD * n_TD).mean(axis=1)")),
    mistake("dx_without_g", "g is missing in dx: y = g x-hat, so what comes back to x-hat is dy g.",
            ("dn_TD = dy_TD * g_D", "dn_TD = dy_TD")),
    mistake("path_added", "The path through r has the wrong sign: a larger x makes r smaller.",
            ("(dn_TD - n_TD * along_T[:, None])", "(dn_TD + n_TD * along_T[:, None])")),
    mistake("r_cubed", "The path through r has r once too often: x-hat has it in it already.",
            (DX, "r_T[:, None] * (dn_TD - r_T[:, None] * n_TD * along_T[:, None])")),
    mistake("mean_of_dn", "The gradient's mean is subtracted, as in LayerNorm: nothing was shifted forward.",
            (DX, "r_T[:, None] * (dn_TD - dn_TD.mean(axis=1, keepdims=True) - n_TD * along_T[:, None])")),
    mistake("dg_without_n", "dg is the sum of dy: y = g x-hat, so x-hat is a factor of it.",
            ("(dy_TD * n_TD).sum(axis=0)", "dy_TD.sum(axis=0)")),
    mistake("dg_of_x", "dg is made of x: what g was multiplied with is x-hat = x r.",
            ("(dy_TD * n_TD).sum(axis=0)", "(dy_TD * n_TD / r_T[:, None]).sum(axis=0)")),
    mistake("dg_mean", "dg is a mean over tokens: it is their sum; the loss divides, if anyone does.",
            ("(dy_TD * n_TD).sum(axis=0)", "(dy_TD * n_TD).mean(axis=0)")),
    mistake("dg_per_token", "dg is per token: g is used by every token, so its gradient sums over them.",
            ("(dy_TD * n_TD).sum(axis=0)", "dy_TD * n_TD")),
    mistake("last_forward", "Backward uses what the last forward left in a global or on the function: another forward has come"
            " between. What it needs is in `saved`.",
            ("    return y_TD, (n_TD, r_T)\n", "    rmsnorm.last = n_TD, r_T\n    return y_TD, None\n"),
            ("n_TD, r_T = saved", "n_TD, r_T = rmsnorm.last")),
    mistake("r_squared", "The path through r lacks a factor r: the derivative of r is -r^3 x / D.",
            (DX, "r_T[:, None] * dn_TD - n_TD * along_T[:, None]")),
)  # fmt: skip
