"""What is right in exercise 36 (pair by pair, in one process and without a cache), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def numbers(draw, T, window, sinks):
    return {"T": T, "window": window, "sinks": sinks}


def call_mask(code, a, at):
    seen = np.asarray(code.mask(a["T"], a["window"], a["sinks"]))
    return {"seen": seen.astype(int) if seen.dtype == bool else seen.tolist()}


def sees(i, j, window, sinks):
    return j in range(max(0, i - window + 1), i + 1) or j in range(min(sinks, i + 1))


def want_mask(a, ref, at):
    T = range(a["T"])
    rows = [[int(sees(i, j, a["window"], a["sinks"])) for j in T] for i in T]
    return {"seen": np.array(rows, int).reshape(a["T"], a["T"])}


def tokens(draw, T, H, E, window, sinks):
    """Scores of about +-4; the last query's are all large, beyond what exp can take, and near each other, those before it far below 0."""
    a = {"q_THE": draw(T, H, E, scale=2), "k_THE": draw(T, H, E, scale=1.5), "v_THE": draw(T, H, E)}
    a["k_THE"][..., 0] = 6 + draw(T, H, scale=0.005)
    a["q_THE"][-1] *= draw.cast(0.2)
    a["q_THE"][-1, :, 0] = 400
    if T > 2:
        # All of a query's far below 0: a maximum that starts from 0 leaves nothing of them.
        a["q_THE"][-2] *= draw.cast(0.2)
        a["q_THE"][-2, :, 0] = -400
    return a | {"window": window, "sinks": sinks}


def call_prefill(code, a, at):
    return {"o": code.prefill(*a.values())}


def truth(a):
    q, k, v = (a[n] for n in ("q_THE", "k_THE", "v_THE"))
    T, H, E = q.shape
    o = np.zeros((T, H, E))
    for i in range(T):
        seen = [j for j in range(T) if sees(i, j, a["window"], a["sinks"])]
        for h in range(H):
            score = [float(q[i, h] @ k[j, h]) / E**0.5 for j in seen]
            weight = np.exp(np.array(score) - max(score))
            o[i, h] = sum(w * v[j, h] for w, j in zip(weight / weight.sum(), seen, strict=True))
    return o


def want_prefill(a, ref, at):
    return {"o": truth(a)}


