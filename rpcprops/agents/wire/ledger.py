"""The ledger of messages, as the test process makes and reads it; ``_ledger.h`` is its layout.

It is a memory file. Every rank of a world writes to it, and nothing has to be sent to read it, so
a rank that is killed loses nothing.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterator
from typing import Any

from rpcprops.faults import MessageType
from rpcprops.outcomes import MessageEnd, SentMessage

#: Messages for which there is room. The kernel gives memory only to pages that are written to.
CAPACITY = 1 << 16

_MAGIC = 0x32726567646C7277
_HEADER_SIZE = 4096
_HEADER = struct.Struct("<QQQQQ")
#: Where `next` and `dropped`, and then `changes`, of `Header` in _ledger.h are.
_NEXT_OFFSET, _CHANGES_OFFSET = 24, 40
#: As `Record` in _ledger.h.
_RECORD = struct.Struct("<qqqqqqqhhBBBBiHHIIIIII")
_READY, _FLAGS, _PROCESSED = 15, 16, 17
#: Two values of `Ready` in _ledger.h.
_WHOLE, _HELD_UP = 1, 2
#: Which of its eight-byte numbers is `ended_ns`, and how many it would be long.
_ENDED, _LONG = 6, _RECORD.size // 8

#: torch's names of all message types, by the low byte of their number (message.h).
MESSAGE_TYPES = {
    0x00: "SCRIPT_CALL",
    0x01: "SCRIPT_RET",
    0x02: "PYTHON_CALL",
    0x03: "PYTHON_RET",
    0x04: "SCRIPT_REMOTE_CALL",
    0x05: "PYTHON_REMOTE_CALL",
    0x06: "REMOTE_RET",
    0x07: "SCRIPT_RREF_FETCH_CALL",
    0x08: "PYTHON_RREF_FETCH_CALL",
    0x09: "SCRIPT_RREF_FETCH_RET",
    0x0A: "PYTHON_RREF_FETCH_RET",
    0x0B: "RREF_USER_DELETE",
    0x0C: "RREF_FORK_REQUEST",
    0x0D: "RREF_CHILD_ACCEPT",
    0x0E: "RREF_ACK",
    0x0F: "FORWARD_AUTOGRAD_REQ",
    0x10: "FORWARD_AUTOGRAD_RESP",
    0x11: "BACKWARD_AUTOGRAD_REQ",
    0x12: "BACKWARD_AUTOGRAD_RESP",
    0x13: "CLEANUP_AUTOGRAD_CONTEXT_REQ",
    0x14: "CLEANUP_AUTOGRAD_CONTEXT_RESP",
    0x15: "RUN_WITH_PROFILING_REQ",
    0x16: "RUN_WITH_PROFILING_RESP",
    0x17: "RREF_BACKWARD_REQ",
    0x18: "RREF_BACKWARD_RESP",
    0x37: "EXCEPTION",
}
_ACTIONS: tuple[Any, ...] = ("", "fail", "lose", "delay", "hold", "duplicate")
#: Actions after which a message still comes.
_LATE = ("delay", "hold")
#: Bits of `Flag` in _ledger.h.
_WRITTEN, _FAILED, _ANSWERED, _TIMED_OUT, _ARRIVED, _DISCARDED, _RAISED = 1, 2, 4, 8, 16, 128, 512
_MARKS = {
    16: "arrived",
    32: "swallowed",
    64: "overdue",
    128: "discarded",
    256: "spared",
    512: "raised",
    2048: "leaving",
}
#: How often a request is processed that was sent twice.
_COPIES = 2
#: How often torch sends a request again, by the low byte of its type; 0 for those not named here.
_RETRIES = {
    number: MessageType(name).max_retries
    for number, name in MESSAGE_TYPES.items()
    if name in set(MessageType)
}


class Ledger:
    """The ledger of one world.

    Attributes:
        fd: the memory file that ranks map.
        capacity: how many messages it has room for.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        index_size = 2 << (capacity - 1).bit_length()
        self.fd = os.memfd_create("rpcprops-ledger")
        try:
            os.ftruncate(self.fd, _HEADER_SIZE + capacity * _RECORD.size + index_size * 4)
            os.pwrite(self.fd, _HEADER.pack(_MAGIC, capacity, index_size, 0, 0), 0)
        except OSError:
            os.close(self.fd)
            raise
        self._forget()

    def clear(self) -> None:
        """Forget all messages, for ranks that go on.

        No message may be under way: a rank that looks at a record meanwhile gets a SIGBUS.
        """
        size = os.fstat(self.fd).st_size
        os.ftruncate(self.fd, _HEADER_SIZE)
        os.ftruncate(self.fd, size)
        os.pwrite(self.fd, bytes(16), _NEXT_OFFSET)
        self._forget()

    def _forget(self) -> None:
        """Look at all records anew."""
        #: The first record that may_send_again, and may_come_late, must still look at.
        self._first_to_retry = self._first_late = 0
        #: The ids of the messages before it that torch has not sent often enough.
        self._trying: set[int] = set()

    def close(self) -> None:
        """Close the memory file; a second call changes nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def count(self) -> int:
        """How many messages were given to agents so far."""
        return self._header()[3]

    @property
    def dropped(self) -> int:
        """How many messages had no room."""
        return self._header()[4]

    @property
    def changes(self) -> int:
        """A number that is another one after each thing that was written."""
        return int.from_bytes(os.pread(self.fd, 4, _CHANGES_OFFSET), "little")

    def messages(self, origin_ns: int, virtual_ns: int | None = None) -> tuple[SentMessage, ...]:
        """All messages so far, in the order in which ranks began to send them.

        Args:
            origin_ns: the instant of the real monotonic clock from which seconds are counted.
            virtual_ns: the same instant on the clocks of the ranks; unless given, they leave real
                time at that instant.
        """
        count = min(self._header()[3], self.capacity)
        data = os.pread(self.fd, count * _RECORD.size, _HEADER_SIZE)
        virtual = origin_ns if virtual_ns is None else virtual_ns
        return tuple(
            _message(row, origin_ns, virtual) for row in _RECORD.iter_unpack(data) if row[_READY]
        )

    def may_send_again(self) -> bool:
        """Whether torch may still send a request again, or waits for the answer of such a request.

        ``rpc_agent.cpp: RpcAgent::rpcRetryCallback`` sends again whenever a try has ended with an
        error, until it has done so often enough. The agent has no counter for that between two
        tries, and a map only for the wait in between. True also where the ledger cannot tell.
        """
        _, capacity, _, count, dropped = self._header()
        if dropped or count > capacity:
            return True
        for row in self._records(self._first_to_retry, count):
            first, is_response, retry, flags = row[1], row[10], row[14], row[_FLAGS]
            most = 0 if is_response else _RETRIES.get(row[9], 0)
            has_ended = not most or flags & (_FAILED | _ANSWERED | _TIMED_OUT)
            if not (row[_READY] == _WHOLE and has_ended):
                return True
            if most and (retry >= most or (flags & _ANSWERED and not flags & _RAISED)):
                self._trying.discard(first)
            elif most:
                self._trying.add(first)
            self._first_to_retry += 1
        return bool(self._trying)

    def may_come_late(self) -> bool:
        """Whether a message that a fault delays or holds has still to be sent, or to come."""
        _, capacity, _, count, _ = self._header()
        for row in self._records(self._first_late, min(count, capacity)):
            is_response, action, flags = row[10], row[11], row[_FLAGS]
            has_come = flags & (_WRITTEN if is_response else _ARRIVED) or flags & _DISCARDED
            if row[_READY] != _WHOLE or (_ACTIONS[action] in _LATE and not has_come):
                return True
            self._first_late += 1
        return False

    def _records(self, first: int, end: int) -> Iterator[tuple[int, ...]]:
        """The records from one on, as they are now."""
        size = _RECORD.size
        data = os.pread(self.fd, (end - first) * size, _HEADER_SIZE + first * size)
        return _RECORD.iter_unpack(data)

    def leaves_nothing(self) -> bool:
        """Whether no message that its sender does not wait for may be on its way or come again.

        Its sender does not wait for a request that has timed out, and for the second copy of one.
        """
        if self.may_send_again():
            return False
        data = os.pread(self.fd, self.count * _RECORD.size, _HEADER_SIZE)
        return not any(
            row[_FLAGS] & _TIMED_OUT
            or (_ACTIONS[row[11]] == "duplicate" and row[_PROCESSED] < _COPIES)
            for row in _RECORD.iter_unpack(data)
        )

    def _header(self) -> tuple[int, ...]:
        return _HEADER.unpack(os.pread(self.fd, _HEADER.size, 0))


def count_in(fd: int) -> int:
    """How many messages were given to agents so far, in the ledger that a rank has as `fd`."""
    return int.from_bytes(os.pread(fd, 8, _NEXT_OFFSET), "little")


def has_ended_in(fd: int) -> bool:
    """Whether each of these messages has come to its end, as far as a rank can tell."""
    data = os.pread(fd, count_in(fd) * _RECORD.size, _HEADER_SIZE)
    return 0 not in memoryview(data).cast("q")[_ENDED::_LONG]


def _message(row: tuple[int, ...], origin_ns: int, virtual_ns: int) -> SentMessage:
    number, first, virtual, real, size, written, ended = row[:7]
    sender, receiver, kind, is_response, action, table, fault, retry = row[7:15]
    ready, flags, processed, _, _, part, delay_ms = row[_READY:]
    if ready == _HELD_UP:
        # Its sender was still held up by a table, and then no fault of the message alone has acted.
        action, fault = 0, -1
    became, marks = _fate(flags, is_lost=_ACTIONS[action] == "lose")
    return SentMessage(
        seconds=(virtual - virtual_ns) / 1e9,
        sender=sender,
        receiver=receiver,
        id=number,
        type=MESSAGE_TYPES.get(kind, f"type {kind:#x}"),
        is_request=not is_response,
        size=size,
        retry=retry,
        fault=fault if fault >= 0 else None,
        done=_ACTIONS[action],
        became=became,
        first_id=first,
        real_seconds=(real - origin_ns) / 1e9,
        failed_by_table=bool(table & 1),
        delayed_by_table=bool(table & 2),
        written=(written - virtual_ns) / 1e9 if written else None,
        ended=(ended - virtual_ns) / 1e9 if ended else None,
        processed=processed,
        marks=marks,
        table_part=part,
        table_delay=delay_ms / 1000 if table & 2 else None,
    )


@functools.lru_cache(maxsize=512)
def _fate(flags: int, *, is_lost: bool) -> tuple[MessageEnd, tuple[str, ...]]:
    """What became of a message, and its marks."""
    marks = tuple(name for bit, name in _MARKS.items() if flags & bit)
    return _end(flags, is_lost=is_lost), marks


def _end(flags: int, *, is_lost: bool) -> MessageEnd:
    # A request that timed out may have been answered too late, which nobody sees.
    if flags & _ANSWERED:
        return "answered"
    if flags & _TIMED_OUT:
        return "timed_out"
    if flags & _FAILED:
        return "failed"
    if is_lost:
        return "lost"
    return "written" if flags & _WRITTEN else ""
