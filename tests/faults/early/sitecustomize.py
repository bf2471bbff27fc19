"""Python imports this first, of a folder on its path: the rank that the environment names comes to harm before it runs MPI.

PLANTED: rank=1,import=numpy (that import raises); rank=1,signal=9,after=0.2 (seconds from the birth of the rank's process);
rank=1,memory=200 (MiB of addresses) or rank=1,files=24 (descriptors), as `ulimit` would set them; rank=1,exit=3 or
rank=1,kill=9 (at once).
late=numpy beside these: on all other ranks that import never ends.
"""

import os
import resource
import sys
import time

_planted = dict(part.split("=") for part in os.environ.get("PLANTED", "").split(",") if part)
_rank = os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))


class _Refused:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == _planted["import"]:
            raise ImportError(f"planted at {name}")


class _Endless:
    @staticmethod
    def find_spec(name, path=None, target=None):
        while name == _planted["late"]:
            time.sleep(1)


def _to_be_killed():
    """Another process sends the signal: no thread of this one runs while MPI starts. Its own children are spared."""
    if not _killers:
        words = f"exec 0<&- 1>&- 2>&-; sleep {_planted['after']}; kill -{_planted['signal']} {os.getpid()}"
        _killers.append(os.posix_spawn("/bin/sh", ["sh", "-c", words], {}))


if _planted.get("rank") in (_rank, "every"):
    if "import" in _planted:
        sys.meta_path.insert(0, _Refused)
    elif "memory" in _planted:
        resource.setrlimit(resource.RLIMIT_AS, (int(_planted["memory"]) * 2**20,) * 2)
    elif "files" in _planted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(_planted["files"]),) * 2)
    elif "exit" in _planted:
        os._exit(int(_planted["exit"]))
    elif "kill" in _planted:
        os.kill(os.getpid(), int(_planted["kill"]))
    else:
        # The rank is the child of the process that the launcher has started.
        _killers = []
        os.register_at_fork(after_in_child=_to_be_killed, after_in_parent=lambda: _killers.append(0))
elif "late" in _planted:
    sys.meta_path.insert(0, _Endless)
