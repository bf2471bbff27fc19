"""What can be printed anywhere: text of others cannot steer the terminal, no character is too much for an encoding."""

from __future__ import annotations

import re
import sys
from io import TextIOWrapper

# Controls but for the tab and the end of a line, and what turns the direction of writing.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""The text with control characters escaped: \x1b for one that would begin a command to the terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_any_encoding() -> None:
    """From now on what standard output cannot encode, as a box in ASCII, is escaped; Python does so on standard error alone."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
