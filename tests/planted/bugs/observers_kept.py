"""An agent forgets the handle of an environment only if its episode ended in time."""

from hypothesis import given
from torch.distributed import rpc

from rpcprops import strategies

RUNNING = []


class Environment:
    def __init__(self):
        self.state = 0

    def step(self):
        self.state += 1
        return self.state


def observe(environment):
    return environment.rpc_sync().step()


def play(episodes):
    for _ in range(episodes):
        RUNNING.append(rpc.remote("worker1", Environment))
        try:
            rpc.rpc_sync("worker2", observe, args=(RUNNING[-1],), timeout=3.0)
        except RuntimeError:
            continue  # the next episode has an environment of its own
        RUNNING.pop()


@given(faults=strategies.fault_plans(world_size=3))
def test_no_environment_outlives_its_episode(rpc_cluster, faults):
    with rpc_cluster(world_size=3, faults=faults, clock=20) as cluster:
        cluster.on(0).call(play, 2)
