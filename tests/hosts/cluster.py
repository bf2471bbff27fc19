"""Hosts on one machine, in Linux's namespaces: each has a network, host name, processes, /dev/shm and /tmp of its own.

```
            front (where mpirun runs, and no rank)
              | bridge, 10.77.0.254
    +---------+---------+
    h1        h2        h3        10.77.0.1, .2, .3, each link of the rate that was asked for
```

All of it hangs on processes, and so vanishes with them: networks, mounts, links. Only files in STATE remain, which say who
these are, until the next cluster is made. Clusters don't see one another: each has the same names and addresses.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from parallel import remains

ROOT = Path(__file__).resolve().parents[2]
STATE = Path("/run/rankwise-hosts")
# Names the cluster to those who enter its hosts, and marks the processes that hold it.
NAME = "RANKWISE_HOSTS"
FRONT = "front"
ENTER = ROOT / "tests" / "hosts" / "enter"
# A host's first process: it holds the namespaces, and reaps what its parents have left.
HOLD = """
hostname "$1"
mount --bind "$2" /mnt && mount -t tmpfs tmpfs /tmp && mkdir -p "$2" && mount --bind /mnt "$2" && umount /mnt
mount -t tmpfs -o size="$4" tmpfs /dev/shm
mount --bind "$3/hosts" /etc/hosts
ip link set lo up
: >"$3/$1.up"
trap 'exit 0' TERM
while :; do sleep 3600 & wait $!; done
"""


@cache
def why_not() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if os.geteuid():
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc", "unshare", "nsenter") if not shutil.which(tool)]:
        return f"there is no {' and no '.join(missing)} here (Debian: iproute2, util-linux)"
    shape = "tc qdisc add dev one root tbf rate 1gbit burst 128k latency 50ms"
    probe = f"ip link add one type veth peer name two && ip link add three type bridge && {shape}"
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "sh", "-ec", probe], capture_output=True, check=False
    )
    return f"no network namespaces with links: {done.stderr.decode().strip()}" if done.returncode else None


class Cluster:
    """The cluster of this name, made or not. `with Cluster.up(...)` takes it down at the end, however that comes."""

    def __init__(self, name: str) -> None:
        self.name, self.state = name, STATE / name
        self._kept: list[subprocess.Popen] = []

    @classmethod
    def up(
        cls, count: int, gbit: float | None = None, name: str | None = None, tied: bool = True, shm: str = "256m"
    ) -> Cluster:
        """So many hosts. `gbit`: the rate of each host's link, each way. `tied`: they die with this process. `shm`: the size of
        each host's /dev/shm. Raises RuntimeError where that is not possible."""
        if problem := why_not():
            raise RuntimeError(problem)
        swept()
        self = cls(name or f"{os.getpid()}-{time.monotonic_ns() // 1000}")
        try:
            (self.state / "shared").mkdir(parents=True)
        except FileExistsError:
            raise RuntimeError(f"there is a cluster {self.name}: take it down first") from None
        try:
            self._make(count, gbit, tied, shm)
        except BaseException:
            self.down()
            raise
        return self

    def _make(self, count: int, gbit: float | None, tied: bool, shm: str) -> None:
        hosts = [f"h{n}" for n in range(1, count + 1)]
        addresses = [f"10.77.0.254 {FRONT} {os.uname().nodename}", *(f"10.77.0.{n} h{n}" for n in range(1, count + 1))]
        (self.state / "hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses, ""]))
        if not tied:
            (self.state / "root").write_text(str(ROOT))
        self._holder(FRONT, tied, shm)
        for host in hosts:
            self._holder(host, tied, shm, "--ipc", "--pid", "--kill-child", "--mount-proc")
        self._until(lambda: all((self.state / f"{host}.up").exists() for host in (FRONT, *hosts)), "hosts do not start")
        for host in hosts:
            self._note(host, self._inner(host))
        lines = ["link add bridge type bridge", "addr add 10.77.0.254/24 dev bridge", "link set bridge up"]
        for host in hosts:
            lines += [f"link add {host} type veth peer name eth0 netns {self.process(host)}",
                      f"link set {host} master bridge", f"link set {host} up"]  # fmt: skip
        self._tool(FRONT, "ip -batch -", "\n".join(lines))
        for n, host in enumerate(hosts, 1):
            self._tool(host, "ip -batch -", f"addr add 10.77.0.{n}/24 dev eth0\nlink set eth0 up")
            if gbit:
                shape = f"root tbf rate {gbit * 1000:g}mbit burst 128k latency 50ms"
                self._tool(FRONT, f"tc qdisc add dev {host} {shape}")
                self._tool(host, f"tc qdisc add dev eth0 {shape}")

    def _holder(self, host: str, tied: bool, shm: str, *more: str) -> None:
        """A process in namespaces of its own; of a host with its own processes, its parent is noted first."""
        parent, words = os.getpid(), [host, str(ROOT), str(self.state), shm]
        with open(self.state / "log", "a") as log:
            process = subprocess.Popen(
                ["unshare", "--net", "--uts", "--mount", *more, "sh", "-ec", HOLD, "sh", *words],
                env={"PATH": os.environ["PATH"], NAME: self.name}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=(lambda: remains.die_with_parent(parent)) if tied else None,
            )  # fmt: skip
        self._note(host, process.pid)
        self._note(f"{host}.outer", process.pid)

    def _inner(self, host: str) -> int:
        outer = self.process(host)
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def _note(self, name: str, pid: int) -> None:
        (self.state / name).write_text(f"{pid}\n")

    def _tool(self, host: str, command: str, text: str | None = None) -> str:
        inside = ["nsenter", "--target", str(self.process(host)), "--net", *command.split()]
        done = subprocess.run(inside, input=text, text=True, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{host}: {command}: {done.stderr.strip()}")
        return done.stdout

    def _until(self, done: object, problem: str, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{problem} within {seconds:g} s: {(self.state / 'log').read_text().strip()}")
            time.sleep(0.01)

    def process(self, host: str) -> int:
        """The first process of a host."""
        return int((self.state / host).read_text())

    @property
    def hosts(self) -> list[str]:
        return [line.split()[1] for line in (self.state / "hosts").read_text().splitlines()[2:]]

    @property
    def shared(self) -> Path:
        """A folder that all hosts see."""
        return self.state / "shared"

    # --- what is done there

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """The command as it is run there, front included, in this folder."""
        own = [] if host == FRONT else ["--ipc", "--pid"]
        inside = ["--target", str(self.process(host)), "--mount", "--uts", "--net", *own, f"--wd={os.getcwd()}"]
        return ["env", f"{NAME}={self.name}", "nsenter", *inside, "--", *command]

    def dealt(self, command: Sequence[str], counts: Sequence[int] | None = None, by_turns: bool = False) -> list[str]:
        """`mpirun -n N ...` with what puts its ranks on the hosts: `counts` on each, else evenly; `by_turns`: rank 0 on h1,
        rank 1 on h2, and so on. Others stay as they are."""
        command = list(command)
        if Path(command[0]).name not in ("mpirun", "mpiexec"):
            return self.on(FRONT, command)
        ranks, many = int(command[command.index("-n") + 1]), len(self.hosts)
        counts = counts or [ranks // many + (n < ranks % many) for n in range(many)]
        places = ",".join(f"{host}:{count}" for host, count in zip(self.hosts, counts, strict=True) if count)
        # A host that is named twice would be two.
        turns = ["-ppn", "1"] if by_turns else []
        places = ",".join(self.hosts) if by_turns else places
        launcher = ["-launcher", "ssh", "-launcher-exec", str(ENTER), "-iface", "bridge", "-hosts", places, *turns]
        return self.on(FRONT, [command[0], *launcher, *command[1:]])

    def link(self, host: str, up: bool) -> None:
        """Set a host's link up or down; its own end does not see it."""
        if up:
            (self.state / f"{host}.down").unlink(missing_ok=True)
        else:
            (self.state / f"{host}.down").touch()
        self._tool(FRONT, f"ip link set {host} {'up' if up else 'down'}")

    def kill(self, host: str) -> None:
        """A host dies whole: its link and all its processes at once."""
        self.link(host, False)
        os.kill(self.process(host), signal.SIGKILL)

    def carried(self, host: str) -> tuple[int, int]:
        """Bytes that the host has sent and received over its link, headers included."""
        shown = self._tool(FRONT, f"ip -json -statistics link show {host}")
        counts = json.loads(shown)[0]["stats64"]
        # Seen from the bridge's end.
        return counts["rx"]["bytes"], counts["tx"]["bytes"]

    def left(self, patience: float = 0.0) -> dict[str, list[str]]:
        """What there is on each host but its own: files in /dev/shm and /tmp, and processes; what is still there after so many
        seconds."""
        deadline = time.monotonic() + patience
        while any((found := self._left()).values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _left(self) -> dict[str, list[str]]:
        found = {}
        own = ROOT.relative_to("/tmp").parts[0] if ROOT.is_relative_to("/tmp") else ""
        for host in (FRONT, *self.hosts):
            root = Path(f"/proc/{self.process(host)}/root")
            # A host that is dead has none.
            if not (root / "dev/shm").exists():
                found[host] = []
                continue
            files = [f"/{folder}/{name}" for folder in ("dev/shm", "tmp") for name in os.listdir(root / folder) if name != own]
            found[host] = files + ([] if host == FRONT else self.processes(host))
        return found

    def processes(self, host: str) -> list[str]:
        """Those of its process namespace, but the first and its sleep. A host that is dead has none."""
        first, found = self.process(host), []
        try:
            space = os.readlink(f"/proc/{first}/ns/pid")
        except OSError:
            return []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/pid") == space and int(pid) != first:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                    if words[:2] != ["sleep", "3600"] and words != [""]:
                        found.append(" ".join(words))
        return found

    def keep(self, process: subprocess.Popen) -> None:
        """A process of the front's, or what has started one on a host: it is ended with the cluster."""
        self._kept.append(process)

    # --- its end

    def down(self) -> None:
        """All its processes, and with them all the rest, are gone when this returns."""
        for process in self._kept:
            process.kill()
            process.wait()
        pids = [int(file.read_text()) for file in self.state.iterdir() if file.is_file() and _is_note(file.read_text())]
        ours = [pid for pid in pids if _holds(pid, self.name)]
        for pid in ours:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for pid in ours:
            with suppress(OSError):
                os.waitpid(pid, 0)
        self._until(lambda: not any(_holds(pid, self.name) for pid in ours), "processes do not end")
        shutil.rmtree(self.state, ignore_errors=True)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()


def _is_note(text: str) -> bool:
    return text.strip().isdecimal()


def _holds(pid: int, name: str) -> bool:
    """Whether this process holds the cluster of this name; a number may be another's by now."""
    with suppress(OSError):
        return f"{NAME}={name}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def all_clusters() -> list[Cluster]:
    return [Cluster(folder.name) for folder in sorted(STATE.iterdir())] if STATE.is_dir() else []


def swept() -> None:
    """The state of clusters whose processes are gone is removed."""
    for cluster in all_clusters():
        with suppress(OSError, ValueError, RuntimeError):
            if time.time() - cluster.state.stat().st_mtime > 30 and not _holds(cluster.process(f"{FRONT}.outer"), cluster.name):
                cluster.down()


def of_this_folder() -> Mapping[str, Cluster]:
    """The clusters that were made to stay, from this copy of the project, by name."""
    made = {}
    for cluster in all_clusters():
        with suppress(OSError):
            if (cluster.state / "root").read_text() == str(ROOT) and _holds(cluster.process(f"{FRONT}.outer"), cluster.name):
                made[cluster.name] = cluster
    return made


def environment() -> dict[str, str]:
    """That of a command that a user types, for a run on a cluster. The ranks of all hosts share the cores of one machine, which
    none of them knows: those that wait let the others go on."""
    from tests.harness import launcher_free

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"} | launcher_free() | {"PATH": path}
