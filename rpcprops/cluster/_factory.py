"""What the ``rpc_cluster`` fixture gives; without pytest, so that any module may name its type."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Unpack

from rpcprops.cluster._client import ClusterServer
from rpcprops.cluster._cluster import Cluster
from rpcprops.cluster.options import ClusterOptions, Transport
from rpcprops.faults import FaultPlan
from rpcprops.programs import check_world_size


class RpcCluster:
    """What the ``rpc_cluster`` fixture gives: call it to make a cluster, enter that to start it.

    The options are :class:`rpcprops.cluster.ClusterOptions`, as for
    :meth:`rpcprops.ClusterServer.cluster`; the transport is by default that of
    ``--rpc-transport``.
    """

    def __init__(
        self,
        started: Callable[[], ClusterServer],
        *,
        transport: Transport,
        without_faults: Callable[[], tuple[str, ...]],
        on_timeout: Callable[[float], object],
    ) -> None:
        self._started = started
        self._transport: Transport = transport
        self._without_faults = without_faults
        self._on_timeout = on_timeout

    def __repr__(self) -> str:
        return "<rpc_cluster>"

    def __call__(self, **options: Unpack[ClusterOptions]) -> Cluster:
        """A cluster that is not started yet, without the faults of ``--rpc-without-fault``.

        Its ranks look for functions in the module that calls this.

        Raises:
            UsageError: an option has an invalid value.
            MachineCannot: the fork server cannot start here.
        """
        module = sys._getframe(1).f_globals.get("__name__", "")
        options.setdefault("transport", self._transport)
        without = self._without_faults()
        if without:
            plan = FaultPlan.of(options.get("faults"))
            size = check_world_size(options.get("world_size"))
            options["faults"] = plan.without(without, size)
        server = self._started()
        timeout: object = options.get("rpc_timeout")
        if isinstance(timeout, int | float) and options.get("clock") is None:
            self._on_timeout(timeout)
        cluster = server.make_cluster(module, **options)
        cluster.arming.left_out = without
        return cluster

    @property
    def server(self) -> ClusterServer:
        """The fork server of this test process, started."""
        return self._started()
