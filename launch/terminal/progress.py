"""What long work says of itself on standard error: a bar in a terminal; else, as under mpirun, a plain line now and then.

Only one rank speaks (`here`), and not of work that is soon done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

# Seconds before the first line, and between lines.
EVERY = 3.0
# Seconds of loading that are worth a word.
LOADED = 0.3


class Lines:
    """Plain lines on the way to `total` items (None: nobody knows how many), of which `done` were there at the beginning."""

    def __init__(self, label: str, total: int | None, done: int = 0, clock: Callable[[], float] = perf_counter) -> None:
        self.label, self.total, self.done, self.clock = label, total, done, clock
        self.before, self.begun = done, clock()
        self.said = self.begun

    def advance(self, *facts: Callable[[float], str]) -> str | None:
        """One item more; the line, if it is time for one. `facts`: what else it says, each of the items a second."""
        self.done += 1
        now = self.clock()
        if now - self.said < EVERY or self.done == self.total:
            return None
        self.said = now
        rate = (self.done - self.before) / (now - self.begun)
        line = [f"{self.label} {self.done}" + ("" if self.total is None else f"/{self.total}")]
        line += [fact(rate) for fact in facts]
        if self.total is not None:
            left = round((self.total - self.done) / rate)
            line.append(f"{left // 60}:{left % 60:02d} left")
        return "  ".join(line)


def _say(line: str | None) -> None:
    if line is not None:
        print(line, file=sys.stderr, flush=True)


def items(label: str, here: bool, total: int | None = None) -> Callable[[Iterable], Iterable]:
    """What goes through items and says how far it is. `total`: how many, where they have no length."""
    if not here:
        return lambda them: them
    if sys.stderr.isatty():
        return lambda them: track(them, label, total, console=Console(stderr=True), transient=True)

    def told(them: Iterable) -> Iterator:
        lines = Lines(label, len(them) if total is None and isinstance(them, Sized) else total)
        for item in them:
            yield item
            _say(lines.advance())

    return told


@contextmanager
def steps(label: str, total: int, done: int, tokens: int, here: bool) -> Iterator[Callable[[float], None]]:
    """Progress of a training run: loss, tokens a second, time to go.

    Yields what is to be called with the loss after each step. `done`: steps before the first; `tokens`: of a step.
    """
    if not here:
        yield lambda loss: None
        return
    if not sys.stderr.isatty():
        lines = Lines("step", total, done)
        yield lambda loss: _say(lines.advance(lambda _: f"loss {loss:.3f}", lambda rate: f"{rate * tokens:,.0f} tokens/s"))
        return
    numbers = map(TextColumn, ("loss {task.fields[loss]:.3f}", "{task.fields[rate]:,.0f} tokens/s"))
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), *numbers, TimeRemainingColumn())
    begun = perf_counter()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done, loss=float("nan"), rate=0.0)

        def advance(loss: float) -> None:
            steps = bar.tasks[0].completed - done + 1
            bar.update(task, advance=1, loss=loss, rate=steps * tokens / (perf_counter() - begun))

        yield advance


def loaded(name: str, parameters: int, seconds: float, here: bool) -> None:
    """Say at once that a model is there, if that took a moment."""
    if here and seconds >= LOADED:
        many = f"{parameters / 1e6:,.0f} M" if parameters >= 1e6 else f"{parameters:,}"
        _say(f"loaded {name}, {many} parameters, {seconds:.1f} s")
