"""HTTP connections that cannot be held without end: by one that sends half a request, or that does not read its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from inference.server.openai_request import Refused

# Seconds that a client may take to send a request, or to read anything of its answer.
PATIENCE = 30.0
# A body's bytes.
MOST_BODY = 2**20
# What is read and thrown away of a body that is too long, so that its sender comes to reading the answer: bytes, seconds.
LINGER_BYTES, LINGER_SECONDS = 2**24, 1.0


class Connection(H11Protocol):
    """Tells its application how to cut it, in scope["state"]["abort"], and cuts itself if no request comes in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._look(object())

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self, before: RequestResponseCycle | object | None) -> None:
        """`before`: the request that was last when it was looked before."""
        busy = self.cycle is not None and not self.cycle.response_complete
        if self.cycle is before and not busy:
            self.transport.abort()
            return
        self._next_look = self.loop.call_later(PATIENCE, self._look, self.cycle)


async def body_of(scope: Scope, receive: Receive) -> bytes:
    """A request's whole body. Raises Refused: 413 for one of more than a MiB, 408 for one that does not come."""
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
    """Until the client closes its connection. For when the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def patient(scope: Scope, send: Send) -> Send:
    """`send`, but a client that reads nothing for too long is cut off. Raises Gone."""

    async def bounded(message: Message) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                await send(message)
        except TimeoutError:
            scope["state"]["abort"]()
            # The loop is to see the connection lost before the application ends without an answer.
            await asyncio.sleep(0)
            raise Gone from None

    return bounded


async def lingering(receive: Receive) -> None:
    """Read what a client still sends, for a while: a connection that is closed before may take the answer with it."""
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
    """`when_gone` is called if the client closes its connection meanwhile, also when nothing is being sent to it."""
    task = asyncio.create_task(gone(receive))
    task.add_done_callback(lambda t: t.cancelled() or when_gone())
    try:
        yield
    finally:
        task.cancel()
