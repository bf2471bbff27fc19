"""What is right in exercise 03 (ratio by ratio, without a maximum), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def rows(draw, T, S):
    x_TS = draw(T, S, scale=3)
    x_TS[T // 2, S // 2] = -np.inf
    # Close together: where one weight is nearly 1, rounding at 10000 would seem to matter less than it does.
    x_TS[0] = 10000 + 0.2 * x_TS[0]
    x_TS[-1] = 0.2 * x_TS[-1] - 10000
    if T > 2:
        x_TS[1] = -np.inf
    return {"x_TS": x_TS}


def ratios(x_TS):
    """p[t, s] = 1 / sum over j of exp(x[t, j] - x[t, s])."""
    p_TS = np.zeros_like(x_TS)
    for p_S, x_S in zip(p_TS, x_TS, strict=True):
        some = x_S > -np.inf
        with np.errstate(over="ignore"):
            p_S[some] = 1 / np.exp(x_S[some] - x_S[some][:, None]).sum(axis=1)
    return p_TS


def want_softmax(a, ref, at):
    return {"p": ratios(a["x_TS"])}


def blocks_of(draw, T, S, E):
    """Keys in blocks of random sizes, one of which nobody sees, the first or a later one; scores of +-10000 in two rows."""
    q_TE, k_SE = draw(T, E, scale=4), draw(S, E)
    k_SE[:, 0] = 100
    q_TE[:, 0] *= 0.01
    for t, huge in ((0, 100), (-1, -100)):
        q_TE[t] *= 0.2
        q_TE[t, 0] = huge * E**0.5
    if T > 3:
        # Scores of one query that lie thousands apart: a block may be all of the sum, or nothing beside those before it.
        q_TE[2] *= 500
    ends = [0]
    while ends[-1] < S:
        ends.append(min(S, ends[-1] + int(draw.rng.integers(1, max(2, min(S // 2, 16))))))
    order = draw.rng.permutation(len(ends) - 1)
    cuts = [(ends[i], ends[i + 1]) for i in order.tolist()]
    seen_at = draw.rng.permutation(S)
    start, stop = cuts[E % 2 * (len(cuts) // 2)]
    seen_at[start:stop] = S
    until_T = draw.rng.integers(S // 2, S, T)
    if T > 2:
        until_T[1] = -1
    arrays = {"q_TE": q_TE, "k_SE": k_SE, "v_SE": draw(S, E)}
    return arrays | {"cuts": cuts, "seen_at": seen_at, "until_T": until_T}


def seen(a, s):
    return a["seen_at"][s] <= a["until_T"][:, None]


def attend(code, a, at):
    cuts = [slice(start, stop) for start, stop in a["cuts"]]
    o_TE, lse_T = code.attend_online(a["q_TE"], ((a["k_SE"][s], a["v_SE"][s], seen(a, s)) for s in cuts))
    return {"o": o_TE, "lse": lse_T}


def scores(a):
    x_TS = np.where(seen(a, slice(None)), a["q_TE"] @ a["k_SE"].T / a["q_TE"].shape[1] ** 0.5, -np.inf)
    # The largest score's share of the sum gives the log-sum-exp.
    p_TS = ratios(x_TS)
    with np.errstate(all="ignore"):
        lse_T = np.where(p_TS.any(axis=1), x_TS.max(axis=1) - np.log(p_TS.max(axis=1)), -np.inf)
    return p_TS, lse_T


def want_attend(a, ref, at):
    p_TS, lse_T = scores(a)
    return {"o": p_TS @ a["v_SE"], "lse": lse_T}


def by_block(a, ref, at):
    p_TS, _ = scores(a)
    parts = {f"block {n}": p_TS[:, i:j] @ a["v_SE"][i:j] for n, (i, j) in enumerate(a["cuts"])}
    return {"o": {name: part for name, part in parts.items() if part.any()}}


def half_a_matrix(a, at):
    """Half of the whole score matrix; what Python itself needs counts where that is tiny. An answer may work in float64 inside."""
    T, S = len(a["q_TE"]), len(a["k_SE"])
    return {"peak bytes": max(40_000, T * S * 8 // 2)}


def largest(x_TS):
    """The largest score of each row, as far as it is finite."""
    return np.where(np.isfinite(x_TS), np.abs(x_TS), 0).max(axis=1, initial=0)[:, None]


def sound_softmax(a, ref, at):
    """exp(x - lse) rounds numbers as large as x."""
    return {"p": largest(a["x_TS"])}


def sound_attend(a, ref, at):
    """Blocks may be merged by their lse, which is as large as the scores."""
    x_TS = a["q_TE"] @ a["k_SE"].T / a["q_TE"].shape[1] ** 0.5
    return {"o": largest(x_TS) * np.abs(a["v_SE"]).max(initial=0)}


def random_rows(rng):
    return tuple(rng.choice([3, 5, 7, 11, 13], 2, replace=False).tolist())


def random_size(rng):
    return tuple(rng.choice([3, 5, 7, 11, 13], 3, replace=False).tolist())


PARTS = (
    Part(
        "softmax",
        ((5, 7), (3, 4), (1, 2)),
        rows,
        lambda code, a, at: {"p": code.softmax(a["x_TS"])},
        want_softmax,
        random_size=random_rows,
        influence=(("x_TS", "p"),),
        sound=sound_softmax,
    ),
    Part(
        "attend_online",
        ((5, 7, 3), (23, 331, 4), (1, 11, 2)),
        blocks_of,
        attend,
        want_attend,
        by_block,
        half_a_matrix,
        random_size=random_size,
        influence=(("v_SE", "o"),),
        sound=sound_attend,
        count_memory=True,
    ),
)

WHOLE = """    k_SE, v_SE, seen_TS = zip(*blocks)
    blocks = [(np.concatenate(k_SE), np.concatenate(v_SE), np.concatenate(seen_TS, axis=1))]
    for k_SE, v_SE, seen_TS in blocks:"""
MISTAKES = (
    mistake("no_maximum", "No maximum is subtracted: exp(10000) is inf, and inf/inf is NaN.",
            ("    w_TS = np.exp(x_TS - top_T1)", "    w_TS = np.exp(x_TS)")),
    mistake("one_maximum", "One maximum is taken of the whole array: rows that lie far below it underflow to 0. Each row has"
            " its own.",
            ("x_TS.max(axis=1, keepdims=True)", "x_TS.max(keepdims=True)")),
    mistake("columns", "The columns add to 1: it is each row, one query's weights, that must.",
            ("axis=1, keepdims=True", "axis=0, keepdims=True")),
    mistake("not_divided", "The weights are not divided by their sum.",
            ("return w_TS / np.where(sum_T1 == 0, 1, sum_T1)", "return w_TS")),
    mistake("empty_row", "A row of -inf becomes NaN: -inf - (-inf). Where the maximum is -inf, subtract 0 and divide by 1.",
            ("    top_T1 = np.where(top_T1 == -np.inf, 0, top_T1)\n", "")),
    mistake("row_of_numbers", "In softmax -inf is made a large negative number: a row of -inf only then weighs all alike, and its weights are 0.",
            ("    top_T1 = x_TS.max(axis=1, keepdims=True)\n", "    x_TS = np.maximum(x_TS, np.finfo(x_TS.dtype).min / 2)\n    top_T1 = x_TS.max(axis=1, keepdims=True)\n")),
    mistake("o_not_rescaled", "The sum is rescaled when a larger score comes, the output is not: both are sums of the same"
            " weights.",
            ("o_TE * shrink_T[:, None] + w_TS", "o_TE + w_TS")),
    mistake("sum_not_rescaled", "The output is rescaled when a larger score comes, the sum is not: both are sums of the same"
            " weights.",
            ("sum_T * shrink_T + w_TS", "sum_T + w_TS")),
    mistake("averaged_in_turn", "Each block is normalised by itself, and half of it is added to half of what was there: blocks weigh as much as their"
            " exp(score) sums say.",
            ("o_TE = o_TE * shrink_T[:, None] + w_TS @ v_SE",
             "own_T = w_TS.sum(axis=1)\n        both_T1 = (np.isfinite(top_T) & (own_T > 0))[:, None]\n"
             "        new_TE = (w_TS / np.where(own_T == 0, 1, own_T)[:, None]) @ v_SE\n        o_TE = np.where(both_T1, (o_TE + new_TE) / 2, o_TE + new_TE)"),
            ("o_TE / np.where(sum_T == 0, 1, sum_T)[:, None]", "o_TE")),
    mistake("averaged", "Each block is normalised by itself and the blocks are averaged: blocks weigh as much as their"
            " exp(score) sums say.",
            ("    for k_SE, v_SE, seen_TS in blocks:", "    blocks = list(blocks)\n    for k_SE, v_SE, seen_TS in blocks:"),
            ("o_TE = o_TE * shrink_T[:, None] + w_TS @ v_SE",
             "own_T = w_TS.sum(axis=1)\n        o_TE = o_TE + (w_TS / np.where(own_T == 0, 1, own_T)[:, None]) @ v_SE"),
            ("o_TE / np.where(sum_T == 0, 1, sum_T)[:, None]", "o_TE / len(blocks)")),
    mistake("last_maximum", "The maximum is the last block's and not the largest so far: the weights of earlier blocks can"
            " overflow.",
            ("np.maximum(top_T, x_TS.max(axis=1))", "x_TS.max(axis=1)")),
    mistake("no_running_maximum", "No maximum is subtracted in the blocks: exp of a score of 1000 is inf.",
            ("from_T = np.where(new_T == -np.inf, 0, new_T)", "from_T = np.zeros_like(new_T)"),
            ("shrink_T = np.exp(top_T - from_T)", "shrink_T = np.ones_like(new_T)"),
            ("        top_T = new_T\n", "        top_T = from_T\n"),
            seen="jzhang38/EasyContext #14"),
    mistake("unseen_block", "A block that a query does not see makes NaN of it: its maximum is -inf, and -inf - (-inf) is NaN.",
            ("from_T = np.where(new_T == -np.inf, 0, new_T)", "from_T = new_T")),
    mistake("nothing_seen", "A query that sees no key is divided by 0: its output is 0, not NaN.",
            ("o_TE / np.where(sum_T == 0, 1, sum_T)[:, None]", "o_TE / sum_T[:, None]")),
    mistake("not_scaled", "The scores are not divided by sqrt(E).", (" / math.sqrt(E)", "")),
    mistake("mask_left_out", "Every query sees every key: `seen` is not used.", ("np.where(seen_TS, x_TS, -np.inf)", "x_TS")),
    mistake("mask_zero", "Keys that are not seen get the score 0 and so the weight exp(0): their score is -inf.",
            ("np.where(seen_TS, x_TS, -np.inf)", "np.where(seen_TS, x_TS, 0)")),
    mistake("lse_relative", "lse is the logarithm of the sum relative to the maximum: the maximum must be added back.",
            ("lse_T = top_T + np.log(sum_T)", "lse_T = np.log(sum_T)")),
    mistake("whole_matrix", "This is right, but all blocks are joined first: the scores of all keys stand in memory at once.",
            ("    for k_SE, v_SE, seen_TS in blocks:", WHOLE)),
    mistake("mask_large", "Keys that are not seen get a large negative score and not -inf: a query that sees none then gets the mean of"
            " all values. Its output is 0.", ("np.where(seen_TS, x_TS, -np.inf)", "np.where(seen_TS, x_TS, -1e9).astype(q_TE.dtype)")),
    mistake("no_running_maximum_masked", "No maximum is subtracted in the blocks: exp of a score of 1000 is inf, of -1000 it is 0.",
            ("        x_TS = np.where(seen_TS, x_TS, -np.inf)\n", ""),
            ("np.exp(x_TS - from_T[:, None])", "np.exp(x_TS) * seen_TS"),
            ("sum_T * shrink_T", "sum_T"), ("o_TE * shrink_T[:, None]", "o_TE"), ("top_T + np.log(sum_T)", "np.log(sum_T)")),
    mistake("ends_at_unseen", "The loop ends at a block that no query sees: others come after it. Pass over that one alone.",
            ("        x_TS = q_TE @ k_SE.T / math.sqrt(E)\n", "        if not seen_TS.any():\n            break\n        x_TS = q_TE @ k_SE.T / math.sqrt(E)\n")),
    mistake("gone_through", "o is 0 and lse -inf, as if no block had come. If you go through `blocks` twice: it is an iterator, which gives each"
            " block once, and a second pass finds none. Do all with a block while it is there.",
            ("    for k_SE, v_SE, seen_TS in blocks:", "    for _ in blocks:\n        pass\n    for k_SE, v_SE, seen_TS in blocks:")),
)  # fmt: skip
