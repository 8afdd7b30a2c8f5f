"""A client opens a session while the server still has the one that the client has dropped."""

import time

import torch.distributed.rpc as rpc
from hypothesis import given

from rpcprops import strategies

OPEN = []


class Session:
    def __init__(self):
        if OPEN:
            raise RuntimeError("the server is full")
        OPEN.append(True)

    def __del__(self):
        OPEN.clear()

    def work(self):
        return len(OPEN)


def client(rounds):
    for _ in range(rounds):
        session = rpc.remote("worker0", Session)
        session.rpc_sync().work()
        del session
        time.sleep(1.5)  # the server closes it by then


@given(faults=strategies.fault_plans(world_size=2))
def test_a_client_gets_a_session_each_time(rpc_cluster, faults):
    with rpc_cluster(world_size=2, faults=faults, clock=20) as cluster:
        cluster.on(1).call(client, 2)
