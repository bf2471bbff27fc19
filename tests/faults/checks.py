"""Checks of practice in a row, in a /dev/shm and a /tmp of 64 MB: `python -m tests.faults.checks 100` has 100 that deadlock and
100 that are killed at a random time. Each deadlock is told; no process and no file stays behind.
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

from practice.exercise import find
from tests.faults.own_space import alone, named, why_not
from tests.faults.running import MARK, marked
from tests.harness import ROOT, launcher_free

AT_ONCE = 3
SENDS = "chunks[into] += ring.sendrecv(right, chunks[out], left)"
# What stands in place of SENDS in exercise 25.
KINDS = {"deadlock": "ring.recv(left)", "loop": "while True: pass", "right": SENDS}
TOLD = "Every rank waits to receive, and nobody sends."
# Seconds for a verdict; and after a kill for all to be gone.
TOLD_WITHIN, GONE = 60, 5.0


def check(kind: str, kill: float | None) -> list[str]:
    """What went wrong in one check, killed after so many seconds."""
    mark, exercise = uuid.uuid4().hex, find("25")
    book = Path("/tmp/books", mark)
    book.mkdir(parents=True)
    (book / f"{exercise.name}.py").write_text(exercise.solution.replace(SENDS, KINDS[kind]))
    environ = launcher_free() | {MARK: mark, "RANKWISE_WORKBOOK": str(book)}
    command = [sys.executable, "-m", "launch.practice", "check", "25"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=TOLD_WITHIN if kill is None else kill)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
    problems = []
    if kill is None and TOLD not in " ".join(said.split()):
        problems.append(f"{kind}: status {process.returncode}, not told: {said[-2000:]}")
    deadline = time.monotonic() + GONE
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        problems.append(f"{kind}, killed after {kill} s: process {pid} is left")
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return problems


def checks(how_many: int) -> list[str]:
    """What went wrong, in words."""
    # The tests' own MPI has a segment too.
    before, draw, problems = named(), random.Random(how_many), []
    runs = [("deadlock", None)] * how_many + [(draw.choice([*KINDS]), draw.uniform(0.1, 2.0)) for _ in range(how_many)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for found in pool.map(lambda run: check(*run), runs):
            problems += found
    return problems + [f"{name} is left" for name in sorted(named() - before - {"/tmp/books"})]


def main() -> int:
    if (status := alone("tests.faults.checks")) is not None:
        return status
    if why := why_not():
        print(f"skipped: {why}")
        return 0
    how_many = int(sys.argv[1])
    problems = checks(how_many)
    print(*problems, f"{how_many} deadlocks and {how_many} kills, {len(problems)} problems", sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
