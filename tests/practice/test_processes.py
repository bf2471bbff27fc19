"""Learners' files in real processes, right, wrong and misbehaving: each gets one clear paragraph and leaves no process."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch import practice as command
from practice.check import check
from practice.desk import screen
from practice.exercise import find
from practice.workbook import Workbook
from tests.ahead import ahead
from tests.faults.running import MARK, marked
from tests.grids import thinned
from tests.harness import ROOT, launcher_free
from tests.practice.test_cli import book, typed  # noqa: F401  fixtures

ONE, ROW = "y_TD = h_TF @", "y_TD = tp.all_reduce(x_Tf"
RING = "chunks[into] += ring.sendrecv(right, chunks[out], left)"
FORKS = "import os\n    while True:\n        try: os.fork()\n        except BaseException: pass"
FORK = "import os, threading\n    threading.Thread(target=os.fork).start()"
THREADS = "import threading, time\n    while True: threading.Thread(target=time.sleep, args=(60,)).start()"
# The launcher ends the others too: they are to be in the verb by then.
LAST = "import os, time\n    if tp.rank == 1: time.sleep(0.4); "
BY_ITSELF = "its process ended by itself"
# exercise, the text before which the statements are put, the statements, what is said of it.
HOSTILE = {
    "syntax error": ("01", ONE, "y = = 1", "This is no Python: invalid syntax"),
    "endless loop": ("01", ONE, "while True: pass", "still running after 1 s, and stopped, in line 21"),
    "fork": ("01", ONE, "import os; os.fork()", "os.fork"),
    "fork bomb": ("01", ONE, FORKS, "still running after 1 s"),
    "fork in a thread": ("01", ONE, FORK, "os.fork: an exercise is one process a rank"),
    "thread bomb": ("01", ONE, THREADS, "It starts more threads than this exercise has memory for."),
    "100 MB of print": ("01", ONE, "print('x' * 100_000_000)", "It prints more than 4 MB."),
    "memory": ("01", ONE, "np.ones(10**10)", "more memory"),
    "our code": ("01", ONE, "__import__('layers.mlp')", "rankwise's own code"),
    "exit at import": ("01", "def mlp", "raise SystemExit", "It leaves the program (sys.exit, exit or quit)"),
    "sys.exit on one rank": ("20", ROW, "import sys\n    if tp.rank == 1: sys.exit()", "on rank 1"),
    "os.abort on one rank": ("20", ROW, f"{LAST}os.abort()", f"no answer on rank 1: {BY_ITSELF}"),
    "comm.Abort on one rank": ("20", ROW, f"{LAST}tp._comm.Abort(1)", f"no answer on rank 1: {BY_ITSELF}"),
    "a loop on one rank": ("20", ROW, "while tp.rank == 1: pass", "no answer on rank 1: still running"),
    "deadlock": ("25", RING, "ring.recv(left)", "Every rank waits to receive, and nobody sends."),
}
# exercise, a text of its solution, what stands in its place, what is said of it.
WRONG = {
    "sends first": ("25", RING, "ring.send(right, chunks[out])\n        chunks[into] += ring.recv(left)",
        "Every rank waits in a send"),
    "one stays away": ("20", "tp.all_reduce(part_TD)", "tp.all_reduce(part_TD) if tp.rank else part_TD",
        "rank 0 returned without"),
    "bias": ("20", "(x_Tf @ W_fD)\n    return y_TD + b_D", "(x_Tf @ W_fD + b_D)\n    return y_TD", "3 x bias"),
    "shapes": ("20", "(part_TD)", "(part_TD[tp.rank % 2 :])", "rank 0 has shape"),
    "nothing": ("01", "return y_TD, (x_TD, a_TF, h_TF)", "y_TD", "two values, y and saved; it returned nothing (None)"),
}  # fmt: skip


def judged(name, source, seconds=None):
    """(the exercise, the verdict, what its processes have left behind)."""
    exercise, jobs = find(name), []
    exercise.facts["seconds"] = seconds or exercise.facts["seconds"]

    def started(ranks, job):
        jobs.append(job)
        return command.command(ranks, job)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mine.py"
        file.write_text(source)
        verdict = check(exercise, file, command.Reference(), started, seed=3)
    left = [job for job in jobs if os.path.exists(job)]
    left += [pid for pid in os.listdir("/proc") if pid.isdigit() and any(job in _command_line(pid) for job in jobs)]
    return exercise, verdict, left


def _command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def edited(what):
    """The file of a learner, in its processes."""
    if what in WRONG:
        name, old, new, _ = WRONG[what]
        assert old in find(name).solution
        return judged(name, find(name).solution.replace(old, new))
    name, before, statements, said = HOSTILE[what]
    head, _, tail = find(name).solution.partition(before)
    assert tail
    pad = " " * (len(head) - len(head.rstrip(" ")))
    # On a busy machine several ranks take more than a second until one is in its loop.
    seconds = (1 if find(name).ranks == 1 else 4) if "still running" in said else None
    return judged(name, f"{head}{statements}\n{pad}{before}{tail}", seconds=seconds)


@pytest.fixture(scope="module")
def verdicts(request):
    """Two at a time: they wait for processes, and some for the end of their time."""
    with ahead(request, ThreadPoolExecutor(2), edited) as begun:
        yield begun


@pytest.mark.parametrize("what", [*HOSTILE, *WRONG])
def test_it_gets_one_clear_paragraph(what, verdicts):
    exercise, verdict, left = verdicts[what].result()
    assert not verdict.passed
    text = " ".join(" ".join(screen.verdict(exercise, verdict, 1, {})).split())
    assert (HOSTILE | WRONG)[what][-1] in text
    assert "Traceback" not in text
    # One wrong part that speaks, or a word on the file as a whole.
    assert bool(verdict.general) + sum(bool(j.lines) for j in verdict.parts if j.status == "wrong") == 1
    assert not left


# That the others pass is seen in test_cli.py too.
@pytest.mark.parametrize("name", thinned(["01_mlp_forward", "20_linear", "25_ring_all_reduce"], ["25_ring_all_reduce"]))
def test_a_solution_passes(name):
    _, verdict, left = judged(name, find(name).solution)
    assert verdict.passed, verdict
    assert not left


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


def test_an_authors_check_that_is_ended_leaves_no_process():
    """Not the workers, and not what they have begun: that would go on for minutes."""
    run = [sys.executable, "-m", "launch.practice", "dev", "check", *map(str, range(31, 39)), "--quick"]
    mark = uuid.uuid4().hex
    own = {"cwd": ROOT, "env": launcher_free() | {MARK: mark}, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(run, **own, text=True)
    try:
        while len(marked(mark)) < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.terminate()
        _, err = process.communicate(timeout=10)
        assert (process.returncode, err) == (128 + signal.SIGTERM, "ended by SIGTERM\n")
        # A killed process may take a moment to be gone.
        end = time.monotonic() + 10
        while left := marked(mark):
            assert time.monotonic() < end, left
            time.sleep(0.1)
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
        process.wait()
