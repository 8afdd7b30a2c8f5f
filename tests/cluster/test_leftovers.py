"""Nothing outlives: no process, descriptor or file, however a cluster or a test process ends."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rpcprops import ClusterServer
from rpcprops.errors import BrokenPromise, MachineCannot, RankDied
from rpcprops.pytest_plugin import ClusterFactory

StillAlive = Callable[..., list[int]]


def start_children() -> list[int]:
    """One child in the rank's group, one in a session of its own, and a child of that one."""
    code = (
        "import subprocess, sys, time\n"
        "below = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "print(below.pid, flush=True)\n"
        "time.sleep(1000)"
    )
    near = subprocess.Popen(["sleep", "1000"])
    far = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert far.stdout is not None
    return [near.pid, far.pid, int(far.stdout.readline())]


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


def test_a_cluster_that_gets_no_descriptors_leaves_none(rpc_cluster: ClusterFactory) -> None:
    """Wherever they run out, those that were opened are closed, and the limit is named."""
    with rpc_cluster(world_size=2):
        pass
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.listdir("/proc/self/fd")
    # The lowest number that is free: what is opened from here on counts up from it.
    first = os.dup(0)
    os.close(first)
    refused: dict[int, str] = {}
    for room in range(10):
        resource.setrlimit(resource.RLIMIT_NOFILE, (first + room, hard))
        try:
            with rpc_cluster(world_size=2) as cluster:
                cluster.on(1).call(os.getpid)
        except MachineCannot as error:
            refused[room] = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert os.listdir("/proc/self/fd") == before
    assert list(refused) == list(range(7))
    for room, said in refused.items():
        assert f"may have {first + room}" in said
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
from test_leftovers import start_children

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
    [(signal.SIGKILL, ""), (signal.SIGKILL, "fork"), (signal.SIGINT, ""), (signal.SIGTERM, "")],
    ids=["SIGKILL", "SIGKILL with a forked child", "SIGINT", "SIGTERM"],
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
            assert not still_alive(tree, 10.0)
        finally:
            process.kill()
            if forked:
                os.kill(forked, signal.SIGKILL)
    assert not list(folder.iterdir()), "files were left behind"


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
