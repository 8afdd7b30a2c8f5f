"""Ranks forked ahead: children of a server that wait until a world needs them.

A server forks them as a world ends, so that the ranks of the next need not all be forked while it
starts, when the processors are busiest. A spare has done what does not depend on its world, and
waits on a socket of its own for the rest. It ends when that socket closes, or its server dies.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from rpcprops.cluster import _rank, _wire
from rpcprops.cluster._spec import WorldSpec

#: Real seconds after which spares that no world needed are let go.
_IDLE_SECONDS = 5.0


class Spares:
    """The spares of one server; `become_child` undoes in a child what only the server needs."""

    def __init__(self, become_child: Callable[[int], None]) -> None:
        self.become_child = become_child
        self.sockets: dict[int, socket.socket] = {}
        self.used = 0.0

    def __contains__(self, pid: int) -> bool:
        return pid in self.sockets

    def keep(self, count: int) -> None:
        """Fork, or let go of, what makes it so many."""
        self.used = time.monotonic()
        while len(self.sockets) > count:
            _, sock = self.sockets.popitem()
            sock.close()
        while len(self.sockets) < count:
            self._fork()

    def keep_if_used(self) -> None:
        """Let go of all when no world needed them for a while."""
        if time.monotonic() - self.used > _IDLE_SECONDS:
            self.keep(0)

    def hand_out(self, spec: WorldSpec, rank: int, descriptors: Sequence[int]) -> int | None:
        """Make a spare this rank: its process, or None when there is no spare that lives.

        Args:
            descriptors: as for :func:`rpcprops.cluster._rank.main`.
        """
        self.used = time.monotonic()
        while self.sockets:
            pid = next(iter(self.sockets))
            # Sending to a spare that has died fails.
            with self.sockets.pop(pid) as sock, contextlib.suppress(OSError):
                _wire.send(sock, (spec, rank), descriptors)
                return pid
        return None

    def forget(self, pid: int) -> None:
        """Called for each process that was reaped."""
        if pid in self.sockets:
            self.sockets.pop(pid).close()

    def close(self) -> None:
        """Let go of all: in the server they end, in another child of it nothing hears of it."""
        while self.sockets:
            self.sockets.popitem()[1].close()

    def _fork(self) -> None:
        parent = os.getpid()
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                self.become_child(parent)
                _rank.prepare()
                _wait(theirs)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        self.sockets[pid] = ours


def _wait(sock: socket.socket) -> NoReturn:
    """The life of a spare: wait for a world, then be a rank of it."""
    reader = _wire.Reader(sock)
    try:
        spec, rank = reader.receive(descriptors=True)
    except EOFError:
        os._exit(0)
    sock.close()
    _rank.main(spec, rank, reader.descriptors)
