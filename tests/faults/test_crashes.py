"""Crashes in a row, of every kind, leave no process and no byte in /dev/shm. `make faults` makes 200."""

import subprocess
import sys

import pytest

from tests.faults.crashes import KINDS
from tests.grids import thinned
from tests.harness import ROOT, launcher_free


@pytest.mark.limit(200)
def test_crashes_of_every_kind_leave_nothing():
    how_many = thinned(4 * len(KINDS), len(KINDS))
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.crashes", str(how_many)],
        cwd=ROOT, env=launcher_free(), capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"{how_many} crashes, 0 problems"), done.stdout + done.stderr
