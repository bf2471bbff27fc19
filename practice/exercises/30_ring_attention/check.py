"""What is right in exercise 30 (the whole sequence, query by query), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def inputs(draw, T, H, E, ranks):
    # Parts of different lengths, at least one token each.
    spare = T - ranks * (ranks + 1) // 2
    lengths = draw.rng.permutation(np.arange(1, ranks + 1)) if spare >= 0 else np.ones(ranks, int)
    lengths[int(draw.rng.integers(ranks))] += T - lengths.sum()
    q, k = 3 * draw(T, H, E), 2 * draw(T, H, E)
    # Some keys tower: their scores pass 100, of either sign: exp is infinite in float32.
    for at in (0, T // 2, T - 2):
        k[at, at % H] *= 12
    # A query far below 0 with all keys: a maximum that starts from 0 leaves nothing of its sum.
    k[..., 0], q[..., 0] = 10 + draw.rng.standard_normal((T, H)), 0.1 * q[..., 0]
    q[T // 3] *= 0.3
    q[T // 3, :, 0] = -100 * E**0.5
    return {"q_THE": draw.cast(q), "k_THE": draw.cast(k), "v_THE": draw(T, H, E), "starts": [0, *np.cumsum(lengths).tolist()]}


def call(code, a, ring):
    mine = slice(a["starts"][ring.rank], a["starts"][ring.rank + 1])
    with code.watching(lambda arrays: kept_blocks(code, arrays, a, ring)):
        o, lse = code.ring_attention(a["q_THE"][mine], a["k_THE"][mine], a["v_THE"][mine], list(a["starts"]), ring)
    return {"o": o, "lse": lse}


def kept_blocks(code, arrays, a, ring):
    """Count the other ranks' blocks whose keys are at hand, beside one that has just come."""
    E = a["k_THE"].shape[2]
    rows = np.concatenate([np.zeros((1, E)), *(x.reshape(-1, E) for x in arrays if x.ndim and x.shape[-1] == E)])
    ranks = [r for r in range(ring.size) if r != ring.rank]
    # By their keys: an output may be a value, where one key has all the weight.
    firsts = np.stack([a["k_THE"][a["starts"][r], 0] for r in ranks])
    others = (firsts[:, None] == rows).all(axis=-1).any(axis=1).sum()
    code.counts["blocks of other ranks kept"] = max(code.counts["blocks of other ranks kept"], int(others) - 1)


def want(a, ref, ring):
    q, k, v = a["q_THE"], a["k_THE"], a["v_THE"]
    mine = slice(a["starts"][ring.rank], a["starts"][ring.rank + 1])
    heads = range(q.shape[1])
    o = np.stack([ref.attention.head(q[:, h], k[:, h], v[:, h], q.shape[2] ** -0.5, True) for h in heads], axis=1)
    lse = np.empty(q.shape[:2])
    for i in range(len(q)):
        for h in heads:
            lse[i, h] = np.logaddexp.reduce([q[i, h] @ k[j, h] * q.shape[2] ** -0.5 for j in range(i + 1)])
    return {"o": o[mine], "lse": lse[mine]}


def sound(a, ref, ring):
    """Blocks may be merged by their lse, which is as large as the scores."""
    q, k, v = a["q_THE"], a["k_THE"], a["v_THE"]
    mine = slice(a["starts"][ring.rank], a["starts"][ring.rank + 1])
    scores = np.abs(np.einsum("tHE,sHE->tHs", q[mine], k)).max(axis=2) / q.shape[2] ** 0.5
    return {"o": scores[..., None] * np.abs(v).max()}


def limits(a, ring):
    lengths, (_, H, E) = np.diff(a["starts"]), a["q_THE"].shape
    last = min(lengths[(ring.rank + 1) % ring.size], lengths[ring.rank - 1])
    return {"numbers sent": 2 * H * E * int(sum(lengths) - last), "ranks sent to": 1, "blocks of other ranks kept": 1}


