"""Answers that are wrong by their last digits alone: by float32 or float16 on the way, or by what cancels."""

from __future__ import annotations

import numpy as np

from practice import probes
from practice.compare import same
from practice.part import Part
from practice.truth import Truth

# From so many right digits on, digits are lost and nothing else is wrong: mistakes are larger.
DIGITS = 6
HALF = "Every number that is wrong is the right one as float16 has it: an array on the way is float16. Keep the inputs' dtype."
SINGLE = (
    "The error is as large as float32's rounding, and float32 inputs give what is right: an array on the way is {}"
    " whatever the inputs are, as np.zeros(..., np.float32) or .astype(np.float32) makes it."
)


def single(truth: Truth, part: Part, failing: list, ran: list) -> bool:
    """Whether all float64 cases are wrong, by no more than float32 rounds, and all float32 ones right."""
    wrong = {id(by_rank) for _, by_rank, _ in failing}
    cases = [(case, by_rank) for case, by_rank in ran if not case.moved and 0 not in case.size]
    if {c.dtype for c, _ in cases} != {"float32", "float64"}:
        return False
    if any((case.dtype == "float64") != (id(by_rank) in wrong) for case, by_rank in cases):
        return False
    ratio = float(np.finfo(np.float32).eps / np.finfo(np.float64).eps)
    for case, by_rank, _ in failing:
        for outcome, right in zip(by_rank, truth.right(case), strict=True):
            for name, want in right.results.items():
                got, allowed = outcome.results.get(name), right.allowed.get(name, 0.0)
                rounds = float(np.finfo(np.float32).eps) * np.abs(want).max(initial=0) if name in part.exact else 0.0
                if np.shape(got) != np.shape(want) or not same(got, want, ratio * np.asarray(allowed) + rounds):
                    return False
    return True


def narrow(failing: list) -> str:
    """What single() has found: where every wrong number is one of float16 as well, it cannot be told from float32."""
    got = [x for _, by_rank, wrong in failing for r in wrong for x in by_rank[r].results.values() if isinstance(x, np.ndarray)]
    with np.errstate(over="ignore"):
        both = all(np.array_equal(x, x.astype(np.float16)) for x in got if x.dtype.kind == "f")
    return SINGLE.format("float32 or float16" if both else "float32")


def half(truth: Truth, failing: list) -> bool:
    """Whether all that is wrong is what is right, rounded to float16: it was moved, or stored, as that."""
    wrong = [(o.results.get(n), r.results[n]) for case, by_rank, _ in failing
             for rank, (o, r) in enumerate(zip(by_rank, truth.right(case), strict=True))
             for n in r.results if truth.wrong(case, rank, o, n)]  # fmt: skip
    return bool(wrong) and all(
        isinstance(x, np.ndarray) and x.dtype.kind == "f" == y.dtype.kind and np.array_equal(x, y.astype(np.float16))
        for x, y in wrong
    )


def lost(truth: Truth, failing: list) -> str:
    """What is said where all that is wrong in float64 is right but for its last digits; '' elsewhere."""
    kept = []
    for case, by_rank, wrong in failing:
        for rank in wrong if case.dtype == "float64" else ():
            right = truth.right(case)[rank].results
            for name in (n for n in right if truth.wrong(case, rank, by_rank[rank], n)):
                got, want = by_rank[rank].results.get(name), right[name]
                if not all(isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in (got, want)) or got.shape != want.shape:
                    return ""
                kept.append(probes.digits(got, want))
    if not kept or min(kept) < DIGITS:
        return ""
    return (
        f"All of it is right to {min(kept)} digits, and not further: digits are lost on the way, by float32 in between, by a"
        " difference of large numbers that are nearly equal, as mean(x^2) - mean(x)^2, or by a small number, as 1e-6, that is"
        " added to a divisor or a norm."
    )
