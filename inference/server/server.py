"""An HTTP server round an engine, compatible with OpenAI's clients: completions, chat, models, health, metrics and a page.

It runs on rank 0. The event loop is in the main thread, where signals are handled, the engine in another (engine_thread.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter, time

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.engine import Engine
from inference.server.answer import Answering, Model, as_json, begin_events
from inference.server.connection import Connection, Gone, patient, watched
from inference.server.engine_thread import EngineThread
from inference.server.entrance import Entrance
from inference.server.gate import Gate
from inference.server.inbox import Feed
from inference.server.metrics import CONTENT_TYPE, Metrics
from inference.server.refused import Refused, missing

PAGE = Path(__file__).with_name("page.html")
# What belongs between its tags: the page is served as one file.
INSIDE = {b"<style>\n": PAGE.with_suffix(".css"), b"<script>\n": PAGE.with_suffix(".js")}
# Some launchers pass on SIGUSR1 and not SIGTERM.
DRAIN = (signal.SIGTERM, signal.SIGUSR1)
# A signal that comes again within so many seconds is the same one: a launcher may send it to a rank by several ways.
ONE_SIGNAL = 0.5


class _Quiet(uvicorn.Server):
    """Leaves signals to us."""

    def capture_signals(self) -> nullcontext:
        return nullcontext()


class _Asgi:
    """Wraps a coroutine function of (scope, receive, send), which Starlette would take for one of a request."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class Server:
    """`about`: what the page shows of the model and the engine. `keys`, `names`, `origins`: see Gate. `most`: connections at a
    time.

    A signal of DRAIN begins to drain: new requests get a 503, and those that run have `drain_seconds` to finish. A second one,
    later, has its usual effect: it ends the process at once.
    """

    def __init__(
        self,
        engine: Engine,
        model: Model,
        about: Mapping[str, object],
        drain_seconds: float = 30.0,
        verbose: bool = False,
        keys: Sequence[str] = (),
        names: Collection[str] = (),
        most: int = 1000,
        origins: Collection[str] = (),
    ) -> None:
        self.engine, self.model, self.about = engine, model, dict(about)
        self.keys, self.names, self.most, self.origins = keys, names, most, origins
        self.drain_seconds, self.verbose, self.started = drain_seconds, verbose, int(time())
        self.metrics, self.feed = Metrics(engine.scheduler.metrics()), Feed()
        self._draining = asyncio.Event()

    def run(self, listening: socket.socket, ready: Callable[[], None]) -> None:
        """Serve until a signal says stop. `ready` is called once requests are answered."""
        asyncio.run(self._run(listening, ready))

    async def _run(self, listening: socket.socket, ready: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_unhandled)
        thread = EngineThread(self.engine, self.metrics, loop, self.feed.put)
        self.answering = Answering(self.model, thread)
        thread.start()
        self._before = {number: signal.getsignal(number) for number in DRAIN}
        for number in DRAIN:
            loop.add_signal_handler(number, self._drain)
        # It would warn of each request that is no HTTP.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        config = uvicorn.Config(
            self._counted(),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=1,
        )
        # Without sockets: what asyncio's own servers do without descriptors is to try without end, and to log each time.
        server = _Quiet(config)
        serving = asyncio.create_task(server.serve(sockets=[]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        state = server.server_state
        entrance = Entrance(listening, partial(Connection, config, state, {}), state.connections, self.most, _say)
        taking = asyncio.create_task(entrance.take())
        ready()
        drained = asyncio.create_task(self._drained())
        await asyncio.wait({serving, drained, taking}, return_when=asyncio.FIRST_COMPLETED)
        taking.cancel()
        listening.close()
        server.should_exit = True
        await serving
        await drained
        thread.stop()
        await asyncio.to_thread(thread.join)

    def _drain(self) -> None:
        if self._draining.is_set():
            return
        self._draining.set()
        loop = asyncio.get_running_loop()
        for number in DRAIN:
            loop.call_later(ONE_SIGNAL, self._as_before, loop, number)

    def _as_before(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        loop.remove_signal_handler(number)
        signal.signal(number, self._before[number])

    async def _drained(self) -> None:
        await self._draining.wait()
        left = self.answering.close()
        _say(f"draining: {left} request{'' if left == 1 else 's'} may finish within {self.drain_seconds:g} s")
        if not await self.answering.finished(self.drain_seconds):
            self.answering.stop()
            if not await self.answering.finished(1):
                # These do not even read that.
                self.answering.cut()
        self.feed.close()

    # --- what there is

    def _app(self) -> ASGIApp:
        routes = [
            Route("/", self._page),
            Route("/steps", _Asgi(self._steps), methods=["GET"]),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._models),
            Route("/v1/completions", _Asgi(partial(self.answering.answer, False)), methods=["POST"]),
            Route("/v1/chat/completions", _Asgi(partial(self.answering.answer, True)), methods=["POST"]),
        ]
        handlers = {Refused: _refusal, HTTPException: _http_error, Exception: _failure}
        return Starlette(routes=routes, exception_handlers=handlers)

    def _counted(self) -> ASGIApp:
        """Numbers requests, counts the responses, and logs them if asked to."""
        app = Gate(self._app(), self.keys, self.names, self.origins)

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            begun, status, id = perf_counter(), 0, secrets.token_hex(8)

            async def noted(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    self.metrics.responses[status] += 1
                    message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", id.encode())]}
                await send(message)

            try:
                await app(scope, receive, noted)
            except Refused as refused:
                await as_json(refused.body, refused.status, refused.headers)(scope, receive, noted)
            finally:
                if self.verbose:
                    client = (scope["client"] or ["-"])[0]
                    took, note = 1e3 * (perf_counter() - begun), scope["state"].get("note", "")
                    # The path as it was sent: no line breaks.
                    path = scope["raw_path"].decode("latin-1")
                    _say(f"{client} {scope['method']} {path} {status or 'gone'} {took:.0f} ms {note}{id}")

        if not self.origins:
            return counted
        # A browser asks first what a page of another site may send, and tells it only what it may read.
        may = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"], "expose_headers": ["x-request-id"]}
        return CORSMiddleware(counted, allow_origins=list(self.origins), **may)

    async def _page(self, request: Request) -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        headers = {"content-security-policy": policy, "cache-control": "no-cache", "x-content-type-options": "nosniff"}
        text = PAGE.read_bytes()
        for tag, file in INSIDE.items():
            text = text.replace(tag, tag + file.read_bytes())
        return Response(text, media_type="text/html", headers=headers)

    async def _health(self, request: Request) -> Response:
        draining = self._draining.is_set()
        return as_json({"status": "draining" if draining else "ok"}, 503 if draining else 200)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _models(self, request: Request) -> Response:
        mine = {"id": self.model.name, "object": "model", "created": self.started, "owned_by": "rankwise"}
        mine["max_model_len"] = self.model.context
        asked = request.path_params.get("model")
        if asked not in (None, self.model.name):
            raise missing(asked, self.model.name)
        return as_json({"object": "list", "data": [mine]} if asked is None else mine)

    async def _steps(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Server-sent events: `about` first, then steps as they come, several in one event if they come fast."""
        send = patient(scope, send)
        scope["state"]["watches"] = True
        try:
            await begin_events(send)
            await _event(send, "about", self.about)
            with self.feed.reader() as reader:
                async with watched(receive, reader.close):
                    while (steps := await reader.take()) is not None:
                        await _event(send, "steps", steps)
                        # Ten times a second is as fast as anybody can see.
                        await asyncio.sleep(0.1)
            await send({"type": "http.response.body", "body": b""})
        except Gone:
            pass


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _event(send: Send, name: str, data: object) -> None:
    text = f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


def _refusal(request: Request, refused: Refused) -> Response:
    return as_json(refused.body, refused.status, refused.headers)


def _http_error(request: Request, error: HTTPException) -> Response:
    messages = {
        404: f"there is no {request.method} {request.url.path}",
        405: f"{request.method} is not allowed for {request.url.path}",
    }
    return _refusal(request, Refused(error.status_code, messages.get(error.status_code, error.detail), headers=error.headers))


def _failure(request: Request, error: Exception) -> Response:
    return _refusal(request, Refused(500, "the server failed at this request; its log says how"))


def _unhandled(loop: asyncio.AbstractEventLoop, context: dict) -> None:
    """An exception in a callback ends all ranks, as one in a thread does; but not one that comes of a client's connection."""
    error = context.get("exception")
    if error is None or isinstance(error, OSError | Gone | Refused):
        loop.default_exception_handler(context)
    else:
        sys.excepthook(type(error), error, error.__traceback__)
