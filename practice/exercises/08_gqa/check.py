"""What is right in exercise 08 (the reference, head by head; one-hot sums of whole numbers), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def inputs(draw, T, H, K, E):
    lengths = []
    while sum(lengths) < T:
        lengths.append(int(draw.rng.integers(1, min(T - sum(lengths), max(2, min(T // 2, 5))) + 1)))
    if T < 5:
        # Empty ones first, in the middle and last.
        lengths = [0, *lengths[:1], 0, *lengths[1:], 0]
    q_THE, k_TKE = draw(T, H, E, scale=3), draw(T, K, E, scale=1.5)
    if E == 2:
        # Scores of some hundred, most of which is common to a query's keys: above 0 for one query head, below for the next. The
        # last key is far from the others.
        lengths = [T]
        q_THE[:, ::2, 0], q_THE[:, 1::2, 0], k_TKE[:-1, :, 0], k_TKE[-1, :, 0] = 50, -50, 25, 50
    return {"q_THE": q_THE, "k_TKE": k_TKE, "v_TKE": draw(T, K, E), "lengths": lengths}


def forward(code, a, at):
    return {"o": code.gqa_forward(*a.values())}


def want_forward(a, ref, at):
    T, H, E = a["q_THE"].shape
    group = H // a["k_TKE"].shape[1]
    o_THE = np.zeros((T, H, E))
    for end, n in zip(np.cumsum(a["lengths"]), a["lengths"], strict=True):
        t = slice(end - n, end)
        for h in range(H if n else 0):
            k_SE, v_SE = (a[name][t, h // group] for name in ("k_TKE", "v_TKE"))
            o_THE[t, h] = ref.attention.head(a["q_THE"][t, h], k_SE, v_SE, E**-0.5, causal=True)
    return {"o": o_THE}


def sound(a, ref, at):
    """p = exp(s - lse) rounds numbers as large as the scores, and scales the values with them."""
    q_THE, k_TKE = a["q_THE"], a["k_TKE"]
    k_THE = np.repeat(k_TKE, q_THE.shape[1] // k_TKE.shape[1], axis=1)
    s_TH = np.abs(np.einsum("the,she->ths", q_THE, k_THE)).max(axis=2) / q_THE.shape[2] ** 0.5
    return {"o": s_TH[:, :, None] * np.abs(a["v_TKE"]).max()}


def no_copies(a, at):
    """The result, the copy of it kept for judging, and something to work with; keys and values for each query head are more.

    In float64, which answers may work in.
    """
    return {"peak bytes": max(40_000, 5 * 8 * a["q_THE"].size // 2)}


def gradients(draw, T, H, K, E):
    return {"dk_THE": draw.whole(-50, 50, T, H, E), "kv_heads": K}


def reads(H, K):
    """(H, K): 1 where query head h reads key head j: neighbours in equal shares."""
    return np.repeat(np.eye(K), [H // K] * K, axis=0)


def want_grad(a, ref, at):
    return {"dk": np.einsum("the,hk->tke", a["dk_THE"], reads(a["dk_THE"].shape[1], a["kv_heads"]))}


def by_place(a, ref, at):
    H, K = a["dk_THE"].shape[1], a["kv_heads"]
    return {"dk": {f"query head {g} of the group": a["dk_THE"][:, [j * (H // K) + g for j in range(K)]] for g in range(H // K)}}


def group(T, H, K, E):
    return {"H/K": H / K}


def random_size(rng):
    T, E = rng.choice([3, 5, 7, 11], 2, replace=False).tolist()
    H, K = [(6, 2), (8, 2), (6, 3), (12, 2), (10, 2), (15, 3)][rng.integers(6)]
    return T, H, K, E


SIZES = ((7, 6, 2, 3), (5, 8, 2, 3), (2, 4, 1, 5), (3, 5, 5, 2), (1, 6, 3, 5), (4, 1, 1, 3))
PARTS = (
    Part(
        "gqa_forward",
        (*SIZES, (97, 6, 2, 17)),
        inputs,
        forward,
        want_forward,
        advice=no_copies,
        random_size=random_size,
        influence=(("k_TKE", "o"),),
        count_memory=True,
        sound=sound,
    ),
    Part(
        "kv_grad",
        SIZES,
        gradients,
        lambda code, a, at: {"dk": code.kv_grad(*a.values())},
        want_grad,
        by_place,
        random_size=random_size,
        influence=(("dk_THE", "dk"),),
        exact=("dk",),
        factors=group,
    ),
)

GROUPED = "q_TKGE = q_THE.reshape(T, K, H // K, E)"
BACK = "o_TKGE.reshape(T, H, E)"
SUM = "    dk_TKGE = dk_THE.reshape(T, kv_heads, H // kv_heads, E)\n    return dk_TKGE.sum(axis=2)"
MISTAKES = (
    mistake("ends_at_empty", "The loop ends at an empty sequence: it has no tokens, and others come after it.",
            ("            continue\n", "            break\n")),
    mistake("masked_by_row", "Tokens and query heads of a group are one dim of the scores, and the mask goes by its rows: it goes by the token, or"
            " later ones are seen.", ("np.tri(n, dtype=bool)", "(np.arange(n) <= np.arange(n)[:, None] * (H // K) + np.arange(H // K)[:, None, None])")),
    mistake("masked_by_row_heads_first", "Query heads of a group and tokens are one dim of the scores, and the mask goes by its rows: it goes by the token,"
            " or later ones are seen.", ("np.tri(n, dtype=bool)", "(np.arange(n) <= np.arange(n)[:, None] + n * np.arange(H // K)[:, None, None])")),
    mistake("tiled", "Key heads are dealt out in turn, 0 1 0 1 0 1 (tile); neighbours share one: 0 0 0 1 1 1 (repeat).",
            (GROUPED, "q_TKGE = q_THE.reshape(T, H // K, K, E).transpose(0, 2, 1, 3)"),
            (BACK, "o_TKGE.transpose(0, 2, 1, 3).reshape(T, H, E)")),
    mistake("values_tiled", "The keys are shared by neighbours, the values in turn (tile): a query head reads both from the"
            " same head.",
            ('np.einsum("kgts,ske->tkge", p_KGTS, v_TKE[s])',
             'np.einsum("kgts,skge->tkge", p_KGTS, np.tile(v_TKE[s], (1, H // K, 1)).reshape(n, K, H // K, E))')),
    mistake("groups_exchanged", "K and H/K are exchanged: there are K groups of H/K query heads; (T, H, E) splits into (T, K,"
            " H/K, E).",
            (GROUPED, "q_TKGE = q_THE.reshape(T, H // K, K, E)")),
    mistake("first_head", "All query heads read key/value head 0.",
            ("k_TKE[s])", "k_TKE[s][:, [0] * K])"), ("p_KGTS, v_TKE[s])", "p_KGTS, v_TKE[s][:, [0] * K])")),
    mistake("mean_of_keys", "The key/value heads are averaged into one: that is how a checkpoint becomes multi-query, not how"
            " groups attend.",
            ("k_TKE[s])", "np.repeat(k_TKE[s].mean(axis=1, keepdims=True), K, axis=1))"),
            ("p_KGTS, v_TKE[s])", "p_KGTS, np.repeat(v_TKE[s].mean(axis=1, keepdims=True), K, axis=1))")),
    mistake("left_folded", "o is left in groups, (T, K, H/K, E): the task wants (T, H, E).",
            (f"return {BACK}", "return o_TKGE")),
    mistake("no_scale", "The scores are not divided by sqrt(E).", (" / math.sqrt(E)", "")),
    mistake("no_mask", "There is no causal mask: tokens see the whole of their sequence.",
            ("np.tri(n, dtype=bool)", "np.ones((n, n), bool)")),
    mistake("no_maximum", "exp overflows: subtract each row's maximum first.",
            ("score_KGTS - score_KGTS.max(axis=3, keepdims=True)", "score_KGTS")),
    mistake("maximum_of_all", "The maximum is taken of later keys too: one far above those that are seen makes the weights of all of"
            " them 0, and 0/0 is NaN. Mask first.",
            ("        score_KGTS = np.where(np.tri(n, dtype=bool), score_KGTS, -np.inf)\n", ""),
            ("np.exp(score_KGTS - score_KGTS.max(axis=3, keepdims=True))",
             "np.exp(score_KGTS - score_KGTS.max(axis=3, keepdims=True)) * np.tri(n, dtype=bool)")),
    mistake("keys_from_front", "Keys and values are cut from the front, [:n], for each sequence: they begin where the sequence does.",
            ("k_TKE[s]", "k_TKE[:n]"), ("v_TKE[s]", "v_TKE[:n]")),
    mistake("start_by_own_length", "Sequence i is taken to begin at i times its own length: it begins where those before it end, at the sum of"
            " their lengths.",
            ("    for n in lengths:\n", "    for i, n in enumerate(lengths):\n        start = i * n\n        n = len(q_THE[start : start + n])\n"
             "        if n == 0:\n            continue\n")),
    mistake("mask_turned", "The mask is transposed: tokens see themselves and what comes after them.",
            ("np.tri(n, dtype=bool)", "np.tri(n, dtype=bool).T")),
    mistake("future", "The mask is off by one: a token sees the token after it.", ("np.tri(n, dtype=bool)", "np.tri(n, k=1, dtype=bool)")),
    mistake("one_sequence", "Sequences see each other: the tokens are taken as one long sequence.", ("in lengths", "in [T]")),
    mistake("over_the_group", "The softmax runs over the heads of a group: it is over keys.",
            ("axis=3", "axis=1")),
    mistake("grad_mean", "The gradients of a group are averaged: H/K query heads use the same key, so its gradient is their"
            " sum.",
            ("dk_TKGE.sum(axis=2)", "dk_TKGE.mean(axis=2)")),
    mistake("grad_of_first", "Only the first query head of each group counts: the key's gradient is the sum over all H/K of"
            " them.",
            ("dk_TKGE.sum(axis=2)", "dk_TKGE[:, :, 0]")),
    mistake("grad_tiled", "The gradient is summed over every K-th query head, as if heads were dealt out in turn (tile): sum"
            " over neighbours.",
            (SUM, "    return dk_THE.reshape(T, H // kv_heads, kv_heads, E).sum(axis=1)")),
    mistake("grad_of_all", "Each key head gets the gradients of all query heads: only those H/K that read it.",
            ("dk_TKGE.sum(axis=2)", "dk_TKGE.sum(axis=(1, 2))[:, None].repeat(kv_heads, axis=1)")),
    mistake("grad_not_summed", "The gradients are still one for each query head: sum over the group.",
            (SUM, "    return dk_THE.copy()")),
    mistake("grad_of_last", "Only the last query head of each group is left, each replaces the one before: the key's gradient is"
            " the sum over all H/K of them.",
            ("dk_TKGE.sum(axis=2)", "dk_TKGE[:, :, -1].copy()")),
    mistake("not_itself", "The mask is off by one: a token does not see itself, and the first of a sequence sees nothing (NaN).",
            ("np.tri(n, dtype=bool)", "np.tri(n, k=-1, dtype=bool)")),
    mistake("not_itself_zero", "The mask is off by one: a token does not see itself, and the first of a sequence sees nothing.",
            ("np.tri(n, dtype=bool)", "np.tri(n, k=-1, dtype=bool)"),
            ('np.einsum("kgts,ske->tkge", p_KGTS, v_TKE[s])', 'np.nan_to_num(np.einsum("kgts,ske->tkge", p_KGTS, v_TKE[s]))')),
)  # fmt: skip
