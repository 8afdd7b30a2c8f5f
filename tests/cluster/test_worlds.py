"""Worlds of every size: they start, settle and shut down, and one server makes many."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed import rpc

from rpcprops.errors import UsageError
from rpcprops.outcomes import Counters
from rpcprops.pytest_plugin import ClusterFactory


def remote_ring(size: int) -> list[float]:
    rank = rpc.get_worker_info().id
    rref = rpc.remote(f"worker{(rank + 1) % size}", torch.add, args=(torch.ones(1) * rank, 1))
    values: list[float] = rref.to_here().tolist()
    return values


def maps_of_shared_memory() -> list[str]:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return [line for line in [*maps, *links] if "tensorpipe_shm" in line or "/dev/shm" in line]


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_world_sizes(rpc_cluster: ClusterFactory, size: int) -> None:
    """A world of any size starts, runs RRefs on every rank, settles and exits with 0."""
    with rpc_cluster(world_size=size) as cluster:
        assert cluster.world_size == size
        assert cluster.each(remote_ring, size) == [[rank + 1.0] for rank in range(size)]
        assert cluster.settle() == (Counters(),) * size
    outcome = cluster.outcome
    assert outcome.world_size == size
    assert [rank.exit_code for rank in outcome.ranks] == [0] * size
    assert [rank.name for rank in outcome.ranks] == [f"worker{n}" for n in range(size)]
    assert [phase.verdict for phase in outcome.phases] == ["ok"] * len(outcome.phases)
    assert {phase.name for phase in outcome.phases} == {"start", "run", "settle", "shutdown"}
    assert outcome.real_seconds > 0


def test_ranks_are_fresh_processes(rpc_cluster: ClusterFactory) -> None:
    """No two ranks of two clusters are one process, and none is the test process."""
    seen: list[int] = []
    for _ in range(2):
        with rpc_cluster(world_size=2) as cluster:
            seen += cluster.each(os.getpid)
    assert len({*seen, os.getpid()}) == 5


def test_two_clusters_at_once(rpc_cluster: ClusterFactory) -> None:
    """Two worlds of one server live side by side, and either may end first."""
    with rpc_cluster(world_size=2) as first:
        with rpc_cluster(world_size=3, names=["a", "b", "c"]) as second:
            later = second.on(0).submit(remote_name)
            assert first.on(0).call(remote_name) == "worker0"
            assert later.result() == "a"
            second.settle()
        assert first.each(remote_name) == ["worker0", "worker1"]
        third = rpc_cluster(world_size=1)
        third.start()
        first.settle()
    assert third.on(0).call(remote_name) == "worker0"
    third.finish()
    third.kill()
    assert [rank.exit_code for rank in third.outcome.ranks] == [0]


def remote_name() -> str:
    return str(rpc.get_worker_info().name)


def test_a_cluster_runs_once(rpc_cluster: ClusterFactory) -> None:
    """A cluster cannot be entered again, neither while it runs nor after its end."""
    cluster = rpc_cluster(world_size=1)
    with cluster:
        with pytest.raises(UsageError, match="runs once"):
            cluster.start()
        assert cluster.on(0).call(remote_name) == "worker0"
    with pytest.raises(UsageError, match="runs once"), cluster:
        pass


def test_nothing_works_before_the_start(rpc_cluster: ClusterFactory) -> None:
    """Calls and looks before the with block are refused in words."""
    cluster = rpc_cluster(world_size=2)
    with pytest.raises(UsageError, match="not running"):
        cluster.on(0).call(remote_name)
    with pytest.raises(UsageError, match="not running"):
        cluster.each(remote_name)
    with pytest.raises(UsageError, match="not running"):
        cluster.settle()
    with pytest.raises(UsageError, match="not running"):
        cluster.snapshot()
    with cluster:
        assert cluster.on(1).call(remote_name) == "worker1"


def test_nothing_works_after_the_end(rpc_cluster: ClusterFactory) -> None:
    """Calls and looks after the with block are refused, and do not change the outcome."""
    with rpc_cluster(world_size=2) as cluster:
        pass
    outcome = cluster.outcome
    with pytest.raises(UsageError, match="not running"):
        cluster.on(0).call(remote_name)
    with pytest.raises(UsageError, match="not running"):
        cluster.on(0).submit(remote_name)
    with pytest.raises(UsageError, match="not running"):
        cluster.each(remote_name)
    with pytest.raises(UsageError, match=r"not running|over"):
        cluster.settle()
    with pytest.raises(UsageError, match=r"not running|over"):
        cluster.snapshot()
    assert cluster.outcome == outcome


def test_ranks_listen_on_loopback_only(rpc_cluster: ClusterFactory) -> None:
    """On the machine's network, every listener and connection of a rank is on loopback."""
    with rpc_cluster(world_size=3, network="host") as cluster:
        cluster.each(remote_ring, 3)
        for pid in cluster.each(os.getpid):
            connections = psutil.Process(pid).net_connections(kind="inet")
            listening = [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]
            assert listening, "the rank has no listener to check"
            addresses = {c.laddr.ip for c in connections} | {
                c.raddr.ip for c in connections if c.raddr
            }
            assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_tcp_uses_no_shared_memory(rpc_cluster: ClusterFactory) -> None:
    """With transport="tcp" no rank maps or opens a shared-memory segment, and files may grow."""

    def write_a_megabyte() -> int:
        fd = os.memfd_create("big")
        return os.write(fd, b"x" * (1 << 20))

    with rpc_cluster(world_size=2, transport="tcp") as cluster:
        cluster.each(remote_ring, 2)
        assert cluster.each(maps_of_shared_memory) == [[], []]
        # The limit that keeps the transport out is lifted again.
        assert cluster.on(0).call(write_a_megabyte) == 1 << 20
    assert cluster.outcome.transport == "tcp"


def test_shared_memory_works(rpc_cluster: ClusterFactory) -> None:
    """With transport="shm" ranks talk through shared memory, and no segment outlives them."""
    before = set(os.listdir("/dev/shm"))
    with rpc_cluster(world_size=2, transport="shm") as cluster:
        assert cluster.each(remote_ring, 2) == [[1.0], [2.0]]
        assert all(cluster.each(maps_of_shared_memory))
        cluster.settle()
    assert cluster.outcome.transport == "shm"
    left = {name for name in set(os.listdir("/dev/shm")) - before if "tensorpipe" in name}
    assert not left
