"""HTTP connections that end by themselves where a client sends half a request, or does not read its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from inference.server.refused import Refused

# Seconds that a client may take to send a request, or to read anything of its answer.
PATIENCE = 30.0
# A body's bytes.
MOST_BODY = 2**20
# The most bytes and seconds to read and throw away of a body that is too long: its sender reads the answer only afterwards.
LINGER_BYTES, LINGER_SECONDS = 2**24, 1.0


class Connection(H11Protocol):
    """Cuts itself if no request comes in time. scope["state"]["abort"] lets the application cut it, too.

    `since`: when it began to wait for the request that it has or waits for, by the loop's clock.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self.since = self.loop.time()
        self._look(object())

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()

    @property
    def watches(self) -> bool:
        """Whether its client only looks on, as scope["state"]["watches"] says: it comes again if it is cut."""
        return self.cycle is not None and not self.cycle.response_complete and "watches" in self.cycle.scope["state"]

    @property
    def idle(self) -> bool:
        """Whether nothing is being answered: no request has come, or not all of it, or its client only looks on."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body or self.watches

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self, before: RequestResponseCycle | object | None) -> None:
        """Cut the connection if nothing is under way and no request has come since the last look. `before`: the latest request
        at that look."""
        busy = self.cycle is not None and not self.cycle.response_complete
        if self.cycle is before and not busy:
            self.transport.abort()
            return
        self._next_look = self.loop.call_later(PATIENCE, self._look, self.cycle)


async def body_of(scope: Scope, receive: Receive) -> bytes:
    """A request's whole body. Raises Refused: 413 for more than MOST_BODY, 408 for one that does not come in time."""
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    body = bytearray()
    if int(declared) > MOST_BODY:
        raise _too_long()
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                body += message.get("body", b"")
                if len(body) > MOST_BODY:
                    raise _too_long()
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refused(408, f"the body did not come within {PATIENCE:g} s", headers={"connection": "close"}) from None


def _too_long() -> Refused:
    message = f"the body is longer than {MOST_BODY:,} bytes"
    return Refused(413, message, code="request_too_large", headers={"connection": "close"})


class Gone(Exception):
    """The client has closed its connection."""


async def gone(receive: Receive) -> None:
    """Wait until the client closes its connection, once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def patient(scope: Scope, send: Send) -> Send:
    """A `send` that cuts off a client which reads nothing for too long, and then raises Gone."""

    async def bounded(message: Message) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                await send(message)
        except TimeoutError:
            scope["state"]["abort"]()
            # Let the loop see that the connection is lost before the application ends without an answer.
            await asyncio.sleep(0)
            raise Gone from None

    return bounded


async def lingering(receive: Receive) -> None:
    """Read what a client still sends, for a while: closing the connection earlier may lose the answer."""
    discarded = 0
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while discarded < LINGER_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                discarded += len(message.get("body", b""))
    except TimeoutError:
        pass


@asynccontextmanager
async def watched(receive: Receive, when_gone: Callable[[], None]) -> AsyncIterator[None]:
    """Calls `when_gone` if the client closes its connection meanwhile, also while nothing is sent to it."""
    task = asyncio.create_task(gone(receive))
    task.add_done_callback(lambda t: t.cancelled() or when_gone())
    try:
        yield
    finally:
        task.cancel()
