"""The fork server: imports torch once, stays single-threaded, and forks ranks on request.

:func:`main` serves the socket that the process inherited. For the modules of a test it forks a
child of itself (a *module server*), which imports them once and then serves its own socket in the
same way. The process that forks a rank also reaps it and reports how it ended.

Nothing outlives the test process: a server whose socket closes kills its ranks and exits. The
kernel kills the children of a server that dies (PR_SET_PDEATHSIG). What a rank leaves behind is
re-parented to its server (PR_SET_CHILD_SUBREAPER), which kills it. Where that server has died, the
server or the watcher above it does so (:mod:`rpcprops.cluster._watcher`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from posix import _exit
from typing import Any, NoReturn

import torch

from rpcprops import agents, clock
from rpcprops.cluster import (
    _injection,
    _limits,
    _warm,
    _watcher,
    _wire,
    finder,
    pages,
    rank_process,
)
from rpcprops.cluster._preforked import PreForked
from rpcprops.cluster._spec import PROBE_SAYS, Hello, WorldSpec
from rpcprops.errors import MachineCannot

#: Real seconds between two checks of an idle server that its parent lives.
_IDLE_CHECK_SECONDS = 2.5
#: After so many checks with nothing to do between them, the pre-forked ranks are let go. One is not
#: enough: a machine that stood still looks idle.
_IDLE_CHECKS = 2
#: On these signals a server kills all processes below it before it ends.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def threads_here() -> int:
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))


class Server:
    """Serves one socket: forks, kills and reaps ranks; the root also forks module servers."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = _wire.Reader(sock)
        self.parent = os.getppid()
        self.private: tuple[int, ...] = ()
        self.ranks: set[int] = set()
        #: The ranks that live, by the number of their world.
        self.worlds: dict[int, set[int]] = {}
        self.module_servers: set[int] = set()
        self.probes: set[int] = set()
        self.preforked = PreForked(self.fork_child)
        #: Whether a module server has died: its orphans then come to this process.
        self.has_orphans = False
        self.handlers: dict[int, Any] = {}

    def hello(self, error: str = "", *, pool: bool = False) -> None:
        threads = threads_here() - 1
        unsafe = f"starts {threads} thread{'s' if threads > 1 else ''}" if threads else ""
        if pool:
            unsafe = "calls torch.set_num_threads, which makes a thread pool"
        gc.collect()
        gc.freeze()
        pages.collapse()
        _wire.send(
            self.sock,
            (
                "hello",
                Hello(os.getpid(), str(torch.__version__), unsafe, error, _injection.problem()),
            ),
        )

    def serve(self) -> NoReturn:
        """Serve until the socket closes or a signal ends this process; leaves no process behind."""
        code = number = 0
        try:
            number = self.serve_socket()
        except (BrokenPipeError, ConnectionResetError):
            pass  # The test process died while we sent it something.
        except BaseException:
            traceback.print_exc()
            code = 1
        try:
            self.kill_all()
            if number:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        finally:
            # Skip the interpreter's shutdown: nothing needs it, and torch's takes long. Where
            # coverage.py is told to, it makes os._exit write a file, which is for ranks only.
            _exit(code)

    def serve_socket(self) -> int:
        """Serve until all is over; the number of the signal that ended it, 0 for none."""
        _watcher.adopt_orphans()
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        # The loop below sees the effect of a signal handler between its steps, by the wake-up.
        for handled in (signal.SIGCHLD, *_STOP_SIGNALS):
            before = signal.signal(handled, lambda *_: None)
            self.handlers[handled] = signal.SIG_DFL if before is None else before
        with selectors.DefaultSelector() as selector:
            selector.register(self.sock, selectors.EVENT_READ)
            selector.register(wake_read, selectors.EVENT_READ)
            self.private = (wake_read, wake_write, selector.fileno())
            idle = 0
            while os.getppid() == self.parent:
                ready = selector.select(_IDLE_CHECK_SECONDS)
                idle = 0 if ready else idle + 1
                for key, _ in ready:
                    if key.fileobj is self.sock:
                        if not self.reader.fill(descriptors=True):
                            return 0
                        for message in self.reader.messages():
                            self.handle(message)
                    else:
                        for number in os.read(wake_read, 4096):
                            if number in _STOP_SIGNALS:
                                return number
                self.reap()
                if idle >= _IDLE_CHECKS:
                    self.preforked.fork_ahead(0)
        return 0

    def handle(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == "fork":
            self.fork_world(message[1], message[2])
        elif kind == "preforked":
            self.preforked.fork_ahead(message[1])
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
        """Make pre-forked processes the ranks, and fork the ranks that are still missing.

        The descriptors are: a store, the channels, the logs, and those of a network and a ledger.
        """
        size = len(spec.names)
        store_fd, *rest = self.take_descriptors(1 + 2 * size + spec.networks + spec.ledgers)
        channels, logs, shared = rest[:size], rest[size : 2 * size], rest[2 * size :]
        pids: list[int] = []
        problem = self.load_agent(spec.agent)
        try:
            for rank in range(size if not problem else 0):
                given = (channels[rank], logs[rank], store_fd, *shared)
                pid = self.preforked.hand_out(spec, rank, given)
                if pid is None:
                    others = [fd for fd in (*channels, *logs) if fd not in given]
                    pid = self.fork_child(functools.partial(_be_rank, spec, rank, given, others))
                pids.append(pid)
                self.ranks.add(pid)
        except OSError as error:
            problem = f"could not fork rank {len(pids)} of {size}: {_limits.explain(error)}"
        for fd in [store_fd, *channels, *logs, *shared]:
            os.close(fd)
        self.worlds[number] = set(pids)
        if problem:
            for pid in pids:
                self.kill(pid)
            _wire.send(self.sock, ("refused", number, problem))
        else:
            _wire.send(self.sock, ("forked", number, pids))

    def load_agent(self, name: str) -> str:
        """Let every rank that is forked from now on have the agent; why that failed, or empty.

        One that a module of the test registers may be known in ranks only.
        """
        try:
            if name in agents.names():
                agents.named(name).make_known()
        except MachineCannot as error:
            return str(error)
        return ""

    def fork_module_server(self, modules: finder.ModuleMap) -> None:
        """Fork a server that imports the modules of a test; the descriptor is its socket."""
        (fd,) = self.take_descriptors(1)
        with socket.socket(fileno=fd) as sock:
            try:
                pid = self.fork_child(lambda: _serve_modules(sock, modules))
            except OSError as error:
                with contextlib.suppress(OSError):
                    _wire.send(sock, ("refused", 0, _limits.explain(error)))
            else:
                self.module_servers.add(pid)
                # If it dies before its hello, this says whose end is reported here.
                with contextlib.suppress(OSError):
                    _wire.send(sock, ("forked", 0, [pid]))

    def fork_probe(self, rate: float) -> None:
        """Fork a process whose clock can be measured; the descriptor is its socket."""
        (fd,) = self.take_descriptors(1)

        def show_clock() -> int:
            try:
                clock.set_rate(rate)
                clock.probe(fd)
            except clock.ClockError as error:
                # The test process only sees that the probe has ended. It reads why in our log.
                print(f"{PROBE_SAYS}{error}", file=sys.stderr, flush=True)
                return 1
            return 0

        try:
            self.probes.add(self.fork_child(show_clock))
        except OSError as error:
            why = f"it could not be forked: {_limits.explain(error)}"
            print(f"{PROBE_SAYS}{why}", file=sys.stderr, flush=True)
        os.close(fd)

    def fork_child(self, life: Callable[[], int]) -> int:
        """Fork a process that runs `life` and exits with its code; returns the process number.

        Raises:
            OSError: the kernel refuses.
        """
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        # A child must never return through the frames of its parent: they would end the ranks of
        # the parent as if they were the child's.
        try:
            self.become_child(parent)
            code = life()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def become_child(self, parent: int) -> None:
        """Undo, in a forked child, what only the server needs."""
        signal.set_wakeup_fd(-1)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        _watcher.die_with_parent(parent)
        # Descriptors for the next message may have come with the last one.
        for fd in [*self.private, *self.reader.descriptors]:
            os.close(fd)
        self.sock.close()
        self.preforked.close()
        for processes in (self.ranks, self.worlds, self.module_servers, self.probes):
            processes.clear()

    def kill(self, pid: int) -> None:
        if pid in self.ranks:
            # Only a child that was not reaped: the kernel cannot have reused its number.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_all(self) -> None:
        """Kill all that is below this process. Orphans of a rank come here when it dies."""
        for pid in self.ranks:
            self.kill(pid)
        self.preforked.close()
        _watcher.kill_all_below()

    def reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.ranks:
                # What the rank started and did not stop. Its group number is still in use.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                self.ranks.remove(pid)
                for world in self.worlds.values():
                    world.discard(pid)
                self.worlds = {number: world for number, world in self.worlds.items() if world}
                seconds = usage.ru_utime + usage.ru_stime
                _wire.send(self.sock, ("ended", pid, status, seconds))
            if pid in self.module_servers:
                self.module_servers.remove(pid)
                # A server that was told to exit has killed what was below it.
                self.has_orphans = self.has_orphans or status != 0
                _wire.send(self.sock, ("ended", pid, status, 0.0))
            self.probes.discard(pid)
            self.preforked.forget(pid)
            if self.has_orphans or not self.ranks:
                self.has_orphans = self.kill_strangers()

    def kill_strangers(self) -> bool:
        """Kill processes that ranks left behind in other groups; whether there were any."""
        ours = {*self.ranks, *self.module_servers, *self.probes, *self.preforked.sockets}
        return _watcher.kill_children(but=ours)


def _be_rank(spec: WorldSpec, rank: int, given: Sequence[int], others: Sequence[int]) -> NoReturn:
    """The life of a rank that was forked for its world, with the descriptors of all ranks."""
    for fd in others:
        os.close(fd)
    rank_process.main(spec, rank, given)


def _serve_modules(sock: socket.socket, modules: finder.ModuleMap) -> NoReturn:
    error = ""
    pools: list[int] = []
    set_num_threads = torch.set_num_threads

    def watched(num: int) -> None:
        pools.append(num)
        set_num_threads(num)

    # When num is 1, the pool has no thread of its own, and ranks still abort on finding it.
    setattr(torch, "set_num_threads", watched)  # noqa: B010  (it is typed as a builtin)
    try:
        finder.install(modules)
        finder.import_first(modules)
    except BaseException:
        error = traceback.format_exc()
    finally:
        torch.set_num_threads = set_num_threads
    server = Server(sock)
    server.hello(error, pool=bool(pools))
    server.serve()


def main(fd: int) -> NoReturn:
    """Entry point of the server process."""
    # No torch.set_num_threads: it makes a thread pool, and forks of a process with one abort.
    # The import of torch may leave a thread that is about to end.
    for _ in range(50):
        if threads_here() == 1:
            break
        time.sleep(0.01)
    _warm.warm_up()
    server = Server(socket.socket(fileno=fd))
    server.hello()
    server.serve()
