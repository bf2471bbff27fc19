"""How much memory this host can still give, so that more is refused at once and not by the kernel in the middle of the work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from launch.process import launcher


def available(root: Path = Path("/")) -> int | None:
    """Bytes that are free on this host and within the limits of this process's control groups; None where nothing says."""
    left = [*_of_host(root), *_of_groups(root)]
    return min(left) if left else None


def lacking(asked: int, ranks: int, has: int | None) -> str | None:
    """What is wrong where each of this host's ranks (of `ranks` in all) asks for so many bytes of the `has` that it has, in
    words; None if nothing is, or nobody knows."""
    here = ranks_here(ranks)
    if has is None or asked * here <= has:
        return None
    each = f" on each of {here} ranks" if here > 1 else ""
    return f"{_size(asked)}{each}, and this host has {_size(has)} free"


def ranks_here(ranks: int) -> int:
    """How many of so many ranks share this host's memory."""
    return min(ranks, launcher.local_size())


def _size(n: float) -> str:
    units = iter(("MiB", "GiB", "TiB", "PiB", "EiB"))
    unit, n = next(units), n / 2**20
    while n >= 1024:
        unit, n = next(units), n / 1024
    return f"{n:,.1f} {unit}"


def _of_host(root: Path) -> Iterator[int]:
    with suppress(OSError):
        if found := re.search(r"MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text()):
            yield 1024 * int(found[1])


def _of_groups(root: Path) -> Iterator[int]:
    """What is left of each limit on the way from this process's group to the root: those of version 2, and of version 1."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
            top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                # In a container the path is the host's, and only the top is there.
                with suppress(OSError, ValueError):
                    limit, used = (int((folder / name).read_text()) for name in names)
                    yield max(0, limit - used + _reclaimable(folder))
                if folder == top:
                    break


def _reclaimable(folder: Path) -> int:
    """What the group has used for files that can be read again."""
    # Version 1 has a total of the groups below as well, further down.
    found = re.findall(r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    return int(found[-1]) if found else 0
