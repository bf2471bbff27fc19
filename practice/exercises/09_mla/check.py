"""What is right in exercise 09 (the reference's plain attention on keys made head by head), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def inputs(draw, S, H, E, R, C):
    qr_HR, kr_SR = draw(H, R, scale=2.5), draw(S, R, scale=1.5)
    if R == 2:
        # Scores of many hundred, most of which is common to a query's keys: above 0 for one head, below for the next.
        qr_HR[::2, 0], qr_HR[1::2, 0], kr_SR[:, 0] = 60, -60, 60
    return {
        "qn_HE": draw(H, E, scale=2.5),
        "qr_HR": qr_HR,
        "c_SC": draw(S, C),
        "kr_SR": kr_SR,
        "Wuk_CHE": draw(C, H, E, scale=1.5 / C**0.5),
        "Wuv_CHE": draw(C, H, E),
    }


def expanded(code, a, at):
    return {"o": code.mla_expanded(*a.values()), "o of the next token": code.mla_expanded(*after(a).values())}


def absorbed(code, a, at):
    return {"o": code.mla_absorbed(*a.values()), "o of the next token": code.mla_absorbed(*after(a).values())}


def after(a):
    """The next token's query has the same weights: the very same arrays."""
    return a | {"qn_HE": -a["qn_HE"], "qr_HR": a["qr_HR"] / 2}


def want(a, ref, at):
    return {"o": of_token(a, ref), "o of the next token": of_token(after(a), ref)}


def of_token(a, ref):
    rows = []
    for h, (qn_E, qr_R) in enumerate(zip(a["qn_HE"], a["qr_HR"], strict=True)):
        q_1F = np.concatenate([qn_E, qr_R])[None]
        k_SF = np.concatenate([a["c_SC"] @ a["Wuk_CHE"][:, h], a["kr_SR"]], axis=1)
        rows.append(ref.attention.head(q_1F, k_SF, a["c_SC"] @ a["Wuv_CHE"][:, h], len(q_1F[0]) ** -0.5, causal=False)[0])
    return np.stack(rows)


def sound(a, ref, at):
    """p = exp(s - lse) rounds numbers as large as the scores, and scales a head's values with them."""
    k_SHE, v_SHE = (np.einsum("sc,che->she", a["c_SC"], a[W]) for W in ("Wuk_CHE", "Wuv_CHE"))
    s_HS = np.einsum("he,she->hs", a["qn_HE"], k_SHE) + a["qr_HR"] @ a["kr_SR"].T
    s_H = np.abs(s_HS).max(axis=1) / (a["qn_HE"].shape[1] + a["qr_HR"].shape[1]) ** 0.5
    return dict.fromkeys(("o", "o of the next token"), s_H[:, None] * np.abs(v_SHE).max())