PARTS = (
    Part("ring_attention", ((13, 2, 5, 4), (10, 3, 4, 4), (5, 2, 3, 4), (23, 1, 6, 4)), inputs, call, want, None, limits,
         random_size=lambda rng: (int(rng.integers(10, 20)), int(rng.integers(1, 4)), int(rng.integers(3, 7)), 4),
         influence=(("q_THE", "o"),), sound=sound),
)  # fmt: skip

OUT = "o_tHE = o_tHE * shrink_tH[..., None] + "
MISTAKES = (
    mistake("averaged_in_turn", "Each block's output is normalised by itself, and half of it is added to half of what was there: blocks weigh as much"
            " as their sums of exp.",
            ("            o_tHE = o_tHE * shrink_tH[..., None] + np.einsum(\"tHs,sHE->tHE\", w_tHs, v_sHE)\n",
             "            if len(k_sHE):\n                new_tHE = np.einsum(\"tHs,sHE->tHE\", w_tHs / w_tHs.sum(axis=2, keepdims=True), v_sHE)\n"
             "                o_tHE = (o_tHE + new_tHE) / 2 if step else new_tHE\n"),
            ("return o_tHE / sum_tH[..., None]", "return o_tHE")),
    mistake("averaged", "Each block's output is normalised by itself and these are averaged: blocks weigh as much as their sums of exp.",
            (OUT + 'np.einsum("tHs,sHE->tHE", w_tHs, v_sHE)', "o_tHE = o_tHE + np.einsum(\"tHs,sHE->tHE\", w_tHs / w_tHs.sum(axis=2, keepdims=True), v_sHE)"),
            ("return o_tHE / sum_tH[..., None]", "return o_tHE / (r + 1)")),
    mistake("outputs_added", "Each block's output is normalised by itself and these are added: blocks weigh as much as their sums of exp.",
            (OUT + 'np.einsum("tHs,sHE->tHE", w_tHs, v_sHE)', "o_tHE = o_tHE + np.einsum(\"tHs,sHE->tHE\", w_tHs / w_tHs.sum(axis=2, keepdims=True), v_sHE)"),
            ("return o_tHE / sum_tH[..., None]", "return o_tHE")),
    mistake("no_maximum", "No maximum is taken off: exp of a score in the hundreds is infinite, in float32 from 89 on.",
            ("np.maximum(top_tH, x_tHs.max(axis=2))", "np.zeros_like(top_tH)"), seen="zhuzilin/EasyContext #14"),
    mistake("o_not_rescaled", "When a larger score arrives the sum is rescaled and the output is not: both are relative to the maximum.",
            (OUT, "o_tHE = o_tHE + ")),
    mistake("sum_not_rescaled", "When a larger score arrives the output is rescaled and the sum is not: both are relative to the maximum.",
            ("sum_tH = sum_tH * shrink_tH + ", "sum_tH = sum_tH + ")),
    mistake("block_maximum", "The maximum is that of the block alone: it must not fall below what has been seen before.",
            ("np.maximum(top_tH, x_tHs.max(axis=2))", "x_tHs.max(axis=2)"), ("seen_ts[:, None], x_tHs, -np.inf", "seen_ts[:, None], x_tHs, -1e9")),
    mistake("local_positions", "Positions are counted within each block: a query may see every key of an earlier block, whatever its place in it.",
            ("starts[r] + np.arange(t)", "np.arange(t)"), ("starts[owner] + np.arange(len(k_sHE))", "np.arange(len(k_sHE))"),
            seen="zhuzilin/ring-flash-attention #54"),
    mistake("equal_blocks", "Positions are the rank times this rank's own number of tokens: ranks have unequally many, starts says where each"
            " begins.", ("starts[r] + np.arange(t)", "r * t + np.arange(t)"),
            ("starts[owner] + np.arange(len(k_sHE))", "owner * t + np.arange(len(k_sHE))")),
    mistake("equal_blocks_own", "Positions are the rank times the number of tokens of its block: ranks have unequally many, starts says where"
            " each begins.", ("starts[r] + np.arange(t)", "r * t + np.arange(t)"),
            ("starts[owner] + np.arange(len(k_sHE))", "owner * len(k_sHE) + np.arange(len(k_sHE))")),
    mistake("no_mask", "Nothing is hidden within the rank's own block: its earlier queries see its later keys.",
            ("at_s <= at_t[:, None]", "at_s <= at_t[:, None] + len(at_s)")),
    mistake("not_itself", "A query does not see its own key: j <= i, not j < i.", ("at_s <= at_t[:, None]", "at_s < at_t[:, None]")),
    mistake("own_only", "Only the rank's own block is looked at: blocks of earlier ranks are seen too.", ("owner <= r", "owner == r")),
    mistake("first_skipped", "The first rank's block is never looked at by the others.", ("if owner <= r:", "if owner <= r and (owner or not r):")),
    mistake("everything", "Blocks of later ranks are taken as though they were earlier ones: they hold the future.",
            ("if owner <= r:", "if True:"), ("at_s <= at_t[:, None]", "(at_s <= at_t[:, None]) | (owner > r)")),
    mistake("wrong_owner", "What comes from the left after i exchanges is the block of rank r - i, not of r + i.",
            ("(r - step) % p", "(r + step) % p")),
    mistake("own_again", "Each rank sends its own block at every step: after the first step pass on what has just come.",
            ("    block = np.stack([k_tHE, v_tHE])\n", "    block = own = np.stack([k_tHE, v_tHE])\n"),
            ("block = ring.sendrecv((r + 1) % p, block, (r - 1) % p)", "block = ring.sendrecv((r + 1) % p, own, (r - 1) % p)")),
    mistake("values_stay", "Keys travel and values stay at home: each block's values belong to its keys.",
            ("k_sHE, v_sHE = block\n", "k_sHE, v_sHE = block[0], np.resize(v_tHE, block[1].shape)\n")),
    mistake("one_more", "This is right, but there is one exchange too many: after p - 1 each block has been everywhere.",
            ("if step < p - 1:", "if step < p:")),
    mistake("gathered", "This is right, but all keys and values are gathered first: each rank holds the whole sequence's, where its own and one"
            " other block suffice. Use a block, pass it on, let it go.",
            ("    for step in range(p):\n        owner = (r - step) % p\n",
             "    blocks = [block]\n    for step in range(p - 1):\n        blocks.append(ring.sendrecv((r + 1) % p, blocks[-1], (r - 1) % p))\n"
             "    for step in range(p):\n        owner = (r - step) % p\n        block = blocks[step]\n"),
            ("        if step < p - 1:\n            block = ring.sendrecv((r + 1) % p, block, (r - 1) % p)\n", "")),
    mistake("no_ring", "This is right, but every rank sends its block to every other: on a ring each talks to one neighbour and passes on what came.",
            ("    block = np.stack([k_tHE, v_tHE])\n", "    block = own = np.stack([k_tHE, v_tHE])\n"),
            ("block = ring.sendrecv((r + 1) % p, block, (r - 1) % p)", "block = ring.sendrecv((r + step + 1) % p, own, (r - step - 1) % p)")),
    mistake("no_scale", "The scores lack 1 / sqrt(E).", (" / math.sqrt(E)", "")),
    mistake("lse_without_top", "lse lacks the maximum that was taken off: log(sum) is relative to it.", ("top_tH + np.log(sum_tH)", "np.log(sum_tH)")),
    mistake("all_send", "All ranks send before any receives: a circle of waiting.",
            ("block = ring.sendrecv((r + 1) % p, block, (r - 1) % p)", "ring.send((r + 1) % p, block)\n            block = ring.recv((r - 1) % p)")),
    mistake("maximum_from_zero", "The largest score starts from 0: where all scores of a query are far below 0 every exp is 0. Start from -inf.",
            ("top_tH = np.full((t, H), -np.inf, q_tHE.dtype)", "top_tH = np.zeros((t, H), q_tHE.dtype)")),
    mistake("scale_square", "The scores are divided by E: it is its root.", (" / math.sqrt(E)", " / E")),
)  # fmt: skip
