"""Python imports this first, of a folder on its path: the rank that the environment names comes to harm before it runs MPI.

PLANTED: rank=1,import=numpy (that import raises); rank=1,signal=9,after=0.2 (seconds from the birth of the rank's process);
rank=1,memory=200 (MiB of addresses) or rank=1,files=24 (descriptors), as `ulimit` would set them.
"""

import os
import resource
import sys
import threading
import time

_planted = dict(part.split("=") for part in os.environ.get("PLANTED", "").split(",") if part)
_rank = os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))


class _Refused:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == _planted["import"]:
            raise ImportError(f"planted at {name}")


def _killed():
    time.sleep(float(_planted["after"]))
    os.kill(os.getpid(), int(_planted["signal"]))


if _planted.get("rank") in (_rank, "every"):
    if "import" in _planted:
        sys.meta_path.insert(0, _Refused)
    elif "memory" in _planted:
        resource.setrlimit(resource.RLIMIT_AS, (int(_planted["memory"]) * 2**20,) * 2)
    elif "files" in _planted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(_planted["files"]),) * 2)
    else:
        # The rank is the child of the process that the launcher has started; its own children are spared.
        _killer = threading.Thread(target=_killed, daemon=True)
        os.register_at_fork(after_in_child=lambda: _killer.ident or _killer.start())
