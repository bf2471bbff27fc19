"""What is right in exercise 13 (the output's law, all drafts and acceptances enumerated, is p), and what is often wrong."""

import itertools
from fractions import Fraction

import numpy as np

from practice.part import Part, mistake


def law(draw, *shape):
    """Distributions along the last dim, peaked, about a fifth of the entries 0, two at least not."""
    p = draw.rng.dirichlet(np.full(shape[-1], 0.8), shape[:-1]) + 0.02
    out = draw.rng.uniform(size=shape) < 0.2
    p[out & ((~out).sum(axis=-1, keepdims=True) > 1)] = 0
    return p / p.sum(axis=-1, keepdims=True)


def rounds(draw, G, V, rounds):
    """Some rounds: in the first q is p and all is accepted, in the second p has nothing where the draft is; else chance."""
    p, q = law(draw, rounds, G + 1, V), law(draw, rounds, G, V)
    q[0] = p[0, :G]
    draft = np.array([[draw.rng.choice(V, p=q[r, n]) for n in range(G)] for r in range(rounds)], int).reshape(rounds, G)
    for n in range(G):
        # Moved to a neighbour, so that p still adds to 1.
        x = draft[1, n]
        p[1, n, (x + 1) % V] += p[1, n, x]
        p[1, n, x] = 0
    # Mostly small, or nothing but first rejections would be seen.
    u = draw.rng.uniform(0.01, 1, (rounds, G)) ** 2
    # The least numbers there are: what p lacks is rejected at u = 0 as well, and nothing of probability 0 is drawn.
    u[1] = 0
    u_next = [0.0, *draw.rng.uniform(0, 1, rounds - 1).tolist()]
    return {
        "p_RNV": draw.cast(p),
        "q_RGV": draw.cast(q),
        "draft_RG": draft,
        "u": u.tolist(),
        "u_next": u_next,
    }


def told(p, q, draft, u, u_next):
    """A round in a few lines, for what is said of a wrong answer."""
    rows = [(f"{name}[{n}]", row) for name, array in (("p", p), ("q", q)) for n, row in enumerate(array)]
    lines = [f"{name} = " + " ".join(f"{float(x):.3f}" for x in row) for name, row in rows]
    us = " ".join(f"{x:.3f}" for x in u)
    return "\n".join([*lines, f"draft = {[int(x) for x in draft]}, u = {us}, u_next = {u_next:.3f}", "ids"])


def each(a):
    return zip(a["p_RNV"], a["q_RGV"], a["draft_RG"], a["u"], a["u_next"], strict=True)


def call_rounds(code, a, at):
    return {told(*r): list(code.accept(*r[:3], np.array(r[3]), r[4])) for r in each(a)}


def want_rounds(a, ref, at):
    """In fractions: u below min(1, p/q), then the running sum of what p has more than q."""
    found = {}
    for whole in each(a):
        p, q, draft, us, u_next = (x.tolist() if isinstance(x, np.ndarray) else x for x in whole)
        tried = enumerate(zip(draft, us, strict=True))
        rejected = [n for n, (x, u) in tried if Fraction(u) * Fraction(q[n][x]) >= Fraction(p[n][x])]
        n = min(rejected, default=len(draft))
        more = [Fraction(y) for y in p[n]]
        if rejected:
            more = [max(Fraction(0), y - Fraction(z)) for y, z in zip(more, q[n], strict=True)]
        running = list(itertools.accumulate(more))
        left = Fraction(u_next) * running[-1]
        found[told(*whole)] = [*draft[:n], next(i for i, r in enumerate(running) if r > left)]
    return found


def one(draw, G, V):
    return {"p_NV": draw.cast(law(draw, G + 1, V)), "q_GV": draw.cast(law(draw, G, V))}


def call_law(code, a, at):
    """All drafts, all numbers of accepted ones, all intervals of u_next, each with its probability: the law of what comes.

    A sequence that ends early is continued with p, as the next run of the target would.
    """
    p_NV, q_GV = a["p_NV"], a["q_GV"]
    p, q = p_NV.astype(np.float64), q_GV.astype(np.float64)
    G, V = q.shape
    total = np.zeros([V] * (G + 1))
    for draft in itertools.product(range(V), repeat=G):
        drawn = np.prod([q[n, x] for n, x in enumerate(draft)])
        if not drawn:
            continue
        edge = np.array([min(1.0, p[n, x] / q[n, x]) for n, x in enumerate(draft)])
        for accepted in range(G + 1):
            chance = drawn * np.prod(edge[:accepted]) * (1 - edge[accepted] if accepted < G else 1)
            if chance <= 0:
                continue
            u = edge / 2
            if accepted < G:
                u[accepted] = (1 + edge[accepted]) / 2
            rest = np.maximum(p[accepted] - q[accepted], 0) if accepted < G else p[G]
            ends = np.cumsum(rest / rest.sum())
            for low, high in itertools.pairwise([0.0, *ends]):
                if high <= low:
                    continue
                ids = code.accept(p_NV, q_GV, np.array(draft, int), u, (low + high) / 2)
                ids = tuple(int(i) for i in ids)[: G + 1]
                after = np.ones(())
                for row in p[len(ids) :]:
                    after = np.multiply.outer(after, row)
                total[ids] += chance * (high - low) * after
    return {"law of the first token": total.reshape(V, -1).sum(axis=1), "law of all": total}


def want_law(a, ref, at):
    together = np.ones(())
    for row in a["p_NV"]:
        together = np.multiply.outer(together, row / row.sum())
    return {"law of the first token": a["p_NV"][0] / a["p_NV"][0].sum(), "law of all": together}


