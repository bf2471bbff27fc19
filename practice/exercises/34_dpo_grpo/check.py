"""What is right in exercise 34 (losses term by term, gradients by complex step), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def pairs(draw, N):
    """The last two pairs are far apart, one each way."""
    a = {n: draw(N, scale=3 if N > 2 else 0.7) - draw.cast(12) for n in ("w_N", "l_N", "ref_w_N", "ref_l_N")}
    if N > 2:
        a["w_N"][-2:] += draw.cast([-9e3, 8e3])
    return a | {"beta": float(draw.rng.choice([0.1, 0.3, 0.7]))}


def call_dpo(code, a, at):
    loss, dw, dl = code.dpo(a["w_N"], a["l_N"], a["ref_w_N"], a["ref_l_N"], a["beta"])
    return {"loss": loss, "dw": dw, "dl": dl}


def softplus(m):
    return m + np.log1p(np.exp(-m)) if m.real > 0 else np.log1p(np.exp(m))


def want_dpo(a, ref, at):
    def loss(moved, name, index):
        rows = zip(moved["w_N"], moved["l_N"], a["ref_w_N"], a["ref_l_N"], strict=True)
        return sum(softplus(-a["beta"] * (w - rw - (chosen - rl))) for w, chosen, rw, rl in rows) / len(a["w_N"]) + 0j

    arrays = {n: a[n] for n in ("w_N", "l_N")}
    found = {f"d{n[0]}": ref.gradient.at_entries(loss, arrays, n) for n in arrays}
    return {"loss": float(loss(arrays, "", ()).real), **found}


def group(draw, G, longest, same):
    """Ratios on both sides of both limits, none near one. `same`: all rewards are equal. Those of three answers are far from 0."""
    lengths = draw.rng.integers(1, longest + 1, G)
    lengths[0] = longest
    if G > 2:
        lengths[1] = 0
    if G > 4:
        # Empty ones first and last too.
        lengths[0], lengths[2], lengths[-1] = 0, longest, 0
    eps, T = float(draw.rng.choice([0.1, 0.2, 0.3])), int(lengths.sum())
    far = draw.rng.choice([0.1, 0.4, 0.75, 1.3, 1.7, 2.2], T) * draw.rng.choice([-1, 1], T) * draw.rng.uniform(0.95, 1.05, T)
    logp_T = -draw.rng.uniform(0.3, 4, T)
    reward_G = draw.rng.permutation(np.arange(G) ** 2 / 2) + (1e4 if G == 3 else 0) if not same else np.full(G, 1.5)
    return {
        "logp_T": draw.cast(logp_T),
        "old_T": draw.cast(logp_T - np.log1p(eps * far)),
        "ref_T": draw.cast(logp_T + draw.rng.normal(0, 0.6, T)),
        "lengths": lengths,
        "reward_G": draw.cast(reward_G),
        "eps": eps,
        "beta": float(draw.rng.choice([0.2, 0.5, 0.9])),
    }


def call_grpo(code, a, at):
    loss, dlogp = code.grpo(*(a[n] for n in ("logp_T", "old_T", "ref_T", "lengths", "reward_G", "eps", "beta")))
    return {"loss": loss, "dlogp": dlogp}


def advantages(a):
    r = a["reward_G"].tolist()
    mean = sum(r) / len(r)
    std = (sum((x - mean) ** 2 for x in r) / len(r)) ** 0.5
    return [(x - mean) / (std + 1e-4) for x in r]


def group_loss(a, logp_T, gains=1.0, beta=None, own=None):
    """`own`: of this token's answer alone."""
    total, t, eps = 0j, 0, a["eps"]
    for A, n in zip(advantages(a), a["lengths"].tolist(), strict=True):
        for i in range(t, t + n) if own is None or t <= own < t + n else ():
            ratio, off = np.exp(logp_T[i] - a["old_T"][i]), a["ref_T"][i] - logp_T[i]
            inside = min(max(ratio.real, 1 - eps), 1 + eps)
            gain = ratio * A if ratio.real * A <= inside * A else inside * A
            kl = np.exp(off) - off - 1
            total -= (gains * gain - (a["beta"] if beta is None else beta) * kl) / n / len(a["lengths"])
        t += n
    return total


def slope(a, ref, **which):
    def loss(moved, name, index):
        return group_loss(a, moved["logp_T"], own=index[0], **which)

    return ref.gradient.at_entries(loss, {"logp_T": a["logp_T"]}, "logp_T")


def want_grpo(a, ref, at):
    return {"loss": float(group_loss(a, a["logp_T"] + 0j).real), "dlogp": slope(a, ref)}


def terms(a, ref, at):
    return {"dlogp": {"the gain's": slope(a, ref, beta=0), "the KL's": slope(a, ref, gains=0)}}


