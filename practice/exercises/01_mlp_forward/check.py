"""What is right in exercise 01, and what is often wrong."""

from math import pi, sqrt

import numpy as np

from practice.part import Part, mistake


def inputs(draw, T, D, F):
    return {
        "x_TD": draw(T, D),
        "W1_DF": draw(D, F),
        "b1_F": draw(F),
        "W2_FD": draw(F, D),
        "b2_D": draw(D),
    }


def call(code, a, at):
    y_TD, _ = code.mlp_forward(*a.values())
    return {"y": y_TD}


def want(a, ref, at):
    return {"y": ref.mlp.forward(*a.values(), "gelu")}


def ingredients(a, ref, at):
    z = a["x_TD"] @ a["W1_DF"] + a["b1_F"]
    h = 0.5 * z * (1 + np.tanh(sqrt(2 / pi) * (z + 0.044715 * z**3)))
    return {"y": {"h W2": h @ a["W2_FD"], "b2": a["b2_D"]}}


def random_size(rng):
    return tuple(rng.choice([2, 3, 5, 7, 11, 13], 3, replace=False).tolist())


PARTS = (
    Part(
        "mlp_forward",
        ((5, 3, 7), (1, 4, 2), (0, 3, 5), (3, 1, 2), (2, 3, 1)),
        inputs,
        call,
        want,
        ingredients,
        random_size=random_size,
        influence=(("x_TD", "y"),),
    ),
)

GELU = "0.5 * a_TF * (1 + np.tanh(u_TF))"
MISTAKES = (
    mistake("no_b2", "The second bias b2 is never added.", ("@ W2_FD + b2_D", "@ W2_FD")),
    mistake("no_b1", "The first bias b1 is never added.", ("@ W1_DF + b1_F", "@ W1_DF")),
    mistake("b1_late", "b1 is added after the GELU: it belongs inside, before it.",
            ("@ W1_DF + b1_F", "@ W1_DF"), (GELU, f"{GELU} + b1_F")),
    mistake("relu", "This is the answer with ReLU: the task wants GELU.", (GELU, "np.maximum(a_TF, 0)")),
    mistake("sigmoid", "This is the answer with GELU's short form a sigmoid(1.702 a): the task wants the tanh form.",
            (GELU, "a_TF / (1 + np.exp(-1.702 * a_TF))")),
    mistake("bracket_lost", "sqrt(2/pi) multiplies a alone: it multiplies the whole bracket, 0.044715 a^3 too.",
            ("* (a_TF + 0.044715 * a_TF**3)", "* a_TF + 0.044715 * a_TF**3")),
    mistake("erf", "This is the exact GELU, by erf: the task wants the tanh form, which differs by up to 5e-4.",
            (GELU, "0.5 * a_TF * (1 + np.vectorize(math.erf, otypes=[float])(a_TF / math.sqrt(2))).astype(a_TF.dtype)")),
    mistake("twice", "The GELU is applied to the output too.",
            ("    return y_TD", "    y_TD = 0.5 * y_TD * (1 + np.tanh(math.sqrt(2 / math.pi) * (y_TD + 0.044715 * y_TD**3)))\n"
             "    return y_TD")),
    mistake("no_activation", "There is no GELU between the two products.", (GELU, "a_TF")),
    mistake("square", "The GELU's inner polynomial has a^2 in place of a^3.", ("a_TF**3", "a_TF**2")),
    mistake("transposed", "The first weight is used transposed: weights are stored (in, out), x @ W needs no transpose.",
            ("x_TD @ W1_DF", "x_TD @ W1_DF.T")),
    mistake("promoted", "float32 became float64: np.sqrt gives a float64 scalar, which promotes; math.sqrt doesn't.",
            ("math.sqrt(2 / math.pi)", "np.sqrt(2 / np.pi)")),
    mistake("residual", "x is added to y, as in a residual connection: the task has none.", ("@ W2_FD + b2_D", "@ W2_FD + b2_D + x_TD")),
)  # fmt: skip
