"""What the engine's thread has sent waits here until the event loop takes it, in bounded memory, however slow a client is."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from inference.server.writer import Delta

# How many past steps a new reader gets, and the most that wait for a slow one.
HISTORY = 240


class Inbox:
    """Deltas of a call's answers, by index. Those of one index are joined, so that a client that reads slowly makes the server
    hold no more than the text of its answers."""

    def __init__(self) -> None:
        self._pieces: dict[int, Delta] = {}
        self._event = asyncio.Event()
        self._failure: Exception | None = None

    def put(self, index: int, delta: Delta) -> None:
        waiting = self._pieces.get(index)
        self._pieces[index] = delta if waiting is None else waiting.then(delta)
        self._event.set()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._event.set()

    async def take(self) -> dict[int, Delta]:
        await self._event.wait()
        self._event.clear()
        if self._failure is not None:
            raise self._failure
        taken, self._pieces = self._pieces, {}
        return taken


class Feed:
    """Outlines of steps, for readers that watch the engine."""

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
        """A reader, which gets the past steps first."""
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
    """A reader that is too slow loses the oldest steps."""

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
        """The steps since the last call, as soon as there are some; None once the feed is closed."""
        await self._event.wait()
        if self._closed:
            return None
        self._event.clear()
        taken = list(self._steps)
        self._steps.clear()
        return taken
