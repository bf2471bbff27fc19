"""Connections that would be held without end, with less patience than a server has; blocks of a rank's memory."""

import argparse
import asyncio
from time import monotonic

import pytest
import uvicorn
from uvicorn.server import ServerState

from inference.server import connection
from inference.server.connection import Connection, Gone, patient
from launch.options import UsageError
from launch.serve import blocks_of


async def answer(scope, receive, send):
    send = patient(scope, send)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1000 if scope["path"] == "/much" else 1):
        await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def tasks_left(app, sent, read):
    """The tasks of a server that is left by a client which sends this, and then reads or does not; None if it stays."""
    config = uvicorn.Config(app, log_config=None, ws="none", lifespan="off", timeout_keep_alive=60)
    config.load()
    loop, state = asyncio.get_running_loop(), ServerState()
    server = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=1024)
    writer.write(sent)
    begun = monotonic()
    if not read:
        reader._transport.pause_reading()
    while state.connections or monotonic() < begun + 0.1:
        if monotonic() > begun + 10:
            return None
        if read and not reader.at_eof():
            await asyncio.wait_for(reader.read(2**20), 10)
        await asyncio.sleep(0.01)
    writer.transport.abort()
    server.close()
    return state.tasks


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
MUCH = GET.replace(b"/", b"/much", 1)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", GET + b"GET /", MUCH])
def test_a_client_that_neither_asks_nor_reads_is_cut(monkeypatch, sent):
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    assert asyncio.run(tasks_left(answer, sent, read=sent != MUCH)) == set()


def test_one_that_reads_is_not(monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 0.3)
    finished = []

    async def slow(scope, receive, send):
        send = patient(scope, send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(8):
            # A request may run for longer than any patience.
            await asyncio.sleep(0.1)
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        finished.append(True)

    assert asyncio.run(tasks_left(slow, GET, read=True)) == set()
    assert finished


def test_a_send_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 0.05)
    aborted = []

    async def send(message):
        await asyncio.sleep(60)

    with pytest.raises(Gone):
        asyncio.run(patient({"state": {"abort": lambda: aborted.append(True)}}, send)({}))
    assert aborted == [True]


def test_blocks_of_a_memory():
    # SmolLM2 on the rank of two that holds two of three key/value heads: 2 x 2 heads x 64 x 4 bytes in 30 layers.
    args = argparse.Namespace(kv_memory_mib=256)
    assert blocks_of(args, 30720) == 546
    args.kv_memory_mib = 1
    assert blocks_of(args, 65536) == 1
    with pytest.raises(UsageError, match="holds no block of 16 tokens of 65,537 bytes: use at least 2"):
        blocks_of(args, 65537)
