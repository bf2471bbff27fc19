"""What is right in exercise 22 (whole heads one after another, gradients by complex step), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake

WEIGHTS = ("Wq", "Wk", "Wv", "Wo")
NAMES = ("x", *WEIGHTS, "bo")
STEP = 1e-30


def inputs(draw, T, D, H, K, E):
    # Scores of about +-4, not more: where a weight is 1 to float32 but not to float64, roundings in one say nothing of the other.
    sharp = (1.3 / D) ** 0.5
    a = {"x": draw(T, D), "Wq": draw(D, H, E, scale=sharp), "Wk": draw(D, K, E, scale=sharp), "Wv": draw(D, K, E)}
    return a | {"Wo": draw(H, E, D), "bo": draw(D), "dy": draw(T, D)}


def counts(a):
    return a["Wq"].shape[1], a["Wk"].shape[1]


def readers(a, head):
    """The query heads that read a key/value head."""
    H, K = counts(a)
    return [i for i in range(H) if i * K // H == head]


def own(a, at):
    """This rank's query heads and the key/value heads that these read, as lists."""
    H, K = counts(a)
    queries = list(range(H))[at.cut(H)]
    return queries, [head for head in range(K) if set(readers(a, head)) & set(queries)]


def shards(a, at):
    h, k = own(a, at)
    return [a["Wq"][:, h], a["Wk"][:, k], a["Wv"][:, k], a["Wo"][h]]


def own_heads(code, a, at):
    H, K = counts(a)
    h, k = code.own_heads(H, K, at)
    return {"query heads": np.arange(H)[h].tolist(), "key/value heads": np.arange(K)[k].tolist()}


def forward(code, a, tp):
    y_TD, _ = code.tp_attention_forward(a["x"], *shards(a, tp), a["bo"], counts(a), tp)
    return {"y": y_TD}


def backward(code, a, tp):
    _, saved = code.tp_attention_forward(a["x"], *shards(a, tp), a["bo"], counts(a), tp)
    dx, dWq, dWk, dWv, dWo, dbo = code.tp_attention_backward(a["dy"], saved, *shards(a, tp), counts(a), tp)
    return {"dx": dx, "dWq": dWq, "dWk": dWk, "dWv": dWv, "dWo": dWo, "dbo": dbo}


def options(a, ref):
    return ref.attention.Options(lengths=[len(a["x"])])


def gradient(a, ref, name, heads, *at):
    """Of the loss sum(dy y), of some query heads only, at these entries: by complex step.

    In long double: what cancels in a softmax's derivative cancels in another order here than in an answer, and its rounding would
    be taken for the answer's.
    """
    o = options(a, ref)
    W = {n: a[n].astype(np.longdouble) for n in NAMES if n != "bo" or name == "bo"}
    dy, moved = a["dy"].astype(np.longdouble), a[name].astype(np.clongdouble)
    at = [np.asarray(i, int) for i in at or map(np.arange, a[name].shape)]
    found = np.empty([len(i) for i in at])
    for place in np.ndindex(found.shape):
        index = tuple(int(i[p]) for i, p in zip(at, place, strict=True))
        reached = ref.attention.reached(W, o, name, index).get("heads", heads)
        moved[index] += 1j * STEP
        y = ref.attention.attention(W | {name: moved}, o, heads=[i for i in heads if i in reached])
        found[place] = (dy * y).sum().imag / STEP
        moved[index] = moved[index].real
    return found


def want_own_heads(a, ref, at):
    h, k = own(a, at)
    return {"query heads": h, "key/value heads": k}


def want_forward(a, ref, tp):
    return {"y": ref.attention.attention({n: a[n] for n in NAMES}, options(a, ref))}


def want_backward(a, ref, tp):
    (h, k), (D, H, E) = own(a, tp), a["Wq"].shape
    d, e, every = range(D), range(E), range(H)
    found = {"dWq": gradient(a, ref, "Wq", every, d, h, e), "dWo": gradient(a, ref, "Wo", every, h, e, d)}
    found |= {f"d{n}": gradient(a, ref, n, every, d, k, e) for n in ("Wk", "Wv")}
    return found | {"dx": gradient(a, ref, "x", every), "dbo": gradient(a, ref, "bo", every)}


