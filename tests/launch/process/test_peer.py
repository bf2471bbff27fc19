"""What couriers send one another is heard whole, also where the sender is gone by then."""

from __future__ import annotations

import socket

import pytest

from launch.process.peer import ALIVE, BYE, SLOTS, STACK, Peer


@pytest.fixture
def peers():
    pair = [Peer(connection) for connection in socket.socketpair()]
    for peer in pair:
        peer.connection.setblocking(False)
    yield pair
    for peer in pair:
        peer.connection.close()


def test_a_message_in_parts_is_heard_once_it_is_whole(peers):
    sender, hearer = peers
    sender.send(SLOTS, b"of a rank")
    sender.send(STACK, b"")
    assert list(hearer.messages()) == [(SLOTS, b"of a rank"), (STACK, b"")]
    assert list(hearer.messages()) == []


@pytest.mark.parametrize("unread", [False, True])
def test_last_words_are_heard_before_the_end(peers, unread):
    """A busy host may look only when the other one's courier has gone; what that has left unread resets the connection."""
    sender, hearer = peers
    if unread:
        hearer.send(ALIVE)
    sender.send(SLOTS, b"killed")
    sender.send(BYE)
    sender.connection.close()
    coming = hearer.messages()
    assert [next(coming), next(coming)] == [(SLOTS, b"killed"), (BYE, b"")]
    with pytest.raises(EOFError):
        next(coming)
