"""Repairs, and what is kept between calls: what is said holds beyond the cases that were run."""

import ast

from practice.edits import edits
from tests.practice.test_named import judged, spoken

SPEEDUP = "expected_tokens(alpha, gamma) / (gamma * c + 1)"


def test_a_repair_that_makes_another_part_wrong_is_not_told():
    """1 / gamma, which is below all speed-ups, divides by 0 where best_gamma asks for none."""
    text, mistakes = spoken(judged("14", ("return tokens / cost", f"return max(1.0, {SPEEDUP})")))
    assert "1.0 / gamma" not in text
    assert f"with {SPEEDUP} in place of max(" in text
    assert mistakes[0].startswith("repair: All is right")


def test_a_loop_is_told_by_its_own_line():
    source = "def f(x):\n    total = 0\n    for row in x:\n        for a in row:\n            total += a\n"
    function = ast.parse(source).body[0]
    said = {e.words() for far in (False, True) for e in edits(function, {}, far)}
    assert "with it at the beginning of the loop that begins in line 3" in said


def test_what_another_call_overwrites_is_found_by_keeping_it():
    some = (
        ("return y_TD, (n_TD, r_T)", "STATE['r'] = r_T\n    return y_TD, n_TD"),
        ("n_TD, r_T = saved", "n_TD, r_T = saved, STATE['r']"),
    )
    text, mistakes = spoken(judged("06", *some, ("def rmsnorm(", "STATE = {}\n\n\ndef rmsnorm(")))
    assert mistakes == ["state"]
    assert "STATE is kept from one call to the next" in text
    assert "put it into what is returned" in text
