"""An evaluator relies on an update to be there after half a second."""

import time

from hypothesis import given
from torch.distributed import rpc

from rpcprops import strategies

WEIGHT = [0.0]


def update(gradient):
    WEIGHT[0] += gradient


def read():
    return WEIGHT[0]


def train():
    rpc.remote("worker0", update, args=(1.0,))


def evaluate():
    trained = rpc.rpc_async("worker1", train)
    time.sleep(0.5)
    weight = rpc.rpc_sync("worker0", read)
    trained.wait()
    return weight


@given(faults=strategies.fault_plans(world_size=3))
def test_the_evaluator_sees_the_update(rpc_cluster, faults):
    with rpc_cluster(world_size=3, faults=faults, clock=10) as cluster:
        assert cluster.on(2).call(evaluate) == 1.0
