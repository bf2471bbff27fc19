"""What is right in exercise 44 (all tokens and heads in one place; gradients by complex step), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake

NAMES = ("q", "k", "v")


def inputs(draw, T, H, E, ranks):
    return {
        "q_THE": draw(T, H, E, scale=1.5),
        "k_THE": draw(T, H, E, scale=1.5),
        "v_THE": draw(T, H, E),
        "do_THE": draw(T, H, E),
    }


def rows(a, cp):
    return cp.cut(len(a["q_THE"]))


def heads(a, cp):
    return cp.cut(a["q_THE"].shape[1])


def to_heads(code, a, cp):
    return {"x": code.to_heads(a["v_THE"][rows(a, cp)], cp)}


def to_tokens(code, a, cp):
    return {"x": code.to_tokens(a["v_THE"][:, heads(a, cp)], cp)}


def forward(code, a, cp):
    o, _ = code.attention_forward(*(a[f"{n}_THE"][rows(a, cp)] for n in NAMES), cp)
    return {"o": o}


def kept(saved):
    """Numbers in what was saved."""
    if isinstance(saved, np.ndarray):
        return saved.size
    inner = saved.values() if isinstance(saved, dict) else saved if isinstance(saved, (tuple, list)) else ()
    return sum(map(kept, inner))


def backward(code, a, cp):
    _, saved = code.attention_forward(*(a[f"{n}_THE"][rows(a, cp)] for n in NAMES), cp)
    code.counts["numbers saved"] += kept(saved)
    dq, dk, dv = code.attention_backward(a["do_THE"][rows(a, cp)], saved, cp)
    return {"dq": dq, "dk": dk, "dv": dv}


def want_forward(a, ref, cp):
    q, k, v = (a[f"{n}_THE"] for n in NAMES)
    o = [ref.attention.head(q[:, h], k[:, h], v[:, h], q.shape[2] ** -0.5, True) for h in range(q.shape[1])]
    return {"o": np.stack(o, axis=1)[rows(a, cp)]}


def want_backward(a, ref, cp):
    given = {n: a[f"{n}_THE"] for n in NAMES}

    def loss(moved, name, index):
        # Of the head that is moved.
        q, k, v = (x[:, index[1]] for x in moved.values())
        return (ref.attention.head(q, k, v, q.shape[1] ** -0.5, True) * a["do_THE"][:, index[1]]).sum()

    at = [np.r_[rows(a, cp)], *(np.arange(n) for n in a["q_THE"].shape[1:])]
    return {f"d{n}": ref.gradient.at_entries(loss, given, n, at) for n in NAMES}


def sound(a, ref, cp):
    """ds = p (dp - sum(p dp)) cancels where a key has all the weight: dp is rounded there as everywhere."""
    q, k, v, do = (np.abs(a[f"{n}_THE"]).max() for n in (*NAMES, "do"))
    E = a["q_THE"].shape[2]
    return {"dq": E**0.5 * do * v * k, "dk": E**0.5 * do * v * q}


def moved(a, cp):
    """Numbers that leave this rank: of each array of its own tokens, and of each array of its own heads."""
    (T, H, E), t, h = a["q_THE"].shape, rows(a, cp), heads(a, cp)
    t, h = t.stop - t.start, h.stop - h.start
    return t * (H - h) * E, (T - t) * h * E


def limits_to_heads(a, cp):
    return {"numbers sent": moved(a, cp)[0], "rounds": 1}


def limits_to_tokens(a, cp):
    return {"numbers sent": moved(a, cp)[1], "rounds": 1}


def limits_forward(a, cp):
    there, back = moved(a, cp)
    return {"numbers sent": 3 * there + back, "rounds": 2}


def limits_backward(a, cp):
    (T, H, E), h, own = a["q_THE"].shape, heads(a, cp), len(a["q_THE"][rows(a, cp)])
    there, back = moved(a, cp)
    # A rank without a head may keep its own tokens: there is nothing else to keep.
    return {
        "numbers sent": there + 3 * back,
        "rounds": 2,
        "numbers saved": max((h.stop - h.start) * T * (3 * E + T), 3 * own * H * E),
    }


def random_size(rng):
    return int(rng.choice([3, 5, 7])), int(rng.choice([3, 5, 6])), int(rng.choice([2, 4])), 4


FEW_TOKENS, FEW_HEADS, UNEVEN = (3, 5, 2, 4), (6, 3, 4, 4), (9, 7, 2, 4)
PARTS = (
    Part("to_heads", (UNEVEN, FEW_TOKENS), inputs, to_heads, lambda a, ref, cp: {"x": a["v_THE"][:, heads(a, cp)]}, limits=limits_to_heads,
         random_size=random_size, exact=("x",)),
    Part("to_tokens", (UNEVEN, FEW_HEADS), inputs, to_tokens, lambda a, ref, cp: {"x": a["v_THE"][rows(a, cp)]}, limits=limits_to_tokens,
         random_size=random_size, exact=("x",)),
    Part("attention_forward", (FEW_HEADS, UNEVEN), inputs, forward, want_forward, limits=limits_forward, random_size=random_size),
    Part("attention_backward", (FEW_TOKENS, FEW_HEADS), inputs, backward, want_backward, limits=limits_backward, random_size=random_size,
         sound=sound),
)  # fmt: skip

HEADS = "parts = [x_tHE[:, cp.cut(H, r)] for r in range(cp.size)]\n    came = cp.all_to_all(parts)"
TOKENS = "rows = [x_ThE[cp.cut(T, r)] for r in range(cp.size)]\n    came = cp.all_to_all(rows)"
JOIN_HEADS = "came = cp.all_to_all(rows)\n    return np.concatenate(came, axis=1)"
JOIN_TOKENS = "came = cp.all_to_all(parts)\n    return np.concatenate(came, axis=0)"
QKV = "all_ThE = to_heads(np.concatenate([q_tHE, k_tHE, v_tHE], axis=2), cp)\n    q_ThE, k_ThE, v_ThE = np.split(all_ThE, 3, axis=2)"
DQKV = ("all_tHE = to_tokens(np.concatenate([dq_ThE, dk_ThE, dv_ThE], axis=2), cp)\n"
        "    dq_tHE, dk_tHE, dv_tHE = np.split(all_tHE, 3, axis=2)")  # fmt: skip
MISTAKES = (
    mistake("reshaped", "What came is laid flat, one rank's heads after another's, and read as tokens: join the pieces along the heads, each token"
            " has a part of every piece.", (JOIN_HEADS, "came = cp.all_to_all(rows)\n"
             "    return np.concatenate([y.ravel() for y in came]).reshape(came[0].shape[0], -1, x_ThE.shape[2])"), seen="deepspeedai/DeepSpeed #8317"),
    mistake("joined_by_heads", "The pieces that came are joined along the heads: they are other tokens of the same heads.",
            (JOIN_TOKENS, JOIN_TOKENS.replace("axis=0", "axis=1"))),
    mistake("joined_by_tokens", "The pieces that came are joined along the tokens: they are other heads of the same tokens.",
            (JOIN_HEADS, JOIN_HEADS.replace("axis=1", "axis=0"))),
    mistake("heads_dealt", "Heads are dealt out in turn, r, r + p, r + 2 p: rank r has the heads cp.cut(H, r), which are neighbours.",
            ("x_tHE[:, cp.cut(H, r)]", "x_tHE[:, r :: cp.size]")),
    mistake("equal_heads", "The heads are cut into equal parts: there may be fewer on some ranks, cp.cut(H, r).",
            ("parts = [x_tHE[:, cp.cut(H, r)] for r in range(cp.size)]", "parts = np.split(x_tHE, cp.size, axis=1)"), seen="deepspeedai/DeepSpeed #6774"),
    mistake("equal_tokens", "The tokens are cut into equal parts: there may be fewer on some ranks, cp.cut(T, r).",
            ("rows = [x_ThE[cp.cut(T, r)] for r in range(cp.size)]", "rows = np.split(x_ThE, cp.size, axis=0)")),
    mistake("own_first", "The tokens begin with this rank's own: what came from rank 0 is first, on every rank.",
            (JOIN_TOKENS, "came = cp.all_to_all(parts)\n    return np.concatenate(came[cp.rank :] + came[: cp.rank], axis=0)")),
    mistake("heads_own_first", "The heads begin with this rank's own: what came from rank 0 is first, on every rank.",
            (JOIN_HEADS, "came = cp.all_to_all(rows)\n    return np.concatenate(came[cp.rank :] + came[: cp.rank], axis=1)")),
    mistake("sent_backwards", "Rank r is sent the heads of rank p - 1 - r: xs[r] goes to rank r.",
            ("came = cp.all_to_all(parts)", "came = cp.all_to_all(parts[::-1])")),
    mistake("gathered", "This is right, but all heads of all tokens are gathered on every rank, which then keeps its own: send each rank what"
            " it needs, an all_to_all.", (HEADS, "came = [cp.all_gather(x_tHE)[:, cp.cut(H)]]")),
    mistake("heads_padded", "This is right, but every piece is filled up to the largest rank's number of heads: pieces may be uneven, send them as"
            " they are.", (HEADS, "most = cp.cut(H, 0).stop\n    parts = [np.pad(x, ((0, 0), (0, most - x.shape[1]), (0, 0))) for x in (x_tHE[:, cp.cut(H, r)] for r in range(cp.size))]\n"
             "    own = cp.cut(H)\n    came = [y[:, : own.stop - own.start] for y in cp.all_to_all(parts)]")),
    mistake("tokens_padded", "This is right, but every piece is filled up to the largest rank's number of tokens: pieces may be uneven, send them as"
            " they are.", (TOKENS, "most = cp.cut(T, 0).stop\n    rows = [np.pad(x, ((0, most - len(x)), (0, 0), (0, 0))) for x in (x_ThE[cp.cut(T, r)] for r in range(cp.size))]\n"
             "    own = cp.cut(T)\n    came = [y[: own.stop - own.start] for y in cp.all_to_all(rows)]")),
    mistake("gathered_back", "This is right, but all heads of all tokens are gathered on every rank, which then keeps its tokens: send each rank"
            " what it needs, an all_to_all.", (TOKENS, "came = [cp.all_gather(x_ThE, dim=1)[cp.cut(T)]]")),
    mistake("three_exchanges", "This is right, but q, k and v go by an exchange each: put them beside one another, and exchange once.",
            (QKV, "q_ThE, k_ThE, v_ThE = to_heads(q_tHE, cp), to_heads(k_tHE, cp), to_heads(v_tHE, cp)")),
    mistake("three_back", "This is right, but the gradients of q, k and v go by an exchange each: put them beside one another, and exchange once.",
            (DQKV, "dq_tHE, dk_tHE, dv_tHE = to_tokens(dq_ThE, cp), to_tokens(dk_ThE, cp), to_tokens(dv_ThE, cp)")),
    mistake("own_tokens_only", "Each rank attends to its own tokens only: the tokens before them are on other ranks.",
            (QKV, "q_ThE, k_ThE, v_ThE = q_tHE, k_tHE, v_tHE"), ("return to_tokens(o_ThE, cp), saved", "return o_ThE, saved"),
            ("    do_ThE = to_heads(do_tHE, cp)", "    do_ThE = do_tHE"), (DQKV, "dq_tHE, dk_tHE, dv_tHE = dq_ThE, dk_ThE, dv_ThE")),
    mistake("cut_before_joined", "q, k and v are joined along the heads, and then cut as though they were one: a rank gets queries of some heads"
            " and keys of others.", (QKV, "all_ThE = to_heads(np.concatenate([q_tHE, k_tHE, v_tHE], axis=1), cp)\n"
             "    q_ThE, k_ThE, v_ThE = np.array_split(all_ThE, 3, axis=1)")),
    mistake("stacked", "q, k and v are stacked in front and then reshaped: that leaves the numbers in their order, and mixes tokens, and q, k and v."
            " Join them along the last dim.", ("np.concatenate([q_tHE, k_tHE, v_tHE], axis=2)", "np.stack([q_tHE, k_tHE, v_tHE]).reshape(*q_tHE.shape[:2], 3 * q_tHE.shape[2])")),
    mistake("cut_by_thirds", "q, k and v are joined along the heads, and then cut as though they were one: a rank gets queries of some heads"
            " and keys of others.", (QKV, "all_ThE = to_heads(np.concatenate([q_tHE, k_tHE, v_tHE], axis=1), cp)\n    h = all_ThE.shape[1] // 3\n"
             "    q_ThE, k_ThE, v_ThE = all_ThE[:, :h], all_ThE[:, h : 2 * h], all_ThE[:, 2 * h : 3 * h]")),
    mistake("keys_for_values", "Keys and values have changed places after the exchange.", ("q_ThE, k_ThE, v_ThE = np.split", "q_ThE, v_ThE, k_ThE = np.split")),
    mistake("gradients_exchanged", "The gradients of k and v have changed places after the exchange.",
            ("dq_tHE, dk_tHE, dv_tHE = np.split", "dq_tHE, dv_tHE, dk_tHE = np.split")),
    mistake("averaged", "The gradients are divided by the ranks: an exchange moves numbers and sums none.", (DQKV, DQKV + "\n    dq_tHE, dk_tHE, dv_tHE ="
             " dq_tHE / cp.size, dk_tHE / cp.size, dv_tHE / cp.size")),
    mistake("more_saved", "This is right, but q, k and v of the own tokens are kept beside what `attend` saves: backward does not need them.",
            ("return to_tokens(o_ThE, cp), saved", "return to_tokens(o_ThE, cp), (saved, q_tHE, k_tHE, v_tHE)"),
            ("dv_ThE = attend_backward(do_ThE, saved)", "dv_ThE = attend_backward(do_ThE, saved[0])")),
    mistake("exchanged_again", "This is right, but backward exchanges q, k and v once more: `attend` has saved them, of this rank's heads.",
            ("return to_tokens(o_ThE, cp), saved", "return to_tokens(o_ThE, cp), (q_tHE, k_tHE, v_tHE)"),
            ("dq_ThE, dk_ThE, dv_ThE = attend_backward(do_ThE, saved)", "_, saved = attend(*np.split(to_heads(np.concatenate(saved, axis=2), cp), 3, axis=2))\n"
             "    dq_ThE, dk_ThE, dv_ThE = attend_backward(do_ThE, saved)")),
    mistake("no_head_no_call", "A rank without a head leaves the others waiting: it has tokens whose outputs come back.",
            ("    T = len(x_ThE)\n", "    T = len(x_ThE)\n    if not x_ThE.size:\n        return np.zeros((T // cp.size, 0, x_ThE.shape[2]), x_ThE.dtype)\n")),
)  # fmt: skip
