"""Too little space is told in one line, before any work; and nothing stays in shared memory or in the temporary folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from parallel import remains
from tests.ahead import ahead
from tests.faults.own_space import why_not
from tests.faults.running import OPEN_MPI, Seen
from tests.faults.scarce import SCARCE, seen
from tests.grids import thinned
from tests.harness import ROOT, launcher_free

CASES = {case.name.replace(" ", "_"): case for case in thinned(SCARCE, [case for case in SCARCE if not case.alike])}
NAMESPACE = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture(scope="module")
def runs(request):
    with ahead(request, ThreadPoolExecutor(2), lambda name: seen(CASES[name])) as begun:
        yield begun


@NAMESPACE
@pytest.mark.limit(90)
@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_is_missing(runs, name):
    case = CASES[name]
    if case.open_mpi and not OPEN_MPI.exists():
        pytest.skip("Open MPI's environment is not there: `make test-openmpi` makes it")
    done: Seen = runs[name].result()
    assert done.status == case.status, str(done)
    assert not done.left, str(done)
    if case.says:
        assert re.fullmatch(f"error: {case.says}\n", done.err), str(done)
    if case.mounts.get("shm") != "none":
        shm, tmp = re.fullmatch(r"(?s).*/dev/shm:(.*) /tmp:(.*)\n", done.out).groups()
        # The project itself may lie in /tmp.
        assert set(shm.split() + tmp.split()) <= {ROOT.parts[2]}, str(done)


@NAMESPACE
@pytest.mark.limit(300)
@pytest.mark.parametrize(("script", "how_many"), [("kills", thinned(50, 2)), ("checks", thinned(20, 1))])
def test_kills_leave_nothing(script, how_many):
    done = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{script}", str(how_many)],
        cwd=ROOT, env=launcher_free(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{how_many} kills, 0 problems\n"), done.stdout


def test_only_what_nobody_holds_is_swept(tmp_path):
    """Files that are open, that are mapped, in use within a folder, of another time or name stay."""
    import mmap

    for name in ("left", "left_by_another", "open", "mapped", "old", "other"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("folder_left", "folder_in_use"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log").write_text("x")
    os.utime(tmp_path / "old", (1, 1))
    names = tuple(f"{re.escape(str(tmp_path))}/{name}" for name in ("left", "open", "mapped", "old", r"folder_\w+"))
    with open(tmp_path / "mapped", "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 1)
    with open(tmp_path / "open"), open(tmp_path / "folder_in_use" / "log"), mapped:
        remains.sweep(names, since=2)
        assert sorted(os.listdir(tmp_path)) == ["folder_in_use", "left_by_another", "mapped", "old", "open", "other"]
    remains.sweep(names, until=2)
    assert sorted(os.listdir(tmp_path)) == ["folder_in_use", "left_by_another", "mapped", "open", "other"]


def test_what_another_job_holds_is_not_waited_for(tmp_path):
    """Of what is held, only that of the job's own processes, which have an entry of their own in their environment."""
    name, pattern = tmp_path / "held", (re.escape(f"{tmp_path}/held"),)
    name.touch()
    command = ["sh", "-c", "exec 9<held; echo; exec cat"]
    own = {"cwd": tmp_path, "env": os.environ | {"JOB": "7"}, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **own) as process:
        process.stdout.readline()
        assert [remains.sweep(pattern, of=of) for of in ("", "JOB=7", "JOB=8")] == [True, True, False]
        assert name.exists()
        process.stdin.close()
    assert remains.sweep(pattern, of="JOB=8")
    assert not name.exists()
