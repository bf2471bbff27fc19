"""What is right in exercise 10 (causal attention over the whole sequence, by the reference), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake

H, K = 6, 2
NAMES = ("Wq", "Wk", "Wv", "Wo")


def cache_inputs(draw, T, E):
    return {"k_TKE": draw(T, K, E), "v_TKE": draw(T, K, E)}


def pieces(T):
    """A prefill, single tokens, a chunk: 11 -> 6, 1, 1, 3."""
    ends = sorted({0, max(1, T - 5), max(1, T - 4), max(1, T - 3), T})
    return np.diff(ends).tolist()


def cache_call(code, a, at):
    T, E = len(a["k_TKE"]), a["k_TKE"].shape[2]
    cache, moved, first = code.Cache(K, E, T, a["k_TKE"].dtype), Moved(code), 0
    lengths, shapes = [cache.length], []
    for n in pieces(T):
        cache.append(a["k_TKE"][first : first + n], a["v_TKE"][first : first + n])
        moved.look(cache)
        first += n
        lengths.append(cache.length)
        shapes.append([list(np.shape(cache.k)), list(np.shape(cache.v))])
    views = all(np.shares_memory(getattr(cache, name), getattr(cache, name)) for name in ("k", "v"))
    found = {"k": cache.k, "v": cache.v, "length": lengths, "shapes of k and v": shapes, "k and v are views": views}
    refused = refuses(cache, a, 1)
    # Of several tokens none is taken where some would fit.
    some = code.Cache(K, E, T, a["k_TKE"].dtype)
    if T > 1:
        some.append(a["k_TKE"][: T - 1], a["v_TKE"][: T - 1])
    found |= {"one token too many raises ValueError": refused, "length after it": cache.length}
    found |= {f"{T} tokens where 1 fits raise ValueError": T == 1 or refuses(some, a, T), "length after these": some.length}
    # What stood there is there still, and the next comes after it.
    if some.length == T - 1:
        some.append(a["k_TKE"][-1:], a["v_TKE"][-1:])
    return found | {"k after these and one that fits": some.k, "v after these and one that fits": some.v}


def refuses(cache, a, n):
    try:
        cache.append(a["k_TKE"][:n], a["v_TKE"][:n])
    except ValueError:
        return True
    return False


def cache_want(a, ref, at):
    n, ends = pieces(len(a["k_TKE"])), [0]
    for m in n:
        ends.append(ends[-1] + m)
    k, v = (np.stack([[token[j] for token in a[name]] for j in range(K)]) for name in ("k_TKE", "v_TKE"))
    shapes = [[[K, end, a["k_TKE"].shape[2]]] * 2 for end in ends[1:]]
    return {"k": k, "v": v, "length": ends, "shapes of k and v": shapes, "k and v are views": True,
            "one token too many raises ValueError": True, "length after it": ends[-1],
            f"{ends[-1]} tokens where 1 fits raise ValueError": True, "length after these": ends[-1] - 1,
            "k after these and one that fits": k, "v after these and one that fits": v}  # fmt: skip


class Moved:
    """Counts the numbers that are in a new place after an append: copies of what was there already."""

    def __init__(self, code):
        self.counts, self.places, self.sizes = code.counts, {}, {}

    def look(self, cache):
        for name in ("k", "v"):
            array = np.asarray(getattr(cache, name))
            place = array.__array_interface__["data"][0]
            # Held, so that its memory is not given to the next.
            before = self.places.setdefault(name, (array, place, array.size))
            if before[1] != place:
                self.counts["numbers copied that were there"] += before[2]
            self.places[name] = (array, place, array.size)


def inputs(draw, T, D, E):
    """Weights such that scores are about +-6, or +-900."""
    wide = 2 / D**0.5
    x_TD = draw(T, D)
    W = {"Wq": draw(D, H, E, scale=wide), "Wk": draw(D, K, E, scale=wide), "Wv": draw(D, K, E), "Wo": draw(H, E, D)}
    if D == 3:
        # Scores of many hundred, most of which is common to a query's keys: above 0 for one head, below for the next. It lies
        # in the pair that turns least. The last key is far from the others.
        x_TD[:-1, 0], x_TD[-1, 0], slow = 10, 20, E // 2 - 1
        for name in ("Wq", "Wk", "Wv"):
            W[name][0] *= 0.1
        for name in ("Wq", "Wk"):
            W[name][1:, :, slow] *= 0.05
        W["Wq"][0, ::2, slow], W["Wq"][0, 1::2, slow], W["Wk"][0, :, slow] = 5, -5, 5
    return {"x_TD": x_TD} | W


def run(code, a, chunks):
    x_TD = a["x_TD"]
    weights = (a["Wq"], code.counted(a["Wk"]), code.counted(a["Wv"]), a["Wo"])
    cache, moved, first, y = code.Cache(K, a["Wk"].shape[2], len(x_TD), x_TD.dtype), Moved(code), 0, []
    for n in chunks:
        y.append(code.step(x_TD[first : first + n], cache, weights))
        moved.look(cache)
        first += n
    return {"y": np.concatenate(y), "length": cache.length}


def prefill(code, a, at):
    return run(code, a, [len(a["x_TD"])])


def decode(code, a, at):
    T = len(a["x_TD"])
    return run(code, a, [T - 4, 1, 1, 1, 1])


def chunks(code, a, at):
    """Three pieces, of which the last two begin where something is cached."""
    T = len(a["x_TD"])
    return run(code, a, [T - 5, 3, 2])


def want(a, ref, at):
    o = ref.attention.Options(lengths=[len(a["x_TD"])], rope={"pairing": "half"})
    return {"y": ref.attention.attention({"x": a["x_TD"]} | {n: a[n] for n in NAMES}, o), "length": len(a["x_TD"])}


def sound(a, ref, at):
    """p = exp(s - lse) rounds numbers as large as the scores, and scales a head's values with them."""
    q, k, v = (np.abs(np.tensordot(a["x_TD"], a[W], 1)) for W in ("Wq", "Wk", "Wv"))
    score = (q.max(axis=(0, 1)) * k.max(axis=(0, 1))).sum() / q.shape[2] ** 0.5
    return {"y": score * v.max() * np.abs(a["Wo"]).sum(axis=(0, 1))}


