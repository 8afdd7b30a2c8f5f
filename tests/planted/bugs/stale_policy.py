"""An actor that cannot fetch the newest policy in time silently acts on the one before."""

from hypothesis import given
from torch.distributed import rpc

from rpcprops import strategies

VERSION = [0]


class Actor:
    def __init__(self):
        self.policy = 0

    def refresh(self):
        newest = rpc.remote("worker0", published)
        try:
            self.policy = newest.to_here(timeout=1.0)
        except Exception:
            pass
        return self.policy


ACTOR = Actor()


def published():
    return VERSION[0]


def refresh():
    return ACTOR.refresh()


def improve():
    VERSION[0] += 1


@given(faults=strategies.fault_plans(world_size=2))
def test_an_actor_uses_the_newest_policy(rpc_cluster, faults):
    with rpc_cluster(world_size=2, faults=faults, clock=10) as cluster:
        for version in (1, 2):
            cluster.on(0).call(improve)
            assert cluster.on(1).call(refresh) == version
