"""Ranks that run one function and exit with it, as processes of their own would."""

from __future__ import annotations

import os
import signal
import time

import pytest
from torch.distributed import rpc

from rpcprops.errors import RankDied, RankHung, UsageError
from rpcprops.fixture import for_this_rank
from rpcprops.pytest_plugin import ClusterFactory

pytestmark = pytest.mark.usefixtures("nothing_left")


def rank_number(limit: int) -> int:
    """This rank; one above the limit waits for ever."""
    rank = for_this_rank().rank
    if rank > limit:
        time.sleep(10_000_000)
    return rank


def outlive_the_last() -> str:
    """Rank 0 calls rank 1 until that is gone; rank 1 returns at once, without a shutdown."""
    fixture = for_this_rank()
    fixture.init_rpc()
    if fixture.rank == 1:
        return "left"
    while True:
        try:
            rpc.rpc_sync(fixture_name(1), os.getpid)
        except RuntimeError as error:
            return str(error)


def fixture_name(rank: int) -> str:
    return f"worker{rank}"


def end_by(number: int) -> None:
    if for_this_rank().rank == 1:
        os.kill(os.getpid(), number)
    time.sleep(10_000_000)


def fail() -> None:
    message = "no such luck"
    raise ValueError(message)


def test_every_rank_gives_its_result_and_exits(rpc_cluster: ClusterFactory) -> None:
    """The results are there by rank, and each rank has left with exit code 0."""
    with rpc_cluster(world_size=3, init=False, leaks="allow") as cluster:
        results = cluster.run_to_exit(rank_number, 9, is_last=lambda _: False)
    assert results == {0: 0, 1: 1, 2: 2}
    assert [rank.exit_code for rank in cluster.outcome.ranks] == [0, 0, 0]


def test_a_rank_leaves_while_others_still_run(rpc_cluster: ClusterFactory) -> None:
    """A rank that has returned is gone for its peers, as a process that ended is."""
    with rpc_cluster(world_size=2, init=False, leaks="allow", deadline=30) as cluster:
        results = cluster.run_to_exit(outlive_the_last, is_last=lambda _: False)
    assert results[1] == "left"
    assert results[0] != "left"


def test_a_last_result_ends_the_run(rpc_cluster: ClusterFactory) -> None:
    """Ranks whose results are pointless by then are killed, and not reported."""
    with rpc_cluster(world_size=3, init=False, leaks="allow") as cluster:
        results = cluster.run_to_exit(rank_number, 0, is_last=lambda result: result == 0)
    assert results == {0: 0}
    assert [rank.killed for rank in cluster.outcome.ranks[1:]] == [True, True]


def test_a_rank_that_dies_is_found(rpc_cluster: ClusterFactory) -> None:
    """A rank that ends by a signal before its result is RankDied, with its name."""
    with pytest.raises(RankDied, match="worker1 died during run: killed by SIGKILL"):
        with rpc_cluster(world_size=2, init=False, leaks="allow") as cluster:
            cluster.run_to_exit(end_by, signal.SIGKILL, is_last=lambda _: False)


def test_a_rank_that_does_not_end_is_found(rpc_cluster: ClusterFactory) -> None:
    """A rank that is out of time is RankHung, and the others' results are kept."""
    results = {}
    cluster = rpc_cluster(world_size=2, init=False, leaks="allow", deadline=2)
    with pytest.raises(RankHung, match="worker1 does not end"):
        with cluster:
            results = cluster.run_to_exit(rank_number, 0, is_last=lambda _: False)
    assert results == {0: 0}
    assert "rank_number" in cluster.outcome.ranks[1].stack


def test_what_a_rank_raises_is_raised(rpc_cluster: ClusterFactory) -> None:
    """An exception of the function comes back as itself."""
    with pytest.raises(ValueError, match="no such luck"):
        with rpc_cluster(world_size=2, init=False, leaks="allow") as cluster:
            cluster.run_to_exit(fail, is_last=lambda _: False)


def test_nothing_runs_after_it(rpc_cluster: ClusterFactory) -> None:
    """A call to ranks that have left is refused."""
    with rpc_cluster(world_size=1, init=False, leaks="allow") as cluster:
        cluster.run_to_exit(rank_number, 9, is_last=lambda _: False)
        with pytest.raises(UsageError, match="have run to their exit"):
            cluster.on(0).call(rank_number, 9)
