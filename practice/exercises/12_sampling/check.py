"""What is right in exercise 12 (token by token in exact fractions where it can be), and what is often wrong."""

import math
from fractions import Fraction

import numpy as np

from practice.part import Part, mistake


def temperatures(draw, V, top_k, percent):
    """`percent`: of top_p. Logits sharp, shuffled, and in one of two cases far out."""
    offset = 1e4 if V % 2 else -30.0
    return {"z_V": draw(V, scale=2) + draw.cast(offset) * (top_k == 0 and percent == 100), "temperature": float(draw.rng.uniform(0.4, 2.5)),
            "top_k": top_k, "top_p": percent / 100}  # fmt: skip


def call(code, a, at):
    return {"p": code.distribution(a["z_V"], a["temperature"], a["top_k"], a["top_p"])}


def want(a, ref, at):
    """By ranks: a token stays if fewer than k, and less than top_p of the mass that those have, are before it."""
    z, T, V = a["z_V"].tolist(), a["temperature"], len(a["z_V"])
    k = a["top_k"] or V
    weight = [math.exp((x - max(z)) / T) for x in z]
    ahead = [[j for j in range(V) if (-z[j], j) < (-z[i], i)] for i in range(V)]
    total = math.fsum(weight[i] for i in range(V) if len(ahead[i]) < k)
    stays = [len(ahead[i]) < k and math.fsum(weight[j] for j in ahead[i]) / total < a["top_p"] for i in range(V)]
    kept = math.fsum(w for w, s in zip(weight, stays, strict=True) if s)
    return {"p": np.array([w / kept if s else 0.0 for w, s in zip(weight, stays, strict=True)])}


def sound(a, ref, at):
    """p = exp(z / T - lse) rounds numbers as large as z / T."""
    return {"p": np.abs(a["z_V"]).max() / a["temperature"]}


def equal_logits(draw, equal, k, percent):
    """Some equal logits among lower ones, where all sums are exact: half and quarter masses, edges hit exactly."""
    z = [3.0] * equal + [-1e4] * (equal + 1)
    return {"z": draw.rng.permutation(z).tolist(), "temperature": 0.5, "top_k": k, "top_p": percent / 100, "zero": draw(1) * 0}


def call_equal(code, a, at):
    z_V = np.array(a["z"], a["zero"].dtype)
    return {"p": code.distribution(z_V, a["temperature"], a["top_k"], a["top_p"])}


def want_equal(a, ref, at):
    """In fractions: the highest are equal, the others have no mass."""
    z, top_p = a["z"], Fraction(a["top_p"])
    high = [i for i, x in enumerate(z) if x == max(z)]
    high = high[: a["top_k"] or None]
    kept = [i for n, i in enumerate(high) if Fraction(n, len(high)) < top_p]
    return {"p": np.array([1 / len(kept) if i in kept else 0.0 for i in range(len(z))])}


def greedy(draw, pairs):
    """Each logit stands twice."""
    return {"z_V": draw.rng.permutation(np.repeat(draw(pairs), 2))}


def call_greedy(code, a, at):
    return {"p": code.distribution(a["z_V"], 0, 3, 0.4), "p at 0.0": code.distribution(a["z_V"], 0.0, 0, 1)}


def want_greedy(a, ref, at):
    z = a["z_V"].tolist()
    p = np.eye(len(z))[z.index(max(z))]
    return {"p": p, "p at 0.0": p}


def sixteenths(draw, V, points):
    """Probabilities in sixteenths, some 0, the first and the last too; u on all edges, and anywhere."""
    cuts = np.sort(draw.rng.integers(0, 17, V - 3))
    sixteenth = draw.rng.permutation(np.diff([0, *cuts, 16]))
    edges = (np.arange(16) / 16).tolist()
    return {"p_V": draw.cast(np.array([0, *sixteenth, 0]) / 16), "u": edges + draw.rng.uniform(0, 1, points).tolist()}


