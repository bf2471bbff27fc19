"""What can be printed anywhere: text of others cannot steer the terminal, no character is too much for an encoding."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper

# Controls but for the tab and the end of a line, and what turns the direction of writing.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""The text with control characters escaped: \x1b for one that would begin a command to the terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Output(TextIOWrapper):
    """Remembers that it could not write: what it could not is not tried again."""

    failed: OSError | None = None

    def write(self, text: str) -> int:
        return self._tried(super().write, text)

    def flush(self) -> None:
        self._tried(super().flush)

    def _tried(self, what: Callable, *given: str) -> int | None:
        try:
            return what(*given)
        except OSError as error:
            self.failed = error
            raise


def prepared() -> str | None:
    """From now on what standard output cannot encode, as a box in ASCII, is escaped; Python does so on standard error alone.
    Returns what is wrong with it, in words, where it is closed; what is printed goes nowhere then."""
    if sys.stderr is None:
        # Else what is meant for it would be printed among the results.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return "standard output is closed, and the results would be lost: leave >&- out, or write them to a file"
    if type(old := sys.stdout) is TextIOWrapper:
        kept = {"encoding": old.encoding, "line_buffering": old.line_buffering, "write_through": old.write_through}
        sys.stdout = _Output(old.detach(), errors="backslashreplace", **kept)
    return None


def lost() -> str | None:
    """Why standard output has not taken what was printed, in words; "" where its reader has gone, as in `| head`; None where it
    has taken all. Once it has not, what is printed goes nowhere, and this says None."""
    with suppress(OSError):
        sys.stdout.flush()
    if (error := getattr(sys.stdout, "failed", None)) is None:
        return None
    sys.stdout.failed = None
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return ""
    return f"standard output: {error.strerror}, and the results are lost: write them where there is room"
