"""`launch.practice watch`: a check at each save. Keys where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from practice.desk.desk import Desk, Refused
from practice.desk.show import home
from practice.exercise import Exercise

KEYS = " h nudge · l list · n next · q quit · Enter check again"
LOOK = 0.2


@contextmanager
def single_keys() -> Iterator[bool]:
    """Set the terminal to give single keys without Enter meanwhile. Yields whether there is one that can."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield False
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield True
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def watch(desk: Desk, e: Exercise) -> int:
    """Check at each save until q or an interrupt. Returns the exit status: 0 if the last check passed."""
    passed, seen, file = False, 0, desk.book.file(e.name)
    if not file.exists():
        raise Refused(f"there is no {desk.path(e)}: start {e.name[:2]}")
    with single_keys() as keys:
        while True:
            file = desk.book.file(e.name)
            # Editors that save by renaming leave a moment without the file.
            stamp = file.stat().st_mtime_ns if file.exists() else seen
            if stamp != seen:
                seen = stamp
                passed, _ = desk.check(e.name, verbose=False)
                desk.say(KEYS if keys else "", f"watching {desk.path(e)}")
                sys.stdout.flush()
            key = _key() if keys else time.sleep(LOOK)
            if key == "q":
                return 0 if passed else 1
            if key in ("\n", "\r"):
                seen = 0
            elif key:
                e = _act(desk, e, key)


def _key() -> str:
    ready, _, _ = select.select([sys.stdin], [], [], LOOK)
    return sys.stdin.read(1) if ready else ""


def _act(desk: Desk, e: Exercise, key: str) -> Exercise:
    try:
        if key == "h":
            desk.hint(e.name)
        elif key == "l":
            home(desk)
        elif key == "n":
            desk.start(None, reset=False)
            return desk.choose(None)
    except Refused as error:
        desk.say(f" {error}")
    return e
