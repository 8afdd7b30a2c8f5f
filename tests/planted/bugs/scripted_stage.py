"""A pipeline gives its first stage, a scripted function, less time than a slow link takes."""

import torch
from hypothesis import given
from torch.distributed import rpc

from rpcprops import strategies


@torch.jit.script
def stage(values: torch.Tensor) -> torch.Tensor:
    return values * 2


def pipeline():
    values = torch.ones(2)
    for worker in ("worker1", "worker2"):
        values = rpc.rpc_sync(worker, stage, args=(values,), timeout=1.0)
    return values.tolist()


@given(faults=strategies.fault_tables())
def test_a_batch_passes_both_stages(rpc_cluster, faults):
    with rpc_cluster(world_size=3, faults=faults, clock=10) as cluster:
        assert cluster.on(0).call(pipeline) == [4.0, 4.0]
