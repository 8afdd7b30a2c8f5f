"""The cluster: a fork server that imports torch once, and worlds of fresh ranks forked from it."""

from rpcprops.cluster._client import ClusterServer
from rpcprops.cluster._cluster import Cluster, RankFuture, RankProxy
from rpcprops.cluster._functions import KeptValue

__all__ = ["Cluster", "ClusterServer", "KeptValue", "RankFuture", "RankProxy"]
