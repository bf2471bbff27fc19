"""What is right in exercise 04 (the reference: query by query, without a mask), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def inputs(draw, T, D, H, E):
    # Two or more sequences where there is room; the first is a single token every other time.
    lengths = []
    while sum(lengths) < T:
        rest = T - sum(lengths)
        lengths.append(int(draw.rng.integers(1, min(rest, max(2, T // 2)) + 1)))
    if T < 5:
        # Empty ones first, in the middle and last.
        lengths = [0, *lengths[:1], 0, *lengths[1:], 0]
    if T > 50:
        # One long sequence and many of a single token: padding would make all as long.
        lengths = [T // 2 + 1] + [1] * (T // 2)
    x_TD, Wv_DHE = draw(T, D), draw(D, H, E)
    Wq_DHE, Wk_DHE = draw(D, H, E, scale=1.3), draw(D, H, E, scale=1.3)
    if E == 2:
        # Scores of some 30000, most of which is common to a query's keys: below 0 for one head, above for the next. So -10000
        # is no mask: it may be far above all that is seen, and what it is added to too. The last key is far from the others,
        # and not alone in its sequence.
        lengths[-2:] = [sum(lengths[-2:])]
        x_TD[:, 0] = 40
        x_TD[-1, 0] = 60
        Wq_DHE *= 0.4
        Wk_DHE *= 0.4
        Wq_DHE[0, ::2], Wq_DHE[0, 1::2], Wk_DHE[0] = -0.1, 0.1, 125
        Wv_DHE[0] *= 0.02
    return {
        "x_TD": x_TD,
        "Wq_DHE": Wq_DHE,
        "Wk_DHE": Wk_DHE,
        "Wv_DHE": Wv_DHE,
        "Wo_HED": draw(H, E, D),
        "lengths": lengths,
    }


def call(code, a, at):
    y_TD, _ = code.mha_forward(*a.values())
    return {"y": y_TD}


def weights(a):
    return {"x": a["x_TD"], "Wq": a["Wq_DHE"], "Wk": a["Wk_DHE"], "Wv": a["Wv_DHE"], "Wo": a["Wo_HED"]}


def options(a, ref):
    """The reference takes no empty sequences; they change nothing."""
    return ref.attention.Options([n for n in a["lengths"] if n])


def want(a, ref, at):
    return {"y": ref.attention.attention(weights(a), options(a, ref))}


def sound(a, ref, at):
    """p = exp(s - lse) rounds numbers as large as the scores, and scales a head's values with them."""
    q, k, v = (np.abs(np.tensordot(a["x_TD"], a[W], 1)) for W in ("Wq_DHE", "Wk_DHE", "Wv_DHE"))
    score_TH = (q * k.max(axis=0)).sum(axis=2) / q.shape[2] ** 0.5
    return {"y": np.einsum("th,hd->td", score_TH * v.max(), np.abs(a["Wo_HED"]).sum(axis=1))}


def by_head(a, ref, at):
    o = options(a, ref)
    return {"y": {f"head {h}": ref.attention.attention(weights(a), o, heads=[h]) for h in range(len(a["Wo_HED"]))}}


def nothing_padded(a, at):
    """Some ten arrays of T x T numbers a head, all sequences as one; what Python itself needs counts where that is small."""
    T, H = len(a["x_TD"]), len(a["Wo_HED"])
    return {"peak bytes": max(200_000, 10 * H * T * T * 8)}


def random_size(rng):
    return tuple(rng.choice([2, 3, 5, 7, 11], 4, replace=False).tolist())


PARTS = (
    Part(
        "mha_forward",
        ((7, 5, 2, 3), (11, 3, 5, 2), (1, 4, 3, 5), (4, 3, 1, 5)),
        inputs,
        call,
        want,
        by_head,
        random_size=random_size,
        influence=(("x_TD", "y"),),
        sound=sound,
    ),
    Part(
        "one long, many short",
        ((61, 5, 2, 3),),
        inputs,
        call,
        want,
        limits=nothing_padded,
        random_size=lambda rng: (int(rng.choice([57, 61, 65])), *random_size(rng)[1:]),
        count_memory=True,
        sound=sound,
        dtypes=("float64",),
    ),
)

