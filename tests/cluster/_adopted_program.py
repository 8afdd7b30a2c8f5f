"""A program as people write them: it hard-codes names, options and addresses, and is a script."""

# mypy: ignore-errors
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.rpc
import torch.multiprocessing as mp
from torch.distributed import autograd as dist_autograd
from torch.distributed import rpc
from torch.distributed.rpc import TensorPipeRpcBackendOptions, init_rpc, shutdown

parser = argparse.ArgumentParser()
parser.add_argument("--rounds", type=int, required=True)
args = parser.parse_args()

STORE = "store"
kept = []


class Store:
    """The parameters, at one rank."""

    def __init__(self, size):
        self.values = torch.zeros(size)

    def add(self, change):
        self.values += change
        return self.values.sum().item()


def name_of(rank):
    return STORE if rank == 0 else f"client{rank}"


def join(rank, world_size):
    """Three ways of calling init_rpc; this module imported two before any rank was forked."""
    options = TensorPipeRpcBackendOptions(
        num_worker_threads=16, rpc_timeout=60, init_method="tcp://localhost:29500"
    )
    if rank == 0:
        init_rpc(
            STORE,
            rpc.BackendType.TENSORPIPE,
            rank=rank,
            world_size=world_size,
            rpc_backend_options=options,
        )
    elif rank == 1:
        rpc.init_rpc(
            name=name_of(rank), rank=rank, world_size=world_size, rpc_backend_options=options
        )
    else:
        torch.distributed.rpc.init_rpc(name_of(rank), rank=rank, world_size=world_size)


def train(world_size):
    stores = [rpc.remote(STORE, Store, args=(4,)) for _ in range(world_size)]
    totals = []
    for _ in range(args.rounds):
        totals = [store.rpc_sync().add(torch.ones(4)) for store in stores]
    return totals, stores


def run(rank, world_size, leak=""):
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = "29500"
    join(rank, world_size)
    totals = None
    if rank == 1:
        totals, stores = train(world_size)
        if leak == "rref":
            kept.append(stores[0])
        del stores
        if leak == "context":
            kept.append(dist_autograd.context())
            kept[-1].__enter__()
    shutdown()
    return totals


def run_with_a_process_group(rank, world_size):
    """A process group and its store on the same fixed port, beside RPC."""
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = "29500"
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    join(rank, world_size)
    total = torch.ones(1)
    dist.all_reduce(total)
    rpc.shutdown()
    dist.destroy_process_group()
    return total.item()


def main():
    mp.spawn(run, args=(3,), nprocs=3)


if __name__ == "__main__":
    main()
