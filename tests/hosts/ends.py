"""Ends of a run over several hosts: what befalls a rank or a host, what is said of it, when all are gone, and what is left."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.hosts.cluster import FRONT, ROOT, Cluster, environment

LIMIT = 2.0
LOOPING = ("python", "-m", "tests.cases.looping")


@dataclass(frozen=True)
class Case:
    """`kind`: of tests.cases.looping; `acts`: what is done to the cluster instead. `says`: a regular expression that the first
    line of the report matches. `slow`: the verbs' time limit comes first."""

    name: str
    kind: str
    says: str
    acts: Callable[[Cluster], None] | None = None
    rank: int = -1
    ranks: int = 4
    slow: bool = False
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """`status` None: it did not end. Seconds from the fault until mpirun was gone, and until no rank was on any host.
    `left`: files and processes, by host."""

    status: int | None
    out: str
    err: str
    seconds: float
    gone: float
    left: dict[str, list[str]]

    def __str__(self) -> str:
        left = {host: what for host, what in self.left.items() if what}
        return f"status {self.status}, mpirun {self.seconds:.1f} s, all {self.gone:.1f} s, left {left}\n{self.out}\n{self.err}"


def seen(cluster: Cluster, case: Case, patience: float = 12) -> Ended:
    file = cluster.shared / f"go-{time.monotonic_ns()}"
    words = [*LOOPING, str(file), case.kind, "--rank", str(case.rank), "--timeout", f"{LIMIT:g}"]
    command = cluster.dealt(["mpirun", "-n", str(case.ranks), *words])
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            ["sh", "-c", 'ulimit -c 0; exec "$@"', "sh", *command], cwd=ROOT, env=environment() | case.environ,
            stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
        begun = _until(lambda: _text(out) or process.poll() is not None, 60)
        fault = time.monotonic()
        if case.acts is not None and begun:
            case.acts(cluster)
        else:
            file.touch()
        _until(lambda: process.poll() is not None, patience)
        seconds = time.monotonic() - fault
        _until(lambda: not any(_processes(cluster)), patience if process.poll() is not None else 1)
        gone = time.monotonic() - fault
        status, left = process.poll(), cluster.left()
        if status is None:
            process.kill()
        process.wait()
        return Ended(status, _text(out), _text(err), seconds, gone, left)


def _processes(cluster: Cluster) -> Sequence[str]:
    return [what for host, found in cluster.left().items() if host != FRONT for what in found if not what.startswith("/")]


def _until(done: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _text(file: object) -> str:
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    return os.read(file.fileno(), 1 << 20).decode(errors="replace")


def _of_rank(signal: int, rank: int) -> Callable[[Cluster], None]:
    return lambda cluster: os.kill(cluster.ranks()[rank], signal)


HANG = r"rank {rank} on {host} did not come"
CASES = [
    Case("a rank raises", "raise", r"\[3\] rank 3 of 4 on h2 failed: ValueError: planted"),
    Case("rank 0 raises", "raise", r"\[0\] rank 0 of 4 on h1 failed: ValueError: planted", rank=0),
    Case("all ranks raise", "all raise", r"\[\d\] rank \d of 4 on h\d failed: ValueError: planted"),
    Case("a rank exits", "exit", r"\[3\] rank 3 of 4 on h2 failed: SystemExit: 3"),
    Case("a rank vanishes", "os._exit", r"rank 3 of 4 on h2 has left by os._exit\(5\), its own .* after all_reduce"),
    Case("a rank is killed", "kill", r"rank 3 of 4 on h2 was killed by SIGKILL after all_reduce"),
    Case("rank 0 is killed", "kill", r"rank 0 of 4 on h1 was killed by SIGKILL after all_reduce", rank=0),
    Case("a host's only rank is killed", "kill", r"rank 1 of 2 on h2 was killed by SIGKILL after all_reduce", ranks=2),
    Case("a segmentation fault", "segv", r"rank 3 of 4 on h2 was killed by SIGSEGV after all_reduce"),
    Case("a rank is stopped", "stop", r"rank 3 on h2 did not come \(stopped \(SIGSTOP\)\)", slow=True),
    Case("rank 0 is stopped", "stop", r"rank 0 on h1 did not come \(stopped \(SIGSTOP\)\)", slow=True, rank=0),
    Case("a rank sleeps", "sleep", r"rank 3 on h2 did not come \(asleep", slow=True),
    Case("a rank computes for ever", "spin", r"rank 3 on h2 did not come \(computing", slow=True),
    Case("a rank returns early", "return", r"rank 3 on h2 did not come \(through with main", slow=True),
    Case("a host loses its link", "nothing", r"h2 ", lambda c: c.link("h2", False), slow=True),
    Case("rank 0's host loses its link", "nothing", r"h1 ", lambda c: c.link("h1", False), slow=True),
    Case("a host dies whole", "nothing", r"h2 ", lambda c: c.kill("h2"), slow=True),
    Case("all of a host's processes die", "nothing", r"h2 ", lambda c: os.kill(c.process("h2"), 9)),
    Case("rank 0's host dies whole", "nothing", r"h1 ", lambda c: c.kill("h1"), slow=True),
]  # fmt: skip


def main(names: Sequence[str]) -> None:
    import re

    cluster = None
    for case in CASES:
        if names and not any(name in case.name for name in names):
            continue
        if cluster is None or case.acts is not None:
            if cluster is not None:
                cluster.down()
            cluster = Cluster.up(2)
        ended = seen(cluster, case)
        lines = [line for line in ended.err.splitlines() if re.search(case.says, line)]
        print(f"=== {case.name}: said {len(lines)}: {ended}\n", flush=True)
        if case.acts is not None:
            cluster.down()
            cluster = None
    if cluster is not None:
        cluster.down()


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
