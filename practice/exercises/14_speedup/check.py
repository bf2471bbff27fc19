"""What is right in exercise 14 (outcomes enumerated in exact fractions), and what is often wrong."""

from fractions import Fraction

import numpy as np

from practice.part import Part, mistake

# Rows of the paper's Table 1 (alpha, gamma), and the ends.
TABLE = ((0.8, 5), (0.6, 2), (0.7, 3), (0.8, 2), (0.9, 2), (0.9, 10), (0.0, 3), (1.0, 4))


def distributions(draw, V):
    found = {}
    for n, peaked in enumerate((0.3, 1.0, 5.0)):
        # None so far apart that alpha, written as 1 - distance, is all rounding.
        p, q = draw.rng.dirichlet(np.full(V, peaked), 2) + 0.2 / V
        # Ids that only one of the two ever has.
        p[n % V] = q[(n + 1) % V] = 0
        q /= q.sum()
        found |= {f"p{n}_V": draw.cast(p / p.sum()), f"q{n}_V": draw.cast(q)}
    if V == 4:
        found |= {"p0_V": draw.cast([0.5, 0.3, 0.15, 0.05]), "q0_V": draw.cast([0.3, 0.4, 0.2, 0.1])}
    return found


def call_alpha(code, a, at):
    return {f"alpha {n}": code.alpha(a[f"p{n}_V"], a[f"q{n}_V"]) for n in range(3)} | {
        "alpha of p and p": code.alpha(a["p1_V"], a["p1_V"])
    }


def want_alpha(a, ref, at):
    """Token by token: drawn with q, accepted with min(1, p/q)."""
    found = {}
    for name, p, q in (*((f"alpha {n}", f"p{n}_V", f"q{n}_V") for n in range(3)), ("alpha of p and p", "p1_V", "p1_V")):
        pairs = [(Fraction(x), Fraction(y)) for x, y in zip(a[p].tolist(), a[q].tolist(), strict=True)]
        found[name] = float(sum(y * min(1, x / y) for x, y in pairs if y))
    return found


def settings(draw, N):
    """alpha and gamma of N settings, first those of the table."""
    some = [*TABLE, *zip(draw.rng.uniform(0.05, 0.97, N), draw.rng.integers(1, 12, N), strict=True)][:N]
    c_N = draw.rng.uniform(0.02, 0.6, N)
    return {"alpha_N": np.array([s[0] for s in some]), "gammas": [int(s[1]) for s in some], "c_N": c_N}


def each(a):
    return zip(a["alpha_N"].tolist(), a["gammas"], a["c_N"].tolist(), strict=True)


def call_tokens(code, a, at):
    return {"tokens": np.array([code.expected_tokens(alpha, gamma) for alpha, gamma, _ in each(a)], float),
            "tokens without drafts": code.expected_tokens(0.5, 0)}  # fmt: skip


def tokens(alpha, gamma):
    """n accepted and then one rejected, for each n < gamma; or all: n + 1 tokens each."""
    rejected = [alpha**n * (1 - alpha) * (n + 1) for n in range(gamma)]
    return sum(rejected) + alpha**gamma * (gamma + 1)


def want_tokens(a, ref, at):
    return {"tokens": np.array([float(tokens(Fraction(alpha), gamma)) for alpha, gamma, _ in each(a)]),
            "tokens without drafts": 1.0}  # fmt: skip


def call_speedup(code, a, at):
    found = [code.speedup(alpha, gamma, c) for alpha, gamma, c in each(a)]
    free = [code.speedup(alpha, gamma, 0) for alpha, gamma, _ in each(a)]
    return {"speed-up": np.array(found, float), "speed-up at c = 0": np.array(free, float)}


def want_speedup(a, ref, at):
    exact = [(tokens(Fraction(alpha), gamma), 1 + gamma * Fraction(c)) for alpha, gamma, c in each(a)]
    return {
        "speed-up": np.array([float(t / cost) for t, cost in exact]),
        "speed-up at c = 0": np.array([float(t) for t, _ in exact]),
    }


def call_best(code, a, at):
    return {"gammas": [int(code.best_gamma(alpha, c)) for alpha, _, c in each(a)],
            "gamma for a free and perfect draft": int(code.best_gamma(1.0, 0.0)),
            "gamma for a draft that is never right": int(code.best_gamma(0.0, 0.1)),
            "gamma where a draft costs more than it gains": int(code.best_gamma(0.2, 0.5)),
            "gamma where all gain the same": [int(code.best_gamma(x, x)) for x in (0.0, 1.0)]}  # fmt: skip


def want_best(a, ref, at):
    """A run's first draft is rejected, or accepted and then gamma - 1 drafts are left: tokens = 1 + alpha tokens(gamma - 1)."""
    found = []
    for alpha, _, c in each(a):
        runs = [1.0]
        for _ in range(64):
            runs.append(1 + alpha * runs[-1])
        gains = [n / (1 + gamma * c) for gamma, n in enumerate(runs)]
        found.append(gains.index(max(gains)))
    return {"gammas": found, "gamma for a free and perfect draft": 64, "gamma for a draft that is never right": 0,
            "gamma where a draft costs more than it gains": 0, "gamma where all gain the same": [0, 0]}  # fmt: skip


def some(rng):
    return (int(rng.integers(9, 14)),)


ONLY = ("float64",)
PARTS = (
    Part(
        "alpha", ((4,), (3,), (7,)), distributions, call_alpha, want_alpha, random_size=lambda rng: (int(rng.integers(3, 12)),)
    ),
    Part("expected_tokens", ((1,), (5,), (11,)), settings, call_tokens, want_tokens, random_size=some, dtypes=ONLY),
    Part("speedup", ((1,), (11,)), settings, call_speedup, want_speedup, random_size=some, dtypes=ONLY),
    Part("best_gamma", ((5,), (11,)), settings, call_best, want_best, random_size=some, dtypes=ONLY),
)