def tenths(draw, V, points):
    """A sum that rounding leaves below 1, and the largest u there is."""
    p = np.array([0, *[1 / V] * V, 0, 0])
    return {"p_V": draw.cast(p), "u": [float(np.nextafter(1, 0)), *draw.rng.uniform(0, 1, points).tolist()]}


def told(p_V, u):
    return "p = " + " ".join(f"{float(p):.4g}" for p in p_V) + f"\ntoken at u = {u:.6g}"


def call_draw(code, a, at):
    return {told(a["p_V"], u): int(code.draw(a["p_V"], u)) for u in a["u"]}


def want_draw(a, ref, at):
    """In fractions."""
    found = {}
    for u in a["u"]:
        below, token = Fraction(0), None
        for i, p in enumerate(a["p_V"].tolist()):
            if p and below <= Fraction(u):
                token = i
            below += Fraction(p)
        found[told(a["p_V"], u)] = token
    return found


def random_size(rng):
    return int(rng.integers(3, 18)), int(rng.integers(0, 8)), int(rng.integers(10, 101))


EXACT = ((2, 0, 50), (4, 0, 50), (4, 2, 50), (5, 3, 100), (8, 4, 25), (8, 0, 37))
PARTS = (
    Part("temperature", ((5, 0, 100), (2, 0, 100), (11, 0, 100)), temperatures, call, want,
         sound=sound, random_size=lambda rng: (int(rng.integers(2, 18)), 0, 100)),
    Part("temperature 0", ((3,), (1,), (7,)), greedy, call_greedy, want_greedy,
         random_size=lambda rng: (int(rng.integers(1, 9)),)),
    Part("top-k", ((5, 3, 100), (3, 1, 100), (4, 9, 100)), temperatures, call, want,
         random_size=lambda rng: (*random_size(rng)[:2], 100)),
    Part("top-p", ((5, 0, 70), (4, 0, 5), (11, 0, 90)), temperatures, call, want,
         random_size=lambda rng: (int(rng.integers(3, 18)), 0, int(rng.integers(10, 100)))),
    Part("top-k and top-p", ((7, 3, 60), (5, 2, 90), (13, 6, 80), (17, 2, 50)), temperatures, call, want, random_size=random_size),
    Part("equal logits", EXACT, equal_logits, call_equal, want_equal,
         random_size=lambda rng: EXACT[rng.integers(len(EXACT))]),
    Part("draw", ((4, 8), (7, 16)), sixteenths, call_draw, want_draw, random_size=lambda rng: (int(rng.integers(4, 12)), 8)),
    Part("draw at the end", ((10, 3), (7, 5)), tenths, call_draw, want_draw,
         random_size=lambda rng: (int(rng.choice([6, 10, 13])), 4)),
)  # fmt: skip

