"""Ranks forked ahead: they become the next ranks, harm no world, and stay for no longer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rpcprops import ClusterServer, Program, clock
from rpcprops.programs import Fetch, Remote
from rpcprops.runner import Runner

StillAlive = Callable[..., list[int]]


@pytest.fixture(scope="module")
def server() -> Iterator[ClusterServer]:
    with ClusterServer() as started:
        yield started


def run_world(server: ClusterServer, size: int) -> list[int]:
    with server.cluster(world_size=size) as cluster:
        return cluster.each(os.getpid)


def forker(server: ClusterServer) -> psutil.Process:
    """The process that forks the ranks of this module."""
    peer, _ = server.servers.peer_for([__name__])
    assert peer.hello is not None
    return psutil.Process(peer.hello.pid)


def wait_for_children(parent: psutil.Process, count: int, seconds: float = 10.0) -> list[int]:
    deadline = time.monotonic() + seconds
    while True:
        pids = [child.pid for child in parent.children()]
        if len(pids) == count or time.monotonic() > deadline:
            assert len(pids) == count
            return pids
        time.sleep(0.01)


def links(pid: int) -> list[str]:
    return sorted(os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())


def start_child() -> int:
    return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid


def test_spares_become_the_next_ranks(server: ClusterServer) -> None:
    """A larger world takes all of them and forks the rest; a smaller one leaves some waiting."""
    run_world(server, 2)
    preforked = wait_for_children(forker(server), 2)
    larger = run_world(server, 3)
    assert set(preforked) < set(larger)
    preforked = wait_for_children(forker(server), 3)
    assert set(run_world(server, 2)) < set(preforked)
    wait_for_children(forker(server), 2)


def test_a_spare_is_a_rank_like_any(server: ClusterServer) -> None:
    """It has the rate of its world, no other rank's descriptors, and a group of its own."""
    run_world(server, 3)
    preforked = wait_for_children(forker(server), 3)
    with server.cluster(world_size=3) as cluster:
        assert sorted(cluster.each(os.getpid)) == sorted(preforked)
        assert cluster.each(os.getpgid, 0) == cluster.each(os.getpid)
        assert cluster.each(clock.get_rate) == [server.rate] * 3
        for rank, pid in enumerate(cluster.each(os.getpid)):
            held = {link.split()[0] for link in links(pid) if link.startswith("/memfd:rpc")}
            assert held == {f"/memfd:rpcprops-worker{rank}", "/memfd:rpcprops-store"}


def test_programs_use_spares_too(server: ClusterServer) -> None:
    """The root server has some of its own, for programs, which import no module of a test."""
    runner = Runner(server)
    program = Program(2, (Remote(0, 1, "a"), Fetch(0, "a")))
    peer, *modules = server.servers.peers
    assert peer.hello is not None
    root = psutil.Process(peer.hello.pid)
    for _ in range(2):
        outcome = runner.run_anew(program)
        assert [rank.exit_code for rank in outcome.ranks] == [0, 0]
        wait_for_children(root, len(modules) + 2)


def settled_links(pid: int) -> list[str]:
    """As :func:`links`, once a process that was forked just now has closed what it inherited."""
    deadline = time.monotonic() + 10
    while True:
        held = links(pid)
        if sum(link.startswith("socket:") for link in held) <= 1 or time.monotonic() > deadline:
            return held
        time.sleep(0.02)


def test_a_spare_holds_nothing_of_a_running_world(server: ClusterServer) -> None:
    """One that is forked while another world runs does not hide the end of that one."""
    with server.cluster(world_size=2) as outer:
        ranks = outer.each(os.getpid)
        with server.cluster(world_size=2) as inner:
            assert inner.each(abs, -1) == [1, 1]
        for pid in set(wait_for_children(forker(server), 4)) - set(ranks):
            # Its log is still the server's; it has a socket, and standard input.
            held = settled_links(pid)
            assert {link.split()[0] for link in held if "memfd" in link} == {
                "/memfd:rpcprops-server"
            }
            assert sum(link.startswith("socket:") for link in held) == 1
        with server.cluster(world_size=2) as third:
            assert third.each(abs, -2) == [2, 2]
        assert outer.each(abs, -3) == [3, 3]


def test_a_killed_spare_is_replaced(server: ClusterServer, still_alive: StillAlive) -> None:
    """A pre-forked rank that has died is not handed out; the world gets a fork instead."""
    run_world(server, 2)
    first, second = wait_for_children(forker(server), 2)
    os.kill(first, signal.SIGKILL)
    assert not still_alive([first])
    ranks = run_world(server, 2)
    assert second in ranks
    assert first not in ranks
    wait_for_children(forker(server), 2)


def test_strangers_among_spares(server: ClusterServer, still_alive: StillAlive) -> None:
    """What a rank leaves behind is killed, and the pre-forked ranks are not."""
    run_world(server, 3)
    preforked = wait_for_children(forker(server), 3)
    with server.cluster(world_size=2) as cluster:
        child = cluster.on(0).call(start_child)
        used = cluster.each(os.getpid)
    assert not still_alive([child, *used])
    assert set(preforked) - set(used) < set(wait_for_children(forker(server), 2))


def test_an_idle_server_lets_its_spares_go(server: ClusterServer) -> None:
    run_world(server, 2)
    wait_for_children(forker(server), 2)
    wait_for_children(forker(server), 0, seconds=20)
    assert len(run_world(server, 2)) == 2


def test_a_stopped_server_keeps_its_spares(server: ClusterServer) -> None:
    """A machine that stood still for longer than that has not left the server idle."""
    run_world(server, 3)
    parent = forker(server)
    preforked = wait_for_children(parent, 3)
    parent.send_signal(signal.SIGSTOP)
    time.sleep(5.5)
    parent.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert set(run_world(server, 3)) == set(preforked)


_WAITS = """
import sys
import time

from rpcprops import ClusterServer, Program
from rpcprops.programs import Fetch, Remote
from rpcprops.runner import Runner

if __name__ == "__main__":
    with ClusterServer(clock="real") as server:
        with server.cluster(world_size=2):
            pass
        Runner(server).run_anew(Program(2, (Remote(0, 1, "a"), Fetch(0, "a"))))
        print("ready", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["SIGKILL", "close"])
def test_no_spare_outlives_the_test_process(
    tmp_path: Path, still_alive: StillAlive, how: str
) -> None:
    script = tmp_path / "waits.py"
    script.write_text(_WAITS, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            # The other child of the script makes network namespaces.
            (root,) = [
                server
                for child in psutil.Process(process.pid).children()
                for server in child.children()
            ]
            # A server for the script, and two pre-forked ranks of each server.
            wait_for_children(root, 3)
            tree = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
            assert len(tree) == 8
            if how == "SIGKILL":
                process.kill()
            else:
                process.communicate("\n", timeout=20)
            assert not still_alive(tree)
        finally:
            process.kill()
