"""What is right in exercise 33 (one matrix that stands for both; gradients by complex step), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake

NAMES = ("x_TD", "A_DR", "B_RF")


def inputs(draw, T, D, F, R):
    a = {"x_TD": draw(T, D), "W_DF": draw(D, F), "A_DR": draw(D, R), "B_RF": draw(R, F)}
    return a | {"alpha": R * float(draw.rng.choice([2.25, 2.75, 3.5])), "dy_TF": draw(T, F)}


def weights(a):
    return [a[n] for n in ("W_DF", "A_DR", "B_RF", "alpha")]


def forward(code, a, at):
    y_TF, _ = code.lora_forward(a["x_TD"], *weights(a))
    return {"y": y_TF}


def backward(code, a, at):
    _, saved = code.lora_forward(a["x_TD"], *weights(a))
    dx, dA, dB = code.lora_backward(a["dy_TF"], saved, *weights(a))
    return {"dx": dx, "dA": dA, "dB": dB, "dB, called again": code.lora_backward(a["dy_TF"], saved, *weights(a))[2]}


def merged(code, a, at):
    return {"W": code.merge(*weights(a))}


def adapter(a):
    return a["alpha"] / len(a["B_RF"]) * sum(np.multiply.outer(c, r) for c, r in zip(a["A_DR"].T, a["B_RF"], strict=True))


def want(a, ref, at):
    return {"y": a["x_TD"] @ (a["W_DF"] + adapter(a))}


def derived(a, ref, names, frozen=1.0, low=1.0):
    """`frozen`, `low`: how much of each of the two paths counts."""

    def loss(moved, name, index):
        t = slice(index[0], index[0] + 1) if name == "x_TD" else slice(None)
        x = moved["x_TD"][t]
        y = frozen * (x @ a["W_DF"]) + low * a["alpha"] / len(a["B_RF"]) * ((x @ moved["A_DR"]) @ moved["B_RF"])
        return (y * a["dy_TF"][t]).sum() + 0j

    arrays = {n: a[n] for n in NAMES}
    return {f"d{n[0]}": ref.gradient.at_entries(loss, arrays, n) for n in names}


def want_backward(a, ref, at):
    found = derived(a, ref, NAMES)
    return found | {"dB, called again": found["dB"]}


def want_merged(a, ref, at):
    return {"W": a["W_DF"] + adapter(a)}


def terms(a, ref, at):
    return {"y": {"x W": a["x_TD"] @ a["W_DF"], "s x A B": a["x_TD"] @ adapter(a)}}


def back_terms(a, ref, at):
    return {
        "dx": {
            "through W": derived(a, ref, ("x_TD",), low=0)["dx"],
            "through A and B": derived(a, ref, ("x_TD",), frozen=0)["dx"],
        }
    }


def matrices(a, ref, at):
    return {"W": {"W": a["W_DF"], "s A B": adapter(a)}}


def small(a, at):
    """Nothing as large as W, where W is large beside what is owed anyhow; in float64, which answers may work in."""
    T, (D, F) = len(a["x_TD"]), a["W_DF"].shape
    large = 10 * max(1, T) * (D + F) < D * F
    return {"peak bytes": int(0.85 * D * F * 8) if large else 2**20}


def random_size(rng):
    return tuple(rng.choice([2, 3, 4, 5, 7], 4, replace=False).tolist())


SIZES = ((5, 3, 7, 2), (1, 4, 2, 3), (2, 44, 60, 3), (0, 3, 5, 2))
PARTS = (
    Part("lora_forward", SIZES, inputs, forward, want, terms, small, random_size=random_size, count_memory=True),
    Part("lora_backward", SIZES, inputs, backward, want_backward, back_terms, small, random_size=random_size, count_memory=True),
    Part("merge", SIZES[:3], inputs, merged, want_merged, matrices, random_size=random_size),
)  # fmt: skip

Y, MERGED = "x_TD @ W_DF + s * (z_TR @ B_RF)", "W_DF + s * np.matmul(A_DR, B_RF)"
DZ, DX, DB = "s * (dy_TF @ B_RF.T)", "dy_TF @ W_DF.T + dz_TR @ A_DR.T", "s * (z_TR.T @ dy_TF)"
S = "s = alpha / A_DR.shape[1]"
MISTAKES = (
    mistake("saved_changed", "Backward changes what is saved: called again it gives another gradient of B. Work on a copy.",
            ("    s = alpha / A_DR.shape[1]\n    dz_TR", "    s = alpha / A_DR.shape[1]\n    z_TR *= s\n    dz_TR"), ("dB_RF = s * (z_TR.T @ dy_TF)", "dB_RF = z_TR.T @ dy_TF")),
    mistake("no_rank", "The scale is alpha: it is alpha / R.", (S, "s = alpha")),
    mistake("root_of_rank", "The scale is alpha / sqrt(R), as in rank-stabilised LoRA: here it is alpha / R.",
            (S, "s = alpha / A_DR.shape[1] ** 0.5")),
    mistake("by_width", "alpha is divided by D: it is divided by R, the width between A and B.", (S, "s = alpha / A_DR.shape[0]")),
    mistake("by_output", "alpha is divided by F: it is divided by R, the width between A and B.", (S, "s = alpha / B_RF.shape[1]")),
    mistake("inverse", "The scale is R / alpha: it is alpha / R.", (S, "s = A_DR.shape[1] / alpha")),
    mistake("whole_division", "alpha // R is rounded down: the scale is alpha / R.", (S, "s = alpha // A_DR.shape[1]")),
    mistake("no_scale", "The adapter is not scaled: y = x W + (alpha / R) x A B.", ("x_TD @ W_DF + s * (z_TR @ B_RF)", "x_TD @ W_DF + z_TR @ B_RF")),
    mistake("all_scaled", "x W is scaled too: s belongs to the adapter alone.", (Y, "s * (x_TD @ W_DF + z_TR @ B_RF)")),
    mistake("adapter_alone", "y is the adapter's output alone: x W is missing.", (Y, "s * (z_TR @ B_RF)")),
    mistake("no_adapter", "The adapter is not in y.", (Y, "x_TD @ W_DF")),
    mistake("subtracted", "The adapter is taken away from x W: it is added.", (Y, "x_TD @ W_DF - s * (z_TR @ B_RF)")),
    mistake("made_whole", "This is right, but A B is made first, as large as W: (x A) B needs R numbers a token.",
            (Y, "x_TD @ W_DF + s * (x_TD @ (A_DR @ B_RF))")),
    mistake("merged_first", "This is right, but forward merges: W + s A B is made anew, as large as W, at each call.",
            (Y, "x_TD @ (W_DF + s * (A_DR @ B_RF))")),
    mistake("frozen_path", "dx lacks the path through W: W has no gradient, but x has, and the layers below need it.",
            (DX, "dz_TR @ A_DR.T")),
    mistake("adapter_path", "dx lacks the path through A and B.", (DX, "dy_TF @ W_DF.T")),
    mistake("dB_scale", "dB lacks the scale s.", (DB, "z_TR.T @ dy_TF")),
    mistake("dA_scale", "dA lacks the scale s.", ("dA_DR = x_TD.T @ dz_TR", "dA_DR = x_TD.T @ (dy_TF @ B_RF.T)")),
    mistake("no_rank_back", "On the way back to x and A the scale is alpha: it is alpha / R.", (DZ, "alpha * (dy_TF @ B_RF.T)")),
    mistake("dx_scale", "The adapter's part of dx lacks the scale s.", (DX, "dy_TF @ W_DF.T + (dy_TF @ B_RF.T) @ A_DR.T")),
    mistake("no_scale_back", "Backward has no scale: s multiplies the adapter's part of dx, dA and dB.", (DZ, "dy_TF @ B_RF.T"), (DB, "z_TR.T @ dy_TF")),
    mistake("scaled_twice", "dA and dB have the scale twice: once is enough.", ("dA_DR = x_TD.T @ dz_TR", "dA_DR = x_TD.T @ dz_TR * s"),
            (DB, "s * (z_TR.T @ dy_TF) * s")),
    mistake("dB_twice", "dB has the scale twice: what is saved, or what is made of it, has it already.", (DB, "s * (z_TR.T @ dy_TF) * s")),
    mistake("dA_twice", "dA has the scale twice: once is enough.", ("dA_DR = x_TD.T @ dz_TR", "dA_DR = x_TD.T @ dz_TR * s")),
    mistake("mean", "dA and dB are means over tokens: they are sums.", ("dA_DR = x_TD.T @ dz_TR", "dA_DR = x_TD.T @ dz_TR / max(1, len(x_TD))"),
            (DB, "s * (z_TR.T @ dy_TF) / max(1, len(x_TD))")),
    mistake("dW_too", "This is right, but the frozen weight's gradient, x^T dy, is computed, as large as W: dA and dB go through R numbers.",
            ("    return dx_TD, dA_DR, dB_RF", "    return (dx_TD, dA_DR, dB_RF, x_TD.T @ dy_TF)[:3]")),
    mistake("whole_back", "This is right, but backward makes W + s A B, as large as W: go through B, then through A.",
            (DX, "dy_TF @ (W_DF + s * (A_DR @ B_RF)).T"),
            (DZ, DZ), ("    return dx_TD, dA_DR, dB_RF",) * 2),
    mistake("kept_global", "saved is shared by all calls: the next layer's forward has overwritten this one's. Return what backward needs.",
            ("return y_TF, (x_TD, z_TR)", "globals()['_kept'] = (x_TD, z_TR)\n    return y_TF, None"), ("= saved", "= _kept")),
    mistake("merge_scale", "merge leaves the scale out: W + s A B.", (MERGED, "W_DF + A_DR @ B_RF")),
    mistake("difference_only", "merge returns s A B alone: W is part of it.", (MERGED, "s * (A_DR @ B_RF)")),
    mistake("unmerged", "merge takes the adapter away: that undoes a merge.", (MERGED, "W_DF - s * (A_DR @ B_RF)")),
)  # fmt: skip
