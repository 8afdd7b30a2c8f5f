"""The processes that fork ranks: how they end, what that costs, and what of theirs stays."""

# ruff: noqa: PT012  (what is raised comes from leaving the block of the cluster)

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rpcprops import Cluster, ClusterServer
from rpcprops import clock as clocks
from rpcprops.cluster import _wire
from rpcprops.cluster._peer import Peer
from rpcprops.cluster._server import Server
from rpcprops.cluster._spec import PROBE_SAYS
from rpcprops.cluster.finder import TRAINING, ModuleMap
from rpcprops.cluster.fork_server import server_environment
from rpcprops.errors import HarnessError, MachineCannot
from tests.cluster._children import start_children

StillAlive = Callable[..., list[int]]
#: Real seconds in which all of ours is gone, whatever was killed.
STOPPED_SECONDS = 3.0


@pytest.fixture(scope="module")
def server() -> Iterator[ClusterServer]:
    """A server whose processes the tests kill."""
    with ClusterServer(clock=50) as started:
        yield started


def server_of(cluster: Cluster) -> psutil.Process:
    """The process that has forked the ranks of a cluster."""
    assert cluster.ranks.peer is not None
    assert cluster.ranks.peer.hello is not None
    return psutil.Process(cluster.ranks.peer.hello.pid)


def write_module(folder: Path, name: str, source: str) -> str:
    """A module in a folder that is on the path, imported here; its name."""
    text = f"TEST_PROCESS = {os.getpid()}\n{textwrap.dedent(source)}"
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    importlib.import_module(name)
    return name


@pytest.fixture
def module_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules can be imported, and are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == tmp_path:
            del sys.modules[name]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_module_server_that_is_told_to_end(
    server: ClusterServer,
    module_folder: Path,
    still_alive: StillAlive,
    how: signal.Signals,
) -> None:
    """Whatever the test's module does on a signal and at exit, its server ends, and says by what.

    The next cluster gets another, and ranks handle signals as the module asked.
    """
    source = """
    import atexit, os, signal, sys, time

    def leave(*_):
        sys.exit(7)

    if os.getpid() != TEST_PROCESS:
        signal.signal(signal.SIGTERM, leave)
        atexit.register(time.sleep, 60)
    """
    name = write_module(module_folder, f"handles_{how.name}", source)
    words = f"fork server has died that imports {name}: killed by {how.name}"
    began, pids = 0.0, list[int]()
    with pytest.raises(HarnessError, match=words):
        with server.make_cluster(name, world_size=2, deadline=20) as cluster:
            handler = cluster.on(0).call(lambda: str(signal.getsignal(signal.SIGTERM)))
            assert "function leave" in handler
            pids = [server_of(cluster).pid, *cluster.each(os.getpid)]
            server_of(cluster).send_signal(how)
            began = time.monotonic()
            cluster.on(0).call(time.sleep, 1e9)
    assert time.monotonic() - began < 3
    assert not still_alive(pids, 3.0)
    with server.make_cluster(name, world_size=1) as cluster:
        assert cluster.on(0).call(abs, -1) == 1


def test_module_server_that_dies_early(server: ClusterServer, module_folder: Path) -> None:
    """A module whose import is killed, as for want of memory, is told as such, and costs itself."""
    source = "import os, signal\nif os.getpid() != TEST_PROCESS: os.kill(os.getpid(), 9)"
    name = write_module(module_folder, "dies_early", source)
    words = f"imports {name} for the ranks has died: killed by SIGKILL .*memory runs out"
    with pytest.raises(HarnessError, match=words):
        server.make_cluster(name, world_size=1).start()
    with server.make_cluster("", world_size=1) as cluster:
        assert cluster.on(0).call(abs, -1) == 1


def test_module_servers_that_are_let_go_harm_no_other(
    server: ClusterServer, module_folder: Path, still_alive: StillAlive
) -> None:
    """The servers of nine modules, the first of which is let go, leave a running cluster alone."""
    with server.make_cluster("", world_size=2) as cluster:
        pids = cluster.each(os.getpid)
        servers: list[int] = []
        for number in range(9):
            peer, _ = server.servers.peer_for([write_module(module_folder, f"module_{number}", "")])
            assert peer.hello is not None
            servers.append(peer.hello.pid)
        assert not still_alive(servers[:1])
        assert still_alive([*servers[1:], *pids], 0.0) == [*servers[1:], *pids]
        assert cluster.each(abs, -1) == [1, 1]


