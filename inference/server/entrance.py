"""Connections are taken while there are descriptors for them. Who does nothing with a connection makes room for the next."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Callable, Collection

from inference.server.connection import Connection

# Descriptors that are left to everything else in this process.
RESERVE = 32


def room() -> int:
    """For how many connections this process has descriptors, beside those that are open and RESERVE."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**16 if soft == resource.RLIM_INFINITY else soft
    return max(0, most - len(os.listdir("/dev/fd")) - RESERVE)


class Entrance:
    """Takes the clients that are queued at `listening`, at most `most` at a time; the rest stay in the queue meanwhile.

    `make`: a connection's protocol; `connections`: those that are there; `tell`: gets a line a second at most.
    """

    def __init__(
        self,
        listening: socket.socket,
        make: Callable[[], Connection],
        connections: Collection[Connection],
        most: int,
        tell: Callable[[str], None],
    ) -> None:
        self.listening, self.make, self.connections, self.most, self.tell = listening, make, connections, most, tell
        self._told = float("-inf")

    async def take(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        self.listening.setblocking(False)
        while True:
            await self._knock()
            while len(self.connections) >= self.most:
                self._tell(f"{self.most} connections are all that this process may have: closing those that do nothing")
                await self._less()
            client = None
            try:
                client, _ = self.listening.accept()
                await loop.connect_accepted_socket(self.make, client)
            except (BlockingIOError, ConnectionAbortedError):
                # It has gone already.
                continue
            except OSError as error:
                # Out of descriptors all the same.
                if client is not None:
                    client.close()
                self._tell(f"cannot take a connection: {error.strerror}")
                await self._less()

    async def _knock(self) -> None:
        """Wait until a client is queued."""
        loop = asyncio.get_running_loop()
        queued = asyncio.Event()
        loop.add_reader(self.listening, queued.set)
        try:
            await queued.wait()
        finally:
            loop.remove_reader(self.listening)

    async def _less(self) -> None:
        """Cut the connection that has done nothing for longest, if there is one, and let the loop close it."""
        idle = [c for c in self.connections if c.idle and not c.transport.is_closing()]
        if idle:
            min(idle, key=lambda c: (c.watches, c.since)).transport.abort()
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(0.02)

    def _tell(self, line: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._told >= 1:
            self._told = now
            self.tell(line)
