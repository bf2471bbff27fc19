"""Ends of a run over several hosts: what befalls a rank or a host, what is said of it, when all are gone, and what is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.hosts.cluster import ROOT, Cluster, environment

# Of a verb, in seconds.
LIMIT = 1.0
EARLY = ROOT / "tests" / "faults" / "early"
LOOPING = ("python", "-m", "tests.cases.looping")


@dataclass(frozen=True)
class Case:
    """`kind`: of tests.cases.looping, on the last rank, or on all; `acts`: what is done to the cluster instead; `early`: what
    tests/faults/early plants in a rank before MPI runs. `says`: a regular expression that the first line of the report matches;
    "" where mpirun is gone before any rank can say a thing. `alike`: the suite leaves it to the whole grid."""

    name: str
    says: str
    kind: str = "nothing"
    acts: Callable[[Cluster], None] | None = None
    early: str = ""
    rank: int = -1
    ranks: int = 4
    shm: str = "256m"
    status: int = 1
    alike: bool = False

    @property
    def at_start(self) -> bool:
        """Before the sums: nothing is timed."""
        return bool(self.early) or self.shm != Case.shm

    @property
    def done(self) -> str:
        """What befalls a rank or a host, as the table has it."""
        return self.early or ("" if self.acts or self.kind == "nothing" else self.kind)


@dataclass(frozen=True)
class Ended:
    """`status` None: it did not end. Seconds from the fault until mpirun was gone, and until no process was on any host.
    `left`: files and processes, by host."""

    status: int | None
    out: str
    err: str
    seconds: float
    gone: float
    left: dict[str, list[str]]

    def __str__(self) -> str:
        times = f"mpirun {self.seconds:.1f} s, all {self.gone:.1f} s"
        return f"status {self.status}, {times}, left {self.left}\n{self.out}\n{self.err}"


def seen(case: Case, patience: float = 15) -> Ended:
    """One run of it, on two hosts of its own."""
    with Cluster.up(2, shm=case.shm) as cluster:
        file = cluster.shared / "now"
        words = [*LOOPING, str(file), case.kind, "--rank", str(case.rank), "--timeout", f"{LIMIT:g}"]
        planted = {"PYTHONPATH": str(EARLY), "PLANTED": f"rank={case.ranks - 1},{case.early}"} if case.early else {}
        command = cluster.dealt(["mpirun", "-n", str(case.ranks), *words])
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(
                ["sh", "-c", 'ulimit -c 0; exec "$@"', "sh", *command], cwd=ROOT, env=environment() | planted,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip
            _until(lambda: _text(out) or process.poll() is not None, 60)
            fault = time.monotonic()
            if case.acts is not None:
                case.acts(cluster)
            else:
                file.touch()
            _until(lambda: process.poll() is not None, patience)
            seconds = time.monotonic() - fault
            _until(lambda: not any(map(cluster.processes, cluster.hosts)), 3)
            gone = time.monotonic() - fault
            status, left = process.poll(), {host: what for host, what in cluster.left().items() if what}
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Ended(status, _text(out), _text(err), seconds, gone, left)


def _until(done: Callable[[], object], seconds: float) -> None:
    """Or until so many seconds are over."""
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)


def _text(file: object) -> str:
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    return os.read(file.fileno(), 1 << 20).decode(errors="replace")


def _killed(host: str) -> Callable[[Cluster], None]:
    return lambda cluster: os.kill(cluster.process(host), signal.SIGKILL)


LOST = r"ranks {} and {} on {} did not come \({} has not been heard of for \d\.\d s\): ranks {} and {} on {} have waited"
H1_LOST, H2_LOST = LOST.format(0, 1, "h1", "h1", 2, 3, "h2"), LOST.format(2, 3, "h2", "h2", 0, 1, "h1")
AFTER = r"after all_reduce .* at tests/cases/looping.py:\d+ in main"
CASES = [
    Case("a rank raises", r"\[3\] rank 3 of 4 on h2 failed: ValueError: planted", "raise", alike=True),
    Case("rank 0 raises", r"\[0\] rank 0 of 4 on h1 failed: ValueError: planted", "raise", rank=0, alike=True),
    Case("all ranks raise at once", r"\[(\d)\] rank \1 of 4 on h\d failed: ValueError: planted", "all raise"),
    Case("a rank exits", r"\[3\] rank 3 of 4 on h2 failed: SystemExit: 3", "exit", alike=True),
    Case("a rank vanishes", rf"rank 3 of 4 on h2 has left by os\._exit\(5\), .* {AFTER}", "os._exit", alike=True),
    Case("a rank is killed", f"rank 3 of 4 on h2 was killed by SIGKILL {AFTER}", "kill", alike=True),
    Case("rank 0 is killed", f"rank 0 of 4 on h1 was killed by SIGKILL {AFTER}", "kill", rank=0, alike=True),
    Case("a host's only rank is killed", f"rank 1 of 2 on h2 was killed by SIGKILL {AFTER}", "kill", ranks=2),
    Case("a segmentation fault", f"rank 3 of 4 on h2 was killed by SIGSEGV {AFTER}", "segv", alike=True),
    Case("a rank is stopped", r"rank 3 on h2 did not come \(stopped \(SIGSTOP\)\): ranks 0 and 1 on h1", "stop"),
    Case("rank 0 is stopped", r"rank 0 on h1 did not come \(stopped \(SIGSTOP\)\): rank 1 on h1", "stop", rank=0, alike=True),
    Case("a rank sleeps", r"rank 3 on h2 did not come \(asleep or reading\): ranks 0 and 1 on h1", "sleep", alike=True),
    Case("a rank computes for ever", r"rank 3 on h2 did not come \(computing\): ranks 0 and 1 on h1", "spin", alike=True),
    Case("a rank returns early", r"rank 3 on h2 did not come \(through with main\): ranks 0 and 1 on h1", "return", alike=True),
    Case("a host loses its link", H2_LOST, acts=lambda c: c.link("h2", False)),
    Case("rank 0's host loses its link", H1_LOST, acts=lambda c: c.link("h1", False), alike=True),
    Case("a host loses its power", H2_LOST, acts=lambda c: c.kill("h2"), alike=True),
    Case("rank 0's host loses its power", H1_LOST, acts=lambda c: c.kill("h1"), alike=True),
    Case("all processes of a host are killed, mpirun's too", "", acts=_killed("h2"), status=255, alike=True),
    Case("a rank is killed before MPI runs", "rank 3 of 4 on h2 was killed by SIGKILL before MPI ran",
         early="signal=9,after=0.05", status=137, alike=True),
    Case("an import fails on a rank", r"\[3\] rank 3 of 4 on h2 failed: ImportError: planted at numpy", early="import=numpy",
         alike=True),
    Case("a small /dev/shm on all hosts", "error: on h1: /dev/shm has 1.0 MiB left, and MPICH needs 2.1 MiB there for 2 ranks",
         shm="1m", status=2),
]  # fmt: skip
REPORT = r"(?m)^(?:(?:\[\d\] )?rank \d of \d .*|ranks? .* did not come .*|error: .*|h\d is gone.*)$"


def reports(err: str) -> list[str]:
    """The first lines of what this project has said."""
    return re.findall(REPORT, err)


def main(names: Sequence[str]) -> None:
    for case in CASES:
        if not names or any(name in case.name for name in names):
            print(f"=== {case.name}: said {len(reports((ended := seen(case)).err))}: {ended}\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
