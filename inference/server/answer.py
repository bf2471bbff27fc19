"""/v1/completions and /v1/chat/completions: from a request's body to its answers, whole or streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inference.scheduler import QueueFull
from inference.server.connection import Gone, body_of, lingering, patient, watched
from inference.server.engine_thread import EngineThread, Job
from inference.server.inbox import Inbox
from inference.server.openai_reply import Reply, Usage
from inference.server.openai_request import decoded, parsed
from inference.server.refused import Refused
from inference.server.writer import Delta, Writer
from models.tokenizer import Tokenizer

# Bytes of a body whose prompt would keep the event loop busy: a thread turns it into tokens.
LONG_BODY = 2**14
SSE = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class Model(NamedTuple):
    """What is served, under which name. `context`: the most tokens of a request, prompt and new. `ends`: tokens that end an
    answer. `sampling`: by the fields' names, what holds where a request says nothing."""

    name: str
    tokenizer: Tokenizer | None
    context: int
    ends: frozenset[int] = frozenset()
    sampling: Mapping[str, float] | None = None


class Answering:
    """The calls that are under way. After `close` there are no new ones; `stop` ends those that are left."""

    def __init__(self, model: Model, thread: EngineThread) -> None:
        self.model, self.thread = model, thread
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        # By call: what cuts its client off.
        self._calls: dict[Inbox, Callable[[], None]] = {}

    def close(self) -> int:
        """Refuse new calls from now on. Returns how many are under way."""
        self._closed = True
        return len(self._calls)

    async def finished(self, seconds: float) -> bool:
        """Whether all calls have ended within these seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def stop(self) -> None:
        """End every call with an error for its client."""
        for inbox in self._calls:
            inbox.fail(Refused(503, "the server is shutting down before this was finished", code="shutting_down"))

    def cut(self) -> None:
        for abort in self._calls.values():
            abort()

    async def answer(self, chat: bool, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application. Raises Refused, but only before anything has been sent."""
        arrived, send = perf_counter(), patient(scope, send)
        try:
            self._admit()
            body = await body_of(scope, receive)
            self._admit()
            await self._answered(chat, body, arrived, scope, receive, send)
        except Gone:
            return
        except Refused as refused:
            if refused.status != 413:
                raise
            await _refuse_long(refused, receive, send)

    def _admit(self) -> None:
        if self._closed:
            raise Refused(503, "the server is shutting down", code="shutting_down", headers={"connection": "close"})

    async def _answered(self, chat: bool, body: bytes, arrived: float, scope: Scope, receive: Receive, send: Send) -> None:
        name, tokenizer, context, ends, sampling = self.model
        call = parsed(decoded(body), chat, name, sampling)
        beside = len(body) > LONG_BODY
        prompts = await asyncio.to_thread(call.encoded, tokenizer) if beside else call.encoded(tokenizer)
        asks, inbox = call.asks(prompts, context, ends, scope["state"]["owner"]), Inbox()
        fail = lambda error: inbox.fail(Refused(500, str(error), code="not_finite"))  # noqa: E731
        jobs = [
            Job(ask, Writer(tokenizer, call.stop, ask.ends), partial(inbox.put, n), fail, arrived) for n, ask in enumerate(asks)
        ]
        self._calls[inbox] = scope["state"]["abort"]
        self._idle.clear()
        try:
            async with watched(receive, lambda: inbox.fail(Gone())):
                try:
                    await self.thread.submit(jobs)
                except QueueFull as full:
                    raise Refused(429, str(full), code="rate_limit_exceeded", headers={"retry-after": "1"}) from None
                except ValueError as error:
                    raise Refused(400, str(error), "messages" if chat else "prompt") from None
                reply = Reply(call, name, tokenizer, prompts)
                await (_streamed if call.stream else _whole)(reply, jobs, prompts, inbox, send)
                scope["state"]["note"] = f"{sum(map(len, prompts))}+{sum(job.tokens for job in jobs)} tokens "
        finally:
            self.thread.cancel(jobs)
            del self._calls[inbox]
            if not self._calls:
                self._idle.set()


def usage(jobs: Sequence[Job], prompts: Sequence[list[int]]) -> Usage:
    """A prompt counts once, however many answers it gets; `cached` is that of its first answer."""
    each = len(jobs) // len(prompts)
    return Usage(sum(map(len, prompts)), sum(job.cached or 0 for job in jobs[::each]), sum(job.tokens for job in jobs))


async def _whole(reply: Reply, jobs: Sequence[Job], prompts: Sequence[list[int]], inbox: Inbox, send: Send) -> None:
    deltas = [Delta("", [], [], None) for _ in jobs]
    while any(delta.reason is None for delta in deltas):
        for index, delta in (await inbox.take()).items():
            deltas[index] = deltas[index].then(delta)
    response = as_json(reply.whole(deltas, usage(jobs, prompts)))
    await send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


async def _streamed(reply: Reply, jobs: Sequence[Job], prompts: Sequence[list[int]], inbox: Inbox, send: Send) -> None:
    await begin_events(send)
    left = len(jobs)
    try:
        while left:
            taken = await inbox.take()
            left -= sum(delta.reason is not None for delta in taken.values())
            await _data(send, [chunk for index, delta in taken.items() for chunk in reply.chunks(index, delta)])
    except Refused as refused:
        # The status has been sent already. The official client raises an error that it finds in the stream.
        await _data(send, [refused.body])
        await send({"type": "http.response.body", "body": b""})
        return
    if reply.call.include_usage:
        await _data(send, [reply.usage_chunk(usage(jobs, prompts))])
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _refuse_long(refused: Refused, receive: Receive, send: Send) -> None:
    response = as_json(refused.body, refused.status, refused.headers)
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    await lingering(receive)
    await send({"type": "http.response.body", "body": b""})


async def begin_events(send: Send) -> None:
    headers = [(key.encode(), value.encode()) for key, value in SSE.items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _data(send: Send, chunks: Sequence[dict]) -> None:
    if chunks:
        lines = "".join(f"data: {json.dumps(chunk, separators=(',', ':'), allow_nan=False)}\n\n" for chunk in chunks)
        await send({"type": "http.response.body", "body": lines.encode(), "more_body": True})


def as_json(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # ASCII: an error may quote half a surrogate pair that the client sent.
    return Response(json.dumps(body, allow_nan=False), status, headers=headers, media_type="application/json")
