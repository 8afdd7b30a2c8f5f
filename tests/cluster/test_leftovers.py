"""Nothing outlives: no process, descriptor or file, however a cluster or a test process ends."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rpcprops import ClusterServer
from rpcprops.cluster import _limits
from rpcprops.errors import BrokenPromise, MachineCannot, RankDied
from rpcprops.pytest_plugin import ClusterFactory
from tests.cluster._children import start_children

StillAlive = Callable[..., list[int]]
#: Real seconds in which all of ours is gone, whatever was killed.
STOPPED_SECONDS = 3.0


def leave(how: str) -> None:
    match how:
        case "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        case "code":
            os._exit(3)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise ValueError(how)


def test_a_cluster_that_gets_no_descriptors_leaves_none(
    rpc_cluster: ClusterFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they run out, those that were opened are closed, and the limit is named.

    The check beforehand is left out: the test code may open some between it and the start.
    """
    monkeypatch.setattr(_limits, "check", lambda *_: None)
    with rpc_cluster(world_size=2):
        pass
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.listdir("/proc/self/fd")
    # Under a limit of free[n], n descriptors are free. One of those listed read the folder.
    taken = {int(fd) for fd in before if Path(f"/proc/self/fd/{fd}").exists()}
    free = [fd for fd in range(len(before) + 16) if fd not in taken]
    refused: dict[int, str] = {}
    for room in range(16):
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[room], hard))
        try:
            with rpc_cluster(world_size=2) as cluster:
                cluster.on(1).call(os.getpid)
        except MachineCannot as error:
            refused[room] = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert os.listdir("/proc/self/fd") == before
    # A store, two descriptors and a log for each rank; then those of the network.
    assert 7 <= len(refused) < 12
    assert list(refused) == list(range(len(refused)))
    for room, said in refused.items():
        assert str(free[room]) in said
        assert "ulimit -n" in said


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("how", ["return", "raise", "signal", "code", "stop"])
def test_children_of_ranks_are_killed(
    rpc_cluster: ClusterFactory, still_alive: StillAlive, how: str
) -> None:
    """What a rank started is gone after the cluster, even in a session of its own."""
    pids: list[int] = []
    try:
        with rpc_cluster(world_size=2, deadline=2) as cluster:
            pids += cluster.on(0).call(start_children)
            pids += cluster.each(os.getpid)
            assert still_alive(pids, 0.0) == pids
            cluster.on(0).call(leave, how)
    except (BrokenPromise, ValueError):
        assert how != "return"
    assert not still_alive(pids)


@pytest.mark.usefixtures("nothing_left")
def test_children_while_another_cluster_lives(
    rpc_cluster: ClusterFactory, still_alive: StillAlive
) -> None:
    """Cleaning up after one cluster does not touch the ranks and children of another."""
    with rpc_cluster(world_size=1) as outer:
        mine = outer.on(0).call(start_children)
        with rpc_cluster(world_size=1) as inner:
            theirs = inner.on(0).call(start_children)
        assert still_alive(mine, 0.0) == mine
        assert outer.on(0).call(abs, -2) == 2
    assert not still_alive([*mine, *theirs])


def test_closing_the_server_in_use(still_alive: StillAlive) -> None:
    """Closing a server ends the ranks of running clusters and all that those started."""
    server = ClusterServer(clock="real")
    server.start()
    cluster = server.cluster(world_size=2)
    cluster.start()
    pids = [child.pid for child in psutil.Process().children(recursive=True)]
    pids = [*cluster.each(os.getpid), *cluster.on(1).call(start_children)]
    server.close()
    assert not still_alive(pids)
    cluster.kill()
    server.close()


def test_descriptors_do_not_grow(
    rpc_cluster: ClusterFactory, let_spares_go: Callable[[ClusterServer], None]
) -> None:
    """Over 30 clusters, some of which fail, no process of ours gains a descriptor."""

    def run(number: int) -> None:
        if number % 3:
            with rpc_cluster(world_size=2) as cluster:
                cluster.each(os.getpid)
        else:
            with pytest.raises(RankDied), rpc_cluster(world_size=2) as cluster:
                cluster.on(0).call(leave, "signal")

    def count() -> list[int]:
        # The ranks that were forked ahead come and go.
        let_spares_go(rpc_cluster.server)
        tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return [process.num_fds() for process in tree]

    for number in range(3):
        run(number)
    before = count()
    for number in range(30):
        run(number)
    assert count() == before


