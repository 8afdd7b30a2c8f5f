"""The test process's end of a server's socket."""

from __future__ import annotations

import select
import socket
import time
from dataclasses import dataclass, field

from rpcprops.cluster import _wire
from rpcprops.cluster._spec import Hello


@dataclass
class Peer:
    """One of our server processes, and the messages that have come from it."""

    sock: socket.socket
    reader: _wire.Reader
    clusters: int = 0
    hello: Hello | None = None
    forked: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, tuple[int, float]] = field(default_factory=dict)
    #: Why a world could not be forked, by its number; under 0, why this server could not start.
    refused: dict[int, str] = field(default_factory=dict)

    @classmethod
    def on(cls, sock: socket.socket) -> Peer:
        return cls(sock, _wire.Reader(sock))

    def read(self) -> None:
        """Read what has arrived. If the server is gone, ``reader.closed`` is true afterwards."""
        self.reader.fill()
        for message in self.reader.messages():
            if message[0] == "hello":
                self.hello = message[1]
            elif message[0] == "forked":
                self.forked[message[1]] = message[2]
                # An earlier process with one of these numbers is of no interest any more.
                for pid in message[2]:
                    self.ended.pop(pid, None)
            elif message[0] == "refused":
                self.refused[message[1]] = message[2]
            elif message[0] == "ended":
                self.ended[message[1]] = (message[2], message[3])

    def close(self) -> None:
        """Let the server go: it kills what it forked, and exits."""
        self.sock.close()
        self.reader.closed = True

    def is_gone(self) -> bool:
        """Whether the server has died; reads what it said before."""
        while not self.reader.closed and self._readable(0.0):
            self.read()
        return self.reader.closed

    def wait_hello(self, seconds: float) -> Hello | None:
        deadline = time.monotonic() + seconds
        while self.hello is None and not self.reader.closed:
            left = deadline - time.monotonic()
            if left <= 0 or not self._readable(left):
                break
            self.read()
        return self.hello

    def _readable(self, seconds: float) -> bool:
        # Not select(): it cannot name a descriptor above 1023.
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return bool(poller.poll(seconds * 1000))
