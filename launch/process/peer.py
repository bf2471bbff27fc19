"""What couriers send one another: messages over a connection that neither waits for. Standard library only."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from time import perf_counter

# Length of what follows, what it is, the sender's clock.
HEAD = struct.Struct("!Icd")
ALIVE, SLOTS, ASKED, ALARM, STACK, CLAIM, YES, NO, BYE = (bytes([c]) for c in b"bsaxkcynq")
# Bytes that may wait for one that is cut off.
MOST_WAITING = 1 << 24


class Peer:
    """Another host's courier. `offset`: its clock before ours, by the message that was fastest so far."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.heard, self.offset = connection, perf_counter(), -float("inf")
        self.coming, self.going = b"", b""

    def send(self, kind: bytes, content: bytes = b"") -> None:
        # One that is cut off must not hold up this one.
        if len(self.going) < MOST_WAITING:
            self.going += HEAD.pack(len(content), kind, perf_counter()) + content
        self.flush()

    def flush(self) -> None:
        with suppress(BlockingIOError):
            sent = self.connection.send(self.going) if self.going else 0
            self.going = self.going[sent:]

    def messages(self) -> Iterator[tuple[bytes, bytes]]:
        """What has come. Raises EOFError when there will be no more, once all of it has been given."""
        over = True
        try:
            while more := self.connection.recv(1 << 20):
                self.coming += more
        except BlockingIOError:
            over = False
        except OSError:
            # One that went with words of ours unread resets the connection.
            pass
        while len(self.coming) >= HEAD.size:
            length, kind, sent = HEAD.unpack_from(self.coming)
            if len(self.coming) < HEAD.size + length:
                break
            content, self.coming = self.coming[HEAD.size : HEAD.size + length], self.coming[HEAD.size + length :]
            self.heard = perf_counter()
            self.offset = max(self.offset, sent - self.heard)
            yield kind, content
        if over:
            raise EOFError
