"""Runs a command so that nothing of it outlives us, however we end.

:func:`guarded` starts this file as a process of its own, the *guard*, which starts the command and
holds the reading end of a pipe whose writing end only we have. It closes when we are done and when
we die, of a SIGKILL too. The guard then sends the command a SIGINT, as Ctrl-C does, and kills what
is left of it after a second: whatever loses its parent below the guard becomes the guard's child
(PR_SET_CHILD_SUBREAPER). Should the guard be killed, the kernel kills the command
(PR_SET_PDEATHSIG).

The guard imports nothing of ours, so that it starts in a few hundredths of a second.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import shutil
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
#: Real seconds that a command which is to stop has for that.
_GRACE_SECONDS = 1.0
#: Real seconds within which the guard ends once it is told to.
_STOP_SECONDS = 5.0


@contextlib.contextmanager
def guarded(
    command: Sequence[str], *, scratch: Path | None = None, **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """Runs `command` until the block is left; then nothing of it runs any more.

    Args:
        scratch: a folder of the command's, which the guard removes if we die before it ends.
        options: for the ``Popen`` that the block gets.
    """
    import subprocess

    ours = [sys.executable, "-I", "-S", os.path.abspath(__file__)]
    theirs, writing = os.pipe()
    try:
        try:
            process = subprocess.Popen(
                [*ours, str(theirs), str(scratch or ""), *command], pass_fds=[theirs], **options
            )
        finally:
            os.close(theirs)
        try:
            yield process
        finally:
            os.close(writing)
            writing = -1
            try:
                process.wait(timeout=_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
    finally:
        if writing >= 0:
            os.close(writing)


def run(
    command: Sequence[str],
    *,
    timeout: float | None = None,
    scratch: Path | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """As ``subprocess.run``, of a command of which nothing outlives the call.

    Raises:
        subprocess.TimeoutExpired: it did not end within `timeout` real seconds.
    """
    import subprocess

    with guarded(command, scratch=scratch, **options) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def environment(**values: str) -> dict[str, str]:
    """Ours with these values, for a process that runs no code of the user's.

    The user's warning filters are for that: under PYTHONWARNINGS=error torch's own parts that warn
    could not be imported.
    """
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    return ours | values


def _start(command: list[str], prctl: Any) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # A handler does not survive what follows, unlike a signal that is ignored.
        signal.set_wakeup_fd(-1)
        if os.getppid() == parent:
            os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as children:
        return [int(word) for word in children.read().split()]


def _kill_all() -> None:
    """Kill what is below this process, until nothing is."""
    deadline = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            for pid in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def main() -> None:
    """The guard: arguments are the pipe, a folder or nothing, and the command."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    pipe, scratch, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    os.set_inheritable(pipe, False)
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    told: list[int] = []
    # What a terminal or `timeout` sends to the whole group reaches the command by itself, and us
    # from whoever started us, by the pipe.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: told.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = _start(command, prctl)
    status: int | None = None
    deadline: float | None = None
    while status is None:
        waiting = [woken] if deadline is not None else [woken, pipe]
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select(waiting, [], [], left)
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
        # Others that end here lost their parent.
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    status = ended[1]
        if status is None and pipe in ready:
            deadline = time.monotonic() + _GRACE_SECONDS
            if signal.SIGINT not in told:
                # A second one would cut short what the first began.
                os.kill(child, signal.SIGINT)
        elif deadline is not None and time.monotonic() >= deadline:
            break
    _kill_all()
    if deadline is not None and scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    if status is None:
        os._exit(128 + signal.SIGKILL)
    if os.WIFSIGNALED(status):
        # End as the command did, but leave its core to it.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL has no handler to take away
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


if __name__ == "__main__":
    main()