def with_heads(a, at):
    return [(q.rank, own(a, q)[0]) for q in at.others() if own(a, q)[0]]


def forward_parts(a, ref, tp):
    W, o = {n: a[n] for n in NAMES if n != "bo"}, options(a, ref)
    return {"y": {f"part {r}": ref.attention.attention(W, o, heads=h) for r, h in with_heads(a, tp)} | {"bo": a["bo"]}}


def backward_parts(a, ref, tp):
    (_, k), (D, _, E) = own(a, tp), a["Wq"].shape
    found = {"dx": {f"part {r}": gradient(a, ref, "x", h) for r, h in with_heads(a, tp)}}
    for n in ("Wk", "Wv"):
        parts = {f"rank {r}'s": gradient(a, ref, n, h, range(D), k, range(E)) for r, h in with_heads(a, tp)}
        found[f"d{n}"] = {name: part for name, part in parts.items() if part.any()}
    return found


def one_sum(a, tp):
    return {"numbers sent": 2 * (tp.size - 1) * a["x"].size // tp.size + 1, "rounds": 2}


def sum_and_copies(a, tp):
    T, D = a["x"].shape
    _, K, E = a["Wk"].shape
    # The gradients of keys and values may be summed instead of their weights'.
    copies = 2 * K * E * max(T, D)
    return {"numbers sent": one_sum(a, tp)["numbers sent"] + 2 * (tp.size - 1) * copies // tp.size + 2, "rounds": 4}


# H and K: copies of both heads on rank 1; queries cut unevenly and groups cut in the middle; a rank without heads; one head for all.
SIZES = ((5, 4, 6, 2, 3), (3, 5, 8, 2, 4), (4, 3, 2, 1, 5), (2, 3, 8, 4, 5))


def random_size(rng):
    T, D, E = rng.choice([2, 3, 4, 5], 3, replace=False).tolist()
    H, K = [(6, 2), (4, 2), (8, 2), (6, 3), (5, 1), (10, 2), (8, 4)][int(rng.integers(7))]
    return T + 1, D, H, K, E


PARTS = (
    Part("own_heads", SIZES, inputs, own_heads, want_own_heads, random_size=random_size, dtypes=("float64",)),
    Part("tp_attention_forward", SIZES, inputs, forward, want_forward, forward_parts, one_sum, random_size=random_size,
         factors=lambda T, D, H, K, E: {"H/K": H / K}),
    Part("tp_attention_backward", SIZES, inputs, backward, want_backward, backward_parts, sum_and_copies,
         random_size=random_size, factors=lambda T, D, H, K, E: {"H/K": H / K}),
)  # fmt: skip

KV, PLACE = "slice(h.start // group, -(-h.stop // group))", "np.arange(h.start, h.stop) // (H // K) - k.start"
SUM, BACK = "tp.all_reduce(part_TD) + bo_D", "tp.all_reduce(q_TD + k_TD + v_TD)"
COPIES = "dWk_DkE, dWv_DkE = tp.all_reduce(both_2DKE)[:, :, k]"
AT = "np.add.at(dk_kTE, kv_h, dk_hTE)\n    np.add.at(dv_kTE, kv_h, dv_hTE)"
LAST = "return dx_TD, dWq_DhE, dWk_DkE, dWv_DkE, dWo_hED, dbo_D"
MISTAKES = (
    mistake("kv_even", "own_heads cuts the key/value heads evenly: then a rank lacks heads that its query heads read.", (KV, "tp.cut(K)")),
    mistake("kv_whole_index", "A key/value head is looked up by its number in the whole model: here it stands at that number less the first"
            " that this rank has.", (PLACE, "np.arange(h.start, h.stop) // (H // K)")),
    mistake("kv_all", "own_heads keeps all key/value heads on every rank; only those that its own query heads read are asked for.",
            (KV, "slice(0, K)")),
    mistake("kv_rounded_down", "own_heads rounds the end down: the last key/value head is missing where a rank reads only some of its group.",
            (KV, "slice(h.start // group, h.stop // group)")),
    mistake("kv_one", "own_heads keeps one key/value head a rank: query heads of one rank may read two.",
            (KV, "slice(h.start // group, h.start // group + 1)")),
    mistake("kv_one_more", "own_heads keeps a key/value head too many: where a rank's last query head ends a group, the next one belongs to"
            " others.", (KV, "slice(h.start // group, h.stop // group + 1)")),
    mistake("kv_of_nobody", "A rank without query heads is given a key/value head: it reads none, so its slice is empty.",
            (KV, "slice(min(h.start // group, K - 1), max(min(h.start // group, K - 1) + 1, -(-h.stop // group)))")),
    mistake("kv_exchanged", "own_heads takes K for the size of a group: H/K query heads read one key/value head.",
            ("group = H // K", "group = K")),
    mistake("kv_zero", "Every query head reads this rank's first key/value head: on a rank with two of them that is wrong for some.",
            (PLACE, "0 * np.arange(h.start, h.stop)")),
    mistake("kv_tile", "Query heads take the key/value heads in turn (tile); neighbours share one (repeat).",
            (PLACE, "np.arange(h.stop - h.start) % Wk_DkE.shape[1]")),
    mistake("kv_local_group", "The group's size is taken from this rank's counts: where a group is cut in the middle that is another one."
            " It is H/K of the whole model, counted from the rank's first head.",
            (PLACE, "np.arange(h.stop - h.start) * Wk_DkE.shape[1] // max(1, h.stop - h.start)")),
    mistake("no_sum", "y has this rank's heads only: the heads' outputs are terms of one sum over all ranks.", (SUM, "part_TD + bo_D")),
    mistake("bias_in_sum", "bo is added on every rank before the all-reduce, so it arrives tp times.",
            (SUM, "tp.all_reduce(part_TD + bo_D)"), seen="huggingface/text-generation-inference #1036"),
    mistake("scale_local", "The scale is that of this rank's whole width, h E: scores are sums over one head's E numbers.",
            ("math.sqrt(Wq_DhE.shape[2])", "math.sqrt(max(1, Wq_DhE[0].size))")),
    mistake("scale_width", "The scale is that of the model's width, D: scores are sums over one head's E numbers.",
            ("math.sqrt(Wq_DhE.shape[2])", "math.sqrt(Wq_DhE.shape[0])")),
    mistake("scale_share", "The scale is that of a head D / H wide: its width is E, Wq's last dim, and need not be D / H.",
            ("math.sqrt(Wq_DhE.shape[2])", "math.sqrt(Wq_DhE.shape[0] / heads[0])")),
    mistake("no_sum_back", "dx has this rank's heads only: all ranks' projections read x, so their parts are to be summed.",
            (BACK, "q_TD + k_TD + v_TD")),
    mistake("dx_queries_only", "dx has the queries' part only: x is read three times, by Wq, Wk and Wv.", (BACK, "tp.all_reduce(q_TD)")),
    mistake("copies_apart", "A copied key/value head's gradient is this rank's only: the other ranks that hold a copy read it too, and the"
            " copies drift apart.", (COPIES, "dWk_DkE, dWv_DkE = both_2DKE[:, :, k]"), seen="bigcode-project/Megatron-LM #37"),
    mistake("copies_mean", "The gradients of a head's copies are averaged over the ranks that hold one: it is one weight, used on all of them,"
            " so they are summed.",
            (COPIES, "mine_K = np.zeros(K, x_TD.dtype)\n    mine_K[k] = 1\n    held_K = tp.all_reduce(mine_K)\n"
             "    dWk_DkE, dWv_DkE = (tp.all_reduce(both_2DKE) / held_K[:, None])[:, :, k]")),
    mistake("copies_by_place", "dWk and dWv are summed over all of tp as they lie: on different ranks the first head is another head.",
            (COPIES, "dWk_DkE, dWv_DkE = (tp.all_reduce(np.ascontiguousarray(w)) for w in both_2DKE[:, :, k])")),
    mistake("summed_before_dx", "dk and dv are summed over the ranks before dx is made of them: then every rank that has a copy counts the"
            " others' share once more in dx.",
            (AT, AT + "\n    H, K = heads\n    _, k = own_heads(H, K, tp)\n    all_2KTE = np.zeros((2, K, *dk_kTE.shape[1:]), x_TD.dtype)\n"
             "    all_2KTE[:, k] = dk_kTE, dv_kTE\n    dk_kTE, dv_kTE = tp.all_reduce(all_2KTE)[:, k]"),
            (COPIES, "dWk_DkE, dWv_DkE = both_2DKE[:, :, k]")),
    mistake("added_once", "a[index] += b adds only one of the heads that have the same index, the last: NumPy reads all, adds, and writes."
            " Sum over the group, or use np.add.at.", (AT, "dk_kTE[kv_h] += dk_hTE\n    dv_kTE[kv_h] += dv_hTE")),
    mistake("dWq_summed", "dWq and dWo are summed over tp: the ranks' heads are different weights.",
            (LAST, "dWq_DhE, dWo_hED = tp.all_reduce(dWq_DhE), tp.all_reduce(dWo_hED)\n    " + LAST)),
    mistake("dbo_summed", "dbo is summed over tp: every rank has all of dy already, so it is tp times too large.",
            ("dbo_D = dy_TD.sum(axis=0)", "dbo_D = tp.all_reduce(dy_TD.sum(axis=0))")),
    mistake("dy_summed", "dy is summed over tp: it is the same on every rank, so all behind it is tp times too large.",
            ("    dbo_D = dy_TD.sum(axis=0)", "    dy_TD = tp.all_reduce(dy_TD)\n    dbo_D = dy_TD.sum(axis=0)")),
    mistake("copies_two_sums", "This is right, but keys' and values' copies are summed one after the other: one message takes both.",
            (COPIES, "dWk_DkE, dWv_DkE = (tp.all_reduce(w)[:, k] for w in both_2DKE)")),
    mistake("head_by_head", "This is right, but each key/value head's copies are summed in a message of its own: one message takes all heads"
            " of both.", (COPIES, "dWk_DkE, dWv_DkE = np.stack([np.stack([tp.all_reduce(w[:, j]) for j in range(K)], axis=1) for w in both_2DKE])[:, :, k]")),
    mistake("three_sums", "This is right, but the three projections' parts of dx are summed over the ranks one by one: add them, then sum once.",
            (BACK, "tp.all_reduce(q_TD) + tp.all_reduce(k_TD) + tp.all_reduce(v_TD)")),
    mistake("kv_own_first", "The groups are counted from this rank's first query head: where that stands inside a group, its neighbours read the"
            " wrong key/value head. Count by the head's number in all H: number // (H/K), less the first key/value head here.",
            (PLACE, "np.arange(h.stop - h.start) // (H // K)")),
    mistake("scale_square", "The scores are divided by E: it is its root.", ("1 / math.sqrt(Wq_DhE.shape[2])", "1 / Wq_DhE.shape[2]")),
    mistake("no_scale", "The scores lack 1 / sqrt(E).", ("1 / math.sqrt(Wq_DhE.shape[2])", "1.0")),
    mistake("dy_averaged", "This is right, but backward sends dy round and averages it, though it is alike on all ranks.",
            ("    dbo_D = dy_TD.sum(axis=0)", "    dy_TD = tp.all_reduce(dy_TD) / tp.size\n    dbo_D = dy_TD.sum(axis=0)")),
    mistake("terms_gathered", "This is right, but every rank's term of y is gathered and added up here: an all-reduce sends 2/tp of that.",
            (SUM, "tp.all_gather(part_TD[None]).sum(axis=0) + bo_D")),
)  # fmt: skip
