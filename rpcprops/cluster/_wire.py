"""Messages between the test process, the fork server and the ranks: length, then a pickle.

Only sockets that were inherited carry them (no address, no listener), so both ends are ours.
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

_HEADER = struct.Struct("!I")
#: The longest call or result in bytes: what the header can express, less the rest of the message.
MAX_PAYLOAD = 2**32 - 2**16
_CHUNK = 1 << 16
#: More descriptors than a fork of sixteen ranks needs.
_MAX_DESCRIPTORS = 64


def pack(message: object) -> bytes:
    """The bytes of a message on the socket."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(len(body)) + body


def send(sock: socket.socket, message: object, descriptors: Sequence[int] = ()) -> None:
    """Send one message, with descriptors for the other process if any.

    Raises:
        OSError: the other end is gone.
    """
    data = pack(message)
    if descriptors:
        sent = socket.send_fds(sock, [data], list(descriptors))
        data = data[sent:]
    if data:
        sock.sendall(data)


class Writer:
    """Messages on their way to a socket that does not block.

    Bytes that the socket does not take wait here, in order, and continue where they stopped. So a
    later message never cuts an earlier one off.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._waiting: deque[memoryview] = deque()

    @property
    def is_waiting(self) -> bool:
        """Whether some bytes have not been sent yet."""
        return bool(self._waiting)

    def put(self, message: object) -> None:
        """Append a message to those that wait."""
        self.put_packed(pack(message))

    def put_packed(self, packed: bytes) -> None:
        """Append a message, as :func:`pack` gives it, to those that wait."""
        self._waiting.append(memoryview(packed))

    def flush(self) -> None:
        """Send what the socket takes now. When the other end is gone, drop all that waits."""
        try:
            while self._waiting:
                sent = self.sock.send(self._waiting[0])
                if sent < len(self._waiting[0]):
                    self._waiting[0] = self._waiting[0][sent:]
                else:
                    self._waiting.popleft()
        except BlockingIOError:
            pass
        except OSError:
            # The wait for the answer will notice that the other end is gone.
            self._waiting.clear()


class Reader:
    """Splits the bytes that arrive on a socket into messages."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self.descriptors: list[int] = []
        self.closed = False

    def fill(self, *, descriptors: bool = False) -> bool:
        """Read once; False when the other end is gone (kept in `closed`).

        A read from a non-blocking socket that has no data also returns True.
        """
        try:
            if descriptors:
                data, fds, _, _ = socket.recv_fds(self.sock, _CHUNK, _MAX_DESCRIPTORS)
                self.descriptors += fds
            else:
                data = self.sock.recv(_CHUNK)
        except BlockingIOError:
            return True
        except ConnectionError:
            data = b""
        if not data:
            self.closed = True
            return False
        self.buffer += data
        return True

    def messages(self) -> Iterator[Any]:
        """The complete messages that have arrived and were not returned before."""
        while len(self.buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self.buffer)
            end = _HEADER.size + length
            if len(self.buffer) < end:
                return
            body = bytes(self.buffer[_HEADER.size : end])
            del self.buffer[:end]
            yield pickle.loads(body)

    def receive(self, *, descriptors: bool = False) -> Any:
        """Wait for the next message, and return it.

        Raises:
            EOFError: the other end is gone.
        """
        while True:
            for message in self.messages():
                return message
            if not self.fill(descriptors=descriptors):
                raise EOFError