def half_of_scores(a, at):
    """Where T is large beside the window; in float64, which answers may work in."""
    T = len(a["q_THE"])
    return {"peak bytes": T * T * 8 // 2 if T > 100 else 2**20}


def call_slots(code, a, at):
    """Several numbers at once, of a cache that is empty: a slot follows from the number alone."""
    cache = code.Cache(1, 2, a["window"], a["sinks"], np.float64)
    return {"slots": [int(cache.slot(n)) for n in range(a["T"])]}


def want_slots(a, ref, at):
    """By keeping who lies where: the new one takes the first free place, or that of the oldest which is no sink."""
    lies, found = [], []
    for n in range(a["T"]):
        if len(lies) < a["sinks"] + a["window"]:
            found.append(len(lies))
            lies.append(n)
        else:
            found.append(lies.index(min(x for x in lies if x >= a["sinks"])))
            lies[found[-1]] = n
    return {"slots": found}


def call_cache(code, a, at):
    """Two caches in turn; the second gets the tokens backwards."""
    q, k, v = (a[n] for n in ("q_THE", "k_THE", "v_THE"))
    T, H, E = q.shape
    cache, other = (code.Cache(H, E, a["window"], a["sinks"], q.dtype) for _ in range(2))
    arrays, o = (cache.k_HSE, cache.v_HSE), []
    for i in range(T):
        cache.append(k[i], v[i])
        other.append(k[-1 - i], v[-1 - i])
        o.append(cache.attend(q[i]))
    found = {"o": np.array(o).reshape(T, H, E), "k kept": cache.k_HSE, "v kept": cache.v_HSE, "length": int(cache.length)}
    return found | {"the arrays are those that were made at first": cache.k_HSE is arrays[0] and cache.v_HSE is arrays[1]}


def want_cache(a, ref, at):
    T, H, E = a["q_THE"].shape
    slots = want_slots({**a, "T": T}, ref, at)["slots"]
    kept = {}
    for name in "kv":
        kept[name] = np.full((H, a["sinks"] + a["window"], E), np.nan)
        for n, slot in enumerate(slots):
            kept[name][:, slot] = a[f"{name}_THE"][n]
    found = {"o": truth(a), "k kept": kept["k"], "v kept": kept["v"], "length": T}
    return found | {"the arrays are those that were made at first": True}


def random_numbers(rng):
    return int(rng.integers(3, 12)), int(rng.integers(1, 6)), int(rng.integers(0, 4))


def random_size(rng):
    return int(rng.integers(5, 12)), int(rng.choice([1, 2])), int(rng.choice([3, 5])), *random_numbers(rng)[1:]


COUNTS = ((9, 3, 2), (7, 4, 0), (5, 1, 2), (6, 9, 1), (4, 2, 7), (0, 3, 1))
SIZES = ((9, 2, 5, 3, 2), (7, 1, 3, 4, 0), (6, 2, 3, 1, 1), (5, 1, 3, 9, 2), (1, 2, 3, 2, 1))
PARTS = (
    Part("mask", COUNTS, numbers, call_mask, want_mask, random_size=random_numbers, dtypes=("float64",)),
    Part("prefill", (*SIZES[:2], (128, 1, 2, 3, 1), *SIZES[2:]), tokens, call_prefill, want_prefill, limits=half_of_scores, random_size=random_size,
         influence=(("v_THE", "o"),), count_memory=True),
    Part("Cache.slot", ((12, 3, 2), (9, 4, 0), (7, 1, 2)), numbers, call_slots, want_slots, random_size=random_numbers, dtypes=("float64",)),
    Part("Cache", SIZES, tokens, call_cache, want_cache, random_size=random_size),
)  # fmt: skip

SEEN, HELD, SLOT = (
    "(j_1T <= i_T1) & (near_TT | sink_TT)",
    "min(self.length, self.sinks + self.window)",
    "self.sinks + (n - self.sinks) % self.window",
)
ROWS = "[*range(min(sinks, first)), *range(first, i + 1)]"
SCORES = 's_HS = np.einsum("he,she->hs", q_HE, k_THE[seen]) * scale\n'
MISTAKES = (
    mistake("one_more", "The window is one token too wide: it has `window` tokens, the query's own among them.",
            ("i_T1 - j_1T < window", "i_T1 - j_1T <= window"), ("i + 1 - window", "i - window")),
    mistake("one_less", "The window is one token too narrow: the query's own token is one of `window`.",
            ("i_T1 - j_1T < window", "i_T1 - j_1T < max(window - 1, 1)"), ("i + 1 - window", "i + 1 - max(window - 1, 1)")),
    mistake("not_itself", "A query does not see its own key.", ("j_1T <= i_T1", "j_1T < i_T1"), ("range(first, i + 1)", "range(first, i)")),
    mistake("future_sinks", "Sinks are seen before they have come: j <= i holds for them too.", (SEEN, "((j_1T <= i_T1) & near_TT) | sink_TT")),
    mistake("future", "The mask lets queries see the future: j <= i is missing.", (SEEN, "near_TT | sink_TT")),
    mistake("no_sinks", "The sinks are not seen once they are out of the window.", (SEEN, "(j_1T <= i_T1) & near_TT"), (ROWS, "[*range(first, i + 1)]")),
    mistake("sinks_twice", "A sink that is still in the window counts twice: once is right.", (ROWS, "[*range(min(sinks, i + 1)), *range(first, i + 1)]")),
    mistake("no_scale", "The scores are not divided by sqrt(E).", ("* scale\n", "\n"), (" / math.sqrt(q_HE.shape[1])", "")),
    mistake("by_heads", "The scores are divided by sqrt(H): of q (T, H, E) the width E is the last.", ("q_THE.shape[2]", "q_THE.shape[1]")),
    mistake("all_scores", "This is right, but all T x T scores are made: a query needs those of its window and sinks alone.",
            ("    for i, q_HE in enumerate(q_THE):", "    every_HTT = np.einsum('ihe,jhe->hij', q_THE, k_THE)\n    for i, q_HE in enumerate(q_THE):")),
    mistake("sinks_rolled", "The slots roll over the sinks too: these are never replaced.", ("        if n < self.sinks:\n            return n\n", ""),
            (SLOT, "n % (self.sinks + self.window)")),
    mistake("not_from_sinks", "The window's slots begin with token `sinks`, not with token 0: (n - sinks) % window.",
            (SLOT, "self.sinks + n % self.window if n >= self.sinks + self.window else n")),
    mistake("no_room_for_sinks", "The window's tokens are written over the sinks: their slots come behind.", (SLOT, "(n - self.sinks) % self.window")),
    mistake("never_rolled", "Slots go on beyond the array: the window's slots are used again, oldest first.", (SLOT, "n")),
    mistake("counted_first", "The new token is counted before its place is asked for: it goes where the next one belongs.",
            ("at = self.slot(self.length)", "at = self.slot(self.length + 1)")),
    mistake("unwritten", "Slots that were never written are read: they hold NaN until their token comes.", (HELD, "self.sinks + self.window")),
    mistake("unwritten_zeros", "Slots that were never written count as keys of zeros: a score of 0 has its share of the softmax. Look at the"
            " slots that are filled alone.", (HELD, "self.sinks + self.window"),
            ("self.k_HSE[:, :held], self.v_HSE[:, :held]", "np.nan_to_num(self.k_HSE), np.nan_to_num(self.v_HSE)")),
    mistake("window_only", "As soon as more than `window` tokens have come, only that many slots are read: the sinks are beside them.",
            (HELD, "min(self.length, self.window)")),
    mistake("shifted", "The window is shifted in the arrays at each append: what is there stays, the new token replaces one. (attend may read slots in"
            " any order.)", ("        at = self.slot(self.length)\n", "        at = min(self.length, self.sinks + self.window - 1)\n        if self.length > at:\n"
             "            for x_HSE in (self.k_HSE, self.v_HSE):\n                x_HSE[:, self.sinks : -1] = x_HSE[:, self.sinks + 1 :].copy()\n")),
    mistake("new_arrays", "append makes new arrays: those that were made once are to be written into.",
            ("        self.k_HSE[:, at] = k_HE\n", "        self.k_HSE, self.v_HSE = self.k_HSE.copy(), self.v_HSE.copy()\n        self.k_HSE[:, at] = k_HE\n")),
    mistake("v_not_rolled", "v is written at the token's number, k at its slot: both belong in the slot.",
            ("self.v_HSE[:, at] = v_HE", "self.v_HSE[:, self.length % self.v_HSE.shape[1]] = v_HE")),
    mistake("length_kept", "length stays at the number of slots: it counts all tokens that ever came.",
            ("self.length += 1", "self.length = min(self.length + 1, self.sinks + self.window)")),
    mistake("not_counted", "append does not count the token: length += 1.", ("        self.length += 1\n", "")),
)  # fmt: skip