_NOT_ROOT = """
import ctypes, os, resource, signal

if os.getpid() != TEST_PROCESS:
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
        PR_SET_DUMPABLE = 4  # else /proc/self belongs to root
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)

    def limit_to(soft):
        _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        resource.setrlimit(resource.RLIMIT_NPROC, (hard if soft is None else soft, hard))

    signal.signal(signal.SIGUSR1, lambda *_: limit_to(None))
    signal.signal(signal.SIGUSR2, lambda *_: limit_to(1))
"""


def test_no_room_for_ranks(
    server: ClusterServer, module_folder: Path, still_alive: StillAlive
) -> None:
    """A server that may not fork says so of the world that needs it, and serves on.

    Ranks that cannot be forked ahead fail nothing. The limit does not bind root, so that root's
    server becomes somebody else before it serves.
    """
    name = write_module(module_folder, "not_root", _NOT_ROOT)

    def make(world_size: int) -> Cluster:
        # Whoever gives up root's rights may not enter a network that root made.
        return server.make_cluster(name, world_size=world_size, network="host")

    if server.network_problem == "":
        with pytest.raises(MachineCannot, match="could not enter the network of its world"):
            server.make_cluster(name, world_size=2).__enter__()
    with make(2) as cluster:
        forker = server_of(cluster)
        assert 0 not in cluster.each(os.getuid)

    def may_fork(yes: bool) -> None:
        forker.send_signal(signal.SIGUSR1 if yes else signal.SIGUSR2)
        limits = Path(f"/proc/{forker.pid}/limits")
        wait_until(lambda: (" 1 " not in line_of(limits, "Max processes")) == yes)

    wait_until(lambda: len(forker.children()) == 2)
    preforked = [child.pid for child in forker.children()]
    descriptors = forker.num_fds()
    may_fork(False)
    with pytest.raises(
        MachineCannot, match=r"rank 2 of 4: Resource temporarily unavailable \(limits: "
    ):
        make(4).__enter__()
    assert not still_alive(preforked)
    assert forker.num_fds() == descriptors - 2  # the sockets of the pre-forked ranks
    may_fork(True)
    with make(2) as cluster:
        may_fork(False)
        ranks = cluster.each(os.getpid)
    assert not still_alive(ranks)
    assert not forker.children()
    may_fork(True)
    with make(4) as cluster:
        assert cluster.each(abs, -1) == [1] * 4
        assert server_of(cluster) == forker


def line_of(file: Path, start: str) -> str:
    lines = file.read_text(encoding="ascii").splitlines()
    return next(line for line in lines if line.startswith(start))


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM], ids=["EAGAIN", "ENOMEM"])
def test_no_room_for_servers(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    """A server that cannot fork a module server, a probe or a rank ahead says so, and lives."""

    def refuse() -> int:
        raise OSError(number, os.strerror(number))

    ours, theirs = socket.socketpair()
    root = Server(theirs)
    monkeypatch.setattr(os, "fork", refuse)
    before = psutil.Process().num_fds()
    channel, other = socket.socketpair()
    root.reader.descriptors = [other.detach()]
    root.handle(("modules", ModuleMap()))
    peer = Peer.on(channel)
    assert peer.wait_hello(5) is None
    assert peer.refused[0].startswith(f"{os.strerror(number)} (limits: ")
    peer.close()
    root.reader.descriptors = [os.open(os.devnull, os.O_RDONLY)]
    root.handle(("probe", 2.0))
    assert f"{PROBE_SAYS}it could not be forked: {os.strerror(number)}" in capfd.readouterr().err
    root.handle(("preforked", 2))
    assert not root.preforked.sockets
    assert psutil.Process().num_fds() == before
    ours.close()
    theirs.close()


def process_above(server: ClusterServer, cluster: Cluster, which: str) -> psutil.Process:
    """The process of that kind that stands above the ranks of a cluster."""
    if which == "module server":
        return server_of(cluster)
    assert server.servers.root.watcher is not None
    watcher = psutil.Process(server.servers.root.watcher.pid)
    return watcher if which == "watcher" else watcher.children()[0]


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("module server", f"died that imports {__name__}: killed by SIGKILL .*memory runs out"),
        ("root server", "fork server has died: killed by SIGKILL .*memory runs out"),
        ("watcher", "fork server has died: its parent, which watches it, was killed by SIGKILL"),
    ],
)
def test_server_that_is_killed(
    server: ClusterServer,
    still_alive: StillAlive,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    words: str,
) -> None:
    """Whichever process above the ranks is killed, what they started is gone in three seconds.

    The clusters under way fail with an error that says so. The next gets another server, for which
    the rate of the clock is measured anew, and so does one that was made before and not started.
    A module server takes nothing of other servers along.
    """
    began, pids = 0.0, list[int]()
    measured: list[float] = []
    observe = clocks.observe

    def observed(fd: int, rate: float) -> float:
        measured.append(rate)
        return observe(fd, rate)

    monkeypatch.setattr(clocks, "observe", observed)
    before = server.cluster(world_size=1)
    other = server.make_cluster("", world_size=1)
    cluster = server.cluster(world_size=2)
    with contextlib.ExitStack() as stack:
        stack.callback(other.kill)
        other.start()
        theirs = other.on(0).call(start_children)
        with pytest.raises(HarnessError, match=words), cluster:
            pids = cluster.each(os.getpid) + cluster.on(0).call(start_children)
            process_above(server, cluster, which).kill()
            began = time.monotonic()
            cluster.on(0).call(time.sleep, 1e9)
        assert not still_alive(pids, began + STOPPED_SECONDS - time.monotonic())
        if which == "module server":
            assert set(theirs[:3]) <= set(still_alive(theirs, 0.0))
            assert other.on(0).call(abs, -1) == 1
        else:
            assert not still_alive(theirs, began + STOPPED_SECONDS - time.monotonic())
        # One that was made before, and has begun nothing, starts on what comes instead.
        with before:
            assert before.on(0).call(clocks.get_rate) == 50
    with server.cluster(world_size=1) as cluster:
        assert cluster.on(0).call(clocks.get_rate) == 50
    assert measured == ([] if which == "module server" else [50])


