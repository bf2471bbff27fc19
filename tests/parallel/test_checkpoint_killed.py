"""Checkpoints are complete whatever is killed and when."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from parallel.checkpoint import Checkpoint, latest, pieces, save
from parallel.control import Control
from tests.cases import saving
from tests.harness import begun
from tests.launch.test_start import alive
from tests.parallel.checkpoints import Alone, require_whole, there, write

# How many kills must come amid a save. For more than there is time for:
# `CHECKPOINT_KILLS=100 python -m pytest tests/parallel/test_checkpoint_killed.py -rP -k killed_again`
KILLS = int(os.environ.get("CHECKPOINT_KILLS", "4"))


def test_killed_before_each_of_its_system_calls(tmp_path):
    """One process, which saves a third step and is killed before its first, second, ... call: at every one in turn."""
    calls = ("open", "write", "flush", "fsync", "close", "__exit__", "mkdir", "rename", "unlink", "rmdir", "scandir")
    before = tmp_path / "before"
    for step in (1, 2):
        write(before, step, Alone)
    # What an earlier kill has left: removing it can be killed too.
    (before / ".step-00000009.partial").mkdir()
    (before / ".step-00000009.partial" / "rank-0000-of-0001.safetensors").touch()
    outcomes = []
    for at in range(1000):
        folder = Path(shutil.copytree(before, tmp_path / f"{at}"))
        child = os.fork()
        if child == 0:
            left = at

            def count(frame, event, function):
                nonlocal left
                if event == "c_call" and function.__name__ in calls:
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            try:
                sys.setprofile(count)
                write(folder, 3, Alone)
                sys.setprofile(None)
                os._exit(0)
            finally:
                # Whatever was raised: this copy of pytest must not go on.
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        steps = [int(p.name[5:]) for p in sorted(folder.glob("step-*"))]
        assert steps in ([1, 2], [1, 2, 3], [2, 3]), "the older is not removed before the newer is complete"
        for step in steps:
            require_whole(Checkpoint(folder / f"step-0000000{step}", Alone), step, 1, 0)
        outcomes.append(steps)
        if status == 0:
            break
        write(folder, 4, Alone)
        assert there(folder) == [f"step-0000000{steps[-1]}", "step-00000004"]
        shutil.rmtree(folder)
    assert status == 0
    # Before the commit, between it and the removal of the oldest, and after: each was met, in this order.
    counts = [outcomes.count(steps) for steps in ([1, 2], [1, 2, 3], [2, 3])]
    assert outcomes == [[1, 2]] * counts[0] + [[1, 2, 3]] * counts[1] + [[2, 3]] * counts[2]
    assert min(counts) > 1
    print(f"killed before, between and after: {counts}")


@pytest.mark.limit(30 + 15 * KILLS)
def test_killed_again_and_again_while_saving_the_newest_is_always_whole(tmp_path, comm):
    """Real ranks, one of which is killed at a random moment; another number of ranks goes on from what is left."""
    control = Control(comm)
    rng = np.random.default_rng()
    mine = [p for name, x in saving.contents(0).items() for p in pieces(name, saving.layouts(1)[name], {"tp": 0}, x)]
    save(tmp_path, 0, mine, {"next": 1}, control)
    steps, amid = [0], 0
    while amid < KILLS:
        assert len(steps) <= 5 * KILLS, f"{amid} kills came while something was being written: this shows too little"
        n = len(steps) - 1
        # Two runs are killed in their first save, which meets what the kill before has left; the next two in their second.
        killed_one_of(2 + n % 2, 1 + n // 2 % 2, tmp_path, rng)
        amid += bool(list(tmp_path.glob(".step-*.partial")))
        for path in tmp_path.glob("step-*"):
            saving.require_of_its_step(Checkpoint(path, control), 1, 0)
        steps.append(int(latest(tmp_path).name[5:]))
    print(f"{len(steps) - 1} kills, {amid} of them amid a save; newest steps {steps}")
    assert steps == sorted(steps)
    assert steps[-1] > 0
    control.close()


def killed_one_of(ranks, saves, folder, rng):
    """Start the command that saves without end, and kill one at a random moment after that many saves have begun."""
    process = begun(ranks, "-m", "tests.cases.saving", str(folder), stderr=subprocess.STDOUT)
    try:
        first_lines = []
        for line in process.stdout:
            first_lines.append(line)
            saves -= line.startswith("saving ")
            if not saves:
                break
        pids = next((line.split()[1:] for line in first_lines if line.startswith("pids ")), [])
        assert len(pids) == ranks, "".join(first_lines)
        # About as long as a save takes: some kills come after it.
        time.sleep(rng.uniform(0, 0.12))
        os.kill(int(rng.choice(pids)), signal.SIGKILL)
        process.communicate(timeout=20)
        assert not alive(pids, seconds=5)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
