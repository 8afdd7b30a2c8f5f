"""Pre-forked ranks: children of a server that wait until a world needs them.

A server forks them when a world ends, so that fewer ranks must be forked while the next world
starts, when the processors are busiest. A pre-forked rank has done what does not depend on its
world, and waits on a socket of its own for the rest. It exits when that socket closes, or its
server dies.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from posix import _exit
from typing import NoReturn

from rpcprops.cluster import _wire, rank_process
from rpcprops.cluster._spec import WorldSpec

#: Real seconds for which no rank is pre-forked after the kernel has refused a fork.
_PAUSE_SECONDS = 5.0


class PreForked:
    """The pre-forked ranks of a server; `fork_child` forks a process that runs a function."""

    def __init__(self, fork_child: Callable[[Callable[[], int]], int]) -> None:
        self.fork_child = fork_child
        self.sockets: dict[int, socket.socket] = {}
        self.refused = float("-inf")

    def fork_ahead(self, count: int) -> None:
        """Fork or drop ranks until there are `count`; fewer if the kernel refuses to fork."""
        while len(self.sockets) > count:
            _, sock = self.sockets.popitem()
            sock.close()
        if time.monotonic() - self.refused < _PAUSE_SECONDS:
            return
        try:
            while len(self.sockets) < count:
                self._fork()
        except OSError:
            # A world that starts needs the remaining processes more. It forks for itself.
            self.refused = time.monotonic()

    def hand_out(self, spec: WorldSpec, rank: int, descriptors: Sequence[int]) -> int | None:
        """Make a pre-forked process this rank; its process number, or None if none is alive.

        Args:
            descriptors: as for :func:`rpcprops.cluster.rank_process.main`.
        """
        while self.sockets:
            pid = next(iter(self.sockets))
            # Sending to a pre-forked rank that has died fails.
            with self.sockets.pop(pid) as sock, contextlib.suppress(OSError):
                _wire.send(sock, (spec, rank), descriptors)
                return pid
        return None

    def forget(self, pid: int) -> None:
        """Called for each process that was reaped."""
        if pid in self.sockets:
            self.sockets.pop(pid).close()

    def close(self) -> None:
        """Close their sockets: in the server this ends them, in a child it changes nothing."""
        while self.sockets:
            self.sockets.popitem()[1].close()

    def _fork(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.sockets[self.fork_child(lambda: _wait(ours, theirs))] = ours
            except OSError:
                ours.close()
                raise


def _wait(servers: socket.socket, sock: socket.socket) -> NoReturn:
    """The life of a pre-forked rank: close the server's end, wait for a world, run as its rank."""
    servers.close()
    rank_process.prepare()
    reader = _wire.Reader(sock)
    try:
        spec, rank = reader.receive(descriptors=True)
    except EOFError:
        # Not os._exit: see the end of a server.
        _exit(0)
    sock.close()
    rank_process.main(spec, rank, reader.descriptors)
