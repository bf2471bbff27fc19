"""The harness itself, on real ranks that really fail."""

import time

from tests.harness import mpirun

CASES = "tests/cases/case_failures.py"


def run(*tests, **environ):
    started = time.monotonic()
    names = [f"{CASES}::test_{name}" for name in tests] or [CASES]
    done = mpirun(3, "-m", "pytest", "-q", *names, "--limit", "5", timeout=40, **environ)
    return done, done.stdout + done.stderr, time.monotonic() - started


def test_a_rank_that_fails_before_a_collective_ends_the_run_and_is_named():
    done, text, seconds = run("before_a_collective", "next")
    assert done.returncode != 0
    assert "rank 1 failed, and the others did not come" in text
    assert text.count("ValueError: planted before the sum") == 1
    assert "--- stack of rank 0 of 3" in text
    assert "in test_before_a_collective" in text
    # The next test, which the failing rank would have entered alone, was not reached.
    assert "test_next" not in text
    assert seconds < 15


def test_a_stuck_rank_is_shown_with_every_stack_when_time_is_up():
    done, text, seconds = run("stuck")
    assert done.returncode != 0
    assert "test_stuck: not finished after 5 s" in text
    assert [f"--- stack of rank {r} of 3" in text for r in range(3)] == [True] * 3
    stacks = text[text.index("--- stack of rank 0") :]
    assert stacks.count("in reduce") == 2, "ranks 0 and 2 wait inside MPI"
    assert seconds < 20


def test_a_failure_on_one_rank_is_one_failure_on_all_and_the_run_goes_on():
    done, text, _ = run("without_a_collective", "next", "fine")
    assert done.returncode == 1
    assert "[failed on rank(s) [1] of 3]" in text
    assert text.count("_ test_without_a_collective _") == 1, "one report, not one a rank"
    assert "1 failed, 2 passed" in text


def test_a_skip_on_one_rank_is_red():
    done, text, _ = run("skip_on_one")
    assert done.returncode == 1
    assert "[skipped on rank(s) [1] of 3]" in text
    assert "1 failed" in text


def test_ranks_that_collect_different_tests_are_refused():
    done, text, _ = run(CASE_UNEVEN="1")
    assert done.returncode != 0
    assert "the ranks collected different tests" in text


def test_an_unknown_argument_of_the_mark_is_refused():
    done, text, _ = run(CASE_MARK="1")
    assert done.returncode != 0
    assert "the mpi mark takes min_size and max_size" in text


def test_nothing_but_green_is_zero():
    done, text, _ = run("next", "fine")
    assert done.returncode == 0, text
    assert "2 passed" in text
    assert text.count("passed") == 1, "one report, by rank 0"
