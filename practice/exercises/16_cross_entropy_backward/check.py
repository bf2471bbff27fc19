"""What is right in exercise 16 (the gradient by complex step), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def inputs(draw, T, V, counting, ignore):
    """`counting` of the T tokens have a target, the first and the last id among them; even T: the last token's is at the far end."""
    z_TV = draw(T, V, scale=4)
    # Odd T: all of a row far below 0: a maximum that starts from 0 leaves nothing of it.
    z_TV[0] -= 1000 * (T % 2)
    z_TV[-1, :2] = 1e4, -1e4
    ids = [n for n in range(V) if n != ignore]
    target_T = np.full(T, ignore)
    target_T[:counting] = [T % 2 == 0, ids[-1], ids[0], *draw.rng.choice(ids, T)][:counting]
    target_T = np.append(draw.rng.permutation(target_T[1:]), target_T[0])
    return {"z_TV": z_TV, "target_T": target_T, "ignore": ignore}


def forward(code, a, at):
    loss, _ = code.cross_entropy(a["z_TV"], a["target_T"], a["ignore"])
    return {"loss": loss}


def backward(code, a, at):
    _, saved = code.cross_entropy(a["z_TV"], a["target_T"], a["ignore"])
    # Another forward comes between: what backward needs is in what the first one returned, and nowhere else.
    code.cross_entropy(-a["z_TV"], a["target_T"], a["ignore"])
    dz_TV = code.backward(saved)
    return {"dz": dz_TV, "dz, called again": code.backward(saved)}


def loss(z_TV, a):
    """Token by token: log of the sum over ids of exp(z_id - z_target)."""
    found = [0.0]
    for z_V, target in zip(z_TV, a["target_T"], strict=True):
        if target != a["ignore"]:
            far_V = z_V - z_V[target]
            high = far_V.real.max()
            found.append(high + np.log(np.exp(far_V - high).sum()))
    return sum(found) / max(1, len(found) - 1)


def want_forward(a, ref, at):
    return {"loss": float(loss(a["z_TV"], a))}


def want_backward(a, ref, at):
    dz_TV = ref.gradient.at_entries(lambda moved, name, index: loss(moved["z"], a), {"z": a["z_TV"]}, "z")
    return {"dz": dz_TV, "dz, called again": dz_TV}


def sound(a, ref, at):
    """log p = z - lse: both are rounded, and may be as large as 1e4 where p is 1 or 0."""
    count = max(1, int((a["target_T"] != a["ignore"]).sum()))
    far_T = np.abs(a["z_TV"]).max(axis=1, initial=0)
    return {"loss": far_T.sum() / count} | dict.fromkeys(("dz", "dz, called again"), far_T[:, None] / count)


def random_size(rng):
    T = int(rng.integers(2, 8))
    return T, int(rng.choice([5, 7, 9, 11])), int(rng.integers(1, T + 1)), int(rng.choice([-1, 2]))


SIZES = ((7, 5, 4, -1), (4, 5, 3, 2), (3, 11, 3, -1), (2, 3, 1, 2), (3, 7, 0, -1))
PARTS = (
    Part("cross_entropy", SIZES, inputs, forward, want_forward, random_size=random_size, sound=sound),
    Part("backward", SIZES, inputs, backward, want_backward, random_size=random_size, influence=(("z_TV", "dz"),), sound=sound),
)

