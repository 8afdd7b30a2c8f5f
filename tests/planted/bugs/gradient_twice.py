"""A trainer sends its gradient again after a timeout, and the server adds it twice."""

from hypothesis import given
from torch.distributed import rpc

from rpcprops import strategies

WEIGHT = [0.0]


def push(gradient):
    WEIGHT[0] -= gradient
    return WEIGHT[0]


def train(gradient):
    try:
        return rpc.rpc_sync("worker0", push, args=(gradient,), timeout=1.0)
    except RuntimeError:
        return rpc.rpc_sync("worker0", push, args=(gradient,), timeout=60.0)


@given(faults=strategies.fault_plans(world_size=3))
def test_each_gradient_counts_once(rpc_cluster, faults):
    with rpc_cluster(world_size=3, faults=faults, clock=10) as cluster:
        for rank in (1, 2):
            cluster.on(rank).call(train, float(rank))
        assert cluster.on(0).call(lambda: WEIGHT[0]) == -3.0