def nothing_moves(a, at):
    return {"numbers copied that were there": 0}


def no_prefix(a, at):
    # Each row once with Wk, and once with Wv.
    return nothing_moves(a, at) | {"multiplications": len(a["x_TD"]) * (a["Wk"].size + a["Wv"].size)}


def random_size(rng):
    return int(rng.integers(7, 14)), int(rng.choice([3, 5, 7])), int(rng.choice([6, 8]))


def part(name, call, sizes):
    return Part(name, sizes, inputs, call, want, limits=no_prefix, random_size=random_size, influence=(("x_TD", "y"),),
                sound=sound)  # fmt: skip


PARTS = (
    Part("Cache", ((11, 6), (3, 4), (1, 8)), cache_inputs, cache_call, cache_want, limits=nothing_moves,
         random_size=lambda rng: (int(rng.integers(1, 14)), int(rng.integers(2, 9)))),
    part("step: prefill", prefill, ((7, 5, 6), (1, 3, 8))),
    part("step: decode", decode, ((9, 5, 6), (11, 3, 8))),
    part("step: chunks", chunks, ((11, 5, 6), (7, 3, 8))),
)  # fmt: skip

POSITIONS = "np.arange(first, first + N)"
SEEN = "np.arange(cache.length) <= first + np.arange(N)[:, None]"
ROTATED = "    k_NKE = rope(k_NKE, positions_N)\n"
APPEND = "cache.append(k_NKE, v_NKE)\n"
MISTAKES = (
    mistake("length_first_zeros", "length has grown before the append is refused: check first, and change nothing if it does not fit.",
            ("            raise ValueError(f\"no room", "            self.length = end\n            raise ValueError(f\"no room"), ("np.empty((", "np.zeros((")),
    mistake("rotated_as_query", "Keys are rotated when they are read, all by the newest token's position: a key keeps its own position.",
            (ROTATED, ""), ("q_NKGE, cache.k)", "q_NKGE, rope(cache.k.swapaxes(0, 1), np.full(cache.length, positions_N[-1])).swapaxes(0, 1))")),
    mistake("no_scale", "The scores are not divided by sqrt(E).", (" / math.sqrt(E)", "")),
    mistake("no_maximum", "exp overflows: subtract each row's maximum first.",
            ("s_KGNS - s_KGNS.max(axis=-1, keepdims=True)", "s_KGNS")),
    mistake("maximum_of_all", "The maximum is taken of later keys too: one far above those that are seen makes the weights of all of"
            " them 0, and 0/0 is NaN. Mask first.",
            ("    s_KGNS = np.where(seen_NS, s_KGNS, -np.inf)\n", ""),
            ("np.exp(s_KGNS - s_KGNS.max(axis=-1, keepdims=True))", "np.exp(s_KGNS - s_KGNS.max(axis=-1, keepdims=True)) * seen_NS")),
    mistake("from_zero", "Positions begin at 0 in every step: the first new token stands at position cache.length.",
            (POSITIONS, "np.arange(N)"), seen="Blaizzy/mlx-vlm #1983"),
    mistake("offset_twice", "The offset is counted twice: cache.length is the new tokens' first position already.",
            (POSITIONS, "np.arange(2 * first, 2 * first + N)"), seen="mlx-node/mlx-node #33"),
    mistake("one_late", "The first new token is put at position length + 1: positions are counted from 0.",
            (POSITIONS, "np.arange(first, first + N) + (first > 0)")),
    mistake("one_position", "All tokens of a chunk get the first one's position.",
            (POSITIONS, "np.full(N, first)"), seen="jundot/omlx #2363"),
    mistake("chunk_alone", "A piece of several tokens looks at itself alone, as a first one does: it sees what is in the cache, too.",
            ("cache.k) / math.sqrt(E)", "cache.k[:, first if N > 1 else 0 :]) / math.sqrt(E)"),
            ("np.arange(cache.length) <=", "np.arange(first if N > 1 else 0, cache.length) <="),
            ("p_KGNS, cache.v)", "p_KGNS, cache.v[:, first if N > 1 else 0 :])")),
    mistake("mask_without_offset", "The mask is that of a first chunk, key j <= row i: row i of this chunk is token length + i.",
            (SEEN, "np.arange(cache.length) <= np.arange(N)[:, None]"), seen="hyprstream/hyprstream #1521"),
    mistake("no_mask", "Within a chunk tokens see those after them: there is no causal mask.",
            (SEEN, "np.full((N, cache.length), True)")),
    mistake("not_itself", "A token does not see itself: key j is seen by query i if j <= i.",
            (SEEN, "(np.arange(cache.length) < first + np.arange(N)[:, None]) | (np.arange(cache.length) == 0)")),
    mistake("prefix_again", "This is right, but the prefix is projected again in every step: its keys and values are in the cache.",
            ("    k_NKE = (x_ND @ Wk_DKE.reshape(D, K * E)).reshape(N, K, E)\n",
             "    x_SD = cache.x_SD = np.concatenate([getattr(cache, 'x_SD', x_ND[:0]), x_ND])\n"
             "    k_NKE = (x_SD @ Wk_DKE.reshape(D, K * E)).reshape(-1, K, E)[first:]\n"),
            ("v_NKE = (x_ND @ Wv_DKE.reshape(D, K * E)).reshape(N, K, E)",
             "v_NKE = (x_SD @ Wv_DKE.reshape(D, K * E)).reshape(-1, K, E)[first:]")),
    mistake("concatenated", "This is right, but each append copies all that was there (np.concatenate): write into room made once.",
            ("        self.k_KCE[:, self.length : end] = k_NKE.swapaxes(0, 1)\n",
             "        room = self.k_KCE[:, end:]\n"
             "        self.k_KCE = np.concatenate([self.k_KCE[:, : self.length], k_NKE.swapaxes(0, 1), room], axis=1)\n"),
            ("        self.v_KCE[:, self.length : end] = v_NKE.swapaxes(0, 1)\n",
             "        self.v_KCE = np.concatenate([self.v_KCE[:, : self.length], v_NKE.swapaxes(0, 1), room], axis=1)\n")),
    mistake("heads_expanded", "H heads are stored where K are enough: queries share key/value heads, and the cache is where it pays.",
            ("np.empty((kv_heads, ", "np.empty((3 * kv_heads, "), ("NKE.swapaxes(0, 1)", "NKE.swapaxes(0, 1).repeat(3, axis=0)"),
            ("cache.k)", "cache.k[::3])"), ("cache.v)", "cache.v[::3])")),
    mistake("tokens_first", "k and v are stored token by token, (length, K, E): the layout here is (K, length, E).",
            ("(kv_heads, capacity, width)", "(capacity, kv_heads, width)"), ("k_KCE.shape[1]", "k_KCE.shape[0]"),
            ("KCE[:, self.length : end] = k_NKE.swapaxes(0, 1)", "KCE[self.length : end] = k_NKE"),
            ("KCE[:, self.length : end] = v_NKE.swapaxes(0, 1)", "KCE[self.length : end] = v_NKE"),
            ("KCE[:, : self.length]", "KCE[: self.length]"), ("nkge,kse", "nkge,ske"), ("kgns,kse", "kgns,ske")),
    mistake("keys_not_rotated", "Only queries are rotated: with the keys as they are, scores depend on absolute positions.", (ROTATED, "")),
    mistake("values_rotated", "Values are rotated as well: only queries and keys are.",
            (ROTATED, ROTATED + "    v_NKE = rope(v_NKE, positions_N)\n")),
    mistake("tiled", "Query head h reads key head h mod K: groups are of neighbours, h // (H/K).",
            ("q_NHE.reshape(N, K, H // K, E)", "q_NHE.reshape(N, H // K, K, E).swapaxes(1, 2)"),
            ("return o_NKGE.reshape", "return o_NKGE.swapaxes(1, 2).reshape")),
    mistake("float64_cache", "The cache is float64 whatever dtype says, and so is all that is computed with it.",
            ("width), dtype)", "width))")),
    mistake("length_by_one", "length grows by 1 for each append, and not by the number of tokens appended.",
            ("        self.length = end\n", "        self.length += 1\n")),
    mistake("whole_capacity", "k and v give all the room there is: past the length stands what was never written. Cut at length.",
            ("KCE[:, : self.length]", "KCE")),
    mistake("copies", "k and v are copies, made anew each time they are asked for: give a view, a slice of the array.",
            ("KCE[:, : self.length]", "KCE[:, : self.length].copy()")),
    mistake("token_by_token", "The room is looked at token by token: of several the first are taken before the append is refused. Check for all of"
            " them first, and change nothing if they do not fit.",
            ("        end = self.length + len(k_NKE)\n        if end > self.k_KCE.shape[1]:\n",
             "        end = self.length + len(k_NKE)\n        if end > self.k_KCE.shape[1]:\n            fit = self.k_KCE.shape[1] - self.length\n"
             "            self.k_KCE[:, self.length :] = k_NKE[:fit].swapaxes(0, 1)\n"
             "            self.v_KCE[:, self.length :] = v_NKE[:fit].swapaxes(0, 1)\n            self.length += fit\n")),
    mistake("length_first", "length has grown before the append is refused: check first, and change nothing if it does not fit.",
            ("        if end > self.k_KCE.shape[1]:\n", "        first, self.length = self.length, end\n        if end > self.k_KCE.shape[1]:\n"),
            ("KCE[:, self.length : end]", "KCE[:, first : end]")),
    mistake("last_place", "The last place stays empty: tokens that fill the cache exactly do fit.", ("if end > self", "if end >= self")),
    mistake("values_tiled", "The keys are shared by neighbours, the values in turn (h mod K): a query head reads both from the same head.",
            ('np.einsum("kgns,kse->nkge", p_KGNS, cache.v)',
             'np.einsum("kgns,kgse->nkge", p_KGNS, np.tile(cache.v, (H // K, 1, 1)).reshape(K, H // K, -1, E))')),
    mistake("length_after", "The first new position is read from cache.length after the append has moved it: queries and the mask stand N"
            " tokens too far.",
            ("    q_NHE = rope(q_NHE, positions_N)\n", ""),
            ("    cache.append(k_NKE, v_NKE)\n",
             "    cache.append(k_NKE, v_NKE)\n    first = cache.length\n    q_NHE = rope(q_NHE, np.arange(first, first + N))\n")),
)  # fmt: skip