def test_descriptors_after_a_request_that_fails(
    server: ClusterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module server or a probe that cannot be asked for, or not in time, takes no descriptor."""
    server.servers.peer_for([])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def broken(*_: object) -> None:
        raise BrokenPipeError

    before = psutil.Process().num_fds()
    with monkeypatch.context() as patch:
        patch.setattr(Peer, "wait_hello", interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.servers.peer_for([TRAINING])
    with monkeypatch.context() as patch:
        patch.setattr(_wire, "send", broken)
        with pytest.raises(HarnessError, match="the fork server has died"):
            server.servers.peer_for([TRAINING])
        with pytest.raises(HarnessError, match="the fork server has died"):
            server.rate_of(3.0)
    assert psutil.Process().num_fds() == before


@pytest.mark.parametrize("which", ["module server", "root server", "watcher"])
def test_server_that_was_killed_just_now(server: ClusterServer, which: str) -> None:
    """A cluster that starts while its server dies gets another, whichever it notices first."""
    for delay in (0.0, 0.0005, 0.002, 0.005):
        with server.cluster(world_size=1) as cluster:
            above = process_above(server, cluster, which)
        above.kill()
        time.sleep(delay)
        with server.cluster(world_size=1) as cluster:
            assert cluster.on(0).call(abs, -1) == 1
        if which != "module server":
            break  # to start a server takes seconds


@pytest.mark.parametrize("which", ["watcher", "fork server"])
def test_server_that_is_killed_while_it_starts(which: str) -> None:
    """A server whose process is killed while it imports torch is started once more."""
    server = ClusterServer(clock="real")
    killed: list[int] = []

    def kill_soon() -> None:
        deadline = time.monotonic() + 20
        while not killed and time.monotonic() < deadline:
            watcher = server.servers.root.watcher
            below = [] if watcher is None else psutil.Process(watcher.pid).children()
            if watcher is not None and below:
                victim = psutil.Process(watcher.pid) if which == "watcher" else below[0]
                killed.append(victim.pid)
                victim.send_signal(signal.SIGTERM)
            time.sleep(0.005)

    killer = threading.Thread(target=kill_soon)
    killer.start()
    try:
        server.start()
        assert killed
        with server.cluster(world_size=1) as cluster:
            assert cluster.on(0).call(abs, -1) == 1
    finally:
        server.close()
        killer.join()


def test_a_cuda_device_of_the_machine_is_hidden_from_the_processes_that_fork() -> None:
    """The thread of a CUDA driver would not survive a fork, so no such process sees a device."""
    environ = server_environment({"CUDA_VISIBLE_DEVICES": "0,1"})
    assert environ["CUDA_VISIBLE_DEVICES"] == ""
    assert environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
