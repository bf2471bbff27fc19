"""A Slurm on the hosts of one machine: `python -m tests.hosts.slurm 2 -- srun --mpi=pmi2 -n 4 python -m launch.tp_mlp`.

slurmctld runs on the front, a slurmd on each host, one munged for all. Debian has them in slurm-wlm and munge, which
`apt-get install --no-install-recommends slurm-wlm munge` brings. All of it is taken down at the end.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.hosts.cluster import FRONT, ROOT, Cluster, environment, why_not

TOOLS = ("slurmctld", "slurmd", "srun", "sinfo", "munged")
CONF = """
ClusterName=rankwise
SlurmctldHost=front(10.77.0.254)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket
CredType=cred/munge
MpiDefault=pmi2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={state}/saved
SlurmctldPidFile={state}/slurmctld.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdSpoolDir={state}/spool-%n
SlurmdPidFile={state}/slurmd-%n.pid
SlurmdLogFile={state}/slurmd-%n.log
SchedulerParameters=sched_interval=1
KillWait=2
{nodes}
PartitionName=all Nodes={names} Default=YES OverSubscribe=FORCE:4 State=UP
"""
START = 50


def lacking() -> str | None:
    """Why there is no Slurm here; None if there is."""
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    return why_not() or (f"there is no {', no '.join(missing)} here (Debian: slurm-wlm, munge)" if missing else None)


class Slurm:
    """With the hosts of a cluster as its nodes; ends with it."""

    def __init__(self, cluster: Cluster, cpus: int) -> None:
        self.cluster, self.state = cluster, cluster.state / "slurm"
        (self.state / "saved").mkdir(parents=True)
        self.conf = self.state / "slurm.conf"
        nodes = [
            f"NodeName={host} NodeAddr=10.77.0.{n} CPUs={cpus} RealMemory=1000 State=UNKNOWN"
            for n, host in enumerate(cluster.hosts, 1)
        ]
        self.conf.write_text(CONF.format(state=self.state, nodes="\n".join(nodes), names=",".join(cluster.hosts)))
        key = self.state / "munge.key"
        key.write_bytes(b"a key of no secret, for one machine's own test cluster" * 20)
        key.chmod(0o400)
        self._begin(FRONT, ["munged", "--force", "--foreground", f"--key-file={key}", f"--socket={self.state}/munge.socket",
                            f"--pid-file={self.state}/munged.pid", f"--log-file={self.state}/munged.log",
                            f"--seed-file={self.state}/munged.seed"])  # fmt: skip
        self._begin(FRONT, ["slurmctld", "-D", "-f", str(self.conf)])
        for host in cluster.hosts:
            self._begin(host, ["slurmd", "-D", "-f", str(self.conf), "-N", host])

    def _begin(self, host: str, command: list[str]) -> None:
        with open(self.state / "log", "a") as log:
            self.cluster.keep(
                subprocess.Popen(self.cluster.on(host, command), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def on_front(self, command: Sequence[str]) -> list[str]:
        return self.cluster.on(FRONT, ["env", f"SLURM_CONF={self.conf}", *command])

    def ready(self) -> float:
        """Seconds until all nodes are idle. Raises RuntimeError when they are not in time."""
        begun, many = time.monotonic(), str(len(self.cluster.hosts))
        while time.monotonic() - begun < START:
            asked = self.on_front(["sinfo", "-h", "-t", "idle", "-o", "%D"])
            shown = subprocess.run(asked, capture_output=True, text=True, check=False)
            if shown.stdout.strip() == many:
                return time.monotonic() - begun
            time.sleep(0.3)
        logs = "".join(file.read_text()[-2000:] for file in [self.state / "log", *self.state.glob("*.log")])
        raise RuntimeError(f"no Slurm within {START} s:\n{logs}")


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m tests.hosts.slurm", description=__doc__)
    p.add_argument("hosts", type=int)
    p.add_argument("--cpus", type=int, default=2, help="of each host, as Slurm is told")
    p.add_argument("command", nargs=argparse.REMAINDER)
    args = p.parse_args()
    if problem := lacking():
        print(f"skipped: {problem}", file=sys.stderr)
        return 2
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    with Cluster.up(args.hosts) as cluster:
        slurm = Slurm(cluster, args.cpus)
        print(f"Slurm is there after {slurm.ready():.1f} s", file=sys.stderr, flush=True)
        status = subprocess.run(slurm.on_front(words), env=environment(), cwd=ROOT, check=False).returncode
        left = {host: [each for each in what if not each.startswith("slurm")] for host, what in cluster.left().items()}
        print(f"status {status}, left {left}", file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())
