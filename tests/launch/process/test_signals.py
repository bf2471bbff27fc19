"""Ctrl-C and SIGTERM: one line, the status of the signal, no rank left, and of a run that is interrupted what is kept."""

import csv
import os
import re
import signal
import time

import pytest

from tests.harness import MPICH, ROOT, begun, mpirun
from tests.launch.test_start import alive, pids

SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize("number", SAID)
@pytest.mark.parametrize("to", ["group", "launcher", "alone", "rank"])
def test_a_signal_is_one_line_and_its_status(number, to):
    """To all that a terminal has started, to mpirun, to a process without mpirun, or to one rank of several."""
    process = begun(0 if to == "alone" else 3, "-m", "tests.cases.planted", "wait")
    started = pids(process.stdout.readline())
    # Two ranks wait in MPI, one sleeps.
    time.sleep(0.1)
    if to == "group":
        os.killpg(process.pid, number)
    else:
        os.kill(int(started[2]) if to == "rank" else process.pid, number)
    out, err = process.communicate(timeout=5)
    if MPICH or to == "alone":
        assert process.returncode == STATUS[number]
        # One of several is named: SIGTERM may have been sent to it alone.
        assert re.fullmatch(rf"(rank \d of \d was )?{SAID[number]}\n", err), err
    else:
        assert process.returncode
    assert not alive(started)
    # Of the launcher's own words those alone that nothing can keep it from.
    assert "BAD TERMINATION" not in out
    assert not MPICH or ("Ctrl-C" in out) == (number == signal.SIGINT and to in ("group", "launcher"))


SCRIPT = """
import os, signal, time
from launch.process import signals
signals.listen()
there, told = os.pipe()
child = os.fork()
if child == 0:
    os.write(told, b"!")
    signal.alarm(5)
    time.sleep(10)
os.read(there, 1)
os.kill(child, {number})
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
time.sleep(0.1)
os.kill(os.getpid(), {number})
time.sleep(10)
"""


@pytest.mark.parametrize("number", SAID)
def test_before_mpi_runs_it_is_the_same_and_a_childs_signal_is_its_own(number):
    done = mpirun(0, "-c", SCRIPT.format(number=int(number)), timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (STATUS[number], f"-{int(number)}\n", f"{SAID[number]}\n")


TRAIN = ("--layers", "1", "--d-model", "16", "--heads", "2", "--d-ff", "16", "--sequence-length", "8", "--batch-tokens", "16")


def test_an_interrupted_run_says_what_is_kept_and_how_to_go_on(tmp_path):
    text = tmp_path / "text"
    text.write_bytes((ROOT / "README.md").read_bytes()[:2000])
    words = ["launch.train", *TRAIN, "--text", str(text), "--output", str(tmp_path / "out"), "--steps", "100000"]
    kept = tmp_path / "kept"
    process = begun(2, "-m", *words, "--checkpoint", str(kept), "--save-every", "3")
    deadline = time.monotonic() + 20
    while len(list(kept.glob("step-*"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 130 if MPICH else process.returncode
    newest = int(max(p.name for p in kept.glob("step-*"))[-8:])
    said = [line for line in err.splitlines() if line and "tokens/s" not in line]
    assert said[0] == "interrupted"
    told = re.fullmatch(rf"step (\d+) of 100000 is kept in {kept}: the same command with --resume goes on from there", said[1])
    # Steps go on, and are kept, until the launcher has ended the ranks.
    assert 3 <= int(told[1]) <= newest
    with open(tmp_path / "out" / "loss.csv") as file:
        assert [int(r["step"]) for r in csv.DictReader(file)][: newest - 1] == list(range(1, newest))
