"""The first error of any rank in `each` is raised at once, with what the others did then."""

# ruff: noqa: PT012  (what is raised comes from the block of the cluster)

from __future__ import annotations

import time

import pytest
from torch.distributed import rpc

from rpcprops.pytest_plugin import ClusterFactory

pytestmark = pytest.mark.usefixtures("nothing_left")


def sleep_for_ever() -> None:
    time.sleep(1e9)


def act() -> int:
    """Rank 0 waits, rank 1 raises, rank 2 returns, rank 3 raises much later."""
    rank = int(rpc.get_worker_info().id)
    if rank == 0:
        rpc.rpc_sync("worker2", sleep_for_ever)
    if rank == 1:
        time.sleep(0.3)
        msg = "the dataset of rank 1 is empty"
        raise LookupError(msg)
    if rank == 3:
        time.sleep(1e6)
        msg = "too late"
        raise KeyError(msg)
    return rank


def test_the_first_error_is_raised_at_once(rpc_cluster: ClusterFactory) -> None:
    """Not after the deadline of those that wait, and a note says what each other rank did."""
    cluster = rpc_cluster(world_size=4, clock="real")
    given_up: list[bool] = []
    took = 0.0
    with pytest.raises(LookupError, match="the dataset of rank 1 is empty") as caught, cluster:
        began = time.monotonic()
        try:
            cluster.each(act)
        finally:
            took = time.monotonic() - began
            given_up += [bool(channel.given_up) for channel in cluster.ranks.channels]
    assert took < 10
    (note,) = caught.value.__notes__
    assert note.splitlines()[0] == "worker1 raised this first. The other ranks:"
    assert "worker0 is at" in note
    assert 'in act: rpc.rpc_sync("worker2", sleep_for_ever)' in note
    assert "worker2 returned" in note
    assert "worker3 is at" in note
    assert "in act: time.sleep(1e6)" in note
    # The answers that nobody waits for any more are dropped when they come.
    assert given_up == [True, False, False, True]


def test_one_rank_alone_has_no_others(rpc_cluster: ClusterFactory) -> None:
    """In a world of one the error has no note about the others."""
    with rpc_cluster(world_size=1) as cluster:
        with pytest.raises(ZeroDivisionError) as caught:
            cluster.each(divmod, 1, 0)
        assert not getattr(caught.value, "__notes__", [])
