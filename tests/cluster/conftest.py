"""Servers and scripts for the tests of real clusters, and a look at what is left of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from rpcprops import ClusterServer
from rpcprops.cluster import _wire
from rpcprops.pytest_plugin import ClusterFactory

#: Real seconds: far above what a script takes, so that a hang fails instead of staying.
SCRIPT_SECONDS = 100


@dataclass(frozen=True)
class Script:
    """How a script ended."""

    code: int
    out: str
    err: str


RunScript = Callable[..., Script]
StillAlive = Callable[..., list[int]]
LetSparesGo = Callable[[ClusterServer], None]


def pids_alive(pids: Iterable[int]) -> list[int]:
    alive = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                alive.append(pid)
        except psutil.NoSuchProcess:
            pass
    return alive


@pytest.fixture(scope="session")
def still_alive() -> StillAlive:
    """Gives those of some processes that still live after at most `seconds` of waiting."""

    def wait(pids: Iterable[int], seconds: float = 10.0) -> list[int]:
        chosen = list(pids)
        deadline = time.monotonic() + seconds
        while pids_alive(chosen) and time.monotonic() < deadline:
            time.sleep(0.02)
        return pids_alive(chosen)

    return wait


@pytest.fixture(scope="session")
def let_spares_go() -> LetSparesGo:
    """Makes a server that runs no cluster give up the ranks that it forked ahead."""

    def let_go(server: ClusterServer, seconds: float = 10.0) -> None:
        peers = server.servers.peers
        servers = {peer.hello.pid for peer in peers if peer.hello}
        for peer in peers:
            _wire.send(peer.sock, ("preforked", 0))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            below = {child.pid for pid in servers for child in psutil.Process(pid).children()}
            if below <= servers:
                break
            time.sleep(0.02)

    return let_go


@pytest.fixture
def nothing_left(
    request: pytest.FixtureRequest,
    rpc_cluster: ClusterFactory,
    still_alive: StillAlive,
    let_spares_go: LetSparesGo,
) -> Iterator[None]:
    """Fails the test if it leaves a process or a listener in the tree of the session's server."""
    # The server of the test's module exists from here on.
    with rpc_cluster.server.make_cluster(request.module.__name__, world_size=1):
        pass
    let_spares_go(rpc_cluster.server)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    let_spares_go(rpc_cluster.server)
    after = {child.pid for child in psutil.Process().children(recursive=True)} - before
    assert not still_alive(after), "processes were left behind"
    for pid in before:
        # A pre-forked rank that was just being let go is gone.
        with contextlib.suppress(psutil.NoSuchProcess):
            states = {connection.status for connection in psutil.Process(pid).net_connections()}
            assert psutil.CONN_LISTEN not in states


@pytest.fixture(scope="session")
def own_server() -> Iterator[ClusterServer]:
    """A second server of this test process, in real time unless a cluster says otherwise."""
    with ClusterServer(clock="real") as server:
        yield server


@pytest.fixture
def run_script(tmp_path: Path) -> RunScript:
    """Runs Python source as a script of its own, in an empty folder."""

    def run(source: str, *arguments: str, code: int = 0, seconds: float = SCRIPT_SECONDS) -> Script:
        file = tmp_path / "script.py"
        file.write_text(textwrap.dedent(source), encoding="utf-8")
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, str(file), *arguments],
            cwd=folder,
            env=os.environ | {"TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert not list(folder.iterdir()), "files were left behind"
        return Script(done.returncode, done.stdout, done.stderr)

    return run
