"""How commands end: on all ranks, soon, with one clear word."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpi4py import MPI

from launch.process import launcher
from parallel.threads import blas_threads
from tests.grids import thinned
from tests.harness import ROOT, begun, launcher_free, mpirun

PLANTED = ("-m", "tests.cases.planted")


def pids(out):
    """The ranks' processes, as the planted command printed them; a launcher's own numbers may follow on other lines."""
    return next(line for line in out.splitlines() if line.startswith("pids ")).split()[1:]


def running(pid):
    """Whether the process is there and not merely waiting for its parent to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def alive(pids, seconds=2.0):
    """Which of these processes are still running after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [p for p in pids if running(p)]


@pytest.fixture
def shared_memory():
    """At the end there is no segment that was not there before, but for those that other programs make and remove."""
    before = set(os.listdir("/dev/shm"))
    yield
    left, deadline = set(os.listdir("/dev/shm")) - before, time.monotonic() + 10
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left &= set(os.listdir("/dev/shm"))
    assert not left


@pytest.mark.parametrize("ranks", thinned([0, 1, 2, 3, 4], [0, 3]))
@pytest.mark.parametrize("kind", ["raise", "exit", "thread"])
def test_one_ranks_end_is_the_end_of_all_within_two_seconds(ranks, kind, shared_memory):
    before = time.monotonic()
    process = begun(ranks, *PLANTED, kind)
    started = pids(process.stdout.readline())
    begins = time.monotonic()
    _, err = process.communicate(timeout=20)
    # What starts slowly on a busy machine may end as slowly.
    assert time.monotonic() - begins < max(2, begins - before)
    assert process.returncode != 0
    first = next(line for line in err.splitlines() if "failed" in line)
    cause = {"raise": "ValueError: planted", "exit": "SystemExit: 3", "thread": "ZeroDivisionError: division by zero"}[kind]
    rank = min(1, max(ranks, 1) - 1)
    assert first == f"[{rank}] rank {rank} of {ranks or 1} failed: {cause}"
    assert err.count(cause) == 2
    assert f"[{rank}] Traceback (most recent call last):" in err
    assert not alive(started)


@pytest.mark.parametrize("ranks", thinned([0, 1, 3], [0, 3]))
def test_a_killed_rank_takes_the_others_along(ranks, shared_memory):
    done = mpirun(ranks, *PLANTED, "kill", timeout=20)
    assert done.returncode != 0
    assert not alive(pids(done.stdout))


def test_a_launcher_that_is_killed_leaves_no_orphan():
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "mpirun"), "-n", "3", sys.executable, *PLANTED, "wait"],
        cwd=ROOT,
        env=launcher_free(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    started = pids(process.stdout.readline())
    assert len(started) == 3
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=5)
    assert not alive(started)


@pytest.mark.parametrize("ranks", thinned([0, 1, 3], [0, 3]))
def test_unusable_input_is_one_line_and_status_two(ranks):
    done = mpirun(ranks, *PLANTED, "usage")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: cannot use 'usage': use something else" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1


def test_the_status_of_main_comes_through():
    assert mpirun(3, *PLANTED, "status").returncode == 7
    assert mpirun(3, *PLANTED, "none").returncode == 0


def test_help_answers_once_and_without_mpi():
    done = mpirun(3, "-m", "launch.tp_mlp", "--help")
    assert done.returncode == 0
    assert done.stdout.count("usage:") == 1
    assert "--activation {relu,gelu,silu,swiglu}" in done.stdout
    started = mpirun(
        0,
        "-c",
        "import sys, launch.start; from launch.tp_mlp import options\n"
        "try: options().parse_args(['--help'])\n"
        "except SystemExit: from mpi4py import MPI; print('started', MPI.Is_initialized())",
    )
    assert "started False" in started.stdout


CLOSED = "standard output is closed, and the results would be lost: leave >&- out, or write them to a file"
FULL = "standard output: No space left on device, and the results are lost: write them where there is room"
UNWRITTEN = {
    # Before the work: it would take more memory than there is.
    "tp_mlp --tokens 999999999 --data none >&-": CLOSED,
    "practice list >&-": CLOSED,
    "__main__ >&-": CLOSED,
    "kv_cache >/dev/full": FULL,
    "kv_cache --json >/dev/full": FULL,
    "kv_cache --help >/dev/full": FULL,
    "practice list >/dev/full": FULL,
    "practice --help >/dev/full": FULL,
    "__main__ --version >/dev/full": FULL,
}


@pytest.mark.parametrize("typed", thinned([*UNWRITTEN], [[*UNWRITTEN][i] for i in (0, 3, 6)]))
def test_a_standard_output_that_takes_nothing_is_told(typed):
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m launch.{typed}"],
        cwd=ROOT, env=launcher_free(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, f"error: {UNWRITTEN[typed]}\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_a_command_without_a_word(unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "launch.kv_cache"],
        cwd=ROOT, env=launcher_free() | {"PYTHONUNBUFFERED": unbuffered}, stdout=writing, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    # As a shell knows a death by SIGPIPE.
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("odd", thinned(["--help", "--seed=3", "--trace=t.json", "--tokens=0"], ["--help"]))
def test_ranks_that_are_given_other_options_are_told_so(odd):
    """As mpirun can: a part of the ranks has another command line."""
    if MPI.get_vendor()[0] == "Open MPI":
        pytest.skip("one MPI's launcher is enough: the ranks compare by themselves")
    words = ("-m", "launch.tp_mlp", "--tokens", "5", "--data", "none")
    done = mpirun(2, *words, ":", "-n", "1", sys.executable, *words, odd, timeout=20)
    assert (done.returncode, done.stdout) == (2, "")
    option = odd.partition("=")[0]
    assert re.search(rf"(?m)^error: ({option}: rank 2 has .*, ranks 0 and 1 have |rank 2: )", done.stderr), done.stderr


def test_a_launcher_of_another_mpi_is_refused():
    """Each started process would believe that it is alone, compute everything, and report that all is well."""
    open_mpi = MPI.get_vendor()[0] == "Open MPI"
    other = {"PMI_SIZE": "4", "PMI_RANK": "0"} if open_mpi else {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}
    done = mpirun(0, "-m", "launch.tp_mlp", **other)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .* started 4 ranks, but this Python's MPI is .*: use its own mpirun, \S+\n", done.stderr)


def test_threads_from_what_launchers_say():
    assert [blas_threads(2, n) for n in (1, 2, 3, 4)] == [2, 1, 1, 1]
    assert blas_threads(16, 3) == 5
    assert launcher.size({}) is None
    assert (launcher.rank({}), launcher.local_size({})) == (0, 1)
    assert (launcher.size({"PMI_SIZE": "4", "PMI_RANK": "3"}), launcher.rank({"PMI_SIZE": "4", "PMI_RANK": "3"})) == (4, 3)
    assert launcher.local_size({"PMI_SIZE": "8", "MPI_LOCALNRANKS": "4"}) == 4
    assert launcher.local_size({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}) == 2
    slurm = {"PMI_SIZE": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}
    assert [launcher.local_size(slurm | {"SLURM_NODEID": str(n)}) for n in range(4)] == [2, 2, 2, 1]
    assert launcher.several_hosts(slurm)
    assert not launcher.several_hosts({"PMI_SIZE": "4", "MPI_LOCALNRANKS": "4"})
