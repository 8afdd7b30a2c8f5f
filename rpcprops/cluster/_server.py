"""The fork server: imports torch once, stays single-threaded, and forks ranks on request.

:func:`main` serves the socket that the process inherited. For the modules
of a test it forks a child of itself (a *module server*) that imports them once and then serves its
own socket in the same way. Whoever forks a rank also reaps it and reports how it ended.

Nothing outlives the test process: a server whose socket closes kills its ranks and leaves, the
kernel kills the children of a server that dies (PR_SET_PDEATHSIG), and what a rank leaves behind is
re-parented to its server (PR_SET_CHILD_SUBREAPER), which kills it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

import torch

from rpcprops import clock
from rpcprops.cluster import _finder, _pages, _rank, _warm, _wire
from rpcprops.cluster._spares import Spares
from rpcprops.cluster._spec import PROBE_SAYS, Hello, WorldSpec

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
#: A socket that a fork of the test process still holds never closes; its parent still dies.
_PARENT_CHECK_SECONDS = 5.0
#: Less than the test process waits for its server to leave.
_KILL_SECONDS = 4.0
_libc = ctypes.CDLL(None)


def threads_here() -> int:
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies, and leave if that has happened."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


class Server:
    """Serves one socket: forks, kills and reaps ranks; the root also forks module servers."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = _wire.Reader(sock)
        self.parent = os.getppid()
        self.private: tuple[int, ...] = ()
        self.ranks: set[int] = set()
        #: Those of them that live, by the number of their world.
        self.worlds: dict[int, set[int]] = {}
        self.module_servers: set[int] = set()
        self.spares = Spares(self.become_child)

    def hello(self, error: str = "", *, pool: bool = False) -> None:
        threads = threads_here() - 1
        unsafe = f"starts {threads} thread{'s' if threads > 1 else ''}" if threads else ""
        if pool:
            unsafe = "calls torch.set_num_threads, which makes a thread pool"
        gc.collect()
        gc.freeze()
        _pages.collapse()
        _wire.send(
            self.sock,
            (
                "hello",
                Hello(os.getpid(), str(torch.__version__), unsafe, error),
            ),
        )

    def serve(self) -> None:
        """Until the socket closes; leaves no process behind."""
        try:
            self.serve_socket()
        except (BrokenPipeError, ConnectionResetError):
            pass  # The test process died while we told it something.
        finally:
            self.kill_all()

    def serve_socket(self) -> None:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with selectors.DefaultSelector() as selector:
            selector.register(self.sock, selectors.EVENT_READ)
            selector.register(wake_read, selectors.EVENT_READ)
            self.private = (wake_read, wake_write, selector.fileno())
            while os.getppid() == self.parent:
                for key, _ in selector.select(_PARENT_CHECK_SECONDS):
                    if key.fileobj is self.sock:
                        if not self.reader.fill(descriptors=True):
                            return
                        for message in self.reader.messages():
                            self.handle(message)
                    else:
                        with contextlib.suppress(BlockingIOError):
                            os.read(wake_read, 4096)
                self.reap()
                self.spares.keep_if_used()

    def handle(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == "fork":
            self.fork_world(message[1], message[2])
        elif kind == "spares":
            self.spares.keep(message[1])
        elif kind == "kill":
            for pid in tuple(self.worlds.get(message[1], ())):
                self.kill(pid)
        elif kind == "stacks":
            for pid in message[1]:
                if pid in self.ranks:
                    os.kill(pid, signal.SIGUSR1)
        elif kind == "modules":
            self.fork_module_server(message[1])
        elif kind == "probe":
            self.fork_probe(message[1])

    def take_descriptors(self, count: int) -> list[int]:
        taken = self.reader.descriptors[:count]
        del self.reader.descriptors[:count]
        return taken

    def fork_world(self, number: int, spec: WorldSpec) -> None:
        """Spares, then forks, become the ranks.

        Descriptors: a store, then channels, then logs, then those of a network.
        """
        size = len(spec.names)
        store_fd, *rest = self.take_descriptors(1 + 2 * size + spec.networks)
        channels, logs, networks = rest[:size], rest[size : 2 * size], rest[2 * size :]
        pids: list[int] = []
        for rank in range(size):
            given = (channels[rank], logs[rank], store_fd, *networks)
            pid = self.spares.hand_out(spec, rank, given)
            if pid is None:
                parent = os.getpid()
                pid = os.fork()
                if pid == 0:
                    self.become_child(parent)
                    for fd in [*channels, *logs]:
                        if fd not in given:
                            os.close(fd)
                    _rank.main(spec, rank, given)
            pids.append(pid)
            self.ranks.add(pid)
        for fd in [store_fd, *channels, *logs, *networks]:
            os.close(fd)
        self.worlds[number] = set(pids)
        _wire.send(self.sock, ("forked", number, pids))

    def fork_module_server(self, modules: _finder.ModuleMap) -> None:
        """Fork a server that has the modules of a test imported; descriptors: its socket."""
        (fd,) = self.take_descriptors(1)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self.become_child(parent)
            sys.exit(_serve_modules(socket.socket(fileno=fd), modules))
        os.close(fd)
        self.module_servers.add(pid)

    def fork_probe(self, rate: float) -> None:
        """Fork a process that lets its clock be measured; descriptors: its socket."""
        (fd,) = self.take_descriptors(1)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self.become_child(parent)
                clock.set_rate(rate)
                clock.probe(fd)
                code = 0
            except clock.ClockError as error:
                # The test process sees only that the probe has ended, and reads why in our log.
                print(f"{PROBE_SAYS}{error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        os.close(fd)
        self.module_servers.add(pid)

    def become_child(self, parent: int) -> None:
        """Undo, in a forked child, what only the server needs."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with_parent(parent)
        # Descriptors of the next message may have come with the last one.
        for fd in [*self.private, *self.reader.descriptors]:
            os.close(fd)
        self.sock.close()
        self.spares.close()

    def kill(self, pid: int) -> None:
        if pid in self.ranks:
            # Only a child that was not reaped yet: its number cannot have been given away.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_all(self) -> None:
        """Kill all that is below this process. What a rank left behind comes here as it dies."""
        for pid in self.ranks:
            self.kill(pid)
        self.ranks.clear()
        self.module_servers.clear()
        self.spares.close()
        deadline = time.monotonic() + _KILL_SECONDS
        while time.monotonic() < deadline:
            self.kill_strangers()
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.002)

    def reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.ranks:
                # What it started and did not stop; the group is still ours to name.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                self.ranks.remove(pid)
                for world in self.worlds.values():
                    world.discard(pid)
                self.worlds = {number: world for number, world in self.worlds.items() if world}
                seconds = usage.ru_utime + usage.ru_stime
                _wire.send(self.sock, ("ended", pid, status, seconds))
            self.module_servers.discard(pid)
            self.spares.forget(pid)
            if not self.ranks:
                self.kill_strangers()

    def kill_strangers(self) -> None:
        """Kill processes that ranks left behind in groups of their own."""
        tid = os.getpid()
        with contextlib.suppress(OSError):
            with open(f"/proc/self/task/{tid}/children", encoding="ascii") as children:
                pids = [int(word) for word in children.read().split()]
            for pid in pids:
                if not any(pid in ours for ours in (self.ranks, self.module_servers, self.spares)):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def _serve_modules(sock: socket.socket, modules: _finder.ModuleMap) -> int:
    error = ""
    pools: list[int] = []
    set_num_threads = torch.set_num_threads

    def watched(num: int) -> None:
        pools.append(num)
        set_num_threads(num)

    # The pool has no thread of its own when num is 1, and ranks still abort when they find it.
    setattr(torch, "set_num_threads", watched)  # noqa: B010  (it is typed as a builtin)
    try:
        _finder.install(modules)
        _finder.import_first(modules)
    except BaseException:
        error = traceback.format_exc()
    finally:
        torch.set_num_threads = set_num_threads
    server = Server(sock)
    server.hello(error, pool=bool(pools))
    server.serve()
    return 0


def main(fd: int) -> NoReturn:
    """Entry point of the server process."""
    # Set while torch was imported. It follows the thread that started us, which may end before its
    # process does: from here on a socket that closes says so.
    _libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
    # No torch.set_num_threads: it makes a thread pool, and forks of a process that has one abort.
    # The import of torch may leave a thread that is about to end.
    for _ in range(50):
        if threads_here() == 1:
            break
        time.sleep(0.01)
    _warm.warm_up()
    server = Server(socket.socket(fileno=fd))
    server.hello()
    server.serve()
    # No interpreter shutdown: there is nothing to clean, and torch's takes its time.
    os._exit(0)
