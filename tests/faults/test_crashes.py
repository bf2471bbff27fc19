"""Crashes in a row, of every kind, leave no process and no byte in /dev/shm. `make faults` makes 200."""

import os
import subprocess
import sys

import pytest

from tests.harness import ROOT, launcher_free


@pytest.mark.limit(200)
def test_twenty_crashes_leave_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.crashes", "20"],
        cwd=ROOT, env=launcher_free(dict(os.environ)), capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "20 crashes, 0 problems"), done.stdout + done.stderr