def test_many_descriptors_are_no_limit(rpc_cluster: ClusterFactory) -> None:
    """A test process that has more descriptors open than select() can name still makes clusters."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1400:
        pytest.skip(f"this process may open {soft} descriptors only")
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with rpc_cluster(world_size=2) as cluster:
            assert cluster.each(abs, -3) == [3, 3]
        with ClusterServer(clock="real") as server, server.cluster(world_size=1) as cluster:
            assert cluster.on(0).call(abs, -3) == 3
    finally:
        for fd in opened:
            os.close(fd)


def test_ranks_hold_no_descriptor_of_another(rpc_cluster: ClusterFactory) -> None:
    """A rank has one control channel, one log and one store: no other rank's, nor the server's."""

    def logs_here() -> set[str]:
        links = {
            os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()
        }
        return {link.split(":")[1].split(" ")[0] for link in links if link.startswith("/memfd:rpc")}

    with rpc_cluster(world_size=3) as cluster:
        for rank, logs in enumerate(cluster.each(logs_here)):
            assert logs == {f"rpcprops-worker{rank}", "rpcprops-store"}


_STAYS = """
import os
import sys
import time

from rpcprops import ClusterServer

sys.path.insert(0, sys.argv[1])
from _children import start_children

if __name__ == "__main__":
    with ClusterServer(clock="real") as server, server.cluster(world_size=2) as cluster:
        pids = cluster.each(os.getpid) + cluster.on(0).call(start_children)
        if "fork" in sys.argv:
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            print("forked", child, flush=True)
        print(*pids, flush=True)
        cluster.on(1).call(time.sleep, 1000)
"""


@pytest.mark.parametrize(
    ("how", "fork"),
    [
        pytest.param(signal.SIGKILL, "", id="SIGKILL"),
        pytest.param(signal.SIGKILL, "fork", id="SIGKILL with a forked child"),
        pytest.param(signal.SIGINT, "", id="SIGINT"),
        # No Python of a script runs after it, as after SIGKILL.
        pytest.param(signal.SIGTERM, "", id="SIGTERM", marks=pytest.mark.nightly),
    ],
)
def test_end_of_the_test_process(
    tmp_path: Path, still_alive: StillAlive, how: signal.Signals, fork: str
) -> None:
    """A test process that is killed takes its server, its ranks and their children with it."""
    script = tmp_path / "stays.py"
    script.write_text(textwrap.dedent(_STAYS), encoding="utf-8")
    folder = tmp_path / "run"
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, str(script), str(Path(__file__).parent), fork],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        forked = 0
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if fork:
                forked = int(line.split()[1])
                line = process.stdout.readline()
            tree = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
            tree.discard(forked)
            # The server, a server for the script, two ranks, and what one of them started.
            assert {*map(int, line.split())} < tree
            process.send_signal(how)
            assert not still_alive(tree, STOPPED_SECONDS)
        finally:
            process.kill()
            if forked:
                os.kill(forked, signal.SIGKILL)
    assert not list(folder.iterdir()), "files were left behind"


_SLOW_TORCH = """
import os
import sys
import time


class SlowTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.getpid(), file=open(os.environ["IMPORTS_TORCH"], "w"), flush=True)
            time.sleep(60)


sys.meta_path.insert(0, SlowTorch())
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_end_of_the_test_process_while_torch_is_imported(
    tmp_path: Path, still_alive: StillAlive, how: signal.Signals
) -> None:
    """A server that still imports torch, for a minute here, is gone at once all the same."""
    (tmp_path / "sitecustomize.py").write_text(_SLOW_TORCH, encoding="utf-8")
    importing = tmp_path / "importing"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        [sys.executable, "-c", "from rpcprops import ClusterServer; ClusterServer().start()"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "IMPORTS_TORCH": str(importing)},
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not (importing.exists() and importing.read_text()) and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            tree = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
            assert int(importing.read_text()) in tree
            process.send_signal(how)
            assert not still_alive([process.pid, *tree], STOPPED_SECONDS)
        finally:
            process.kill()


def test_descriptors_after_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that cannot be started is MachineCannot, and takes no descriptor with it."""
    before = psutil.Process().num_fds()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nonexistent/python")
        with pytest.raises(MachineCannot, match="could not be started: No such file"):
            ClusterServer(clock="real").start()

    def refuse(name: str) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), name)

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", refuse)
        with pytest.raises(MachineCannot, match=r"Too many open files \(limits: ulimit -n = \d+\)"):
            ClusterServer(clock="real").start()
    assert psutil.Process().num_fds() == before


def test_no_file_is_left(run_script: Callable[..., object]) -> None:
    """Clusters that end well, leak, crash and use shared memory leave no file anywhere."""
    run_script(
        """
        import os
        from rpcprops import ClusterServer
        from rpcprops.errors import BrokenPromise

        if __name__ == "__main__":
            before = set(os.listdir("/dev/shm"))
            with ClusterServer() as server:
                for transport in ("tcp", "shm"):
                    with server.cluster(world_size=2, transport=transport):
                        pass
                    try:
                        with server.cluster(world_size=2, transport=transport) as cluster:
                            cluster.on(0).call(os.abort)
                    except BrokenPromise:
                        pass
            assert not {n for n in set(os.listdir("/dev/shm")) - before if "pipe" in n}
        """
    )
