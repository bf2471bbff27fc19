"""What is often written in a thing's place is tried: the change that mends it is among the edits, and is told."""

from __future__ import annotations

import ast

import pytest

from practice import edits
from tests.practice.test_named import judged, spoken

WORDS = {
    "s * seen": "np.where(seen, s, -np.inf) in place of s * seen",
    "n // block": "-(-n // block) in place of n // block",
    "n // block + 1": "-(-n // block) in place of n // block + 1",
    "stack.pop()": "stack.pop(0) in place of stack.pop()",
    "g.shape[0]": "g.size in place of g.shape[0]",
    "p[:, ids]": "p[np.arange(len(p)), ids] in place of p[:, ids]",
    "np.maximum(scale, 1e-08)": "np.where(scale == 0, 1, scale) in place of np.maximum(scale, 1e-08)",
    "np.mean(r * r) - np.mean(r) ** 2": "np.var(r) in place of np.mean(r * r) - np.mean(r) ** 2",
    "(r ** 2).mean(axis=1) - m ** 2": "np.var(r, axis=1) in place of (r ** 2).mean(axis=1) - m ** 2",
    "int(ok.sum())": "np.cumprod(ok).sum() in place of ok.sum()",
    "1 - t": "1 - t ** 2 in place of 1 - t",
    "k >= -v": "k >= 0 in place of k >= -v",
    "x[:, r * n:(r + 1) * n]": "x[:, tp.cut(x.shape[1], r)] in place of x[:, r * n:(r + 1) * n]",
    "tp.all_reduce(a)[tp.cut(T)]": "tp.reduce_scatter(a), which gives each rank its part, in place of"
    " tp.all_reduce(a) cut afterwards",
}


@pytest.mark.parametrize("wrong", WORDS)
def test_the_change_is_among_the_edits(wrong):
    names = "s, seen, n, block, stack, g, p, ids, scale, r, m, ok, t, k, v, x, a, T, tp"
    source = f"def f({names}):\n    y = {wrong}\n    return tp.rank, y"
    assert f"with {WORDS[wrong]}" in {e.words() for e in edits.edits(ast.parse(source).body[0], {}, False)}


BOTH = """
def f(ids, tp, a, b):
    for i in ids[::-1]:
        tp.send(0, i)
    return (tp.all_reduce(a), tp.all_reduce(b), ids[::-1])
"""


@pytest.mark.parametrize(
    "words", ["if nothing is turned round, here and in line 5", "without the all_reduce of a, b, here and in line 5"]
)
def test_the_same_at_several_places_is_one_edit(words):
    function = ast.parse(BOTH).body[0]
    (edit,) = [e for e in edits.edits(function, {}, False) if e.words() == words]
    edit.swap()
    assert ast.unparse(function).count("[::-1]" if "turned" in words else "all_reduce(") == 0


TOLD = {
    "what is made of numbers": ("06", [("1 / np.sqrt(", "np.sqrt(1.0) / np.sqrt(")], "makes float64 of float32 arrays"),
    "an array as large as W": (
        "33",
        [("dA_DR = x_TD.T @ dz_TR", "dA_DR = s * (x_TD.T @ dy_TF) @ B_RF.T")],
        "Most is held at line",
    ),
}


@pytest.mark.parametrize("what", TOLD)
def test_it_is_told(what):
    name, some, said = TOLD[what]
    text, _ = spoken(judged(name, *some))
    assert said in text
