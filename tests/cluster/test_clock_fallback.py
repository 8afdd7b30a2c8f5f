"""A clock that cannot be had: the server falls back to real time and says so, or refuses."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rpcprops import ClusterServer
from rpcprops import clock as clocks
from rpcprops.clock import _measure
from rpcprops.cluster import _wire
from rpcprops.errors import MachineCannot

pytestmark = pytest.mark.skipif(clocks.library_path() is None, reason="no clock library")

UNASKED = "clock: real time, though it was not asked for: "


@pytest.fixture
def damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Lets the library that is preloaded be one with its first bytes only."""
    library = clocks.library_path()
    assert library is not None
    copy = tmp_path / library.name
    shutil.copyfile(library, copy)

    def cut_off(size: int) -> Path:
        copy.write_bytes(copy.read_bytes()[:size])
        monkeypatch.setattr(clocks, "library_path", lambda: copy)
        return copy

    return cut_off


def rate_of_a_rank(server: ClusterServer) -> tuple[float, bool]:
    """What a rank says of its clock."""
    with server.cluster(world_size=1) as cluster:
        rate, loaded = cluster.on(0).call(clocks.get_rate), cluster.on(0).call(clocks.loaded)
        return rate, loaded


@pytest.mark.parametrize(("size", "said"), [(0, "file too short"), (4096, "the file is cut off, ")])
def test_a_damaged_library_is_not_loaded(
    damage: Callable[[int], Path], size: int, said: str
) -> None:
    """Under "auto" the server starts without the library, and its note is the problem's."""
    damage(size)
    with ClusterServer() as server:
        assert server.clock_problem == server.clock_note
        assert server.clock_note.startswith(UNASKED)
        assert said in server.clock_note
        assert "reinstall rpcprops" in server.clock_note
        assert server.rate == 1.0
        assert rate_of_a_rank(server) == (1.0, False)
        with pytest.raises(MachineCannot, match="reinstall rpcprops"):
            server.cluster(world_size=1, clock=40)


def test_a_rate_that_was_asked_for_is_refused(damage: Callable[[int], Path]) -> None:
    """A rate by number raises, with the linker's words, before a server is started."""
    damage(0)
    server = ClusterServer(clock=40)
    with pytest.raises(MachineCannot, match=r"clock=40\.0 cannot be had: .*file too short"):
        server.start()
    assert server.servers.root.watcher is None


def test_real_time_that_was_asked_for_is_no_problem(damage: Callable[[int], Path]) -> None:
    """Who asks for real time is told of no problem, and the library is left out."""
    damage(4096)
    with ClusterServer(clock="real") as server:
        assert server.clock_note == "clock: real time, as asked for"
        assert server.clock_problem == ""
        assert rate_of_a_rank(server) == (1.0, False)


def test_a_probe_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock's probe refuses its rate and ends: real time, with what it wrote last."""
    send = _wire.send

    def wrong_rate(sock: Any, message: Any, descriptors: Any = ()) -> None:
        send(sock, ("probe", -1.0) if message[0] == "probe" else message, descriptors)

    monkeypatch.setattr(_wire, "send", wrong_rate)
    with ClusterServer() as server:
        assert server.clock_problem.startswith(UNASKED)
        assert "the dilated process ended while it was measured" in server.clock_problem
        assert "rate -1.0 is refused" in server.clock_problem
        assert server.clock_problem == server.clock_note
        assert rate_of_a_rank(server)[0] == 1.0


def test_a_probe_that_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that does not answer is waited for so long and no longer; it does not stay."""
    observe = clocks.observe
    stopped: list[psutil.Process] = []
    server = ClusterServer()

    def stalled(fd: int, rate: float) -> float:
        root = server.servers.root.peer()
        deadline = time.monotonic() + 30
        while not stopped and time.monotonic() < deadline:
            assert root.hello is not None
            stopped.extend(psutil.Process(root.hello.pid).children())
        stopped[0].send_signal(signal.SIGSTOP)
        return observe(fd, rate)

    monkeypatch.setattr(clocks, "observe", stalled)
    monkeypatch.setattr(_measure, "_SILENCE_REAL_SECONDS", 0.5)
    with server:
        assert server.clock_problem.startswith(UNASKED)
        assert "a clock read in the dilated process did not end within 0.5" in server.clock_problem
        assert "reinstall rpcprops" in server.clock_problem
    assert not psutil.pid_exists(stopped[0].pid) or not stopped[0].is_running()
