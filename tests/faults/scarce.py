"""What a job can lack in shared memory and in its temporary folder, and what must be said of it then."""

from __future__ import annotations

import shlex
import sys
import uuid
from dataclasses import dataclass, field
from functools import partial

from tests.faults.crashes import COMMAND as MLP
from tests.faults.own_space import own
from tests.faults.running import Seen, run

RING = "25_ring_all_reduce"
SHORT = r"/dev/shm has {free} MiB left, and MPICH needs {need} MiB there for {ranks} of this host: make it larger .*"


@dataclass(frozen=True)
class Scarce:
    """`mounts`: options of own_space.own. `says`: the one line of standard error, as a regular expression; "" if all goes well.
    `practice`: a check of it, in place of a command under mpirun. `alike`: the suite leaves it to `make faults`."""

    name: str
    says: str = ""
    mounts: dict = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    ranks: int = 4
    practice: bool = False
    open_mpi: bool = False
    alike: bool = False

    @property
    def status(self) -> int:
        return 2 if self.says else 0


SCARCE = [
    Scarce("a small /dev/shm", SHORT.format(free="2.0", need="4.2", ranks="4 ranks"), {"shm": "size=2m"}),
    Scarce("a small /dev/shm, without mpirun", SHORT.format(free="0.5", need="1.0", ranks="1 rank"), {"shm": "size=512k"},
           ranks=0, alike=True),
    Scarce("a /dev/shm that is just large enough", "", {"shm": "size=4300k"}),
    Scarce("a read-only /dev/shm", r"/dev/shm cannot be written to: MPICH needs 4.2 MiB there .*", {"shm": "ro"}, alike=True),
    Scarce("no /dev/shm", r"/dev/shm: No such file or directory: MPICH needs 4.2 MiB there .*", {"shm": "none"}, alike=True),
    Scarce("a small /dev/shm, under Open MPI", "", {"shm": "size=64k"}, {"OMPI_MCA_btl": "self,sm,tcp"}, ranks=2,
           open_mpi=True, alike=True),
    Scarce("a read-only /tmp, and no TMPDIR", "", {"read_only": True}, {"TMPDIR": "/nonexistent"}),
    Scarce("a full /tmp", "", {"tmp": "size=4k"}, alike=True),
    Scarce("no launcher", "PMI_SIZE is 4, but no launcher has set it: unset it, or use .*", environ={"PMI_SIZE": "4"}, ranks=0),
    Scarce("practice: a small /dev/shm", SHORT.format(free="2.0", need="4.2", ranks="4 ranks"), {"shm": "size=2m"},
           practice=True, alike=True),
    Scarce("practice: a nearly full /tmp", "/tmp: 1.0 MiB are left, and a check needs 8: give TMPDIR another folder",
           {"tmp": "size=1m"}, practice=True),
]  # fmt: skip


def seen(case: Scarce) -> Seen:
    """One run of it. What it leaves in its /dev/shm and /tmp is on the last line of standard output."""
    environ = dict(case.environ)
    args, ranks = MLP, case.ranks
    if case.practice:
        # A folder of the run's own, not the one that is scarce; cases run side by side.
        environ["RANKWISE_WORKBOOK"] = f"/var/tmp/rankwise-scarce-{uuid.uuid4().hex}"
        args, ranks = ["-m", "launch.practice", "check", RING], 0
    return run(ranks, args, open_mpi=case.open_mpi, within=partial(_within, case), **environ)


def _within(case: Scarce, command: list[str]) -> list[str]:
    before = f"{shlex.quote(sys.executable)} -m launch.practice start 25 >/dev/null; " if case.practice else ""
    after = 'status=$?; echo $(ls /dev/shm /tmp 2>/dev/null); rm -rf "${RANKWISE_WORKBOOK:-/none}"; exit $status'
    return own(["sh", "-c", f'{before}"$@"; {after}', "sh", *command], **case.mounts)
