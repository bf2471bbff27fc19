"""What is right in exercise 24 (one process with every token), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake

RANKS = 4


def inputs(draw, a, b, c, d, D, F):
    """a, b, c, d: the ranks' tokens. The gradient of each token with respect to W (D, F), b (F) and a single number."""
    tokens = [draw(n, D * F + F + 1) for n in (a, b, c, d)]
    # The means that each rank hands in are rounded once, from float64.
    means = [np.full(D * F + F + 1, np.nan) if len(t) == 0 else t.astype(np.float64).mean(axis=0) for t in tokens]
    return {"means": draw.cast(np.stack(means)), "counts": [a, b, c, d], "D": D, "F": F}


def arrays(flat, a):
    D, F = a["D"], a["F"]
    return {"dW": flat[: D * F].reshape(D, F), "db": flat[D * F : -1], "dscale": flat[-1:].reshape(1, 1)}


def call(code, a, dp):
    grads = list(arrays(a["means"][dp.rank], a).values())
    averaged = code.average(grads, a["counts"][dp.rank], dp)
    dW, db, dscale = averaged
    return {"dW": dW, "db": db, "dscale": dscale}


def shares(a):
    """What each rank's tokens contribute: each token counts alike."""
    counts = np.array(a["counts"])
    total = max(1, int(counts.sum()))
    return [np.zeros_like(m) if n == 0 else n / total * m for n, m in zip(counts, a["means"], strict=True)]


def want(a, ref, dp):
    # Token by token: a rank's mean stands for each of its tokens.
    tokens = [m for n, m in zip(a["counts"], a["means"], strict=True) for _ in range(n)]
    return arrays(np.mean(tokens, axis=0) if tokens else np.zeros(a["means"].shape[1]), a)


def ingredients(a, ref, dp):
    parts = {f"rank {r}'s": arrays(share, a) for r, share in enumerate(shares(a)) if share.any()}
    return {name: {rank: own[name] for rank, own in parts.items()} for name in ("dW", "db")}


def numbers(a):
    return a["means"].shape[1] + 1