GREEDY = "    if temperature == 0:\n        p_V = np.zeros_like(z_V)\n        p_V[np.argmax(z_V)] = 1\n        return p_V\n"
TOP_P = "    if top_p < 1:\n        sorted_V[before_V >= top_p] = 0\n"
MISTAKES = (
    mistake("multiplied", "Logits are multiplied by the temperature; dividing makes a low one sharp.",
            ("z_V / temperature", "z_V * temperature")),
    mistake("on_probabilities", "The temperature has no effect. It divides logits; dividing probabilities is undone by renormalising.",
            ("    z_V = z_V / temperature\n", "")),
    mistake("no_maximum", "No maximum is subtracted: exp(1e4) is infinite.", ("z_V - z_V.max()", "z_V")),
    mistake("division_by_zero", "Temperature 0 divides by 0: it means greedy, all mass on the largest logit.", (GREEDY, "")),
    mistake("greedy_ties", "At temperature 0 all equal largest logits share the mass: greedy is one token, the lowest id.",
            ("p_V[np.argmax(z_V)] = 1\n        return p_V", "p_V[z_V == z_V.max()] = 1\n        return p_V / p_V.sum()")),
    mistake("top_k_0", "top_k = 0 keeps nothing: it means that all stay.", ("if top_k > 0:", "if True:")),
    mistake("top_k_off", "One token too many stays in top-k.", ("sorted_V[top_k:]", "sorted_V[top_k + 1 :]")),
    mistake("top_k_ties", "All tokens as probable as the k-th stay: here exactly k do, of equal ones the lower ids.",
            ("sorted_V[top_k:] = 0", "sorted_V[sorted_V < sorted_V[min(top_k, len(z_V)) - 1]] = 0")),
    mistake("crossing_dropped", "The token that crosses top_p is dropped: what counts is the mass before a token, without its own.",
            ("before_V >= top_p", "before_V + sorted_V > top_p"), seen="rasbt/reasoning-from-scratch #164"),
    mistake("edge_kept", "Where the mass before a token is exactly top_p it is kept: top_p is reached there, it goes.",
            ("before_V >= top_p", "before_V > top_p")),
    mistake("top_p_of_all", "top_p is taken of all the mass: after top-k, of what that has left, renormalised.",
            ("    if top_k > 0:\n        sorted_V[top_k:] = 0\n    sorted_V = sorted_V / sorted_V.sum()\n    before_V = np.cumsum(sorted_V) - sorted_V\n",
             "    sorted_V = sorted_V / sorted_V.sum()\n    before_V = np.cumsum(sorted_V) - sorted_V\n    if top_k > 0:\n        sorted_V[top_k:] = 0\n")),
    mistake("top_p_first", "top-p is decided before the temperature: the temperature comes first and changes which tokens are the nucleus.",
            ("before_V = np.cumsum(sorted_V) - sorted_V", "raw_V = sorted_V**temperature / (sorted_V**temperature).sum()\n    before_V = np.cumsum(raw_V) - raw_V")),
    mistake("ties_reversed", "Of equal logits the higher id comes first: an order turned round by [::-1] turns equal ones round too."
            " Sort -z, stably.", ('np.argsort(-z_V, kind="stable")', 'np.argsort(z_V, kind="stable")[::-1]')),
    mistake("greedy_last", "At temperature 0 the last of the largest logits is taken: of equal ones the lower id comes first.",
            ("p_V[np.argmax(z_V)] = 1", "p_V[len(z_V) - 1 - np.argmax(z_V[::-1])] = 1")),
    mistake("ascending", "The order is ascending: the least probable tokens are taken first.", ("np.argsort(-z_V", "np.argsort(z_V")),
    mistake("order_kept", "The sorted order is not undone: p must stand by id.", ("p_V[order_V] = sorted_V", "p_V[:] = sorted_V")),
    mistake("order_inverted", "The order is undone the wrong way round: sorted[order] sorts again; p[order] = sorted puts back.",
            ("p_V[order_V] = sorted_V", "p_V[:] = sorted_V[order_V]")),
    mistake("not_renormalised", "What stays does not add to 1: divide by its sum.", ("return p_V / p_V.sum()", "return p_V")),
    mistake("draw_edge", "At u on an edge the token before it is drawn, at u = 0 even one of probability 0: it is the first sum > u.",
            ('side="right"', 'side="left"')),
    mistake("draw_at_edge", "At u on an edge the token before it is drawn: it is the first whose sum is above u, not the first that reaches it.",
            ('np.searchsorted(up_to_V, u, side="right")', "np.flatnonzero((up_to_V >= u) & (p_V > 0)).min(initial=len(p_V))")),
    mistake("draw_past_end", "Rounding may leave the sum below u, and then an id that does not exist is drawn.",
            ("int(min(token, last))", "int(token)")),
    mistake("draw_last_id", "Where rounding leaves the sum below u the last id is drawn, be its probability 0.",
            ("np.flatnonzero(p_V)[-1]", "len(p_V) - 1")),
    mistake("draw_argmax", "The most probable token is drawn, whatever u.", ("int(min(token, last))", "int(np.argmax(p_V))")),
    mistake("nearly_greedy", "Temperature 0 is replaced by a tiny number: equal largest logits then share the mass. Greedy is one token,"
            " the lowest id.", (GREEDY, "    temperature = max(temperature, 1e-6)\n")),
)  # fmt: skip