SCALE, SEEN = "/ math.sqrt(E)", "np.tri(n, dtype=bool)"
MISTAKES = (
    mistake("ends_at_empty", "The loop ends at an empty sequence: it has no tokens, and others come after it.",
            ("            continue\n", "            break\n")),
    mistake("padded", "This is right, but all sequences are made as long as the longest: that costs its square for each of them. Go"
            " through them one after another, or mask what belongs to another one.",
            ("    start = 0\n", "    start, most = 0, max(lengths)\n    padded = [np.zeros((len(lengths), H, most, most), x_TD.dtype) for _ in range(3)]\n"),
            ("    return y_TD, (q_HTE", "    return y_TD, (padded, q_HTE")),
    mistake("scale_D", "The scores are divided by sqrt(D): the sum q.k has E terms, so it is sqrt(E).",
            (SCALE, "/ math.sqrt(D)")),
    mistake("scale_heads", "The scores are divided by sqrt(H E), the width of all heads: a score is a sum over one head's E.",
            (SCALE, "/ math.sqrt(H * E)")),
    mistake("scale_E", "The scores are divided by E: it is its square root.", (SCALE, "/ E")),
    mistake("no_scale", "The scores are not divided by sqrt(E).", (f" {SCALE}", "")),
    mistake("future", "The mask is off by one: a token sees the token after it.", (SEEN, "np.tri(n, k=1, dtype=bool)")),
    mistake("not_itself", "The mask is off by one: a token does not see itself, and the first of a sequence sees nothing"
            " (NaN).",
            (SEEN, "np.tri(n, k=-1, dtype=bool)")),
    mistake("mask_turned", "The mask is transposed: tokens see themselves and what comes after them.",
            (SEEN, "np.tri(n, dtype=bool).T")),
    mistake("no_mask", "There is no causal mask: tokens see the whole of their sequence.", (SEEN, "np.ones((n, n), bool)")),
    mistake("over_queries", "The softmax runs over queries: the columns add to 1, the rows do not.",
            ("axis=2", "axis=1")),
    mistake("mask_after", "The mask comes after the softmax: masked weights are 0, but what is left in a row does not add to"
            " 1.",
            ("        score_HTS = np.where(seen_TS, score_HTS, -np.inf)\n", ""),
            ("w_HTS / w_HTS.sum(axis=2, keepdims=True)", "w_HTS / w_HTS.sum(axis=2, keepdims=True) * seen_TS")),
    mistake("mask_finite", "10000 is taken from the scores of later keys: scores lie further apart than that, and some still weigh. A mask is"
            " -inf.",
            ("np.where(seen_TS, score_HTS, -np.inf)", "score_HTS - 10000 * (1 - np.tri(n, dtype=score_HTS.dtype))")),
    mistake("mask_low", "The scores of later keys are set to -10000, and some that are seen are lower: a mask is -inf.",
            ("np.where(seen_TS, score_HTS, -np.inf)", "np.where(seen_TS, score_HTS, -10000)")),
    mistake("mask_zero", "Keys that are not seen get the score 0 and so a weight: their score is -inf.",
            ("np.where(seen_TS, score_HTS, -np.inf)", "np.where(seen_TS, score_HTS, 0)")),
    mistake("merged", "Heads are merged without the transpose: (H, T, E) is read as if it were (T, H, E).",
            ("o_THE = o_HTE.transpose(1, 0, 2)", "o_THE = o_HTE.reshape(T, H, E)")),
    mistake("merged_by_sequence", "A sequence's heads are merged without the transpose: (H, n, E) is read as if it were (n, H, E), which mixes"
            " tokens and heads.",
            ("= p_HTS @ v_HTE[:, s]", "= (p_HTS @ v_HTE[:, s]).reshape(n, H, E).transpose(1, 0, 2)")),
    mistake("start_by_own_length", "Sequence i is taken to begin at i times its own length: it begins where those before it end, at the sum of"
            " their lengths.",
            ("    for n in lengths:\n", "    for i, n in enumerate(lengths):\n        start = i * n\n        n = len(x_TD[start : start + n])\n"
             "        if n == 0:\n            continue\n")),
    mistake("keys_from_front", "Keys and values are cut from the front, [:n], for each sequence: they begin where the sequence does.",
            ("k_HTE[:, s]", "k_HTE[:, :n]"), ("v_HTE[:, s]", "v_HTE[:, :n]")),
    mistake("one_sequence", "Sequences see each other: the tokens are taken as one long sequence.", ("in lengths", "in [T]")),
    mistake("no_maximum", "exp overflows: subtract each row's maximum first.",
            ("score_HTS - score_HTS.max(axis=2, keepdims=True)", "score_HTS")),
    mistake("maximum_of_all", "The maximum is taken of later keys too: one far above those that are seen makes the weights of all of"
            " them 0, and 0/0 is NaN. Mask first.",
            ("        score_HTS = np.where(seen_TS, score_HTS, -np.inf)\n", ""),
            ("np.exp(score_HTS - score_HTS.max(axis=2, keepdims=True))", "np.exp(score_HTS - score_HTS.max(axis=2, keepdims=True)) * seen_TS")),
    mistake("values", "The weights are applied to the keys: it is the values that are averaged.",
            ("p_HTS @ v_HTE[:, s]", "p_HTS @ k_HTE[:, s]")),
    mistake("queries_for_keys", "Queries and keys are exchanged: the scores are transposed.",
            ("q_HTE[:, s] @ k_HTE[:, s].transpose(0, 2, 1)", "k_HTE[:, s] @ q_HTE[:, s].transpose(0, 2, 1)")),
    mistake("not_itself_zero", "The mask is off by one: a token does not see itself, and the first of a sequence sees nothing.",
            (SEEN, "np.tri(n, k=-1, dtype=bool)"), ("= p_HTS @ v_HTE[:, s]", "= np.nan_to_num(p_HTS @ v_HTE[:, s])")),
    mistake("split_without_transpose", "Heads are split without the transpose: (T, H E) is read as if it were (H, T, E).",
            ('np.einsum("td,dhe->hte", x_TD, Wq_DHE)', "(x_TD @ Wq_DHE.reshape(D, H * E)).reshape(H, T, E)"),
            ('np.einsum("td,dhe->hte", x_TD, Wk_DHE)', "(x_TD @ Wk_DHE.reshape(D, H * E)).reshape(H, T, E)"),
            ('np.einsum("td,dhe->hte", x_TD, Wv_DHE)', "(x_TD @ Wv_DHE.reshape(D, H * E)).reshape(H, T, E)")),
)  # fmt: skip
