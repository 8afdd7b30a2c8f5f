"""A barrier counts arrivals, and a worker that waits for long arrives a second time."""

import time

from hypothesis import given
from torch.distributed import rpc

from rpcprops import strategies

ARRIVED = []


def arrive(rank):
    ARRIVED.append(rank)


def is_open():
    return len(ARRIVED) >= 2


def pass_barrier(rank):
    """Which workers had arrived when the barrier opened."""
    rpc.rpc_sync("worker0", arrive, args=(rank,))
    waited = 0.0
    while not rpc.rpc_sync("worker0", is_open):
        time.sleep(0.1)
        waited += 0.1
        if waited > 1.0:
            rpc.rpc_sync("worker0", arrive, args=(rank,))  # the first may have been lost
            waited = 0.0
    return rpc.rpc_sync("worker0", arrived)


def arrived():
    return list(ARRIVED)


@given(faults=strategies.fault_plans(world_size=3))
def test_the_barrier_waits_for_both(rpc_cluster, faults):
    with rpc_cluster(world_size=3, faults=faults, clock=10) as cluster:
        passing = [cluster.on(rank).submit(pass_barrier, rank) for rank in (1, 2)]
        for one in passing:
            assert set(one.result()) == {1, 2}
