"""Runs a command so that no process of it outlives us, however we end.

:func:`guarded` starts this file as a separate process, the *guard*. The guard starts the command,
and holds the reading end of a pipe whose writing end only we have. That end closes when we are done
and also when we die, even by SIGKILL. The guard then sends the command a SIGINT, as Ctrl-C does,
and after a second kills what is left of it: orphans below the guard become the guard's children. If
the guard is killed, the kernel kills the command.

:func:`scratch` makes a folder, and starts this file as a process that removes it once we and every
guard of ours are gone.

Both import nothing of ours except the watcher of the fork server, by its path: it kills in the same
way, and imports only the standard library. So they start in a few hundredths of a second.
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

#: Real seconds that a command gets to stop by itself.
_GRACE_SECONDS = 1.0
#: Real seconds within which the guard ends after it was told to.
_STOP_SECONDS = 5.0
#: The writing ends of the pipes that keep folders alive. A guard holds them too, as long as its
#: command may write there.
_keeping: list[int] = []


@contextlib.contextmanager
def guarded(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Run `command` until the block is left; then nothing of it runs any more.

    Args:
        options: for the ``Popen`` that the block gets.
    """
    import subprocess

    theirs, writing = os.pipe()
    passed = [theirs, *_keeping]
    try:
        try:
            process = subprocess.Popen(
                [*_ourselves("guard", passed), *command], pass_fds=passed, **options
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
    command: Sequence[str], *, timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """As ``subprocess.run``, but no process of the command outlives the call.

    Raises:
        subprocess.TimeoutExpired: the command did not end within `timeout` real seconds.
    """
    import subprocess

    with guarded(command, **options) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A new folder for temporary files. It is removed at the end, even if we are killed.

    Commands that were guarded in the block have ended before that.
    """
    import secrets
    import subprocess
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.gettempdir(), prefix + secrets.token_hex(8))
    theirs, writing = os.pipe()
    try:
        try:
            keeper = subprocess.Popen(
                [*_ourselves("keeper", [theirs]), str(folder)],
                pass_fds=[theirs],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # A Ctrl-C is for us, and must not end this process early.
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        _keeping.append(writing)
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            _keeping.remove(writing)
            os.close(writing)
            writing = -1
            with contextlib.suppress(subprocess.TimeoutExpired):
                keeper.wait(timeout=_STOP_SECONDS)
    finally:
        if writing >= 0:
            os.close(writing)


def _ourselves(role: str, passed: Sequence[int]) -> list[str]:
    """The command that runs this file, with the descriptors that it gets, as numbers."""
    pipes = ",".join(map(str, passed))
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), role, pipes]


def environment(**values: str) -> dict[str, str]:
    """Our environment plus these values, for a process that runs no code of the user's.

    The user's warning filters are removed: under PYTHONWARNINGS=error some parts of torch
    cannot be imported.
    """
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    return ours | values


def _watcher() -> Any:
    """The module of the fork server's watcher, loaded without its package."""
    import importlib.util

    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cluster", "_watcher.py")
    spec = importlib.util.spec_from_file_location("watcher", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _start(command: list[str], watcher: Any) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        watcher.die_with_parent(parent)
        # A handler does not survive the exec below, but an ignored signal does.
        signal.set_wakeup_fd(-1)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _guard(pipe: int, command: list[str]) -> None:
    """Run the command, end everything of it, and exit as it did."""
    watcher = _watcher()
    watcher.adopt_orphans()
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    told: list[int] = []
    # A Ctrl-C at a terminal goes to the whole group: it reaches the command directly, and our
    # starter tells us by the pipe. A SIGTERM may be for this process alone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: told.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = _start(command, watcher)
    status: int | None = None
    deadline: float | None = None
    while status is None:
        waiting = [woken] if deadline is not None else [woken, pipe]
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select(waiting, [], [], left)
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
        status = _reap(child)
        if status is None and signal.SIGTERM in told:
            told.remove(signal.SIGTERM)
            os.kill(child, signal.SIGTERM)
        if status is None and pipe in ready:
            deadline = time.monotonic() + _GRACE_SECONDS
            if signal.SIGINT not in told:
                # A second signal would cut short what the first one began.
                os.kill(child, signal.SIGINT)
        elif deadline is not None and time.monotonic() >= deadline:
            break
    watcher.kill_all_below()
    _leave_as(status)


def _reap(child: int) -> int | None:
    """Wait for children that have ended; the status of `child` if it is among them."""
    status: int | None = None
    # The others are orphans.
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                status = ended[1]
    return status


def _leave_as(status: int | None) -> None:
    """End as the command did; as if killed, if the command has no status."""
    if status is None:
        os._exit(128 + signal.SIGKILL)
    if os.WIFSIGNALED(status):
        # The command has written its own core file.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL can have no handler to remove
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _hold_folder(pipe: int, folder: str) -> None:
    """Remove the folder once no process can write into it any more."""
    os.read(pipe, 1)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """The arguments are the role, descriptors (the first is this process's pipe), and the rest."""
    role, passed, *rest = sys.argv[1:]
    pipes = [int(number) for number in passed.split(",")]
    for pipe in pipes:
        os.set_inheritable(pipe, False)
    if role == "guard":
        _guard(pipes[0], rest)
    else:
        _hold_folder(pipes[0], rest[0])


if __name__ == "__main__":
    main()
