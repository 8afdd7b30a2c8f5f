"""A training step that fails never leaves its autograd context."""

import torch
import torch.distributed.autograd as dist_autograd
from hypothesis import given
from torch.distributed import rpc

from rpcprops import strategies


def parameters():
    return torch.ones(2, requires_grad=True)


def forward(model):
    return model.to_here().sum()


def train(steps):
    model = rpc.remote("worker1", parameters)
    for _ in range(steps):
        try:
            step(model)
        except RuntimeError:
            continue  # a step may be skipped


def step(model):
    context = dist_autograd.context()
    context_id = context.__enter__()
    loss = rpc.rpc_sync("worker2", forward, args=(model,), timeout=5.0)
    dist_autograd.backward(context_id, [loss])  # pyright: ignore[reportPrivateImportUsage]
    context.__exit__(None, None, None)


@given(faults=strategies.fault_plans(world_size=3))
def test_each_context_is_left(rpc_cluster, faults):
    with rpc_cluster(world_size=3, faults=faults, clock=20) as cluster:
        cluster.on(0).call(train, 1)
