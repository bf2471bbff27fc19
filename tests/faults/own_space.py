"""Commands that see a /dev/shm and a /tmp of their own, as small as they are told: in a mount namespace, which root makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache

from tests.harness import ROOT

SHM, TMP = "size=64m", "size=64m"
# Is set in it.
ALONE = "RANKWISE_OWN_SPACE"
# The project itself may lie in /tmp.
MOUNTS = """
mount --bind "$1" /mnt && mount -t tmpfs -o "$3" tmpfs /tmp && mkdir -p "$1" && mount --bind /mnt "$1" && cd "$1"
if [ "$2" = none ]; then
    mount -t tmpfs tmpfs /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9
else
    mount -t tmpfs -o "$2" tmpfs /dev/shm
fi
if [ "$4" = read-only ]; then mount -o remount,ro /tmp; fi
shift 4
exec "$@"
"""


@cache
def why_not() -> str | None:
    """Why there is no such namespace here; None if there is."""
    if os.geteuid() or not shutil.which("unshare"):
        return "a mount namespace needs root and unshare"
    done = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return f"no mount namespace: {done.stderr.decode().strip()}" if done.returncode else None


def own(command: list[str], shm: str = SHM, tmp: str = TMP, read_only: bool = False) -> list[str]:
    """The command, in such a namespace. `shm`, `tmp`: options of their mounts, as in size=4m; `shm` none: there is no /dev/shm.
    `read_only`: /tmp is."""
    last = "read-only" if read_only else "read-write"
    return ["unshare", "--mount", "sh", "-ec", MOUNTS, "sh", str(ROOT), shm, tmp, last, *command]


def alone(module: str) -> int | None:
    """The status of this script, run once more in such a namespace; None if it is there already, or there is none."""
    if ALONE in os.environ or why_not():
        return None
    again = own([sys.executable, "-m", module, *sys.argv[1:]])
    return subprocess.run(again, env=os.environ | {ALONE: "1"}, check=False).returncode


def named() -> set[str]:
    """What has a name in shared memory and in the temporary folder."""
    return {f"{folder}/{name}" for folder in ("/dev/shm", "/tmp") for name in os.listdir(folder)}
