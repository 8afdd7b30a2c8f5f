"""The cluster: a fork server that imports torch once, and worlds of fresh ranks forked from it."""

from rpcprops.cluster._calls import RankFuture, RankProxy
from rpcprops.cluster._client import ClusterServer
from rpcprops.cluster._cluster import Cluster
from rpcprops.cluster._factory import RpcCluster
from rpcprops.cluster._functions import KeptValue
from rpcprops.cluster.options import ClusterOptions

__all__ = [
    "Cluster",
    "ClusterOptions",
    "ClusterServer",
    "KeptValue",
    "RankFuture",
    "RankProxy",
    "RpcCluster",
]
