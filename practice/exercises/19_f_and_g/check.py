"""What is right in exercise 19 (f as a matrix over all ranks' numbers, backward as its transpose), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake

RANKS = 3


def inputs(draw, T, D):
    # Sums are exact, whatever their order.
    return {"same_TD": draw.whole(-99, 100, T, D), "own_rTD": draw.whole(-99, 100, RANKS, T, D)}


def f_matrix(a):
    """What f does, as a matrix: numbers of x in, all ranks' numbers out, each rank's a copy. g's is its transpose."""
    return np.vstack([np.eye(a["same_TD"].size)] * RANKS)


def copied(a, at):
    """This rank's part of F times the whole array."""
    return (f_matrix(a) @ a["same_TD"].ravel()).reshape(a["own_rTD"].shape)[at.rank]


def summed(a):
    return (f_matrix(a).T @ a["own_rTD"].ravel()).reshape(a["same_TD"].shape)


def f_forward(code, a, tp):
    return {"y": code.f_forward(a["same_TD"], tp)}


def f_backward(code, a, tp):
    return {"dx": code.f_backward(a["own_rTD"][tp.rank], tp)}


def g_forward(code, a, tp):
    return {"y": code.g_forward(a["own_rTD"][tp.rank], tp)}


def g_backward(code, a, tp):
    return {"dx": code.g_backward(a["same_TD"], tp)}


def terms(a):
    return {f"rank {r}'s": own_TD for r, own_TD in enumerate(a["own_rTD"])}


def silent(a, tp):
    return {"numbers sent": 0}


def one_sum(a, tp):
    return {"numbers sent": 2 * (tp.size - 1) * a["same_TD"].size // tp.size + 1, "rounds": 2}


def random_size(rng):
    return tuple(rng.choice([2, 4, 5, 7, 11], 2, replace=False).tolist())


SIZES = ((5, 4), (2, 7), (0, 5))


def part(name, call, result, want, limits, ingredients=None):
    own = {result: ingredients} if ingredients else None
    return Part(name, SIZES, inputs, call, lambda a, ref, tp: {result: want(a, tp)},
                (lambda a, ref, tp: {n: f(a) for n, f in own.items()}) if own else None,
                limits, random_size=random_size, exact=(result,))  # fmt: skip


PARTS = (
    part("f_forward", f_forward, "y", copied, silent),
    part("f_backward", f_backward, "dx", lambda a, tp: summed(a), one_sum, terms),
    part("g_forward", g_forward, "y", lambda a, tp: summed(a), one_sum, terms),
    part("g_backward", g_backward, "dx", copied, silent),
)

MISTAKES = (
    mistake("f_sums", "f sums forward: x is whole on every rank already, so this is tp times x. Forward f is the identity; its sum comes"
            " backward.", ("return x\n", "return tp.all_reduce(x * 1)\n")),
    mistake("f_shares", "f divides x by tp: x is not shared out, every rank needs all of it as it is.",
            ("return x\n", "return x / tp.size\n")),
    mistake("f_cuts", "f cuts x over the ranks: every rank goes on with the whole of it; what is cut is the matrix behind.",
            ("return x\n", "return x[tp.cut(len(x))]\n")),
    mistake("f_fetches", "This is right, but f asks the other ranks for what it has: forward f needs no talk.",
            ("return x\n", "return tp.all_reduce(x, op='max')\n")),
    mistake("f_no_sum", "f_backward returns this rank's dy: every rank has used x, so x's gradient is the sum of what all of them say.",
            ("return tp.all_reduce(dy)", "return dy"), seen="NVIDIA/Megatron-LM #19"),
    mistake("f_mean", "f_backward averages: a value that is used tp times gets the sum of tp gradients, not their mean.",
            ("return tp.all_reduce(dy)", "return tp.all_reduce(dy) / tp.size")),
    mistake("f_largest", "f_backward takes the largest of the ranks' entries; they are to be added.",
            ("return tp.all_reduce(dy)", "return tp.all_reduce(dy, op='max')")),
    mistake("f_on_one", "Only rank 0 gets the sum in f_backward: what is before f runs on every rank, and needs it on every rank.",
            ("return tp.all_reduce(dy)", "dx = tp.all_reduce(dy)\n    return dx if tp.rank == 0 else dy")),
    mistake("f_twice", "f_backward sums twice: after the first sum every rank has all of it, so the second multiplies by tp.",
            ("return tp.all_reduce(dy)\n", "return tp.all_reduce(tp.all_reduce(dy * 1))\n")),
    mistake("f_gathers", "This is right, but f_backward gathers every rank's dy to add them up itself: an all-reduce sends 2/tp of that.",
            ("return tp.all_reduce(dy)", "return tp.all_gather(dy[None]).sum(axis=0)")),
    mistake("f_in_place", "f_backward writes the sum into its argument: the caller's dy is changed.",
            ("return tp.all_reduce(dy)", "dy[...] = tp.all_reduce(dy)\n    return dy")),
    mistake("g_no_sum", "g returns this rank's term: the next layer needs the sum of all terms, on every rank.",
            ("return tp.all_reduce(x)", "return x * 1")),
    mistake("g_mean", "g averages: what the ranks bring are terms of one sum.", ("return tp.all_reduce(x)", "return tp.all_reduce(x) / tp.size")),
    mistake("g_joins", "g puts the ranks' arrays side by side: they are terms of one array of the same shape, to be added.",
            ("return tp.all_reduce(x)", "return tp.all_gather(x, x.ndim - 1)")),
    mistake("g_largest", "g takes the largest of the ranks' entries; they are to be added.",
            ("return tp.all_reduce(x)", "return tp.all_reduce(x, op='max')")),
    mistake("both_sum", "g_backward sums: there is one dy, the same on every rank, so this is tp times it. An all-reduce whose backward is"
            " an all-reduce is right only where every rank has a loss of its own.",
            ("return dy\n", "return tp.all_reduce(dy * 1)\n"), seen="NVIDIA/Megatron-LM #559, Dao-AILab/flash-attention #1244"),
    mistake("g_shares", "g_backward divides dy by tp: each term enters y with factor 1, so its gradient is all of dy.",
            ("return dy\n", "return dy / tp.size\n")),
    mistake("g_averages", "This is right, but g_backward averages copies that are alike: it needs no talk.",
            ("return dy\n", "return tp.all_reduce(dy * 1, op='min')\n")),
    mistake("g_gathers", "This is right, but g gathers every rank's term to add them up itself: an all-reduce sends 2/tp of that.",
            ("return tp.all_reduce(x)", "return tp.all_gather(x[None]).sum(axis=0)")),
)  # fmt: skip