def less_than_the_keys(a, at):
    """Two thirds of the expanded keys, in float64, which answers may work in; what Python itself needs counts where those are few."""
    return {"peak bytes": max(30_000, len(a["c_SC"]) * 8 * a["qn_HE"].size * 2 // 3)}


def random_size(rng):
    return tuple(rng.choice([2, 3, 5, 7, 11], 5, replace=False).tolist())


SIZES = ((7, 2, 3, 4, 5), (5, 3, 4, 2, 7), (1, 2, 5, 4, 3), (5, 1, 3, 4, 2), (3, 2, 1, 4, 5), (4, 3, 2, 1, 5), (6, 3, 5, 2, 1))
LONG = (199, 6, 25, 4, 11)
PARTS = (
    Part("mla_expanded", SIZES, inputs, expanded, want, random_size=random_size, influence=(("qr_HR", "o"),), sound=sound),
    Part(
        "mla_absorbed",
        (SIZES[0], LONG, *SIZES[1:]),
        inputs,
        absorbed,
        want,
        limits=less_than_the_keys,
        random_size=random_size,
        influence=(("qr_HR", "o"),),
        count_memory=True,
        sound=sound,
    ),
)

EXPANDED_SCORE, ABSORBED_SCORE = "(content_HS + rotary_HS) / math.sqrt(E + R)", "(latent_HS + rotated_HS) / math.sqrt(E + R)"


def scores(name, sentence, expanded, absorbed):
    """A mistake in both functions, and the same in the second alone."""
    edits = (EXPANDED_SCORE, expanded), (ABSORBED_SCORE, absorbed)
    return mistake(name, sentence, *edits), mistake(f"{name}_absorbed", sentence, edits[1])


def crosswise(query, key):
    """The scores of these parts joined, each as if it were in the other's order."""
    return (
        "np.einsum('hx,shx->hs', np.concatenate(" + query + ", axis=1), np.concatenate("
        + key.replace("kr_SHR", "np.repeat(kr_SR[:, None], len(qn_HE), axis=1)") + ", axis=2)) / math.sqrt(E + R)"
    )  # fmt: skip


MISTAKES = (
    mistake("squeezed", "np.squeeze takes every dim of 1 away: with one head, or heads of width 1, o loses it. Take away the dim that you mean.",
            ('return np.einsum("hc,che->he", oc_HC, Wuv_CHE)', 'return np.squeeze(np.einsum("hc,che->he", oc_HC, Wuv_CHE))')),
    *scores("scale_of_E", "The scores are divided by sqrt(E): a query has E + R entries, the rotary ones too.",
            "(content_HS + rotary_HS) / math.sqrt(E)", "(latent_HS + rotated_HS) / math.sqrt(E)"),
    mistake("scale_of_model", "The scores are divided by the root of the model's width over heads or the like (here H E): they"
            " are sums of E + R terms.",
            (EXPANDED_SCORE, "(content_HS + rotary_HS) / math.sqrt(len(qn_HE) * E)"), seen="NVIDIA/Megatron-LM #1501"),
    mistake("scale_of_latent", "The absorbed scores are divided by sqrt(C + R), the width they are computed in: absorbing changes no number, so"
            " it stays sqrt(E + R).",
            (ABSORBED_SCORE, "(latent_HS + rotated_HS) / math.sqrt(c_SC.shape[1] + R)"), seen="ollama/ollama #13893"),
    mistake("scale_of_C", "The absorbed scores are divided by sqrt(C): absorbing changes no number, so it stays sqrt(E + R).",
            (ABSORBED_SCORE, "(latent_HS + rotated_HS) / math.sqrt(c_SC.shape[1])")),
    *scores("no_scale", "The scores are not divided by sqrt(E + R).", "content_HS + rotary_HS", "latent_HS + rotated_HS"),
    *scores("content_scaled", "Only the content part is divided by sqrt(E + R): the rotary part is part of the same product.",
            "content_HS / math.sqrt(E + R) + rotary_HS", "latent_HS / math.sqrt(E + R) + rotated_HS"),
    *scores("each_scaled", "The two parts have a scale each, sqrt(E) and sqrt(R): they are one product of width E + R.",
            "content_HS / math.sqrt(E) + rotary_HS / math.sqrt(R)", "latent_HS / math.sqrt(E) + rotated_HS / math.sqrt(R)"),
    *scores("no_rotary", "The rotary part is missing: the scores know no positions.",
            "content_HS / math.sqrt(E + R)", "latent_HS / math.sqrt(E + R)"),
    mistake("crosswise", "The parts are multiplied crosswise: the rotary part comes first in the query and last in the key.",
            (EXPANDED_SCORE, crosswise("[qr_HR, qn_HE]", "[k_SHE, kr_SHR]"))),
    mistake("crosswise_keys", "The parts are multiplied crosswise: the rotary part comes last in the query and first in the key.",
            (EXPANDED_SCORE, crosswise("[qn_HE, qr_HR]", "[kr_SHR, k_SHE]"))),
    mistake("no_maximum", "exp overflows: subtract each row's maximum first.",
            ("score_HS - score_HS.max(axis=1, keepdims=True)", "score_HS"), ("sum_HS - sum_HS.max(axis=1, keepdims=True)", "sum_HS")),
    mistake("one_rotary_query", "All heads use head 0's rotary query: it is the rotary key that they share.",
            ("qr_HR @ kr_SR.T", "qr_HR[[0] * len(qr_HR)] @ kr_SR.T")),
    mistake("rotary_key_per_head", "The rotary key is indexed by head: there is one, of R numbers a token, that all heads"
            " share.",
            ("rotary_HS = qr_HR @ kr_SR.T",
             'rotary_HS = np.einsum("hr,shr->hs", qr_HR, kr_SR.reshape(len(kr_SR), len(qr_HR), -1))')),
    mistake("weights_exchanged", "Wuk and Wuv are exchanged.",
            ('"sc,che->she", c_SC, Wuk_CHE', '"sc,che->she", c_SC, Wuv'),
            ('"sc,che->she", c_SC, Wuv_CHE', '"sc,che->she", c_SC, Wuk_CHE'),
            ('"sc,che->she", c_SC, Wuv)', '"sc,che->she", c_SC, Wuv_CHE)')),
    mistake("values_by_keys", "The values are the keys: they have a matrix of their own, Wuv.",
            ('"sc,che->she", c_SC, Wuv_CHE', '"sc,che->she", c_SC, Wuk_CHE')),
    mistake("wuk_on_the_way_out", "The way out goes through Wuk: the weighted latent becomes a value by Wuv.",
            ('"hc,che->he", oc_HC, Wuv_CHE', '"hc,che->he", oc_HC, Wuk_CHE')),
    mistake("wuv_on_the_way_in", "The query is brought to the latent through Wuv: q . (Wuk c) = (Wuk^T q) . c.",
            ('"he,che->hc", qn_HE, Wuk_CHE', '"he,che->hc", qn_HE, Wuv_CHE')),
    mistake("wuv_forgotten", "The weighted latent is returned, of width C: it must still go through Wuv.",
            ('return np.einsum("hc,che->he", oc_HC, Wuv_CHE)', "return oc_HC")),
    mistake("heads_together", "The softmax runs over heads: over the S cached tokens, for each head by itself.",
            ("axis=1", "axis=0")),
    mistake("softmax_twice", "Content and rotary part have a softmax each: they are one score.",
            ("    w_HS = np.exp(score_HS - score_HS.max(axis=1, keepdims=True))\n"
             "    p_HS = w_HS / w_HS.sum(axis=1, keepdims=True)",
             "    p_HS = 0\n    for part_HS in (content_HS / math.sqrt(E + R), rotary_HS / math.sqrt(E + R)):\n"
             "        w_HS = np.exp(part_HS - part_HS.max(axis=1, keepdims=True))\n"
             "        p_HS = p_HS + w_HS / w_HS.sum(axis=1, keepdims=True) / 2")),
    mistake("half_inside", "This is right, but the keys or the values of all heads are made, S x H x E numbers: the query meets the latent, and"
            " the weighted latent goes through Wuv.",
            ("    latent_HS = qc_HC @ c_SC.T",
             "    k_SHE = np.einsum('sc,che->she', c_SC, Wuk_CHE)\n    latent_HS = np.einsum('he,she->hs', qn_HE, k_SHE)")),
    mistake("expanded_inside", "This is right, but keys and values of all heads are made: the latent is to be met by the"
            " query, not blown up.",
            ("    latent_HS = qc_HC @ c_SC.T",
             "    k_SHE, v_SHE = (np.einsum('sc,che->she', c_SC, W_CHE) for W_CHE in (Wuk_CHE, Wuv_CHE))\n"
             "    latent_HS = np.einsum('he,she->hs', qn_HE, k_SHE)"),
            ('return np.einsum("hc,che->he", oc_HC, Wuv_CHE)', "return np.einsum('hs,she->he', weight_HS, v_SHE)"),
            seen="huggingface/transformers #47761"),
)  # fmt: skip
