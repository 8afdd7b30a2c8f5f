"""Runs of ours under stress: all their processes, by a mark in the environment; what each one is.

Every descendant inherits the environment of the run, also one that has another parent by now, so a
look at /proc finds what is left of a run, wherever it went.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rpcprops.profiles import NIGHTLY, current

_MARK = "RPCPROPS_STRESS_RUN"
#: What a function of a test starts in a rank, in a session of its own and with no parent of ours.
CHILD = ["sleep", "987654"]
#: Real seconds within which nothing of a run that died may be left.
GONE_SECONDS = 3.0
#: How many more there may be, of those in which a process waited for a processor. The tests that CI
#: runs share its processors with others; those of a night have the machine for themselves. Who
#: needed them is counted.
MOST_STALLED_SECONDS = 0.0 if current() == NIGHTLY else 7.0


def stalled_seconds() -> float:
    """Real seconds since boot in which a process waited for a processor; 0 where none are told."""
    try:
        text = Path("/proc/pressure/cpu").read_text(encoding="ascii")
    except OSError:
        return 0.0
    return int(text.split("total=")[1].split()[0]) / 1e6


def marked(mark: str) -> list[psutil.Process]:
    """The processes that live with this mark."""
    wanted = f"{_MARK}={mark}".encode()
    found: list[psutil.Process] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        # A process that has ended, or is one of another user that we may not look at.
        with contextlib.suppress(OSError, psutil.Error):
            # It is empty for a zombie.
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(psutil.Process(int(entry.name)))
    return found


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that run still; a zombie does not."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def role(process: psutil.Process, top: int) -> str:
    """What a process of a run is; `top` is the one that we started. Empty when it has ended."""
    try:
        command = process.cmdline()
        if process.pid == top:
            found = _command(command)
            return "xdist controller" if found == "pytest" and "-n" in command else found
        if command == CHILD:
            return "child of a rank"
        if not _may_fork_ranks(process):
            if any("sys.stdin.readline()" in word for word in command):
                return "xdist worker"
            return _command(command)
        return _role_of_fork(process)
    except (psutil.Error, OSError):
        return ""


def _command(command: Sequence[str]) -> str:
    if "rpcprops" in command:
        return f"rpcprops {command[command.index('rpcprops') + 1]}"
    if any(word.startswith("--rpc-replay=") for word in command):
        return "pytest of a replay"
    if any(word.endswith("namespaces.py") for word in command):
        return "maker of networks"
    return "pytest" if "pytest" in command else "another"


def _may_fork_ranks(process: psutil.Process | None) -> bool:
    """Whether a process has the command line of the watcher, which all its forks have."""
    return process is not None and any(
        "rpcprops.cluster._server import" in word for word in process.cmdline()
    )


def _role_of_fork(process: psutil.Process) -> str:
    """Which of the processes that have the command line of the fork server this one is."""
    parent = process.parent()
    leads = os.getsid(process.pid) == process.pid
    if parent is None or not _may_fork_ranks(parent):
        # A fork server whose watcher has just died looks so too, for as long as it lives.
        return "watcher" if leads else "orphan"
    if leads and not _may_fork_ranks(parent.parent()):
        return "fork server"
    links: list[str] = []
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(entry))
    if any(link.startswith("/memfd:rpcprops-worker") for link in links):
        return "rank"
    if os.getpgid(process.pid) == process.pid:
        return "pre-forked rank"
    if any("eventpoll" in link for link in links):
        return "module server"
    return "starting fork"


@dataclass
class Run:
    """A command of ours in a folder, with a mark of its own.

    Attributes:
        scratch: what it takes for the folder of temporary files.
        late: whether the last look for what is left had to wait longer than it was to, because the
            machine was loaded.
    """

    command: list[str]
    folder: Path
    scratch: Path
    mark: str
    process: subprocess.Popen[bytes]
    log: Path
    late: bool = False

    @classmethod
    def start(cls, command: Sequence[str], folder: Path, logs: Path) -> Run:
        """Start a command, with SIGINT as a terminal would have it; what it says goes to a file."""
        mark = uuid.uuid4().hex
        scratch = logs / f"tmp-{mark}"
        scratch.mkdir()
        log = logs / f"log-{mark}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                # A shell may have left SIGINT ignored. This stays the same process.
                ["env", "--default-signal=INT,TERM", *command],
                cwd=folder,
                env=environment(mark) | {"TMPDIR": str(scratch)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(list(command), folder, scratch, mark, process, log)

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def processes(self, wanted: str | None = None) -> list[psutil.Process]:
        """Those that live now, of one role if that is given."""
        found = marked(self.mark)
        if wanted is None:
            return found
        return [one for one in found if role(one, self.process.pid) == wanted]

    def wait_for(self, wanted: str, seconds: float, since: float = 0.0) -> list[psutil.Process]:
        """The processes of a role that began after `since`; empty if the run ends without one."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.has_ended():
            found = []
            for one in self.processes(wanted):
                with contextlib.suppress(psutil.Error):
                    if one.create_time() > since:
                        found.append(one)
            if found:
                return found
            time.sleep(0.02)
        return []

    def left_after(self, seconds: float, only: Iterable[psutil.Process] | None = None) -> list[str]:
        """What lives after at most so many seconds: of `only`, or of the run; each in words."""
        chosen = None if only is None else list(only)
        began, stalled = time.monotonic(), stalled_seconds()
        while True:
            self.process.poll()
            found = marked(self.mark) if chosen is None else alive(chosen)
            waited = min(stalled_seconds() - stalled, MOST_STALLED_SECONDS)
            took = time.monotonic() - began
            self.late = took > seconds
            if not found or took > seconds + waited:
                return [self.describe(one) for one in found]
            time.sleep(0.02)

    def describe(self, process: psutil.Process) -> str:
        name = role(process, self.process.pid)
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())[:100]
            return f"{name} {process.pid} ({process.status()}, parent {process.ppid()}): {command}"
        return f"{name} {process.pid}"

    def kill(self) -> None:
        """Kill all that is left; a test that found something has said so before."""
        kill_marked(self.mark)
        self.process.wait(timeout=10)


def kill_marked(mark: str) -> None:
    """Kill every process with this mark, and those that they start meanwhile."""
    for _ in range(100):
        left = marked(mark)
        if not left:
            return
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.kill()
        time.sleep(0.02)


def left_of(mark: str, seconds: float) -> list[str]:
    """What lives with this mark after at most so many seconds, in words."""
    deadline = time.monotonic() + seconds
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    words: list[str] = []
    for one in marked(mark):
        with contextlib.suppress(psutil.Error):
            words.append(f"{one.pid} {' '.join(one.cmdline())[:100]}")
    return words


def environment(mark: str) -> dict[str, str]:
    """The environment of a run: neither this run's pytest nor a CI's profile reaches it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "TMPDIR") and not name.startswith(("PYTEST_", "HYPOTHESIS_"))
    }
    return kept | {"COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1", _MARK: mark}


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def stop(process: psutil.Process) -> bool:
    """Stop a process where it is, to look at it; whether it could be done."""
    with contextlib.suppress(psutil.Error):
        process.suspend()
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            if process.status() == psutil.STATUS_STOPPED:
                return True
            time.sleep(0.001)
    return False


def send(process: psutil.Process, number: signal.Signals) -> None:
    """A signal to a process that is stopped, and goes on with it.

    SIGINT goes to its group, as a Ctrl-C at a terminal does.
    """
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        if number != signal.SIGKILL:
            process.resume()
