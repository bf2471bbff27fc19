"""Kinds of mistakes that are on no exercise's list, each in several exercises, on simulated ranks: what the examiner says."""

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from launch.practice import Reference
from practice import dev
from practice.examine import Examiner
from practice.exercise import every, find
from practice.part import cases
from tests.grids import thinned


def changed(name, *edits):
    text = find(name).solution
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    return text


@cache
def examiner(name):
    """One for all tests of an exercise: it remembers what is right."""
    return Examiner(find(name), Reference())


def judged(name, *edits):
    return dev.judged(examiner(name), changed(name, *edits), seed=1)


def spoken(verdict):
    """The lines of the one part that is spoken of, and its mistakes."""
    (part,) = [j for j in verdict if j.lines and j.status == "wrong"]
    return "\n".join(part.lines), part.mistakes


SOFTMAX = """    top_T1 = x_TS.max(axis=1, keepdims=True)
    top_T1 = np.where(top_T1 == -np.inf, 0, top_T1)
    w_TS = np.exp(x_TS - top_T1)
    sum_T1 = w_TS.sum(axis=1, keepdims=True)
    return w_TS / np.where(sum_T1 == 0, 1, sum_T1)
"""
BLOCK_TOP = "np.maximum(top_tH, x_tHs.max(axis=2))"
NAIVE = {
    "03": ((SOFTMAX, "    w_TS = np.exp(x_TS)\n    return w_TS / w_TS.sum(axis=1, keepdims=True)\n"),),
    "04": (("score_HTS - score_HTS.max(axis=2, keepdims=True)", "score_HTS"),),
    "16": (("np.exp(z_TV - high_T1)", "np.exp(z_TV)"), ("z_TV[row_T, id_T] - high_T1[:, 0] - np.log(sum_T1[:, 0])",
            "np.log((e_TV / sum_T1)[row_T, id_T])")),
    "30": ((BLOCK_TOP, "0 * sum_tH"), ("np.exp(x_tHs - new_tH[..., None])", "np.exp(x_tHs)")),
}  # fmt: skip


@pytest.mark.parametrize("name", NAIVE)
def test_a_naive_softmax_is_named_with_the_line_that_overflows(name):
    source = changed(name, *NAIVE[name])
    text, _ = spoken(judged(name, *NAIVE[name]))
    told = re.search(r"This is the naive softmax, exp over its sum: exp overflows in line (\d+), (.*)", text)
    assert told, text
    line = source.splitlines()[int(told[1]) - 1]
    assert "np.exp(" in line
    assert line.strip() == told[2]
    assert re.search(r"inf/inf .* in line \d+ is NaN. Subtract each row's maximum first.", text)


def test_what_makes_nan_is_told_with_its_line():
    text, _ = spoken(judged("06", ("1 / np.sqrt((x_TD**2).mean(axis=1) + eps)", "1 / np.sqrt(-(x_TD**2).mean(axis=1))")))
    assert re.search(r"the root of a negative number in line \d+, r_T = 1 / np.sqrt\(", text)


