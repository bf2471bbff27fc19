"""Kills in a row, of anything that a job has: `python -m tests.faults.kills 50` sends SIGKILL to a rank, a keeper, the launcher
or its proxy, and to the launcher SIGTERM and SIGINT too, at a random time in the first second or soon after MPI has named
something, under MPICH and Open MPI. All are gone soon, and no file is left.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tests.faults.crashes import COMMAND
from tests.faults.own_space import alone, named, why_not
from tests.faults.running import AS_ROOT, MARK, OPEN_MPI, marked
from tests.harness import ROOT, launcher_free

AT_ONCE = 2
# Seconds after a kill for all to be gone; for the launcher's own end when nothing was killed.
GONE, OVER = 3.0, 20.0


def children(pid: int) -> list[int]:
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def victims(launcher: int) -> list[int]:
    """What the job has now: the launcher, its proxy, keepers and ranks."""
    every, new = [], [launcher]
    while new:
        every += new
        new = [child for pid in new for child in children(pid)]
    return every


def kill(seed: int, before: set[str]) -> list[str]:
    """What went wrong. `before`: the names that were there already."""
    draw, mark = random.Random(seed), uuid.uuid4().hex
    ranks, after = draw.choice((1, 2, 3)), draw.uniform(0, 1)
    folder = OPEN_MPI if seed % 4 > 1 and OPEN_MPI.exists() else Path(sys.executable).parent
    command = [str(folder / "mpirun"), "-n", str(ranks), str(folder / "python"), *COMMAND]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=launcher_free() | AS_ROOT | {MARK: mark}, **quiet)
    if seed % 2:
        after /= 20
        deadline = time.monotonic() + OVER
        while not named() - before and time.monotonic() < deadline:
            time.sleep(0.001)
    time.sleep(after)
    victim = draw.choice(victims(process.pid))
    name = Path(f"/proc/{victim}/comm").read_text().strip() if Path(f"/proc/{victim}").exists() else "what had ended"
    number = draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)) if victim == process.pid else signal.SIGKILL
    with suppress(OSError):
        os.kill(victim, number)
    with suppress(subprocess.TimeoutExpired):
        process.wait(OVER)
    deadline = time.monotonic() + GONE
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return (
        [f"seed {seed}: {len(left)} processes are left of {ranks} ranks after {number.name} to {name} at {after:.2f} s"]
        if left
        else []
    )


def kills(seeds: range) -> list[str]:
    """What went wrong, in words."""
    # The tests' own MPI has a segment too.
    before = named()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        problems = [problem for found in pool.map(lambda seed: kill(seed, before), seeds) for problem in found]
    return problems + [f"{name} is left" for name in sorted(named() - before)]


def main() -> int:
    if (status := alone("tests.faults.kills")) is not None:
        return status
    if why := why_not():
        print(f"skipped: {why}")
        return 0
    how_many = int(sys.argv[1])
    problems = kills(range(how_many))
    print(*problems, f"{how_many} kills, {len(problems)} problems", sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
