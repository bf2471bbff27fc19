"""What a learner's file may import and do: NumPy and the standard library, without ways out of its process."""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Sequence

from practice import memory

OURS = ("parallel", "layers", "reference", "models", "inference", "practice", "launch", "tests")
# Standard modules that lead out of the process or read other people's files.
CLOSED = (
    "ctypes",
    "subprocess",
    "multiprocessing",
    "socket",
    "importlib",
    "runpy",
    "imp",
    "signal",
    "resource",
    "pty",
    "_ctypes",
    "_socket",
)
# Acts that Python reports (as audit events) before they happen.
FORBIDDEN = ("os.fork", "os.forkpty", "os.exec", "os.system", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.kill")
FORBIDDEN += ("ctypes.dlopen", "socket.connect", "socket.bind", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")


# The acts that were tried, also in a thread or where the learner's code caught the error.
attempted: list[str] = []


class Refused(ImportError):
    """An import, or an act, that an exercise does not allow."""


def refusal(module: str) -> str:
    """Why this import is refused; '' if it is not."""
    top = module.split(".")[0]
    if top in OURS:
        return f"import {module}: that is rankwise's own code; here you write it yourself"
    if top == "mpi4py":
        return "import mpi4py: the axis that your function is handed has the verbs of this exercise"
    if top in CLOSED:
        return f"import {module}: not here; only NumPy and the standard library, in one process"
    if top == "numpy" or top in sys.stdlib_module_names:
        return ""
    return f"import {module}: only NumPy and the standard library here"


def first_refused(source: str) -> tuple[int, str] | None:
    """(line, why) of the first import that is refused. Raises SyntaxError."""
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or "." * node.level] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if refusal(name):
                return node.lineno, refusal(name)
    return None


class Gate:
    """A finder before all others: it refuses imports of the learner's code at run time, by name."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        # From here on, no module of this project may be imported in any way.
        if refusal(name) and (name.split(".")[0] in OURS or self._asked_by_learner()):
            raise Refused(refusal(name))

    def __init__(self, file: str) -> None:
        self._file = file

    def _asked_by_learner(self) -> bool:
        """Whether the learner's file itself imports, not a library that it has imported."""
        frame = sys._getframe(2)
        while frame and (frame.f_code.co_filename == memory.__file__ or "importlib" in frame.f_code.co_filename):
            frame = frame.f_back
        return frame is not None and frame.f_code.co_filename == self._file


def close(file: str, names: Sequence[str]) -> None:
    """Refuse, from now on, forbidden imports by `file` and the FORBIDDEN acts. `names`: modules that are hidden from now on."""
    sys.meta_path.insert(0, Gate(file))
    for name in names:
        sys.modules.pop(name, None)

    def audit(event: str, args: tuple) -> None:
        if event in FORBIDDEN and _stands_on_stack(file):
            attempted.append(f"{event}: an exercise is one process a rank and starts, ends and removes nothing")
            raise PermissionError(attempted[-1])

    sys.addaudithook(audit)
    # These errors are explained in a sentence, without a traceback.
    threading.excepthook = lambda args: None if str(args.exc_value) in attempted else threading.__excepthook__(args)


def _stands_on_stack(file: str) -> bool:
    if threading.current_thread() is not threading.main_thread():
        # All threads belong to the learner's code, whatever function they run.
        return True
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename != file:
        frame = frame.f_back
    return frame is not None
