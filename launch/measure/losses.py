"""loss.csv, a line a step, written while a training run goes on."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from math import log
from pathlib import Path

from parallel.atomic import write_atomically

COLUMNS = ("step", "tokens", "loss_nats", "bits_per_byte")


class LossTable:
    """The losses of all steps as `path`, for steps of so many `tokens`; `losses`: of the steps before this start of the run;
    `per_byte`: how many tokens a byte of text is.

    What stood there gives way at the first step. Where it cannot be written, `problem` says why, and the run goes on.
    """

    def __init__(self, path: Path, tokens: int, losses: Sequence[float], per_byte: float = 1.0) -> None:
        self.path, self.tokens, self.losses, self.per_byte = path, tokens, list(losses), per_byte
        self.problem: str | None = None
        self.begun = False

    def add(self, *loss: float) -> None:
        """Append the next step's loss in one write, so that a reader never sees half a line. Without one, as after a run that
        had no step left to take: see that the table is there."""
        first = len(self.losses) + 1
        self.losses += loss
        try:
            if not self.begun:
                self.path.parent.mkdir(exist_ok=True)
                with write_atomically(self.path) as file:
                    file.write(",".join(COLUMNS) + "\r\n" + self._lines(1))
                self.begun = True
            elif loss:
                with open(self.path, "a", newline="") as file:
                    file.write(self._lines(first))
            self.problem = None
        except OSError as error:
            # There may be half a line: the next step writes all of it anew.
            self.begun = False
            self.problem = f"cannot write {self.path}: {error.strerror or error}"

    def _lines(self, first: int) -> str:
        text, steps = io.StringIO(), enumerate(self.losses[first - 1 :], first)
        csv.writer(text).writerows((n, n * self.tokens, repr(loss), repr(self.per_byte * loss / log(2))) for n, loss in steps)
        return text.getvalue()
