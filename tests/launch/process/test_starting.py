"""A rank that starts when its launcher has gone, as where Open MPI's is killed in the first second."""

import subprocess
import sys

from tests.harness import ROOT, launcher_free


def test_a_rank_whose_launcher_has_gone_ends_at_once():
    environ = launcher_free() | {"PMI_SIZE": "2", "PMI_RANK": "1", "PMI_FD": "0"}
    # The shell is gone long before Python has started.
    shell = ["sh", "-c", f"{sys.executable} -m launch.kv_cache &"]
    done = subprocess.run(shell, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("", "error: rank 1 of 2: its launcher has gone\n")