LOG = "z_TV[row_T, id_T] - high_T1[:, 0] - np.log(sum_T1[:, 0])"
ONE_HOT = "dz_TV[row_T, id_T] -= 1"
MISTAKES = (
    mistake("over_all", "Divided by T, all tokens; the mean is over those that count.",
            ("count = max(int(counts_T.sum()), 1)", "count = len(z_TV)")),
    mistake("loss_sum", "The loss is a sum over tokens: divide by the number of tokens that count.",
            ("counts_T].sum() / count", "counts_T].sum()")),
    mistake("not_divided", "dz is the gradient of the sum: the loss was divided by the number of tokens that count, dz was not.",
            ("return dz_TV / count", "return dz_TV")),
    mistake("divided_twice", "dz is divided by the number of tokens twice.", ("return dz_TV / count", "return dz_TV / count / count")),
    mistake("no_one_hot", "dz is the softmax alone: 1 must be taken away at the target.", (ONE_HOT, "pass")),
    mistake("sign", "The sign of dz is turned: it is the gradient of the loss, softmax - one-hot, not of -loss.",
            ("return dz_TV / count", "return -dz_TV / count")),
    mistake("one_hot_everywhere", "1 is taken away in the targets' columns of every row: index rows and columns in pairs.",
            (ONE_HOT, "dz_TV[:, id_T] -= 1")),
    mistake("ignored_rows", "Rows of ignored tokens are not 0 in dz: they push logits that the loss does not see.",
            ("dz_TV[~counts_T] = 0", "pass")),
    mistake("ignored_softmax", "In ignored rows of dz the softmax is left: only the 1 was left out there.",
            ("dz_TV[~counts_T] = 0", "dz_TV[~counts_T] = p_TV[~counts_T]")),
    mistake("ignored_counted", "The value `ignore` is used as an id: with -1, ignored tokens are taught the last column.",
            ("id_T = np.where(counts_T, target_T, 0)", "id_T, counts_T = target_T, target_T == target_T")),
    mistake("log_of_softmax", "The logarithm is taken of a softmax that is 0: log(exp(-2e4)) is -inf. Keep z - max - log(sum).",
            (LOG, "np.log((e_TV / sum_T1)[row_T, id_T])")),
    mistake("no_maximum", "No maximum is subtracted: exp(1e4) is infinite.",
            ("z_TV.max(axis=1, keepdims=True)", "0 * z_TV[:, :1]")),
    mistake("none_count", "Where no token counts it divides by 0: loss and gradient are 0 then.",
            ("max(int(counts_T.sum()), 1)", "counts_T.sum().astype(z_TV.dtype)")),
    mistake("last_forward", "Backward uses what the last forward left in a global or on the function: another forward has come"
            " between. What it needs is in `saved`.",
            ("    return loss, (e_TV / sum_T1, row_T, id_T, counts_T, count)\n",
             "    cross_entropy.last = e_TV / sum_T1, row_T, id_T, counts_T, count\n    return loss, None\n"),
            ("counts_T, count = saved", "counts_T, count = cross_entropy.last")),
    mistake("saved_changed", "Backward changes what is saved: called again it gives another gradient. Work on a copy.",
            ("dz_TV = p_TV.copy()", "dz_TV = p_TV"), ("return dz_TV / count", "dz_TV /= count\n    return dz_TV")),
    mistake("ignore_fixed", "-1 is what does not count, whatever `ignore` says: compare with `ignore`.", ("target_T != ignore", "target_T != -1")),
    mistake("maximum_from_zero", "The maximum is at least 0: in a row whose logits are all far below 0 every exp is 0. Start from -inf, or from"
            " the logits themselves.", ("z_TV.max(axis=1, keepdims=True)", "np.maximum(z_TV.max(axis=1, keepdims=True), 0)")),
    mistake("whole_maximum", "The maximum of the whole array is subtracted: in rows that lie far below it every exp is 0. Each row has its own"
            " maximum, axis=1.", ("z_TV.max(axis=1, keepdims=True)", "z_TV.max() + 0 * z_TV[:, :1]")),
    mistake("dz_over_all", "The loss is divided by the number of tokens that count, dz by T, all tokens: it is the gradient of that loss.",
            ("return dz_TV / count", "return dz_TV / max(1, len(dz_TV))")),
    mistake("dz_over_vocabulary", "dz is divided by V: the loss is a mean over the tokens that count, so it is by their number.",
            ("return dz_TV / count", "return dz_TV / dz_TV.shape[1]")),
)  # fmt: skip