def limits(a, dp):
    return {"numbers sent": 2 * (dp.size - 1) * (numbers(a) + len(a["counts"])) // dp.size + 4, "rounds": 4}


def advice(a, dp):
    return {"all_reduce": 1}


def random_size(rng):
    counts = rng.choice([0, 1, 2, 3, 5, 8], 4, replace=False).tolist()
    return (*counts, *rng.choice([2, 3, 4, 5], 2, replace=False).tolist())


PARTS = (
    Part("average", ((5, 1, 0, 3, 3, 4), (0, 7, 2, 4, 5, 2), (2, 9, 1, 4, 2, 3), (0, 0, 0, 0, 2, 3)), inputs, call, want, ingredients,
         limits, advice, random_size, factors=lambda a, b, c, d, D, F: {"tokens": float(a + b + c + d)}),
)  # fmt: skip

SUMS, MEANS = "[g * n if n else np.zeros_like(g) for g in grads]", "total[1:] / max(total[0], 1)"
MISTAKES = (
    mistake("mean_of_means", "This is the mean of the ranks' means: a token on a rank that has few weighs more than one on a rank that has many."
            " Weigh each rank by its number of tokens.",
            (SUMS, "[g if n else np.zeros_like(g) for g in grads]"), (MEANS, "total[1:] / dp.size"),
            seen="huggingface/transformers #34242, pytorch/torchtitan #2206"),
    mistake("mean_of_present", "This is the mean of the means of those ranks that have tokens; each token counts alike, not each rank.",
            (SUMS, "[g if n else np.zeros_like(g) for g in grads]"), ("np.array([n], dtype)", "np.array([n > 0], dtype)")),
    mistake("means_over_tokens", "The means are added up and divided by the number of all tokens: means have been divided by n already,"
            " so make them sums first.", (SUMS, "[g if n else np.zeros_like(g) for g in grads]")),
    mistake("not_divided", "This is the sum over all tokens: it is to be divided by their number.", (MEANS, "total[1:]")),
    mistake("divided_by_ranks", "The mean over all tokens is divided by the number of ranks as well: the tokens of all ranks are counted in it.",
            (MEANS + "\n", MEANS + " / dp.size\n")),
    mistake("times_ranks", "The mean over all tokens is multiplied by the number of ranks: that undoes a mean that all_reduce does not take here"
            " (PyTorch's DDP does).", (MEANS + "\n", MEANS + " * dp.size\n")),
    mistake("own_count", "The sum is divided by this rank's own number of tokens: it is to be divided by that of all, or the ranks' weights"
            " drift apart.", (MEANS, "total[1:] / max(n, 1)")),
    mistake("own_count_times_ranks", "The number of all tokens is taken as this rank's times the number of ranks: the others have other numbers.",
            (MEANS, "total[1:] / max(n * dp.size, 1)")),
    mistake("nan_times_zero", "A rank without tokens spoils all: its means are NaN, and NaN x 0 is NaN.", (SUMS, "[g * n for g in grads]")),
    mistake("nan_spreads", "A rank without tokens spoils all but the case that no rank has any: its means are NaN, and NaN x 0 is NaN.",
            (SUMS, "[g * n for g in grads]"), (MEANS, "total[1:] / total[0] if total[0] else np.zeros_like(total[1:])")),
    mistake("nan_made_0", "A rank without tokens spoils the sum, its means are NaN and NaN x 0 is NaN; and what is NaN is made 0 afterwards: leave its"
            " means out before the sum.", (SUMS, "[g * n for g in grads]"), (MEANS, "np.nan_to_num(total[1:] / max(total[0], 1))")),
    mistake("empty_stays_away", "A rank without tokens returns before the all_reduce: a collective is for all ranks, so it brings zeros.",
            ("    dtype = grads[0].dtype", "    if n == 0:\n        return [np.zeros_like(g) for g in grads]\n    dtype = grads[0].dtype"),
            seen="pytorch/pytorch #33148"),
    mistake("nobody_has_any", "Where no rank has tokens it divides 0 by 0: the gradients are 0 then.", (MEANS, "total[1:] / total[0]")),
    mistake("own_only", "Nothing is exchanged: each rank goes on with its own gradients, and its weights with them.",
            ("dp.all_reduce(bucket)", "bucket")),
    mistake("no_offset", "Every array is taken from the start of the bucket: each begins where the one before it ends.",
            ("        start += g.size", "        pass")),
    mistake("count_left_in", "The bucket begins with the number of tokens: the gradients stand one place further.",
            (MEANS, "total / max(total[0], 1)")),
    mistake("flat", "The arrays come back flat: give each its own shape again.", (".reshape(g.shape))", ")")),
    mistake("in_place", "The caller's gradients are multiplied in place.",
            (SUMS, "[g.__imul__(n) if n else np.zeros_like(g) for g in grads]")),
    mistake("one_an_array", "This is right, but every array has a message of its own: put them into one bucket, for each message costs its latency.",
            ("dp.all_reduce(bucket)", "np.concatenate([dp.all_reduce(part) for part in np.array_split(bucket, len(grads))])")),
    mistake("gathered", "This is right, but every rank is sent every rank's gradients: p - 1 buckets where 2 (p - 1)/p are enough.",
            ("dp.all_reduce(bucket)", "dp.all_gather(bucket[None]).sum(axis=0)")),
    mistake("columns_first", "The arrays are flattened by columns and read back by rows: use one order for both.",
            ("*(s.ravel() for s in sums)", '*(s.ravel(order="F") for s in sums)')),
    mistake("read_by_columns", "The arrays are flattened by rows and read back by columns: use one order for both.",
            (".reshape(g.shape))", '.reshape(g.shape, order="F"))')),
    mistake("empty_gets_nothing", "A rank without tokens returns zeros: it steps with the others, so it needs the mean over their tokens too.",
            ("    return averaged\n", "    return averaged if n else [np.zeros_like(g) for g in grads]\n")),
    mistake("own_count_times_busy", "The number of all tokens is taken as this rank's times the number of ranks that have some: the others have"
            " other numbers.", ("np.array([n], dtype)", "np.array([n > 0], dtype)"), (MEANS, "total[1:] / max(total[0] * n, 1)")),
)  # fmt: skip