MISTAKES = (
    mistake("distance", "That is the distance between p and q (total variation): alpha is 1 minus it.",
            ("float(both_V.sum())", "1 - float(both_V.sum())")),
    mistake("matching", "sum p q is the probability that two samples are equal: the rule accepts with min(1, p/q), which is more.",
            ("np.minimum(p_V, q_V)", "p_V * q_V"), seen="ml-explore/mlx-swift-lm #459"),
    mistake("maximum", "The larger of p and q is summed: q min(1, p/q) is the smaller.", ("np.minimum", "np.maximum")),
    mistake("weighed_with_p", "min(1, p/q) is weighed with p: the token is drawn from q, so it counts q times.",
            ("np.minimum(p_V, q_V)", "p_V * np.minimum(1, p_V / np.where(q_V > 0, q_V, p_V + (p_V == 0)))")),
    mistake("weighed_with_p_both", "min(1, p/q) is weighed with p: the token is drawn from q, so it counts q times.",
            ("np.minimum(p_V, q_V)", "(q_V > 0) * p_V * np.minimum(1, p_V / np.where(q_V > 0, q_V, 1))")),
    mistake("unweighted", "min(1, p/q) is averaged over ids: a token is drawn with q, so it counts q times.",
            ("np.minimum(p_V, q_V)", "np.minimum(1, p_V / q_V) / len(p_V)")),
    mistake("unweighted_drawn", "min(1, p/q) is averaged over ids: a token is drawn with q, so it counts q times.",
            ("np.minimum(p_V, q_V)", "np.minimum(1, p_V[q_V > 0] / q_V[q_V > 0]) / (q_V > 0).sum()")),
    mistake("no_bonus", "The bonus token is not counted: if all gamma are accepted, gamma + 1 tokens come.",
            ("tokens = gamma + 1\n", "tokens = gamma\n")),
    mistake("accepted_only", "Only accepted drafts are counted: where one is rejected the target's own token comes in its place.",
            ("return float(tokens)", "return float(tokens - 1)"), ("/ (1 - alpha)", "/ (1 - alpha) - 1")),
    mistake("independent", "1 + gamma alpha counts drafts after a rejected one: they are thrown away. (Accepted/drafted is not alpha.)",
            ("return (1 - alpha**tokens) / (1 - alpha)", "return 1 + gamma * alpha")),
    mistake("endless", "1 / (1 - alpha) is the mean without an end: a draft has gamma tokens.", ("(1 - alpha**tokens)", "1")),
    mistake("alpha_1", "At alpha = 1 it divides by 0: gamma + 1 tokens come then.",
            ("    if alpha == 1:\n        return float(tokens)\n", "")),
    mistake("most_tokens", "The gamma with most tokens a run is taken, always the longest: what counts is tokens for the time.",
            ("[speedup(alpha, gamma, c) for", "[expected_tokens(alpha, gamma) for")),
    mistake("costs_exchanged", "A round is counted as gamma runs of the target and one of the draft, gamma + c: it is gamma of the draft and one of the"
            " target, gamma c + 1.", ("gamma * c + 1", "(gamma + c + (gamma + c == 0))")),
    mistake("draft_free", "The draft's runs cost nothing here: gamma of them take gamma c.", ("gamma * c + 1", "1")),
    mistake("no_verification", "The target's run is forgotten: a round takes gamma c + 1.", ("gamma * c + 1", "gamma * c + (gamma * c == 0)")),
    mistake("one_draft_run", "The draft is counted as one run: its tokens come one after another, gamma runs.",
            ("gamma * c + 1", "c + 1")),
    mistake("draft_runs_bonus", "gamma + 1 runs of the draft are paid for: the bonus token is the target's.",
            ("gamma * c + 1", "(gamma + 1) * c + 1")),
    mistake("verified_one_by_one", "The target is paid for each token: it verifies all of them in one run.",
            ("gamma * c + 1", "gamma * c + gamma + 1")),
    mistake("never_0", "best_gamma never says 0: at alpha .2 and c .5 no draft pays.",
            ("for gamma in range(65)]\n    return int(np.argmax(gains))", "for gamma in range(1, 65)]\n    return int(np.argmax(gains)) + 1")),
    mistake("range_short", "The longest draft, 64, is not tried.", ("range(65)", "range(64)")),
    mistake("no_bonus_below_1", "The exponent is gamma: if all gamma drafts are accepted gamma + 1 tokens come, so it is gamma + 1.",
            ("(1 - alpha**tokens)", "(1 - alpha**gamma)")),
    mistake("not_halved", "The whole sum of |p - q| is subtracted: it counts what p lacks and what q lacks; alpha is 1 minus half of it.",
            ("both_V = np.minimum(p_V, q_V)", "both_V = p_V - np.abs(p_V - q_V)")),
    mistake("largest_of_equal", "Of several gammas with the same speed-up the largest is taken: it is the smallest.",
            ("int(np.argmax(gains))", "64 - int(np.argmax(gains[::-1]))")),
    mistake("nan_at_1", "At alpha = 1 it divides by 0: gamma + 1 tokens come then.", ("return float(tokens)", "return float('nan')")),
    mistake("gamma_at_1", "At alpha = 1 it says gamma: all drafts are accepted then, and the bonus token comes too, gamma + 1.",
            ("        return float(tokens)\n", "        return float(gamma)\n")),
)  # fmt: skip
