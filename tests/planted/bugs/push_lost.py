"""A trainer pushes its gradient and never asks whether it arrived, so nobody hears of its loss."""

from hypothesis import given
from torch.distributed import rpc

from rpcprops import RETRYABLE_MESSAGE_TYPES, strategies

WEIGHT = [0.0]
LOSES = ("PYTHON_REMOTE_CALL", "PYTHON_RREF_FETCH_CALL", *RETRYABLE_MESSAGE_TYPES)


def push(gradient):
    WEIGHT[0] += gradient


def train(gradient):
    rpc.remote("worker0", push, args=(gradient,))


@given(faults=strategies.fault_plans(world_size=3, tables=strategies.fault_tables(messages=LOSES)))
def test_each_gradient_arrives_or_its_trainer_is_told(rpc_cluster, faults):
    with rpc_cluster(world_size=3, faults=faults) as cluster:
        trained = 0.0
        for rank in (1, 2):
            try:
                cluster.on(rank).call(train, float(rank))
                trained += rank
            except RuntimeError:
                continue
        cluster.settle()
        assert cluster.on(0).call(lambda: WEIGHT[0]) == trained
