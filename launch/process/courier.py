"""A process on each host of several, which carries what its ranks' slots say to the other hosts. Standard library only.

Couriers are no ranks: they go on while ranks are stopped, wait in MPI or die, and nothing of theirs goes through MPI. Each is
connected to each other by TCP. It writes copies of the other hosts' slots into the flight recorder of its host, so that a
watchdog sees all ranks; passes on an alarm; and says which rank of all is the first that knows why the run ends. Where all
ranks are on one host there is none.

    at rest                             a beat every BEAT seconds, so that a host that is cut off is known
    while a rank waits or has died      the slots of all hosts, ten times a second
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from fcntl import ioctl
from hmac import compare_digest
from time import perf_counter, sleep
from typing import TYPE_CHECKING, NoReturn

from launch.process.peer import ALARM, ALIVE, ASKED, BYE, CLAIM, NO, SLOTS, STACK, YES, Peer
from parallel import slot

if TYPE_CHECKING:
    from mpi4py import MPI

    from parallel.recorder import Recorder

TICK, BEAT = 0.05, 0.25
# Seconds in a wait after which it is of interest to other hosts, and between two copies of slots.
LONG, COPY = 0.4, 0.1
# Seconds after which a host that is not heard of has no say any more.
SILENT = 1.0
# Seconds for an answer, and for ranks to write their stacks.
ANSWER, STACKS = 0.4, 0.15
# A fixed port for every host's courier, where a firewall lets only some through.
PORT = "RANKWISE_PORT"

# Before a copy of a slot but its stack: the rank, how its process is, its exit code.
COPY_OF = struct.Struct("!ici")

# The rank's end of a pipe to the courier that it has forked, and the port of that.
_link: socket.socket | None = None
_port = 0


# --- what a rank calls


def begin() -> str | None:
    """Fork this host's courier, on the first of its ranks. To be called before threads and MPI: nothing of theirs is copied.
    Returns what is wrong with the port that was given, if anything is."""
    global _link, _port
    if not hasattr(os, "pidfd_open"):
        return None
    port = os.environ.get(PORT, "0")
    if not port.isdecimal() or int(port) > 65535:
        return f"{PORT}={port} is no port: use a number from 1024 to 65535, or leave it out"
    try:
        listening = socket.create_server(("", int(port)), backlog=128)
    except OSError as error:
        return f"{PORT}={port}: {error.strerror}: use another port, or leave it out"
    parent = os.pidfd_open(os.getpid())
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        _live(parent, theirs, listening)
    _link, _port = ours, listening.getsockname()[1]
    for each in (theirs, listening):
        each.close()
    os.close(parent)
    return None


def join(comm: MPI.Intracomm, recorder: Recorder, stack_signal: int) -> None:
    """Let the couriers of all hosts know one another, and this host's the recorder. All ranks call it together."""
    if not recorder.hosts[0]:
        return
    mine = None if _link is None else (_addresses(), _port)
    token, every = comm.bcast(os.urandom(16).hex()), comm.allgather(mine)
    places = [
        {"name": name, "ranks": [r for r, other in enumerate(recorder.hosts) if other == name]}
        for name in dict.fromkeys(recorder.hosts)
    ]
    for place in places:
        known = [every[r] for r in place["ranks"] if every[r] is not None]
        place["addresses"], place["port"] = known[0] if known else ([], 0)
    own = next(i for i, place in enumerate(places) if comm.rank in place["ranks"])
    if _link is not None:
        asked = {"token": token, "own": own, "places": places, "stack_signal": stack_signal}
        socket.send_fds(_link, [json.dumps(asked).encode() + b"\n"], [recorder.stack])
    port = places[own]["port"]
    recorder.first_of_all = lambda: _claim(port, token)


def _claim(port: int, token: str) -> bool:
    """Ask this host's courier whether this rank is the first of all that says why the run ends. Without one, it is."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), ANSWER) as asking:
        asking.settimeout(4 * ANSWER)
        asking.sendall(f"{token}{-1:6d}".encode())
        return asking.recv(1) != NO
    return True


def _addresses() -> list[str]:
    """This host's IPv4 addresses, by Linux's interfaces."""
    found = []
    get_address = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = ioctl(any_socket, get_address, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in found if not address.startswith("127.")]


# --- the courier


def _live(parent: int, link: socket.socket, listening: socket.socket) -> NoReturn:
    """Until the ranks of this host are gone."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        # Launchers wait until a job's output is closed; and MPI's sockets are none of its own.
        kept = sorted({parent, link.fileno(), listening.fileno()})
        for low, high in zip([-1, *kept], [*kept, 65536], strict=True):
            os.closerange(low + 1, high)
        select.select([link, parent], [], [])
        asked, files, _, _ = socket.recv_fds(link, 1 << 20, 1)
        while asked and not asked.endswith(b"\n"):
            asked += link.recv(1 << 20)
        if asked and files:
            Courier(json.loads(asked), files[0], listening).run()
    finally:
        os._exit(0)


