"""Messages over a socket: whole or in pieces, many or none, with descriptors or without."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rpcprops.cluster import _wire
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.outcomes import Counters, StepOutcome

MESSAGES: list[Any] = [
    None,
    0,
    "",
    ("hello", [1, 2.5, b"\x00\xff"], {"a": None}),
    FaultPlan(by_rank={1: FaultTable(["RREF_USER_DELETE"], 2)}),
    StepOutcome(2, [1.0], None, 0.5, (Counters(owners=1), Counters(contexts=2)), ended=False),
    b"x" * 300_000,
]


@pytest.fixture(name="pair")
def _pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    theirs.settimeout(10)
    with ours, theirs:
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


@pytest.mark.parametrize("message", MESSAGES[:-1])
def test_a_message_arrives_as_it_was_sent(message: Any, pair: Pair) -> None:
    """What is sent at one end is received at the other."""
    _wire.send(pair[0], message)
    assert _wire.Reader(pair[1]).receive() == message


def test_messages_arrive_in_order_and_one_at_a_time(pair: Pair) -> None:
    """Several messages that arrive in one read stay several, in the order of their sending."""
    for message in MESSAGES[:-1]:
        _wire.send(pair[0], message)
    reader = _wire.Reader(pair[1])
    assert [reader.receive() for _ in MESSAGES[:-1]] == MESSAGES[:-1]
    assert not reader.buffer


def test_a_message_larger_than_the_sockets_buffer_arrives(pair: Pair) -> None:
    """A message that takes many reads is put together again."""
    sender = threading.Thread(target=_wire.send, args=(pair[0], MESSAGES[-1]))
    sender.start()
    assert _wire.Reader(pair[1]).receive() == MESSAGES[-1]
    sender.join()


def test_pieces_are_no_message_until_the_last(pair: Pair) -> None:
    """Byte by byte nothing is given before the whole message is there, and nothing twice."""
    data = _wire.pack(("answer", 42)) + _wire.pack("next")
    first = len(_wire.pack(("answer", 42)))
    reader = _wire.Reader(pair[1])
    for count, byte in enumerate(data, 1):
        pair[0].sendall(bytes([byte]))
        assert reader.fill()
        expected = {first: [("answer", 42)], len(data): ["next"]}.get(count, [])
        assert list(reader.messages()) == expected
    assert list(reader.messages()) == []


def test_what_is_left_unread_is_given_next_time(pair: Pair) -> None:
    """Whoever stops at the first message finds the others later, without another read."""
    for number in range(3):
        _wire.send(pair[0], number)
    reader = _wire.Reader(pair[1])
    reader.fill()
    assert next(reader.messages()) == 0
    assert list(reader.messages()) == [1, 2]


def test_the_end_of_the_other_side_shows(pair: Pair) -> None:
    """A closed peer is an EOFError to who waits, and stays visible in `closed`."""
    reader = _wire.Reader(pair[1])
    pair[0].close()
    with pytest.raises(EOFError):
        reader.receive()
    assert reader.closed
    assert not reader.fill()


def test_what_was_sent_before_the_end_is_still_given(pair: Pair) -> None:
    """A peer that says its last word and goes is heard; half a word is not taken for one."""
    _wire.send(pair[0], "last")
    pair[0].sendall(_wire.pack("cut off")[:-1])
    pair[0].close()
    reader = _wire.Reader(pair[1])
    assert reader.receive() == "last"
    with pytest.raises(EOFError):
        reader.receive()


def test_a_reset_connection_is_an_end_too(pair: Pair) -> None:
    """A peer that goes without reading what it was sent counts as gone, not as an error."""
    pair[1].sendall(b"never read")
    pair[0].close()
    reader = _wire.Reader(pair[1])
    assert not reader.fill()
    assert reader.closed


def test_sending_to_nobody_is_an_os_error(pair: Pair) -> None:
    """The sender learns that the other end is gone."""
    pair[1].close()
    with pytest.raises(OSError, match=r"[Pp]ipe"):
        _wire.send(pair[0], "anybody?")


def test_a_socket_that_does_not_block_gives_nothing_and_stays_open(pair: Pair) -> None:
    """To look and find nothing is no end."""
    pair[1].setblocking(False)
    reader = _wire.Reader(pair[1])
    assert reader.fill()
    assert not reader.closed
    assert list(reader.messages()) == []


def test_descriptors_travel_with_their_message(pair: Pair) -> None:
    """Files that are sent along can be used at the other end, in the order in which they were."""
    files = [os.memfd_create(f"file{number}") for number in range(3)]
    for number, fd in enumerate(files):
        os.write(fd, bytes([number]))
    _wire.send(pair[0], "three files", files)
    for fd in files:
        os.close(fd)
    reader = _wire.Reader(pair[1])
    try:
        assert reader.receive(descriptors=True) == "three files"
        assert len(reader.descriptors) == 3
        assert [os.pread(fd, 8, 0) for fd in reader.descriptors] == [b"\x00", b"\x01", b"\x02"]
    finally:
        for fd in reader.descriptors:
            os.close(fd)


def test_descriptors_of_a_long_message_arrive_with_it(pair: Pair) -> None:
    """A message that takes many writes passes its descriptors exactly once."""
    fd = os.memfd_create("file")
    sender = threading.Thread(target=_wire.send, args=(pair[0], MESSAGES[-1], [fd]))
    sender.start()
    reader = _wire.Reader(pair[1])
    assert reader.receive(descriptors=True) == MESSAGES[-1]
    sender.join()
    os.close(fd)
    assert len(reader.descriptors) == 1
    os.close(reader.descriptors[0])


def test_as_many_descriptors_as_a_fork_of_sixteen_ranks_takes(pair: Pair) -> None:
    """A store, sixteen sockets and sixteen logs fit into one message."""
    fds = [os.memfd_create(f"file{number}") for number in range(33)]
    _wire.send(pair[0], ("fork", 1), fds)
    reader = _wire.Reader(pair[1])
    assert reader.receive(descriptors=True) == ("fork", 1)
    assert len(reader.descriptors) == 33
    for fd in [*fds, *reader.descriptors]:
        os.close(fd)


def test_a_message_that_cannot_be_pickled_is_not_half_sent(pair: Pair) -> None:
    """What fails to pickle fails before a byte of it is on its way."""
    with pytest.raises(TypeError):
        _wire.send(pair[0], (1, threading.Lock()))
    _wire.send(pair[0], "whole")
    assert _wire.Reader(pair[1]).receive() == "whole"


def test_the_header_counts_bytes() -> None:
    """A packed message begins with the length of its pickle, in network order."""
    data = _wire.pack([1, 2, 3])
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    assert array.array("B", data)[4] == 0x80  # where a pickle begins


def test_what_a_socket_does_not_take_goes_on_where_it_stopped(pair: Pair) -> None:
    """Messages that wait arrive whole and in order, and nobody waits for the reader."""
    pair[0].setblocking(False)
    writer = _wire.Writer(pair[0])
    assert not writer.is_waiting
    sent = [MESSAGES[-1], "small", 3 * MESSAGES[-1], ("last",)]
    for message in sent:
        writer.put(message)
        writer.flush()
        assert writer.is_waiting
    reader = _wire.Reader(pair[1])
    arrived: list[Any] = []
    while len(arrived) < len(sent):
        assert reader.fill()
        arrived += reader.messages()
        writer.flush()
    assert arrived == sent
    assert not writer.is_waiting


def test_nothing_waits_for_an_end_that_is_gone(pair: Pair) -> None:
    """What was to go there is dropped."""
    pair[0].setblocking(False)
    writer = _wire.Writer(pair[0])
    writer.put(MESSAGES[-1])
    writer.flush()
    pair[1].close()
    writer.flush()
    assert not writer.is_waiting
