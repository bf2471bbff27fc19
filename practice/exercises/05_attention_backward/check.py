"""What is right in exercise 05 (by complex step: no backward is written here), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake

NAMES = ("dq", "dk", "dv")


def inputs(draw, T, H, E, longest):
    lengths = []
    while sum(lengths) < T:
        lengths.append(int(draw.rng.integers(1, min(longest, T - sum(lengths)) + 1)))
    if T < 5:
        # Empty ones first, in the middle and last.
        lengths = [0, *lengths[:1], 0, *lengths[1:], 0]
    a = {"do": draw(T, H, E), "q": draw(T, H, E, scale=2), "k": draw(T, H, E, scale=1.2), "v": draw(T, H, E)}
    if E == 2:
        # One sequence, and a last key that the first query would give a score of 800, if it saw it; its own query gives it 0.
        lengths = [T]
        a["k"][-1] = draw.cast(800 * E**0.5) * a["q"][0] / (a["q"][0] ** 2).sum(axis=1, keepdims=True)
        a["q"][-1] = 0
        # And in head 0 a first key whose score is as large, and seen: exp(s) alone is infinite.
        a["k"][0, 0] = draw.cast(800 * E**0.5) * a["q"][0, 0] / (a["q"][0, 0] ** 2).sum()
    # Rounded once: the truth computes them anew from q, k and v.
    q, k, v = (a[n].astype(np.float64) for n in "qkv")
    o, lse = np.zeros((T, H, E)), np.zeros((T, H))
    start = 0
    for n in lengths:
        for t in range(start, start + n):
            for h in range(H):
                s = k[start : t + 1, h] @ q[t, h] / E**0.5
                lse[t, h] = np.logaddexp.reduce(s)
                o[t, h] = np.exp(s - lse[t, h]) @ v[start : t + 1, h]
        start += n
    return a | {"o": draw.cast(o), "lse": draw.cast(lse), "lengths": lengths}


def call(code, a, at):
    return dict(zip(NAMES, code.attention_backward(*a.values()), strict=True))


def want(a, ref, at):
    ends = np.cumsum(a["lengths"])

    def loss(moved, name, index):
        """Of the sequence and head of the entry that moves alone."""
        n = int(np.searchsorted(ends, index[0], side="right"))
        t, h = slice(ends[n] - a["lengths"][n], ends[n]), index[1]
        q, k, v = (moved[name][t, h] for name in "qkv")
        return (ref.attention.head(q, k, v, q.shape[1] ** -0.5, causal=True) * a["do"][t, h]).sum()

    arrays = {name: a[name] for name in "qkv"}
    return {f"d{n}": ref.gradient.at_entries(loss, arrays, n) for n in arrays}


def sound(a, ref, at):
    """p = exp(s - lse) rounds numbers as large as the scores; the row term may be summed of p dp, which rounds them again."""
    largest, start = 0.0, 0
    for n in a["lengths"]:
        q, k = (np.abs(a[name][start : start + n]) for name in "qk")
        s_HTS = np.einsum("the,she->hts", q, k) * np.tri(n)
        largest, start = max(largest, float(s_HTS.max(initial=0.0))), start + n
    E = a["q"].shape[2]
    dp = largest / E * np.abs(a["do"]).sum(axis=2).max() * np.abs(a["v"]).max()
    return {"dq": dp * np.abs(a["k"]).max(), "dk": dp * np.abs(a["q"]).max()}


def less_than_a_matrix(a, at):
    """One T x T array; what Python itself and the pieces of many sequences need counts where that is small, in float64: answers may be."""
    T = len(a["q"])
    return {"peak bytes": max(60_000, T * T * 8)}


def root_of_width(T, H, E, longest):
    return {"sqrt(E)": E**0.5, "1/sqrt(E)": E**-0.5}


def random_size(rng):
    return (*rng.choice([2, 3, 5, 7], 3, replace=False).tolist(), 4)


PARTS = (
    Part(
        "attention_backward",
        ((7, 2, 3, 5), (37, 2, 3, 3), (5, 3, 2, 5), (4, 1, 3, 2), (1, 2, 3, 1)),
        inputs,
        call,
        want,
        limits=less_than_a_matrix,
        random_size=random_size,
        influence=(("do", "dq"), ("do", "dv")),
        factors=root_of_width,
        count_memory=True,
        sound=sound,
    ),
)

ALL = """    T = len(q_THE)
    at_T = np.repeat(np.arange(len(lengths)), lengths)
    s_HTS = np.einsum("the,she->hts", q_THE, k_THE) * scale
    p_HTS = np.where((at_T[:, None] == at_T) & np.tri(T, dtype=bool), np.exp(s_HTS - lse_TH.T[:, :, None]), 0)
    dv_THE = np.einsum("hts,the->she", p_HTS, do_THE)
    ds_HTS = p_HTS * (np.einsum("the,she->hts", do_THE, v_THE) - row_TH.T[:, :, None])
    return np.einsum("hts,she->the", ds_HTS, k_THE) * scale, np.einsum("hts,the->she", ds_HTS, q_THE) * scale, dv_THE
    start = 0