FLOAT64 = ("law of the first token", "law of all")
PARTS = (
    Part("accept", ((1, 4, 12), (3, 5, 30), (0, 3, 5), (5, 7, 12)), rounds, call_rounds, want_rounds,
         random_size=lambda rng: (int(rng.integers(1, 6)), int(rng.integers(3, 10)), 20)),
    Part("output law", ((1, 3), (2, 4), (3, 3)), one, call_law, want_law, any_dtype=FLOAT64, dtypes=("float64",),
         random_size=lambda rng: ((1, 4), (2, 3), (2, 2))[rng.integers(3)]),
)  # fmt: skip

TEST = "u_G[n] < ratio"
REST = "np.maximum(p_NV[n] - q_GV[n], 0)"
MISTAKES = (
    mistake("accept_all", "Every draft is accepted: then what comes is distributed as q, not as p.", (TEST, "True"),
            seen="huggingface/transformers #28508"),
    mistake("argmax", "A draft is accepted if it is p's most probable token: that is the rule for temperature 0 only.",
            (TEST, "x == np.argmax(p_NV[n])")),
    mistake("matching", "A draft is accepted if a sample of p equals it, with probability sum p q: the rule is min(1, p/q).",
            (TEST, "x == draw(p_NV[n], u_G[n])"), seen="ml-explore/mlx-swift-lm #459"),
    mistake("p_larger", "A draft is accepted only where p >= q; where p is smaller it is accepted still, with probability p/q.",
            (TEST, "ratio >= 1")),
    mistake("p_alone", "A draft is accepted with probability p: it has been drawn with q already, so p/q.", (TEST, "u_G[n] < p_NV[n, x]")),
    mistake("inverted", "The ratio is q/p: the draft's favourites would be kept most.", ("p_NV[n, x] / q_GV[n, x]", "q_GV[n, x] / p_NV[n, x]")),
    mistake("from_p", "The replacement is drawn from p: what acceptance gave already comes again. Draw from max(0, p - q), normalised.",
            (REST, "p_NV[n]"), seen="ShopeeLLM/Spec-RL #14"),
    mistake("not_normalised", "The residual is not normalised: its sum is 1 - alpha, and u beyond that draws the last token.",
            ("        rest_V = rest_V / rest_V.sum()\n", "")),
    mistake("absolute", "The residual is |p - q|: only what p has more than q.", (REST, "np.abs(p_NV[n] - q_GV[n])")),
    mistake("turned", "The residual is q - p: the tokens that the draft proposes too often already.", (REST, "np.maximum(q_GV[n] - p_NV[n], 0)")),
    mistake("next_row", "The residual is taken a row too far: the replacement stands where the rejected draft stood.",
            (REST, "np.maximum(p_NV[n + 1] - q_GV[n], 0)")),
    mistake("greedy_rest", "The residual's most probable token is taken: it is drawn, with u_next.",
            ("draw(rest_V, u_next)", "int(np.argmax(rest_V))")),
    mistake("u_again", "The u that rejected the draft draws the replacement as well: it is known to be large. Use u_next.",
            ("draw(rest_V, u_next)", "draw(rest_V, u_G[n])")),
    mistake("goes_on", "It goes on after a rejection: later drafts continue a token that is not there any more.",
            ("        ids.append(draw(rest_V, u_next))\n        return ids\n", "        ids.append(draw(rest_V, u_next))\n")),
    mistake("goes_on_accepting", "It goes on after the first rejection: later drafts are kept, though they continue a token that is not there"
            " any more. The replacement is the last token.",
            ("    ids = []\n", "    ids, replaced = [], False\n"),
            ("        rest_V = np.maximum", "        if replaced:\n            continue\n        replaced = True\n        rest_V = np.maximum"),
            ("        ids.append(draw(rest_V, u_next))\n        return ids\n", "        ids.append(draw(rest_V, u_next))\n    if replaced:\n        return ids\n")),
    mistake("no_replacement", "A rejected draft is dropped and nothing comes in its place: a run gives one token at least.",
            ("        ids.append(draw(rest_V, u_next))\n", "")),
    mistake("kept_too", "The rejected draft stays, with the replacement after it.",
            ("        ids.append(draw(rest_V, u_next))\n", "        ids += [int(x), draw(rest_V, u_next)]\n")),
    mistake("no_bonus", "After all drafts are accepted one token more is free: p has a row for it.",
            ("    ids.append(draw(p_NV[len(draft_G)], u_next))\n", "")),
    mistake("bonus_row", "The bonus token is drawn from the last draft's row: its own is the one after, p[G].",
            ("p_NV[len(draft_G)]", "p_NV[len(draft_G) - 1]")),
    mistake("no_bonus_after_drafts", "After all drafts are accepted one token more is free: p has a row for it.",
            ("    ids.append(draw(p_NV[len(draft_G)], u_next))\n",
             "    if not ids:\n        ids.append(draw(p_NV[0], u_next))\n")),
    mistake("goes_on_replacing", "It goes on after the first rejection, with a replacement for each draft that is rejected: what is drawn for the"
            " first is the last token.",
            ("        ids.append(draw(rest_V, u_next))\n        return ids\n", "        ids.append(draw(rest_V, u_next))\n        rejected = True\n"),
            ("    ids = []\n", "    ids, rejected = [], False\n"),
            ("    ids.append(draw(p_NV[len(draft_G)], u_next))\n", "    if not rejected:\n        ids.append(draw(p_NV[len(draft_G)], u_next))\n")),
    mistake("without_the_draft", "The replacement is drawn from p without the rejected token: others too may have had their share by acceptance."
            " Draw from max(0, p - q), normalised.", (REST, "np.where(np.arange(len(p_NV[n])) == x, 0, p_NV[n])")),
)  # fmt: skip