class Courier:
    def __init__(self, asked: dict, memory: int, listening: socket.socket) -> None:
        self.memory = mmap.mmap(memory, 0)
        self.token, self.own, self.places = asked["token"].encode(), asked["own"], asked["places"]
        self.stack_signal, self.listening = asked["stack_signal"], listening
        self.ranks: Sequence[int] = self.places[self.own]["ranks"]
        self.peers: dict[int, Peer] = {}
        self.left: set[int] = set()
        # Connections that have not said who they are; ranks whose claim another host decides, by the host that was asked.
        self.unnamed: dict[socket.socket, bytes] = {}
        self.claims: list[tuple[socket.socket, int, float]] = []
        self.granted = False
        self.alarmed = self.stacks_due = self.beaten = self.copied = 0.0
        # Others know of these ranks from the start.
        self.wanted = perf_counter()
        self.pids = {rank: slot.SELF.unpack_from(self.memory, slot.base_of(rank) + slot.SELF_AT)[0] for rank in self.ranks}
        # Each is readable when that process is gone.
        self.processes = {os.pidfd_open(pid): rank for rank, pid in self.pids.items() if _state(pid)[0] != b"?"}
        self.gone: set[int] = {*self.ranks} - {*self.processes.values()}

    def run(self) -> None:
        for index in range(self.own):
            self._connect(index)
        self.listening.setblocking(False)
        while True:
            poll = [self.listening, *self.unnamed, *self.processes, *(peer.connection for peer in self.peers.values())]
            ready, _, _ = select.select(poll, [], [], TICK)
            for process in self.processes.keys() & {each for each in ready if isinstance(each, int)}:
                self.gone.add(self.processes.pop(process))
            self._accept()
            for index in list(self.peers):
                self._hear(index)
            self._settle()
            self._tell()
            if not self.processes:
                self._leave()
                return

    # --- connections

    def _connect(self, index: int) -> None:
        place = self.places[index]
        for address in place["addresses"]:
            with suppress(OSError):
                connection = socket.create_connection((address, place["port"]), SILENT)
                connection.sendall(self.token + f"{self.own:3d}{index:3d}".encode())
                self._know(index, connection)
                return

    def _know(self, index: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peers[index] = Peer(connection)

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            while True:
                connection, _ = self.listening.accept()
                connection.setblocking(False)
                self.unnamed[connection] = b""
        whole = len(self.token) + 6
        for connection in list(self.unnamed):
            with suppress(BlockingIOError):
                try:
                    more = connection.recv(whole - len(self.unnamed[connection]))
                except ConnectionError:
                    more = b""
                said = self.unnamed[connection] = self.unnamed[connection] + more
                if more and len(said) < whole:
                    continue
                del self.unnamed[connection]
                token, rest = said[:-6], said[-6:]
                if not compare_digest(token, self.token):
                    connection.close()
                elif rest.strip() == b"-1":
                    self._ask(connection)
                elif int(rest[3:]) == self.own:
                    self._know(int(rest[:3]), connection)
                else:
                    connection.close()

    # --- what is heard

    def _hear(self, index: int) -> None:
        peer = self.peers[index]
        try:
            for kind, content in peer.messages():
                self._heard(index, kind, content)
            peer.flush()
        except (OSError, EOFError):
            del self.peers[index]
            if index not in self.left:
                # All its ranks are gone, and their courier with them.
                for rank in self.places[index]["ranks"]:
                    self._mark(rank, b"?", slot.HOST_GONE, peer.heard)

    def _heard(self, index: int, kind: bytes, content: bytes) -> None:
        peer = self.peers[index]
        if kind == SLOTS:
            for at in range(0, len(content), COPY_OF.size + slot.STACK_AT):
                rank, letter, code = COPY_OF.unpack_from(content, at)
                self._copy(rank, letter, code, content[at + COPY_OF.size : at + COPY_OF.size + slot.STACK_AT], peer)
        elif kind == ASKED:
            self.wanted = perf_counter()
        elif kind == ALARM:
            self._alarm()
        elif kind == STACK:
            rank = int.from_bytes(content[:4], "big")
            base = slot.base_of(rank) + slot.STACK_AT
            self.memory[base : base + len(content) - 4] = content[4:]
        elif kind == CLAIM:
            peer.send(YES if not self.granted else NO)
            self.granted = True
        elif kind in (YES, NO):
            for asking in [claim[0] for claim in self.claims if claim[1] == index]:
                self._answer(asking, kind)
            self.claims = [claim for claim in self.claims if claim[1] != index]
        elif kind == BYE:
            self.left.add(index)
        for rank in self.places[index]["ranks"]:
            letter, code, _ = slot.copied(self.memory, rank)
            self._mark(rank, letter.encode() or b"S", code, peer.heard)

    def _mark(self, rank: int, letter: bytes, code: int, heard: float) -> None:
        slot.COPIED.pack_into(self.memory, slot.base_of(rank) + slot.COPIED_AT, letter, code, heard)

    def _copy(self, rank: int, letter: bytes, code: int, content: bytes, peer: Peer) -> None:
        """What its host says of a rank, with this host's times, and no process."""
        base, copy = slot.base_of(rank), bytearray(content)
        begun, waiting, since, doing = slot.NOW.unpack_from(copy)
        slot.NOW.pack_into(copy, 0, begun, waiting, since - peer.offset, doing)
        _, beat, ready = slot.SELF.unpack_from(copy, slot.SELF_AT)
        slot.SELF.pack_into(copy, slot.SELF_AT, 0, beat - peer.offset, ready)
        slot.COPIED.pack_into(copy, slot.COPIED_AT, letter, code, peer.heard)
        self.memory[base : base + slot.STACK_AT] = bytes(copy)

    # --- what is said

    def _tell(self) -> None:
        now = perf_counter()
        if slot.ALARM.unpack_from(self.memory, 0)[0]:
            self._alarm()
        waits = any(self._waits(rank, now) for rank in self.ranks)
        if now - self.copied > COPY:
            if waits or self.alarmed:
                self._send(ASKED)
            if waits or self.alarmed or self.gone or now - self.wanted < SILENT:
                self.copied = now
                self._send(SLOTS, b"".join(map(self._own, self.ranks)))
        if self.stacks_due and now > self.stacks_due:
            self.stacks_due = 0.0
            self._send_stacks()
        if now - self.beaten > BEAT:
            self.beaten = now
            self._send(ALIVE)

    def _waits(self, rank: int, now: float) -> bool:
        _, waiting, since, _ = slot.NOW.unpack_from(self.memory, slot.base_of(rank))
        return bool(waiting) and now - since > LONG

    def _leave(self) -> None:
        self._send_stacks()
        self._send(SLOTS, b"".join(map(self._own, self.ranks)))
        self._send(BYE)
        sleep(TICK)

    def _send(self, kind: bytes, content: bytes = b"") -> None:
        """To all."""
        for peer in list(self.peers.values()):
            # Its end is heard of where it is listened to.
            with suppress(OSError):
                peer.send(kind, content)

    def _own(self, rank: int) -> bytes:
        letter, code = _state(self.pids[rank])
        base = slot.base_of(rank)
        return COPY_OF.pack(rank, letter, code) + self.memory[base : base + slot.STACK_AT]

    def _send_stacks(self) -> None:
        for rank in self.ranks:
            base = slot.base_of(rank) + slot.STACK_AT
            stack = self.memory[base : base + slot.STACK].rstrip(b"\0")
            if stack:
                self._send(STACK, rank.to_bytes(4, "big") + stack)

    def _alarm(self) -> None:
        """Heard of, or raised here: all hosts hear of it, and the ranks of this one write their stacks."""
        if self.alarmed:
            return
        self.alarmed = perf_counter()
        if not slot.ALARM.unpack_from(self.memory, 0)[0]:
            slot.ALARM.pack_into(self.memory, 0, self.alarmed)
        self._send(ALARM)
        for pid in self.pids.values():
            with suppress(OSError):
                os.kill(pid, self.stack_signal)
        self.stacks_due = self.alarmed + STACKS

    # --- who says why the run ends: the host that comes first in order, of those that are heard of, decides

    def _ask(self, asking: socket.socket, after: int = -1) -> None:
        now = perf_counter()
        heard = (i for i in range(after + 1, self.own) if i in self.peers and now - self.peers[i].heard < SILENT)
        first = next(heard, None)
        if first is None:
            self._answer(asking, NO if self.granted else YES)
            self.granted = True
            return
        self.claims.append((asking, first, now))
        with suppress(OSError):
            self.peers[first].send(CLAIM)

    def _settle(self) -> None:
        """A claim that is not answered is asked of the next host."""
        now = perf_counter()
        late = [claim for claim in self.claims if claim[1] not in self.peers or now - claim[2] > ANSWER]
        self.claims = [claim for claim in self.claims if claim not in late]
        for asking, first, _ in late:
            self._ask(asking, first)

    def _answer(self, asking: socket.socket, answer: bytes) -> None:
        with suppress(OSError):
            asking.setblocking(True)
            asking.sendall(answer)
        asking.close()


def _state(pid: int) -> tuple[bytes, int]:
    """The letter and the exit code that /proc has of a process; b"?" of one that is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return fields[0], int(fields[-1])
    except (OSError, ValueError, IndexError):
        return b"?", 0
