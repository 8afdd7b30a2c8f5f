"""The watcher: the parent of the fork server. It makes sure that nothing of the server is left.

A process that a rank starts may leave the rank's session and outlive the rank. It is then
re-parented to the nearest process above that adopts orphans: its server if that lives, else the
watcher. The watcher kills all processes below it when the server has ended, when the test process
closes the watcher's standard input, and when the test process has died.

It is forked before anything heavy is imported, and costs a few megabytes. The test process runs
this file by its path for the same reason, so it may import the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Container
from posix import _exit

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
#: Real seconds between checks that the test process lives: a fork of it may keep stdin open.
_PARENT_CHECK_SECONDS = 1.0
#: Real seconds after which a process is left that cannot be killed (another user's, or stuck).
KILL_SECONDS = 2.0
#: As in a shell: the watcher exits with this plus the number of the signal that killed the server.
KILLED = 128

_libc = ctypes.CDLL(None)


def die_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel for a signal when the parent dies; exit if it is already dead."""
    _libc.prctl(_PR_SET_PDEATHSIG, by, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent dies."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_children(but: Container[int] = ()) -> bool:
    """Kill the children of this process, which has one thread; whether there were any."""
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as children:
        pids = [int(word) for word in children.read().split()]
    chosen = [pid for pid in pids if pid not in but]
    for pid in chosen:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return bool(chosen)


def kill_all_below() -> None:
    """Kill and reap all that is below this process: orphans come here as their parents die."""
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        kill_children()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def main(server_socket: int, test_process: int) -> None:
    """Fork the process that becomes the fork server, in which this returns, and watch it."""
    adopt_orphans()
    watcher = os.getpid()
    server = os.fork()
    if server == 0:
        # With a signal that it can handle: nobody else would kill what is below it.
        die_with_parent(watcher, signal.SIGTERM)
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        return
    os.close(server_socket)
    code, number = _watch(server, test_process)
    kill_all_below()
    if number:
        signal.signal(number, signal.SIG_DFL)
        os.kill(watcher, number)
    # coverage.py can make os._exit write a file.
    _exit(code)


def _watch(server: int, test_process: int) -> tuple[int, int]:
    """Wait until all is over; the exit code that says why, and the signal that ended the wait."""
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(wake_read, select.POLLIN)
    while os.getppid() == test_process:
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == server:
                    code = os.waitstatus_to_exitcode(ended[1])
                    return (code if code >= 0 else KILLED - code), 0
        except ChildProcessError:
            return 1, 0
        for fd, _ in poller.poll(_PARENT_CHECK_SECONDS * 1000):
            if fd == 0:
                return 0, 0
            asked = [number for number in os.read(wake_read, 4096) if number != signal.SIGCHLD]
            if asked:
                return 0, asked[0]
    return 0, 0
