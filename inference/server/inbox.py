"""What the engine's thread has told, until somebody on the event loop takes it: bounded, however slowly that is."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from inference.server.writer import Piece

# Steps that one who begins to watch is told of, and the most that he is told late.
HISTORY = 240


class Inbox:
    """Pieces of a call's answers, by index, until somebody takes them: those of one index as one, so that a client that reads
    slowly holds no more than the text of its answers."""

    def __init__(self) -> None:
        self._pieces: dict[int, Piece] = {}
        self._event = asyncio.Event()
        self._failure: Exception | None = None

    def put(self, index: int, piece: Piece) -> None:
        waiting = self._pieces.get(index)
        self._pieces[index] = piece if waiting is None else waiting.then(piece)
        self._event.set()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._event.set()

    async def take(self) -> dict[int, Piece]:
        await self._event.wait()
        self._event.clear()
        if self._failure is not None:
            raise self._failure
        taken, self._pieces = self._pieces, {}
        return taken


class Feed:
    """Outlines of steps for those who watch."""

    def __init__(self) -> None:
        self.history: deque[dict] = deque(maxlen=HISTORY)
        self._readers: set[Reader] = set()
        self._closed = False

    def put(self, outline: dict) -> None:
        self.history.append(outline)
        for reader in self._readers:
            reader.put(outline)

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """One who begins with what has been."""
        reader = Reader(self.history)
        self._readers.add(reader)
        if self._closed:
            reader.close()
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    def close(self) -> None:
        self._closed = True
        for reader in self._readers:
            reader.close()


class Reader:
    """Who reads too slowly loses the oldest steps."""

    def __init__(self, steps: Iterable[dict]) -> None:
        self._steps, self._event, self._closed = deque(steps, maxlen=HISTORY), asyncio.Event(), False
        self._event.set()

    def put(self, outline: dict) -> None:
        self._steps.append(outline)
        self._event.set()

    def close(self) -> None:
        self._closed = True
        self._event.set()

    async def take(self) -> list[dict] | None:
        """Steps that have not been read, as soon as there are some; None at the end."""
        await self._event.wait()
        if self._closed:
            return None
        self._event.clear()
        taken = list(self._steps)
        self._steps.clear()
        return taken
