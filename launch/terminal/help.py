"""How options are read, for every command: `--help` as one page, printed by one rank, with the defaults there are."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches

from launch.process import launcher

STATUSES = ("fine", "a comparison, or a rank, failed", "options or input that cannot be used: a line says what would be right")


def epilog(examples: Sequence[str], statuses: Sequence[str] = STATUSES) -> str:
    """How a page of help ends. `statuses`: what 0, 1, 2 and so on mean."""
    parts = {"examples": examples, "exit status": [f"{n}  {meaning}" for n, meaning in enumerate(statuses)]}
    return "\n\n".join("\n".join([f"{title}:", *(f"  {line}" for line in lines)]) for title, lines in parts.items() if lines)


class Formatter(argparse.HelpFormatter):
    """Defaults, of options that have one; a value by the name that its type has, `metavar`. Paragraphs of prose are folded,
    those with indented lines kept."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        none = action.nargs == 0 or action.default in (None, argparse.SUPPRESS, "", []) or "(default" in text
        return text if none else f"{text} (default: %(default)s)"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(p if "\n " in p else textwrap.fill(" ".join(p.split()), width) for p in paragraphs)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "metavar", None) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """Prints its help once, however many ranks were started."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**{"formatter_class": Formatter, **settings})

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = get_close_matches(name, self._option_string_actions, 1)
            self.error(f"{name!r} is no option here: " + (f"do you mean {near[0]}?" if near else "--help lists them"))
        return parsed

    def print_help(self, file: object = None) -> None:
        if launcher.rank() == 0:
            super().print_help(file)
