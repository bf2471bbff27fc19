"""What is right in exercise 02 (by complex step: no backward is written here), and what is often wrong."""

from math import pi, sqrt

import numpy as np

from practice.part import Part, mistake

NAMES = ("dx", "dW1", "db1", "dW2", "db2")


def inputs(draw, T, D, F):
    a = {"x": draw(T, D), "W1": draw(D, F), "b1": draw(F), "W2": draw(F, D), "b2": draw(D), "dy": draw(T, D)}
    # Rounded once: the truth computes it anew from x, W1 and b1.
    x, W1, b1 = (a[n].astype(np.float64) for n in ("x", "W1", "b1"))
    return a | {"z": draw.cast(x @ W1 + b1)}


def call(code, a, at):
    h = (0.5 * a["z"] * (1 + np.tanh(sqrt(2 / pi) * (a["z"] + 0.044715 * a["z"] ** 3)))).astype(a["z"].dtype)
    h.flags.writeable = False
    gradients = code.mlp_backward(a["dy"], (a["x"], a["z"], h), a["W1"], a["W2"])
    return dict(zip(NAMES, gradients, strict=True))


def want(a, ref, at):
    T, D = a["x"].shape
    grid = ref.mlp.grid(T, D, len(a["b1"]), D)
    found = ref.mlp.gradients(*(a[n] for n in ("x", "W1", "b1", "W2", "b2")), "gelu", a["dy"], grid)
    return {n: found[n[1:]] for n in NAMES}


def random_size(rng):
    return tuple(rng.choice([2, 3, 5, 7, 11], 3, replace=False).tolist())


def sound(a, ref, at):
    """Far below 0, 1 + tanh and 1 - tanh^2 are much smaller than 1, and off by as much as 1 is: what that is in each gradient."""
    z, dh = a["z"], np.abs(a["dy"]) @ np.abs(a["W2"]).T
    off = dh * (1 + np.abs(z) * sqrt(2 / pi) * (1 + 3 * 0.044715 * z**2)) / 2
    return {"dx": off @ np.abs(a["W1"]).T, "dW1": np.abs(a["x"]).T @ off, "db1": off.sum(axis=0)}


PARTS = (
    Part(
        "mlp_backward",
        ((5, 3, 7), (1, 4, 2)),
        inputs,
        call,
        want,
        random_size=random_size,
        influence=(("dy", "dx"),),
        sound=sound,
    ),
)

SLOPE = "0.5 * (1 + t_TF) + 0.5 * a_TF * (1 - t_TF**2) * c * (1 + 3 * 0.044715 * a_TF**2)"
MISTAKES = (
    mistake("no_slope", "da equals dh: the derivative of the GELU is missing.", ("dh_TF * slope_TF", "dh_TF")),
    mistake("slope_at_h", "The GELU's derivative is taken at h; it belongs at a, the GELU's input.",
            ("x_TD, a_TF, h_TF = saved", "x_TD, a_TF, h_TF = saved\n    a_TF = h_TF")),
    mistake("relu", "The derivative is ReLU's, a mask: the forward pass is GELU.", (SLOPE, "(a_TF > 0).astype(a_TF.dtype)")),
    mistake("half_slope", "The derivative of the tanh is missing: GELU' is more than (1 + t) / 2.", (SLOPE, "0.5 * (1 + t_TF)")),
    mistake("no_inner", "The chain rule stops at the tanh: its argument's derivative c (1 + 3 x 0.044715 a^2) is missing.",
            (" * c * (1 + 3 * 0.044715 * a_TF**2)", "")),
    mistake("no_three", "The slope of the GELU lacks a factor 3: the derivative of 0.044715 a^3 is 3 x 0.044715 a^2.",
            ("3 * 0.044715", "0.044715")),
    mistake("bracket_lost", "c multiplies a alone in the tanh: it multiplies the whole bracket, 0.044715 a^3 too.",
            ("c * (a_TF + 0.044715 * a_TF**3)", "c * a_TF + 0.044715 * a_TF**3")),
    mistake("mean", "Every weight gradient is 1/T of what is right: sum over tokens; the loss divides, if anyone does.",
            ("x_TD.T @ da_TF", "x_TD.T @ da_TF / len(x_TD)"), ("h_TF.T @ dy_TD", "h_TF.T @ dy_TD / len(x_TD)"),
            (".sum(axis=0)", ".mean(axis=0)")),
    mistake("bias_per_token", "The bias gradients are per token: a bias is added to every token, so its gradient sums over them.",
            ("dy_TD.sum(axis=0)", "dy_TD"), ("da_TF.sum(axis=0)", "da_TF")),
    mistake("bias_mean", "The bias gradients are means over tokens: they are sums.", (".sum(axis=0)", ".mean(axis=0)")),
    mistake("dW2_transposed", "dW2 is transposed: it has W2's shape (F, D), so h comes first.", ("h_TF.T @ dy_TD", "dy_TD.T @ h_TF")),
    mistake("dW2_of_a", "dW2 is made of a; what W2 was multiplied with is h.", ("h_TF.T @ dy_TD", "a_TF.T @ dy_TD")),
    mistake("in_place", "dy is changed in place: the caller still needs it.", ("da_TF = dh_TF", "dy_TD *= 1\n    da_TF = dh_TF")),
    mistake("dW1_of_last", "dW1 is the last token's only, each replaces the one before: it is the sum of all tokens' x da.",
            ("x_TD.T @ da_TF", "x_TD[-1:].T @ da_TF[-1:]")),
    mistake("dW2_of_last", "dW2 is the last token's only, each replaces the one before: it is the sum of all tokens' h dy.",
            ("h_TF.T @ dy_TD", "h_TF[-1:].T @ dy_TD[-1:]")),
)  # fmt: skip
