"""More clients than connections: those that do nothing make room, those that are answered do not."""

import asyncio
import socket
from contextlib import ExitStack

import uvicorn
from uvicorn.server import ServerState

from inference.server.connection import Connection
from inference.server.entrance import Entrance

GET, WATCH = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /watch HTTP/1.1\r\nHost: x\r\n\r\n"
HALF = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"


async def answer(scope, receive, send):
    """Begins, and ends when the client does."""
    if scope["path"] == "/watch":
        scope["state"]["watches"] = True
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    await receive()


class Clients:
    """Clients of an Entrance of `most` connections, each of whom has sent something."""

    def __init__(self, most, stack):
        self.listening, self.state, self.told = stack.enter_context(socket.create_server(("127.0.0.1", 0))), ServerState(), []
        config = uvicorn.Config(answer, log_config=None, ws="none", lifespan="off")
        config.load()
        self.entrance = Entrance(
            self.listening, lambda: Connection(config, self.state, {}), self.state.connections, most, self.told.append
        )
        self.taking, self.stack = asyncio.create_task(self.entrance.take()), stack

    async def come(self, sent):
        raw = self.stack.enter_context(socket.create_connection(self.listening.getsockname()))
        raw.setblocking(False)
        raw.send(sent)
        return raw

    @staticmethod
    async def cut(raw):
        """Whether the server ends a client's connection; it has read what came before."""
        try:
            async with asyncio.timeout(2):
                while await asyncio.get_running_loop().sock_recv(raw, 4096):
                    pass
        except ConnectionResetError:
            pass
        except TimeoutError:
            return False
        return True

    @staticmethod
    async def begun(raw):
        async with asyncio.timeout(5):
            return b"200" in await asyncio.get_running_loop().sock_recv(raw, 4096)


def test_the_idlest_makes_room_and_one_that_looks_on_comes_last():
    async def body(stack):
        clients = Clients(4, stack)
        busy, watching = await clients.come(GET), await clients.come(WATCH)
        assert await clients.begun(busy)
        assert await clients.begun(watching)
        silent, half = await clients.come(b""), await clients.come(HALF)
        await asyncio.sleep(0.1)
        assert len(clients.state.connections) == 4
        # Each that comes, and is answered, costs the one that has waited longest with nothing asked.
        for gone in (silent, half, watching):
            assert await clients.begun(await clients.come(GET))
            assert await clients.cut(gone)
        # Now all are answered: the next waits until one has ended.
        late = await clients.come(GET)
        await asyncio.sleep(0.2)
        assert len(clients.state.connections) == 4
        busy.close()
        assert await clients.begun(late)
        assert clients.told == ["4 connections are all that this process may have: closing those that do nothing"]
        clients.taking.cancel()

    with ExitStack() as stack:
        asyncio.run(body(stack))


def test_what_fails_at_the_door_is_told_once_a_second():
    async def body(stack):
        clients = Clients(4, stack)

        def make():
            tries.append(1)
            raise OSError(24, "Too many open files")

        tries, clients.entrance.make = [], make
        for _ in range(3):
            await clients.come(b"")
        await asyncio.sleep(0.3)
        assert len(tries) == 3
        assert clients.told == ["cannot take a connection: Too many open files"]
        clients.taking.cancel()

    with ExitStack() as stack:
        asyncio.run(body(stack))
