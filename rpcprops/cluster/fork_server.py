"""The fork server as the test process sees it: how it starts, dies and is stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from rpcprops.cluster import _limits, _watcher, _wire
from rpcprops.cluster._peer import Peer
from rpcprops.cluster._spec import Hello
from rpcprops.cluster.logs import RankLog
from rpcprops.errors import HarnessError, MachineCannot, UsageError

#: Real seconds that a server may take for its imports.
START_SECONDS = 120.0
#: Real seconds that the watcher may take to kill all processes below it, and to exit.
_END_SECONDS = _watcher.KILL_SECONDS + 1.0
#: What modules of tests import. Where the test process has it, they will: once, in the fork server.
_OF_TESTS = ("hypothesis", "pytest")


def server_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ`, plus what a process needs that imports torch and forks ranks."""
    return {
        **environ,
        # A thread of numpy's OpenBLAS, or of an OpenMP pool, would not survive a fork.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # Nor would the thread of a CUDA driver: it starts when torch's test modules look for
        # devices. These two hide the devices, and let torch look without starting the driver.
        "CUDA_VISIBLE_DEVICES": "",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # RPC executes pickled code: listen on loopback only.
        "TP_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
        # "Send try N failed" is the only sign of an injected failure, and it is an INFO line.
        "TORCH_CPP_LOG_LEVEL": "INFO",
        "PYTHONUNBUFFERED": "1",
    }