SLOPE = "The slope of the GELU lacks a factor 3: the derivative of 0.044715 a^3 is 3 x 0.044715 a^2."
ROOT = "in place of sqrt(2 / pi) = 0.797885."
CONSTANTS = {
    "factor 3 of 02": ("02", ("3 * 0.044715", "0.044715"), SLOPE),
    "factor 3 of 21": ("21", ("3 * 0.044715", "0.044715"), SLOPE),
    "a digit lost": ("01", ("0.044715", "0.04715"), "this is the answer with 0.04715 in place of 0.044715."),
    "digits exchanged": ("02", ("0.044715", "0.044751"), "this is the answer with 0.044751 in place of 0.044715."),
    "a short root": ("01", ("math.sqrt(2 / math.pi)", "0.7978"), f"0.7978 {ROOT}"),
    "another root": ("21", ("math.sqrt(2 / math.pi)", "math.sqrt(1 / math.pi)"), f"0.564189583548 {ROOT}"),
    "base": ("10", ("base=10000.0", "base=100000.0"), "this is the answer with 100000 in place of 10000.0."),
    "eps": ("06", ("axis=1) + eps", "axis=1) + 1e-8"), "eps is not used as it is given: this is the answer with eps = 1e-08"),
    "a usual decay": ("17", ("    w = w - lr * wd * w\n", "    b1 = 0.9\n    w = w - lr * wd * w\n"),
                      "answer with b1 = 0.9, whatever"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONSTANTS)
def test_a_wrong_constant_is_fitted_from_the_answer(what):
    name, edit, said = CONSTANTS[what]
    text, mistakes = spoken(judged(name, edit))
    assert said in text
    assert mistakes in (["constant"], ["no_three"])


def test_a_constant_that_explains_one_case_only_is_not_named():
    """Off by a number that depends on the inputs: no single constant gives that in all cases."""
    text, mistakes = spoken(judged("01", ("0.044715 * a_TF**3", "(0.044715 + 0.01 * float(a_TF.mean())) * a_TF**3")))
    assert [m.partition(":")[0] for m in mistakes] == ["repair"]
    assert "A constant" not in text


MEAN = "    r_T = 1 / np.sqrt((x_TD**2).mean(axis=1) + eps)\n    n_TD = x_TD * r_T[:, None]"
AXES = {
    "db1": ("02", ("da_TF.sum(axis=0)", "da_TF.sum(axis=1)"), "A sum goes over the wrong axis", "axis 1 in place of axis 0"),
    "db1, kept": ("02", ("da_TF.sum(axis=0)", "np.add.reduce(da_TF, 1)"), "A sum goes", "axis 1 in place of axis 0"),
    "mean": ("06", (MEAN, "    r_D = 1 / np.sqrt((x_TD**2).mean(axis=0) + eps)\n    n_TD, r_T = x_TD * r_D, r_D"),
             "A mean goes over the wrong axis", "axis 0 in place of axis 1"),
    "maximum": ("16", ("z_TV.max(axis=1, keepdims=True)", "z_TV.max(axis=0)[None]"), "A maximum", "axis 0 in place of axis 1"),
    "on ranks": ("21", ("db2_D = dy_TD.sum(axis=0)", "db2_D = dy_TD.sum(axis=1)"), "A sum goes", "axis 1 in place of axis 0"),
    "group": ("08", ("dk_TKGE.sum(axis=2)", "dk_TKGE.sum(axis=1)"), "A sum goes", "axis 1 in place of axis 2"),
}  # fmt: skip


@pytest.mark.parametrize("what", AXES)
def test_a_sum_over_the_wrong_axis_is_named(what):
    name, edit, said, place = AXES[what]
    text, mistakes = spoken(judged(name, edit))
    assert said in text
    assert place in text
    assert mistakes == ["axis"]


def test_all_results_that_are_right_and_wrong_are_told():
    text, _ = spoken(judged("02", ("dh_TF * slope_TF", "dh_TF")))
    assert "right: dW2, db2; wrong: dx, dW1, db1" in text
    text, _ = spoken(judged("21", ("db2_D = dy_TD.sum(axis=0)", "db2_D = 3 * dy_TD.sum(axis=0)")))
    assert "right: dx, dW1, db1, dW2; wrong: db2" in text
    text, _ = spoken(judged("05", ("scale = 1 / math.sqrt(q_THE.shape[2])", "scale = 1.7")))
    assert "right: none; wrong: dq, dk, dv" in text


@pytest.mark.parametrize("exercise", every(), ids=lambda e: e.name)
def test_a_verdict_on_several_results_tells_which(exercise):
    """Of every exercise: what the line says is what is right and wrong in the cases that fail."""
    own = examiner(exercise.name)
    for mistake in thinned(exercise.mistakes[:6], exercise.mistakes[1:2]):
        source = own.mistaken((mistake,))
        for j in dev.told(own, source, 1):
            if j.status != "wrong" or not own.failed or j.part != own.failed[0].part:
                continue
            case, by_rank = own.failed
            names = list(own.right(case)[0].results)
            results = all(o.kind == "ok" for o in by_rank) and "right, but" not in "\n".join(j.lines)
            # Where other cases have other results, as one for each of their layers, nothing is said.
            own_cases = [c for c in cases(exercise.parts, 1) if c.part == j.part and not c.moved]
            results = results and len({tuple(own.right(c)[0].results) for c in own_cases}) == 1
            told = [line for line in j.lines if re.match(r"right: .*; wrong: ", line)]
            asked = results and len(names) > 1 and not any({*"\n(["} & {*n} for n in names) and "must return" not in j.lines[0]
            assert bool(told) == asked or not results, (mistake.name, j.lines)
            # A name may have a comma of its own.
            one = {n: n.replace(",", "") for n in names}
            for line in told:
                for n in names:
                    line = line.replace(n, one[n])
                right, wrong = (t.split(", ") for t in line.removeprefix("right: ").split("; wrong: "))
                assert {*right, *wrong} - {"none"} == set(one.values())
                here = {one[n] for n in names for r, o in enumerate(by_rank) if o.kind == "ok" and own.wrong(case, r, o, n)}
                assert here <= set(wrong)


MISSING = {
    "function": ("02", ("def mlp_backward", "def mlp_back"), "your file has no function mlp_backward (it has mlp_back): "),
    "no likeness": ("06", ("def rmsnorm_backward", "def second"), "your file has no function rmsnorm_backward"),
    "class": ("10", ("class Cache", "class Kept"), "your file has no class Cache: it must be named so."),
    "method": ("10", ("def append", "def add"), "your Cache has no append: it must be named so."),
    "no function": ("03", ("def attend_online", "softmax = 3\ndef attend_online"),
                    "your file has no function softmax (softmax is 3 there)"),
    "one array": ("01", ("return y_TD, (x_TD, a_TF, h_TF)", "return y_TD"),
                  "mlp_forward must return two values, y and saved; it returned one array of shape (3, 1)"),
    "rows unpacked": ("20", ("return y_TD + b_D, x_Tf", "return y_TD + b_D"),
                      "row_forward must return two values, y and saved; it returned one array of shape (2, 3)"),
    "too few": ("02", ("return dx_TD, dW1_DF, db1_F, dW2_FD, db2_D", "return dx_TD, dW1_DF, dW2_FD"),
                "mlp_backward must return five values, dx, dW1, db1, dW2 and db2; it returned 3 values"),
    "nothing": ("05", ("return dq_THE, dk_THE, dv_THE", "return"),
                "attention_backward must return three values, dq, dk and dv; it returned nothing (None)"),
    "two for one": ("07", ("return y_THE", "return y_THE, None"), "rope must return one array; it returned 2 values"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_one_sentence(what):
    name, edit, said = MISSING[what]
    text, _ = spoken(judged(name, edit))
    assert text.startswith(said)
    assert "\n" not in text


# --- costs


def test_costs_are_those_of_the_function_asked_alone():
    """A sum too many in column_forward, which column_backward's check calls first, is column_forward's alone."""
    verdict = judged("20", ("y_Tf = x_TD @ W_Df + b_f", "y_Tf = x_TD @ W_Df + b_f + 0 * tp.all_reduce(x_TD).sum()"))
    assert [j.status for j in verdict] == ["wrong", "ok", "ok", "ok"]
    assert "right, but rank 0:" in verdict[0].lines[0]
    verdict = judged("20", ("db_D = dy_TD.sum(axis=0)", "db_D = dy_TD.sum(axis=0) + 0 * tp.all_reduce(dy_TD[0])"))
    assert [j.status for j in verdict] == ["ok", "ok", "ok", "wrong"]
    # Its forward sums T x D numbers; of backward's it is said how many there are.
    assert re.match(r"right, but rank 0: [1-9] numbers sent where 0 is allowed", verdict[3].lines[0])


def test_memory_is_that_of_the_function_asked_alone():
    exercise = find("09")
    own = Examiner(exercise, Reference())
    part = own.parts["mla_absorbed"]
    case = max((c for c in cases(exercise.parts, 1) if c.part == part.name), key=lambda c: np.prod(c.size))

    def both(code, a, at):
        code.mla_expanded(*a.values())
        return part.call(code, a, at)

    (alone,) = own.simulated(case, exercise.solution)
    own.parts[part.name] = replace(part, call=both)
    (after,) = own.simulated(case, exercise.solution)
    assert alone.counts["peak bytes"] > 0
    assert abs(after.counts["peak bytes"] - alone.counts["peak bytes"]) < 0.2 * alone.counts["peak bytes"]
