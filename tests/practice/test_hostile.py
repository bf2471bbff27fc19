"""Learners' files that misbehave (more in test_practice.py): each gets one clear paragraph, leaves no process."""

import os
from pathlib import Path

import pytest

from launch import practice as command
from practice.check import check
from practice.desk import screen
from practice.exercise import find
from practice.workbook import Workbook
from tests.practice.test_cli import book, typed  # noqa: F401  fixtures

ONE, ROW = "y_TD = h_TF @", "y_TD = tp.all_reduce(x_Tf"
RING = "chunks[into] += ring.sendrecv(right, chunks[out], left)"
FORKS = "import os\n    while True:\n        try: os.fork()\n        except BaseException: pass"
FORK = "import os, threading\n    threading.Thread(target=os.fork).start()"
THREADS = "import threading, time\n    while True: threading.Thread(target=time.sleep, args=(60,)).start()"
BY_ITSELF = "its process ended by itself"
# exercise, the text before which the statements are put, the statements, what is said of it.
HOSTILE = {
    "syntax error": ("01", ONE, "y = = 1", "This is no Python: invalid syntax"),
    "endless loop": ("01", ONE, "while True: pass", "still running after 1 s, and stopped, in line 21"),
    "fork bomb": ("01", ONE, FORKS, "still running after 1 s"),
    "fork in a thread": ("01", ONE, FORK, "os.fork: an exercise is one process a rank"),
    "thread bomb": ("01", ONE, THREADS, "It starts more threads than this exercise has memory for."),
    "100 MB of print": ("01", ONE, "print('x' * 100_000_000)", "It prints more than 4 MB."),
    "exit at import": ("01", "def mlp", "raise SystemExit", "It leaves the program (sys.exit, exit or quit)"),
    "sys.exit on one rank": ("20", ROW, "import sys\n    if tp.rank == 1: sys.exit()", "on rank 1"),
    "os.abort on one rank": ("20", ROW, "import os\n    if tp.rank == 1: os.abort()", f"no answer on rank 1: {BY_ITSELF}"),
    "comm.Abort on one rank": ("20", ROW, "if tp.rank == 1: tp._comm.Abort(1)", f"no answer on rank 1: {BY_ITSELF}"),
    "a loop on one rank": ("20", ROW, "while tp.rank == 1: pass", "no answer on rank 1: still running"),
    "deadlock": ("25", RING, "ring.recv(left)", "Every rank waits to receive, and nobody sends."),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_it_gets_one_clear_paragraph(what, tmp_path):
    name, before, statements, said = HOSTILE[what]
    exercise, file, jobs = find(name), tmp_path / "mine.py", []
    if "still running" in said:
        exercise.facts["seconds"] = 1
    head, _, tail = exercise.solution.partition(before)
    assert tail
    pad = " " * (len(head) - len(head.rstrip(" ")))
    file.write_text(f"{head}{statements}\n{pad}{before}{tail}")

    def started(ranks, job):
        jobs.append(job)
        return command.command(ranks, job)

    verdict = check(exercise, file, command.Reference(), started, seed=3)
    assert not verdict.passed
    text = " ".join(" ".join(screen.verdict(exercise, verdict, 1, {})).split())
    assert said in text
    assert "Traceback" not in text
    # One wrong part that speaks, or a word on the file as a whole.
    assert bool(verdict.general) + sum(bool(j.lines) for j in verdict.parts if j.status == "wrong") == 1
    assert not [job for job in jobs if os.path.exists(job)]
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and any(job in _command_line(pid) for job in jobs)]


def _command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_the_program_and_the_state_survive(book, typed):  # noqa: F811
    typed("start")
    solution = find("01").solution
    file = book / "01_mlp_forward.py"
    for statements in ("import os; os.abort()", "import os; os.remove(os.environ.get('HOME', '/') + '/nothing')"):
        file.write_text(solution.replace(ONE, f"{statements}\n    {ONE}"))
        typed("check", status=1)
    file.write_text(solution)
    assert "Passed" in typed("check")
    assert [e["what"] for e in Workbook(book).log] == ["start", "check", "check", "check"]
