"""The learner's folder: the files at work, passed ones, backups, and one readable file of all that happened.

    workbook/20_linear.py                   at work
    workbook/done/20_linear.2026-11-23.py   as it passed
    workbook/backup/20_linear.20261123-180211.py
    workbook/progress.json                  {"version": 1, "log": [one event a line]}

The log is only ever added to. Status, attempts, times and due dates are derived from it (practice/progress.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from parallel.atomic import write_atomically
from parallel.json_text import parsed

VERSION = 1
Event = dict[str, Any]


class WorkbookError(ValueError):
    """A workbook that this program cannot use; the text says what would be right. Nothing was changed."""


def local_now() -> datetime:
    """Now, in local time with its offset, to the second."""
    return datetime.now().astimezone().replace(microsecond=0)


class Workbook:
    """`folder`: made when something is first written. `say`: called with what the user has to know of the file's state."""

    def __init__(self, folder: Path, now: Callable[[], datetime] = local_now, say: Callable[[str], None] = print) -> None:
        self.folder, self.now, self._say = folder, now, say
        self.progress = folder / "progress.json"
        self.log = self._read()

    # --- the log

    def _read(self) -> list[Event]:
        try:
            text = self.progress.read_text()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            return self._set_aside(str(error))
        try:
            kept = parsed(text)
            version, log = kept["version"], kept.get("log")
            if isinstance(version, int) and version > VERSION:
                raise WorkbookError(
                    f"{self.progress} was written by a newer rankwise (version {version}, this one knows {VERSION}):"
                    " update rankwise, or give RANKWISE_WORKBOOK another folder"
                )
            for event in log:
                datetime.fromisoformat(event["at"]), event["what"]
            # It will be written again: half a surrogate pair, which JSON may spell, is no UTF-8.
            json.dumps(log, ensure_ascii=False).encode()
        except WorkbookError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            return self._set_aside(f"{type(error).__name__}: {error}")
        return log

    def _set_aside(self, why: str) -> list[Event]:
        """Keep a file that cannot be read under another name, and begin a new one."""
        kept = self.progress.with_name(f"progress.unreadable-{self.now():%Y%m%d-%H%M%S}.json")
        os.replace(self.progress, kept)
        self._say(f"{self.progress} could not be read ({why}). It is kept as {kept.name}; a new one begins.")
        return []

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer at a time: a watch and a check may run side by side."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def add(self, what: str, **facts: Any) -> Event:
        """Append an event; it is on disk when this returns. An interruption leaves the old file or the new one."""
        event = {"at": self.now().isoformat(), "what": what, **facts}
        with self._alone():
            self.log = [*self._read(), event]
            lines = ",\n ".join(json.dumps(e, ensure_ascii=False) for e in self.log)
            replace(self.progress, f'{{"version": {VERSION}, "log": [\n {lines}\n]}}\n')
        return event

    # --- the learner's files

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.py"

    def write(self, name: str, text: str) -> Path:
        """Write a learner's file. What stands there is kept in backup/ unless it is empty or the same."""
        path = self.file(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_bytes().strip() and path.read_bytes() != text.encode():
            backup = self.folder / "backup"
            backup.mkdir(exist_ok=True)
            shutil.copy2(path, fresh(backup, f"{name}.{self.now():%Y%m%d-%H%M%S}"))
        replace(path, text)
        return path

    def keep(self, name: str) -> Path:
        """Keep the file as it passed."""
        done = self.folder / "done"
        done.mkdir(parents=True, exist_ok=True)
        kept = fresh(done, f"{name}.{self.now():%Y-%m-%d}")
        shutil.copy2(self.file(name), kept)
        return kept

    def kept(self, name: str) -> list[Path]:
        """All files of this exercise that have passed, oldest first."""
        return sorted((self.folder / "done").glob(f"{name}.*.py"), key=lambda p: (p.stat().st_mtime, p.name))


def fresh(folder: Path, stem: str) -> Path:
    """A path in the folder that is not taken: stem.py, stem-2.py, ..."""
    number, path = 1, folder / f"{stem}.py"
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.py"
    return path


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all, and on the disk."""
    with write_atomically(path, flushed=True) as file:
        file.write(text)