"""
MISTAKES = (
    mistake("ends_at_empty", "The loop ends at an empty sequence: it has no tokens, and others come after it.",
            ("    for n in lengths:\n", "    for n in lengths:\n        if n == 0:\n            break\n")),
    mistake("no_row_term", "ds is p dp: the softmax's own term is missing. Subtract the row's sum of do o (= sum of p dp) from"
            " dp first.",
            ("(dp_TS - row_TH[t, h, None])", "dp_TS")),
    mistake("row_outside", "The row term is subtracted from p dp, not multiplied by p: ds = p (dp - row).",
            ("p_TS * (dp_TS - row_TH[t, h, None])", "p_TS * dp_TS - row_TH[t, h, None]")),
    mistake("mean_of_dp", "The plain mean of dp is subtracted: the row term is its mean weighted by p, sum of p dp.",
            ("(dp_TS - row_TH[t, h, None])", "(dp_TS - dp_TS.mean(axis=1, keepdims=True))")),
    mistake("row_of_v", "The row term is made of do and v: it is the sum of do o, the output that these weights gave.",
            ("(do_THE * o_THE)", "(do_THE * v_THE)")),
    mistake("row_over_heads", "The row term is summed over the heads too: each head has its own, the sum of do o over that head's E.",
            ("row_TH = (do_THE * o_THE).sum(axis=2)", "row_TH = (do_THE * o_THE).sum(axis=(1, 2))[:, None] + np.zeros_like(lse_TH)")),
    mistake("diagonal", "ds is p (1 - p) dp: that is the softmax's diagonal only; raising one score lowers all other weights"
            " of the row.",
            ("p_TS * (dp_TS - row_TH[t, h, None])", "p_TS * (1 - p_TS) * dp_TS")),
    mistake("dq_not_scaled", "dq lacks the factor 1/sqrt(E): s has it, so both its gradients do.",
            ("ds_TS @ k_SE * scale", "ds_TS @ k_SE")),
    mistake("dk_not_scaled", "dk lacks the factor 1/sqrt(E): s has it, so both its gradients do.",
            ("ds_TS.T @ q_TE * scale", "ds_TS.T @ q_TE")),
    mistake("scaled_twice", "1/sqrt(E) is multiplied in twice: in ds and again in dq and dk.",
            ("row_TH[t, h, None])", "row_TH[t, h, None]) * scale")),
    mistake("scores_not_scaled", "The weights are made anew from scores without 1/sqrt(E): they are not the forward pass's"
            " weights.",
            ("q_TE @ k_SE.T * scale", "q_TE @ k_SE.T")),
    mistake("dk_of_p", "dk is made of p: it is ds, the gradient of the scores, that meets q.",
            ("ds_TS.T @ q_TE", "p_TS.T @ q_TE")),
    mistake("dv_of_ds", "dv is made of ds: o = p v, so dv is p^T do.", ("p_TS.T @ do_TE", "ds_TS.T @ do_TE"),
            ("            dv_THE[t, h] = ds_TS.T @ do_TE\n", ""),
            ("            dq_THE[t, h] =", "            dv_THE[t, h] = ds_TS.T @ do_TE\n            dq_THE[t, h] =")),
    mistake("dv_untransposed", "dv is p do: a key's gradient sums over the queries that see it, so it is p^T do.",
            ("p_TS.T @ do_TE", "p_TS @ do_TE")),
    mistake("dk_untransposed", "dk is ds q: a key's gradient sums over the queries that see it, so it is ds^T q.",
            ("ds_TS.T @ q_TE", "ds_TS @ q_TE")),
    mistake("dv_unnormalised", "p is relative to the row's maximum and not normalised: exp(s - lse) adds to 1.",
            ("s_TS - lse_TH[t, h, None]", "s_TS - s_TS.max(axis=1, keepdims=True)")),
    mistake("last_query", "The last query of each sequence is left out: a sequence of n tokens has n queries, the last of which sees all of it.",
            ("            dv_THE[t, h] =", "            p_TS[-1] = 0\n            dv_THE[t, h] =")),
    mistake("mask_forgotten", "The mask is forgotten when p is made anew: exp(s - lse) of a later key is not 0.",
            ("np.where(np.tri(n, dtype=bool), s_TS, -np.inf)", "s_TS")),
    mistake("mask_off_by_one", "The mask is off by one when p is made anew: a token sees itself.",
            ("np.tri(n, dtype=bool)", "np.tri(n, k=-1, dtype=bool)")),
    mistake("mask_after", "The mask is multiplied in after exp: exp(s - lse) of a later key can be infinite, and 0 x inf is NaN. Mask the"
            " scores, before exp.",
            ("            s_TS = np.where(np.tri(n, dtype=bool), s_TS, -np.inf)\n", ""),
            ("np.exp(s_TS - lse_TH[t, h, None])", "np.exp(s_TS - lse_TH[t, h, None]) * np.tri(n, dtype=s_TS.dtype)")),
    mistake("exp_apart", "exp(s) is divided by exp(lse): of scores in the hundreds both are infinite. p = exp(s - lse), which is at most 1.",
            ("np.exp(s_TS - lse_TH[t, h, None])", "np.exp(s_TS) / np.exp(lse_TH[t, h, None])")),
    mistake("start_by_own_length", "Sequence i is taken to begin at i times its own length: it begins where those before it end, at the sum of"
            " their lengths.",
            ("    for n in lengths:\n", "    for i, n in enumerate(lengths):\n        start = i * n\n        n = len(q_THE[start : start + n])\n")),
    mistake("one_sequence", "Sequences see each other: the tokens are taken as one long sequence.",
            ("    for n in lengths:", "    for n in [len(q_THE)]:")),
    mistake("exchanged", "dq and dk are returned in each other's place.", ("return dq_THE, dk_THE", "return dk_THE, dq_THE")),
    mistake("whole_matrix", "This is right, but the scores of all tokens with all tokens stand in memory, though most pairs"
            " are of different sequences.",
            ("    start = 0\n", ALL)),
    mistake("mask_nowhere", "There is no causal mask: the weights of later keys are not 0, and the row term sums over them too.",
            ("np.where(np.tri(n, dtype=bool), s_TS, -np.inf)", "s_TS"),
            ("(dp_TS - row_TH[t, h, None])", "(dp_TS - (p_TS * dp_TS).sum(axis=1, keepdims=True))")),
    mistake("dk_of_last", "dk is the last query's only, each replaces the one before: a key's gradient is the sum over all queries that"
            " see it.", ("ds_TS.T @ q_TE", "ds_TS[-1:].T @ q_TE[-1:]")),
    mistake("dv_of_last", "dv is the last query's only, each replaces the one before: a value's gradient is the sum over all queries"
            " that see it.", ("p_TS.T @ do_TE", "p_TS[-1:].T @ do_TE[-1:]")),
    mistake("mean_of_seen", "The plain mean of dp over the keys that are seen is subtracted: the row term is its mean weighted by p, sum of p dp.",
            ("(dp_TS - row_TH[t, h, None])",
             "(dp_TS - (np.tril(dp_TS).sum(axis=1) / np.arange(1, n + 1).astype(dp_TS.dtype))[:, None])")),
)  # fmt: skip
