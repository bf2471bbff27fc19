"""What is right in exercise 23 (whole tables, token by token, the gradient by complex step), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake

RANKS = 3


def edges(V):
    """The first and the last id of each rank's part."""
    return [i for ids in np.array_split(np.arange(V), RANKS) for i in (ids[0], ids[-1])]


def picked(draw, T, V):
    """T ids: those at the edges of parts first, in any order."""
    return draw.rng.permutation([*draw.rng.permutation(edges(V)), *draw.ids(V, max(0, T - 2 * RANKS))][:T])


def inputs_embed(draw, T, V, D):
    return {"ids_T": picked(draw, T, V), "W_VD": draw(V, D)}


def inputs_loss(draw, T, V):
    z_TV = draw(T, V, scale=3)
    # One rank's logits far above the others', another one each token; and a token with very large ones.
    for t in range(1, T, 2):
        z_TV[t, np.array_split(np.arange(V), RANKS)[t // 2 % RANKS]] += 1000
    # Odd T: a token whose logits are all far below 0: a maximum that starts from 0 leaves nothing of them.
    z_TV[0] -= 1000 * (T % 2)
    z_TV[-1, [1, V - 2]] = 1e4, -1e4
    return {"z_TV": z_TV, "target_T": picked(draw, T, V)}


def embed(code, a, tp):
    own = tp.cut(len(a["W_VD"]))
    return {"x": code.embed(a["ids_T"], a["W_VD"][own], own.start, tp)}


def loss(code, a, tp):
    own = tp.cut(a["z_TV"].shape[1])
    mean, _ = code.loss(np.ascontiguousarray(a["z_TV"][:, own]), a["target_T"], own.start, tp)
    return {"loss": mean}


def backward(code, a, tp):
    own = tp.cut(a["z_TV"].shape[1])
    _, saved = code.loss(np.ascontiguousarray(a["z_TV"][:, own]), a["target_T"], own.start, tp)
    return {"dz": code.backward(saved), "dz, called again": code.backward(saved)}


def true_loss(z_TV, target_T):
    """Token by token: log of the sum over ids of exp(z_id - z_target)."""
    found = []
    for z_V, target in zip(z_TV, target_T, strict=True):
        far_V = z_V - z_V[target]
        high = far_V.real.max()
        found.append(high + np.log(np.exp(far_V - high).sum()))
    return sum(found) / len(found)


def want_embed(a, ref, tp):
    return {"x": np.array([a["W_VD"][i] for i in a["ids_T"].tolist()])}


def want_loss(a, ref, tp):
    return {"loss": float(true_loss(a["z_TV"], a["target_T"]))}


def want_backward(a, ref, tp):
    T, V = a["z_TV"].shape
    at = np.arange(T), np.arange(V)[tp.cut(V)]

    def moved_loss(moved, name, index):
        return true_loss(moved["z"], a["target_T"])

    dz_Tv = ref.gradient.at_entries(moved_loss, {"z": a["z_TV"]}, "z", at)
    return {"dz": dz_Tv, "dz, called again": dz_Tv}


def embed_parts(a, ref, tp):
    ids_T, W_VD = a["ids_T"], a["W_VD"]
    owned = {q.rank: np.isin(ids_T, np.arange(len(W_VD))[q.cut(len(W_VD))]) for q in tp.others()}
    return {"x": {f"rank {r}'s rows": W_VD[ids_T] * own_T[:, None] for r, own_T in owned.items() if own_T.any()}}


def one_sum(a, tp):
    return {"numbers sent": 2 * (tp.size - 1) * a["ids_T"].size * a["W_VD"].shape[1] // tp.size + 1, "rounds": 2}


def three_a_token(a, tp):
    # As an all-gather of three; three all-reduces send less.
    return {"numbers sent": 3 * (tp.size - 1) * len(a["z_TV"]), "rounds": 6}


def sound(a, ref, tp):
    """log p = z - lse, and the sum of what the ranks have of it, round numbers as large as the logits."""
    far_T = np.abs(a["z_TV"]).max(axis=1)
    return {"loss": far_T.mean()} | dict.fromkeys(("dz", "dz, called again"), far_T[:, None] / len(far_T))


def silent(a, tp):
    return {"numbers sent": 0}


def random_embed(rng):
    return tuple(rng.choice([3, 4, 5, 7], 1).tolist() + rng.choice([10, 11, 13, 16], 1).tolist() + [2])


def random_loss(rng):
    return int(rng.integers(2, 9)), int(rng.choice([11, 13, 14, 16]))


PARTS = (
    Part("embed", ((7, 10, 3), (3, 11, 5), (5, 13, 4)), inputs_embed, embed, want_embed, embed_parts, one_sum,
         random_size=random_embed),
    Part("loss", ((7, 10), (3, 11), (6, 13)), inputs_loss, loss, want_loss, None, three_a_token, random_size=random_loss,
         sound=sound),
    Part("backward", ((7, 10), (3, 11), (6, 13)), inputs_loss, backward, want_backward, None, silent,
         random_size=random_loss, sound=sound),
)  # fmt: skip

PART, HERE = "np.where(here_T[:, None], W_vD[row_T], 0)", "(ids_T >= first) & (ids_T < first + len(W_vD))"
HIT, MINE = "np.where(mine_T, far_Tv[np.arange(T), column_T], 0)", "(target_T >= first) & (target_T < first + v)"
HIGH, BOTH = 'tp.all_reduce(z_Tv.max(axis=1), op="max")', "sum_T, at_T = tp.all_reduce(np.stack([e_Tv.sum(axis=1), hit_T]))"
ONE_HOT = "dz_Tv[mine_T, column_T[mine_T]] -= 1"
MISTAKES = (
    mistake("saved_changed", "Backward changes what is saved: called again it gives another gradient. Work on a copy.",
            ("dz_Tv = p_Tv.copy()", "dz_Tv = p_Tv")),
    mistake("embed_no_sum", "Ids of other ranks get zeros and nobody sums: each id's row is on one rank, the others bring 0.",
            ("tp.all_reduce(part_TD)", "part_TD")),
    mistake("embed_mean", "The rows are divided by tp: one rank brings the row and the others 0, so the sum is the row.",
            ("tp.all_reduce(part_TD)", "tp.all_reduce(part_TD) / tp.size")),
    mistake("embed_last_row", "An id that is not here became index -1, which is the last row here: every rank adds something for every id."
            " Put zeros there.", (PART, "W_vD[np.where(here_T, ids_T - first, -1)]")),
    mistake("embed_first_row", "An id that is not here became index 0 and its row is added: every rank adds something for every id. Put"
            " zeros there.", (PART, "W_vD[row_T]")),
    mistake("embed_wraps", "Only the upper end is tested: ids of earlier ranks give negative indices, which NumPy counts from the end: a wrong"
            " row, or an error where they reach too far.", (HERE, "ids_T < first + len(W_vD)")),
    mistake("embed_no_first", "Rows are looked up by the id of the whole vocabulary; here row 0 is id `first`.",
            ("np.where(here_T, ids_T - first, 0)", "np.where(here_T, ids_T, 0) % len(W_vD)")),
    mistake("embed_edge", "The id just behind this rank's last is taken for its own: the part is first <= id < first + v.",
            (HERE, "(ids_T >= first) & (ids_T <= first + len(W_vD))")),
    mistake("embed_first_id", "The first id of each part is nobody's: the part is first <= id < first + v.",
            (HERE, "(ids_T > first) & (ids_T < first + len(W_vD))")),
    mistake("embed_gathered", "This is right, but the whole table is gathered on every rank: V x D numbers for T rows.",
            ("return tp.all_reduce(part_TD)", "return tp.all_gather(W_vD)[ids_T]")),
    mistake("local_maximum", "Each rank subtracts its own maximum: the sums of exp are then in different units and cannot be added."
            " One maximum a token, over all ranks.", (HIGH, "z_Tv.max(axis=1)")),
    mistake("maxima_summed", "The ranks' maxima are added; the largest of them is wanted.", (HIGH, "tp.all_reduce(z_Tv.max(axis=1))")),
    mistake("no_maximum", "No maximum is subtracted: exp(1e4) is infinite.", (HIGH, "0 * z_Tv[:, 0]")),
    mistake("local_softmax", "dz's softmax is over this rank's ids only: its rows add to 1 on every rank, tp in all.",
            ("e_Tv / sum_T[:, None]", "e_Tv / e_Tv.sum(axis=1, keepdims=True)")),
    mistake("local_softmax_of_zeros", "dz's softmax is divided by this rank's own sum of exp, and is 0 where that is 0: the sum is that of all"
            " ranks.", ("e_Tv / sum_T[:, None]", "e_Tv / np.maximum(e_Tv.sum(axis=1, keepdims=True), np.finfo(e_Tv.dtype).tiny)")),
    mistake("local_sum", "The sum of exp is over this rank's ids only: the softmax is over all V.",
            (BOTH, BOTH + "\n    sum_T = e_Tv.sum(axis=1)")),
    mistake("target_local", "The target's logit is not summed over the ranks: where another rank has it, 0 is used.",
            (BOTH, BOTH + "\n    at_T = hit_T")),
    mistake("target_edge", "The id just behind this rank's last is taken for its own: the part is first <= target < first + v.",
            (MINE, "(target_T >= first) & (target_T <= first + v)")),
    mistake("target_first_id", "A target that is the first id of a part is nobody's: the part is first <= target < first + v.",
            (MINE, "(target_T > first) & (target_T < first + v)")),
    mistake("target_last_logit", "A target that is not here became index -1: every rank adds its last logit. Put 0 there.",
            (HIT, "far_Tv[np.arange(T), np.where(mine_T, target_T - first, -1)]")),
    mistake("target_first_logit", "A target that is not here became index 0, and every rank adds its first logit. Put 0 there.",
            (HIT, "far_Tv[np.arange(T), column_T]")),
    mistake("target_unshifted", "The maximum was subtracted in the sum and not in the target's logit: subtract it in both, or in neither.",
            (HIT, HIT.replace("far_Tv", "z_Tv"))),
    mistake("gathered_into_parallel", "The loss is too large by the logarithm of tp: every rank sums exp over all V ids, and then the ranks'"
            " sums are added.", ("e_Tv.sum(axis=1), hit_T", "np.exp(tp.all_gather(z_Tv, 1) - high_T[:, None]).sum(axis=1), hit_T"),
            (HIGH, HIGH), seen="NVIDIA/Megatron-LM #7452"),
    mistake("loss_summed", "The loss is a sum over tokens: the mean is asked for.", (".mean()", ".sum()")),
    mistake("loss_over_ranks", "The loss is divided by tp: it is one loss, which all ranks compute.", (".mean()", ".mean() / tp.size")),
    mistake("logits_gathered", "This is right, but all logits are gathered: T x V numbers, where three a token are enough.",
            ("T, v = z_Tv.shape\n", "T, v = z_Tv.shape\n    z_TV = tp.all_gather(z_Tv, 1)\n"), ('tp.all_reduce(z_Tv.max(axis=1), op="max")', "z_TV.max(axis=1)"),
            ("sum_T, at_T = tp.all_reduce(np.stack([e_Tv.sum(axis=1), hit_T]))",
             "z_TV = z_TV - high_T[:, None]\n    sum_T, at_T = np.exp(z_TV).sum(axis=1), z_TV[np.arange(T), target_T]")),
    mistake("one_hot_everywhere", "Every rank takes 1 away, also those that do not have the target: only its owner does.",
            (ONE_HOT, "dz_Tv[np.arange(len(dz_Tv)), column_T] -= 1")),
    mistake("one_hot_clipped", "A target of another rank is clipped onto this rank's first or last column, and 1 is taken away there: only"
            " its owner takes it away.", ("column_T = np.where(mine_T, target_T - first, 0)", "column_T = np.clip(target_T - first, 0, v - 1)"),
            (ONE_HOT, "dz_Tv[np.arange(len(dz_Tv)), column_T] -= 1")),
    mistake("one_hot_last", "Ranks that do not have the target take 1 away in their last column: index -1 is not nowhere.",
            (ONE_HOT, "dz_Tv[np.arange(len(dz_Tv)), np.where(mine_T, column_T, -1)] -= 1")),
    mistake("no_one_hot", "dz is the softmax alone: 1 is to be taken away at the target.", (ONE_HOT, "pass")),
    mistake("not_divided", "dz is the gradient of the sum over tokens: the loss was divided by T, dz was not.",
            ("return dz_Tv / len(p_Tv)", "return dz_Tv")),
    mistake("sign", "The sign of dz is turned: it is softmax - one-hot.", ("return dz_Tv / len(p_Tv)", "return -dz_Tv / len(p_Tv)")),
    mistake("embed_clipped", "Ids of other ranks are clipped onto this rank's first or last row, and that row is added: put zeros there.",
            (PART, "W_vD[np.clip(ids_T - first, 0, len(W_vD) - 1)]")),
    mistake("target_clipped", "A target of another rank is clipped onto this rank's first or last logit, which is added: put 0 there.",
            (HIT, "far_Tv[np.arange(T), np.clip(target_T - first, 0, v - 1)]")),
    mistake("maximum_from_zero", "The maximum is at least 0: where all logits of a token are far below 0 every exp is 0. Start from -inf, or"
            " from the logits themselves.", (HIGH, 'np.maximum(tp.all_reduce(z_Tv.max(axis=1), op="max"), 0)')),
    mistake("whole_maximum", "One maximum is subtracted from all rows: in rows that lie far below it every exp is 0. Each token has its own"
            " maximum, over all ranks.", (HIGH, 'tp.all_reduce(np.full(T, z_Tv.max()), op="max")')),
)  # fmt: skip
