"""Crashes in a row, of all kinds: `python -m tests.faults.crashes 200`. No process stays behind, and no file.

Where the system lets it, the crashes see a /dev/shm and a /tmp of their own, so that what others do there is not counted.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.faults.own_space import ALONE, alone, named
from tests.faults.running import run

COMMAND = ["-m", "launch.tp_mlp", "--tokens", "5", "--d-model", "6", "--d-ff", "13", "--timed", "5,6,13", "--data", "none"]
KINDS = ("kind=raise", "kind=kill", "kind=segv,when=in", "kind=exit:3", "kind=osexit:5", "kind=shape", "kind=thread")
KINDS += ("kind=kill,when=in",)
AT_ONCE = 3


def crashes(how_many: int) -> list[str]:
    """What went wrong, in words."""
    before, problems = named(), []

    def crash(i: int) -> None:
        kind, ranks = KINDS[i % len(KINDS)], (2, 3, 4, 1)[(i + i // len(KINDS)) % 4]
        # Alone, a rank has no one to disagree with.
        kind = "kind=raise" if ranks == 1 and kind == "kind=shape" else kind
        done = run(ranks, COMMAND, f"rank={i % ranks},at=all_reduce:{1 + i % 2},{kind}")
        if done.status in (0, None) or done.left:
            problems.append(f"{kind} on rank {i % ranks} of {ranks}: status {done.status}, left {done.left}")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(crash, range(how_many)):
            pass
    problems += [f"{name} is left" for name in sorted(named() - before) if ALONE in os.environ or "shm" in name]
    return problems


def main() -> int:
    if (status := alone("tests.faults.crashes")) is not None:
        return status
    how_many = int(sys.argv[1])
    problems = crashes(how_many)
    print(*problems, f"{how_many} crashes, {len(problems)} problems", sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