class ForkServer:
    """The fork server and its watcher.

    Attributes:
        torch_version: version of the torch that it has imported, empty before the first start.
        arming_problem: why no fault can be armed while its ranks run; empty if that is possible.
        watcher: the process that watches it and is its parent, None while there is none.
    """

    def __init__(self) -> None:
        self.torch_version = ""
        self.arming_problem = ""
        self.watcher: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it; a fork of that process must not stop it
        self._peer: Peer | None = None
        self._last_death = ""
        self._log: RankLog | None = None
        self._begun_with: tuple[str, dict[str, str]] | None = None

    @property
    def is_started(self) -> bool:
        """Whether it was started and not stopped since; it may have died."""
        return self._peer is not None and self._begun_with is None

    def begin(self, environ: Mapping[str, str]) -> None:
        """Start the process and do not wait: it imports torch while this process does other work.

        Raises:
            MachineCannot: it cannot be started.
        """
        if self._peer is None:
            self._popen(environ)
            self._begun_with = _surroundings(environ)

    @property
    def is_gone(self) -> bool:
        """Whether it was started and has died."""
        return self._peer is not None and self._peer.is_gone()

    def start(self, environ: Mapping[str, str]) -> None:
        """Start the process, and wait until it has imported torch.

        Raises:
            MachineCannot: it cannot be started, or torch cannot be imported.
        """
        if self._begun_with != _surroundings(environ):
            self.stop()  # what it has begun in is not what it must run in
            self._popen(environ)
        self._begun_with = None
        hello = self._wait_hello()
        self.torch_version = hello.torch_version
        self.arming_problem = hello.arming_problem
        if hello.unsafe:
            msg = f"importing torch {hello.unsafe} in the fork server, so forking is unsafe."
            raise MachineCannot(msg)

    def _popen(self, environ: Mapping[str, str]) -> None:
        """Start the watcher, which forks the server before anything heavy is imported."""
        package_home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        try:
            ours, theirs = socket.socketpair()
            self._peer = Peer.on(ours)
            with theirs:
                self._log = RankLog("rpcprops-server")
                early = [name for name in _OF_TESTS if name in sys.modules]
                code = (
                    f"import sys; sys.path.append({package_home!r})\n"
                    f"names = {{'__name__': 'watcher'}}; path = {_watcher.__file__!r}\n"
                    f"exec(compile(open(path, 'rb').read(), path, 'exec'), names)\n"
                    f"names['main']({theirs.fileno()}, {os.getpid()}); del names, path\n"
                    f"from rpcprops.cluster import _limits; _limits.raise_soft_limits()\n"
                    # What an import makes stays: to look for garbage in it takes 0.3 s with torch.
                    f"import gc; gc.disable(); from rpcprops.cluster._server import main\n"
                    f"list(map(__import__, {early!r}))\n"
                    # Once it is enabled, the next object would make it look through all of them.
                    f"gc.freeze(); gc.enable(); del gc; main({theirs.fileno()})"
                )
                self.watcher = subprocess.Popen(
                    [sys.executable, "-P", "-c", code],
                    bufsize=0,
                    env=server_environment(environ),
                    # Held open as long as the server is wanted.
                    stdin=subprocess.PIPE,
                    stdout=self._log.fd,
                    stderr=self._log.fd,
                    pass_fds=[theirs.fileno()],
                    # A Ctrl-C at the terminal is for the test process, which then stops us.
                    start_new_session=True,
                )
        except OSError as error:
            msg = f"the fork server could not be started: {_limits.explain(error)}"
            raise MachineCannot(msg) from error
        self._owner = os.getpid()

    def _wait_hello(self) -> Hello:
        assert self._peer is not None
        hello = self._peer.wait_hello(START_SECONDS)
        if hello is not None:
            return hello
        text = self._log.text() if self._log else ""
        if self._peer.reader.closed:
            end = self._describe_end()
        else:
            end = f"it was not ready after {START_SECONDS:g} s"
        last = text.strip().splitlines()[-1:] or ["it printed nothing"]
        msg = f"the fork server did not start: {last[0]} ({end})\n{text}"
        raise MachineCannot(msg)

    def stop(self) -> None:
        """End the server and all that it forked; may be called again."""
        self._begun_with = None
        if self._peer is not None:
            self._peer.close()
            self._peer = None
        if self.watcher is not None:
            self._end_watcher(self.watcher)
            self.watcher = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _end_watcher(self, process: subprocess.Popen[bytes]) -> None:
        """Have the watcher kill all that is below it, and wait until it has."""
        assert process.stdin is not None
        if os.getpid() != self._owner:
            process.stdin.close()
            return
        with contextlib.suppress(OSError), process.stdin:
            # Closing stdin is not enough if a fork of this process also holds it open.
            process.stdin.write(b"\n")
        try:
            process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=_END_SECONDS)

    def peer(self) -> Peer:
        """The socket of the server.

        Raises:
            UsageError: it is not running.
            HarnessError: it has died.
        """
        if self._peer is None:
            msg = "the ClusterServer is not running; use it in a with block, or call start()."
            raise UsageError(msg)
        if self._peer.is_gone():
            raise self.died()
        return self._peer

    def ask(self, message: tuple[Any, ...]) -> socket.socket:
        """Send the server a message and one end of a new socket pair; returns the other end."""
        peer = self.peer()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                _wire.send(peer.sock, message, [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise self.died() from error
        return ours

    def log_size(self) -> int:
        """How many bytes the server has written so far."""
        return self._log.size() if self._log else 0

    def log_from(self, start: int) -> str:
        """What the server has written from byte `start` on."""
        return self._log.text_from(start) if self._log else ""

    def died(self) -> HarnessError:
        """The error that says which server died and how, and what the fork server wrote last."""
        if self.is_gone:
            self.note_death(f"the fork server has died: {self._describe_end()}.")
        return HarnessError(self._last_death or "the fork server has died.")

    def note_death(self, what: str) -> None:
        """Keep how a server died for :meth:`died`."""
        text = self._log.text() if self._log else ""
        self._last_death = f"{what} The next cluster gets another.\n{text}".rstrip()

    def was_killed(self) -> bool:
        """Whether it was started, and a signal has ended it or its watcher."""
        if self.watcher is None or not self.is_gone:
            return False
        try:
            code = self.watcher.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return code < 0 or code > _watcher.KILLED

    def _describe_end(self) -> str:
        """How the fork server ended, as its watcher reports."""
        assert self.watcher is not None
        try:
            code = self.watcher.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its socket"
        if code < 0:
            return f"its parent, which watches it, was {_describe_code(code)}"
        return _describe_code(_watcher.KILLED - code if code > _watcher.KILLED else code)

    def end_of_child(self, pid: int) -> str:
        """How a server that it forked ended, by its report; empty if it has died itself."""
        deadline = time.monotonic() + _END_SECONDS
        while self._peer is not None:
            gone = self._peer.is_gone()
            if pid in self._peer.ended:
                status, _ = self._peer.ended.pop(pid)
                return _describe_code(os.waitstatus_to_exitcode(status))
            if gone:
                return ""
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        return "it closed its socket"


def _surroundings(environ: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """What a process inherits from this one, but for what pytest changes for each test."""
    kept = {name: value for name, value in environ.items() if name != "PYTEST_CURRENT_TEST"}
    return os.getcwd(), kept


def _describe_code(code: int) -> str:
    """How a process ended, by its exit code, which is negative for a signal."""
    if code >= 0:
        return f"exit code {code}"
    number = -code
    words = f"killed by {signal.Signals(number).name if number in set(signal.Signals) else number}"
    if number == signal.SIGKILL:
        words += (
            " (if nobody sent that: the kernel does when memory runs out, see dmesg or the memory "
            "limit of the container)"
        )
    return words