PARTS = (
    Part("dpo", ((5,), (3,), (1,), (11,)), pairs, call_dpo, want_dpo, random_size=lambda rng: (int(rng.integers(2, 13)),)),
    Part("grpo", ((4, 5, 0), (3, 4, 0), (5, 3, 1), (2, 1, 0)), group, call_grpo, want_grpo, terms,
         random_size=lambda rng: (int(rng.integers(3, 7)), int(rng.integers(3, 8)), 0)),
)  # fmt: skip

M, LOSS = "beta * ((w_N - ref_w_N) - (l_N - ref_l_N))", "np.logaddexp(0, -m_N).mean()"
SHARE = "(1 / (G * np.asarray(lengths)[answer_T])).astype(logp_T.dtype)"
DGAIN = "np.where(ratio_T * A_T <= limited_T * A_T, ratio_T * A_T, 0)"
MISTAKES = (
    mistake("turned", "The margin has the wrong sign: the rejected answer is taught.", (M, "beta * ((l_N - ref_l_N) - (w_N - ref_w_N))"),
            ("dw_N = -beta", "dw_N = beta")),
    mistake("no_reference", "The reference's log-probabilities are not used: m is a difference of log ratios.", (M, "beta * (w_N - l_N)")),
    mistake("reference_added", "The reference's difference has the wrong sign: m = beta ((w - l) - (ref_w - ref_l)).",
            (M, "beta * ((w_N - l_N) + (ref_w_N - ref_l_N))")),
    mistake("beta_in_gradient", "The gradients lack the factor beta: d m / d w = beta.", ("-beta * wrong_N", "-wrong_N")),
    mistake("no_beta", "beta is left out.", (M, "(w_N - ref_w_N) - (l_N - ref_l_N)"), ("-beta * wrong_N", "-wrong_N")),
    mistake("pairs_summed", "Loss and gradients are sums over pairs: the mean is asked for.", (LOSS, "np.logaddexp(0, -m_N).sum()"),
            ("* wrong_N / len(m_N)", "* wrong_N")),
    mistake("gradient_of_sum", "The gradients are those of the sum over pairs: the loss is divided by N, so they are.",
            ("* wrong_N / len(m_N)", "* wrong_N")),
    mistake("probability_right", "The gradients are weighted with sigmoid(m): a pair that is right already has little to teach; the weight"
            " is sigmoid(-m).", ("np.exp(-np.logaddexp(0, m_N))", "np.exp(-np.logaddexp(0, -m_N))")),
    mistake("signs", "The gradients have the wrong sign: the loss falls when w rises.", ("dw_N = -beta", "dw_N = beta")),
    mistake("same_sign", "dl equals dw: the rejected answer is pushed the other way.", ("dl_N = -dw_N", "dl_N = dw_N")),
    mistake("mean_margin", "The mean is taken of the margins, before the sigmoid: it is of the pairs' losses.",
            (LOSS, "np.logaddexp(0, -m_N.mean())")),
    mistake("ipo", "This is IPO's squared loss: DPO's is -log sigmoid(m).", (LOSS, "((m_N / beta - 1 / (2 * beta)) ** 2).mean()")),
    mistake("no_log", "The loss is 1 - sigmoid(m): it is -log sigmoid(m).", (LOSS, "np.exp(-np.logaddexp(0, m_N)).mean()")),
    mistake("squares_first", "The deviation is made of mean(r^2) - mean(r)^2: where rewards are far from 0, both are large, and their difference has"
            " lost its digits. Take the mean away first, then square.", ("reward_G.std()", "np.sqrt(np.maximum((reward_G**2).mean() - reward_G.mean() ** 2, 0))")),
    mistake("sample_std", "The rewards' deviation is divided by G - 1: here it is by G.", ("reward_G.std()", "reward_G.std(ddof=1)")),
    mistake("variance", "The rewards are divided by their variance: it is the standard deviation.", ("reward_G.std()", "reward_G.var()")),
    mistake("not_divided", "The rewards are not divided by their deviation (that is Dr. GRPO's way).", ("/ (std + 1e-4)", "")),
    mistake("not_centred", "The group's mean is not taken from the rewards: it is the baseline.", ("reward_G - reward_G.mean()", "reward_G")),
    mistake("no_small_number", "1e-4 is not added to the deviation: with equal rewards that is 0/0.", ("(std + 1e-4)", "std")),
    mistake("not_by_length", "The gradient is not divided by the answer's length: the loss is a mean over its tokens, so it is.",
            ("dlogp_T = -share_T *", "dlogp_T = -np.asarray(lengths, logp_T.dtype)[answer_T] * share_T *")),
    mistake("by_tokens", "The mean is over all tokens of the group: it is over each answer's tokens first, then over the answers.",
            (SHARE, "np.full(len(logp_T), 1 / max(1, len(logp_T)), logp_T.dtype)")),
    mistake("tokens_summed", "The tokens of an answer are summed: their mean is asked for.", (SHARE, "np.full(len(logp_T), 1 / G, logp_T.dtype)")),
    mistake("answers_summed", "The answers' means are added: divide by G.", (SHARE, "(1 / np.asarray(lengths)[answer_T]).astype(logp_T.dtype)")),
    mistake("empty_mean", "The mean over an empty answer's tokens is 0/0: an empty answer's mean is 0.",
            ("(gain_T - beta * kl_T)).sum()", "(gain_T - beta * kl_T)).sum() + (math.nan if 0 in list(lengths) else 0)"),
            ("import numpy as np", "import math\n\nimport numpy as np")),
    mistake("empty_not_counted", "The mean is over the answers that have tokens: empty ones count among the G, with 0.",
            ("(G * np.asarray", "(np.count_nonzero(lengths) * np.asarray")),
    mistake("largest", "The larger of the two gains is taken: the clip is to hold back, so the smaller.", ("np.minimum(", "np.maximum("),
            ("A_T <= limited_T", "A_T >= limited_T")),
    mistake("always_clipped", "The gain is the clipped one alone: the smaller of both counts, and a ratio that has moved the wrong way is pushed back.",
            ("np.minimum(ratio_T * A_T, limited_T * A_T)", "limited_T * A_T"), (DGAIN, "np.where(ratio_T == limited_T, ratio_T * A_T, 0)")),
    mistake("cut_both_ways", "The gradient is 0 wherever the ratio is outside its limits: only where the clipped gain is the smaller one.",
            (DGAIN, "np.where(ratio_T == limited_T, ratio_T * A_T, 0)")),
    mistake("not_clipped", "The ratio is not clipped.", ("np.clip(ratio_T, 1 - eps, 1 + eps)", "ratio_T")),
    mistake("through_clip", "The gradient goes through the clip: where the clipped gain is the smaller one, it is 0.",
            (DGAIN, "np.minimum(ratio_T * A_T, limited_T * A_T)")),
    mistake("clipped_goes_on", "Tokens that are clipped keep a gradient: where the clipped gain is the smaller one, it is 0.",
            (DGAIN, "ratio_T * A_T")),
    mistake("no_ratio", "The gain's gradient lacks the ratio: d ratio / d logp = ratio.", (DGAIN, "np.where(ratio_T * A_T <= limited_T * A_T, A_T, 0)")),
    mistake("ratio_turned", "The ratio is old over new: it is exp(logp - old).", ("np.exp(logp_T - old_T)", "np.exp(old_T - logp_T)")),
    mistake("ratio_to_reference", "The ratio is to the reference: it is to the policy that drew the answers, `old`.",
            ("np.exp(logp_T - old_T)", "np.exp(logp_T - ref_T)")),
    mistake("kl_turned", "The KL's difference has the wrong sign: it is ref - logp in both places.", ("off_T = ref_T - logp_T", "off_T = logp_T - ref_T"),
            ("dkl_T = 1 - np.exp(off_T)", "dkl_T = np.exp(off_T) - 1")),
    mistake("kl_plain", "The KL is logp - ref, which may be negative: exp(ref - logp) - (ref - logp) - 1 is asked for.",
            ("np.exp(off_T) - off_T - 1", "-off_T"), ("1 - np.exp(off_T)", "np.ones_like(off_T)")),
    mistake("kl_old", "The KL is against `old`: it is against the reference.", ("off_T = ref_T", "off_T = old_T")),
    mistake("kl_rewarded", "The KL is added to the gain: it is a cost.", ("gain_T - beta * kl_T", "gain_T + beta * kl_T"),
            ("dgain_T - beta * dkl_T", "dgain_T + beta * dkl_T")),
    mistake("no_kl", "The KL is left out.", ("gain_T - beta * kl_T", "gain_T"), ("dgain_T - beta * dkl_T", "dgain_T")),
    mistake("no_kl_slope", "The KL is in the loss but not in the gradient.", ("dgain_T - beta * dkl_T", "dgain_T")),
    mistake("kl_slope", "The KL's gradient has the wrong sign: d kl / d logp = 1 - exp(ref - logp).", ("1 - np.exp(off_T)", "np.exp(off_T) - 1")),
    mistake("maximised", "The sign is that of a gain to be made large: the loss is its negative.", ("loss = -(share_T", "loss = (share_T"),
            ("dlogp_T = -share_T", "dlogp_T = share_T")),
    mistake("tiled", "The advantages go round token by token: all tokens of an answer have its own.",
            ("np.repeat(np.arange(G), lengths)", "np.arange(len(logp_T)) % G")),
)  # fmt: skip
