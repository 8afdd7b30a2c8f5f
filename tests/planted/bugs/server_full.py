"""A client opens a session while the server still has the one that the client has dropped."""

import time

from hypothesis import given
from torch.distributed import rpc

from rpcprops import strategies

OPEN = []


class Session:
    def __init__(self):
        if OPEN:
            message = "the server is full"
            raise RuntimeError(message)
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
