"""How the pictures of a page of docs are drawn again: `python -m launch.pictures.experts`, and its like."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from launch.terminal.help import Parser


def options(name: str, page: str) -> Parser:
    """Of the module launch.pictures.`name`, which draws those of docs/`page`."""
    p = Parser(prog=f"python -m launch.pictures.{name}", description=f"Draw the pictures of docs/{page} again.")
    p.add_argument("folder", nargs="?", type=Path, default=Path("docs"), help="where")
    return p


def each(folder: Path, names: Iterable[str], draw: Callable[[Path, str], None]) -> list[Path]:
    """Draw the pictures of these names, each into a file of its own."""
    paths = {name: folder / f"{name}.png" for name in names}
    for name, path in paths.items():
        draw(path, name)
    return [*paths.values()]


def main(p: Parser, pictures: Callable[[Path], Iterable[Path]]) -> None:
    """Draw them into the folder that is asked for, and print each file's name."""
    folder = p.parse_args().folder
    try:
        print(*pictures(folder), sep="\n")
    except OSError as error:
        p.error(f"cannot draw into {folder}: {error}")
