"""The harness itself, on real ranks that really fail."""

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness import ROOT, claimed, launcher_free, mpirun

CASES = "tests/cases/case_failures.py"
# By name: ranks, tests (all if none), options, environment.
RUNS = {
    "one fails": (3, ("before_a_collective", "next"), ("--grace", "1"), {}),
    "one is stuck": (3, ("stuck",), ("--limit", "1"), {}),
    "it goes on": (3, ("without_a_collective", "next", "skip_on_one", "fine"), (), {}),
    "uneven": (2, (), (), {"CASE_UNEVEN": "1"}),
    "unknown mark": (1, (), (), {"CASE_MARK": "1"}),
    "green": (2, ("next", "fine"), (), {}),
}


def run(ranks, tests, options, environ):
    started = time.monotonic()
    names = [f"{CASES}::test_{name}" for name in tests] or [CASES]
    done = mpirun(ranks, "-m", "pytest", "-q", *names, *options, timeout=50, **environ)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


@pytest.fixture(scope="module")
def runs():
    """Two at a time: much of a run is waiting."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, *what) for name, what in RUNS.items()}


def test_a_rank_that_fails_before_a_collective_ends_the_run_and_is_named(runs):
    status, text, seconds = runs["one fails"].result()
    assert status != 0
    assert "rank 1 failed, and the others did not come" in text
    assert text.count("ValueError: planted before the sum") == 1
    assert "--- stack of rank 0 of 3" in text
    assert "in test_before_a_collective" in text
    # The next test, which the failing rank would have entered alone, was not reached.
    assert "test_next" not in text
    assert seconds < 45


def test_a_stuck_rank_is_shown_with_every_stack_when_time_is_up(runs):
    status, text, seconds = runs["one is stuck"].result()
    assert status != 0
    assert "test_stuck: not finished after 1 s" in text
    assert [f"--- stack of rank {r} of 3" in text for r in range(3)] == [True] * 3
    stacks = text[text.index("--- stack of rank 0") :]
    assert stacks.count("in reduce") == 2, "ranks 0 and 2 wait inside MPI"
    assert seconds < 45


def test_a_failure_on_one_rank_is_one_failure_on_all_and_the_run_goes_on(runs):
    status, text, _ = runs["it goes on"].result()
    assert status == 1
    assert "[failed on rank(s) [1] of 3]" in text
    assert text.count("_ test_without_a_collective _") == 1, "one report, not one a rank"
    assert "2 failed, 2 passed" in text


def test_a_skip_on_one_rank_is_red(runs):
    _, text, _ = runs["it goes on"].result()
    assert "[skipped on rank(s) [1] of 3]" in text
    assert text.count("_ test_skip_on_one _") == 1


def test_ranks_that_collect_different_tests_are_refused(runs):
    status, text, _ = runs["uneven"].result()
    assert status != 0
    assert "the ranks collected different tests" in text


def test_an_unknown_argument_of_the_mark_is_refused(runs):
    status, text, _ = runs["unknown mark"].result()
    assert status != 0
    assert "the mpi mark takes min_size and max_size" in text


def test_nothing_but_green_is_zero(runs):
    status, text, _ = runs["green"].result()
    assert status == 0, text
    assert "2 passed" in text
    assert text.count("passed") == 1, "one report, by rank 0"


def test_each_file_is_claimed_by_one_run(tmp_path):
    files = [ROOT / f"tests/room/test_{n}.py" for n in range(50)] + [ROOT / "tests/test_1.py"]
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(lambda: [file for file in files if claimed(tmp_path, file)]) for _ in range(4)]
    assert sorted(file for run in runs for file in run.result()) == sorted(files)


def shared_out(*arguments):
    """What runs side by side print, all of which must be green."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.shares", *arguments],
        cwd=ROOT, env=launcher_free(), capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_runs_side_by_side_do_all_tests_once():
    files = ("tests/parallel/test_text.py", "tests/parallel/test_owed.py")
    there = sum((ROOT / file).read_text().count("\ndef test_") for file in files)
    assert sum(int(n) for n in re.findall(r"(\d+) passed", shared_out("2", "-q", *files))) == there > 0


def test_without_files_they_are_at_home_in_the_project():
    """pytest looks for its settings beside the first path that it is given, which is not to be that of the claims."""
    assert "@pytest.mark.limit(seconds)" in shared_out("1", "--markers")
