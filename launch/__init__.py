"""What a person types: one module a command, and what every command needs."""

from launch.process import keeper, launcher

# First of all: from here on no death of this rank goes unsaid.
if launcher.size() is not None:
    keeper.keep()

    from launch.process import limits, signals

    if _problem := limits.too_small():
        keeper.refuse(_problem)
    signals.listen()

import sys
from importlib.util import find_spec
from pathlib import Path


def _require_environment() -> None:
    """Leave with one line that says what to type, instead of a traceback, where the project's packages are not there."""
    missing = [name for name in ("numpy", "mpi4py", "threadpoolctl", "rich") if find_spec(name) is None]
    if sys.version_info >= (3, 11) and not missing:
        return
    why = f"{missing[0]} is not installed for it" if missing else "Python 3.11 or newer is needed"
    environment = Path(__file__).resolve().parent.parent / ".venv"
    how = f"run `source {environment / 'bin/activate'}`" + ("" if environment.is_dir() else " after `make setup`")
    keeper.refuse(f"{sys.executable} cannot run rankwise: {why}: {how}")


_require_environment()
