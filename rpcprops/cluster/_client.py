"""The API of the fork server: it is started once in a test process, and makes its clusters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Unpack

from rpcprops import agents
from rpcprops.cluster._cluster import Cluster
from rpcprops.cluster.options import (
    ClockChoice,
    ClusterOptions,
    Network,
    check_bool,
    check_clock,
    check_network,
    complete,
)
from rpcprops.cluster.servers import Servers
from rpcprops.faults import FaultPlan
from rpcprops.outcomes import Outcome


class ClusterServer:
    """The fork server of a test process: imports torch once and makes clusters in milliseconds.

    ::

        table = FaultTable(["RREF_USER_DELETE"], num_fail_sends=3)
        with ClusterServer() as server:
            with server.cluster(world_size=2, faults=table) as cluster:
                cluster.on(0).call(my_function)

    Args:
        clock: "auto" (fast if the clock library is built and runs at its rate, else real),
            "real", or a rate: virtual seconds for each real second.
        network: the network of the ranks of a world: "auto" (its own, which nobody else can
            reach, where this machine allows that; else the machine's), "private" (its own, or an
            error), or "host" (the machine's: for code that talks to services there).
        agent: the RPC agent of clusters that name none, by its name in :mod:`rpcprops.agents`;
            torch's faulty one unless given.
        reuse: whether programs run in worlds that other programs have left as they were, where
            their agent can have that and a run does not say otherwise (see :func:`rpcprops.run`).
            Clusters are new unless they ask for ``reuse=True`` themselves.

    Attributes:
        servers: the fork server and all that belongs to it.

    Raises:
        UsageError: `clock` or `network` is none of these, or there is no such agent.
        MachineCannot: a rate was asked for by number and this machine cannot give it, or torch
            cannot be imported.
    """

    def __init__(
        self,
        clock: ClockChoice = "auto",
        network: Network = "auto",
        agent: str | None = None,
        *,
        reuse: bool = False,
    ) -> None:
        self.reuse = check_bool("reuse", reuse)
        self.servers = Servers(check_clock(clock), check_network(network))
        self.agent = agents.named(agents.default_name() if agent is None else agent).name
        #: Set while the examples of a confirmation run: the rate of clusters that name no clock.
        self.override_rate: float | None = None
        #: Set while a failing example runs again: no cluster has used ranks, whatever it asks for.
        self.only_fresh = False
        #: The fastest rate of clusters whose clock nobody has chosen; None is the server's rate.
        self.auto_limit: float | None = None
        #: Called with each cluster before its ranks are forked.
        self.on_start: Callable[[Cluster], None] | None = None
        #: Called with the plan and the outcome of each cluster that has ended, if it was started.
        self.on_end: Callable[[FaultPlan, Outcome], None] | None = None
        #: Called with the name of each rank; what it returns is called with each piece of the
        #: output of that rank while the rank runs, and with an empty piece at the end.
        self.on_output: Callable[[str], Callable[[bytes], None]] | None = None
        #: Called with each failure of a state machine that slower rates did not show, and whether
        #: it is undecided (ranks were too late to tell); if None, a warning is issued instead.
        self.on_unconfirmed: Callable[[str, bool], None] | None = None

    def __enter__(self) -> ClusterServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        """Begin to start the server process, and do not wait; :meth:`start` then waits for less."""
        self.servers.begin()

    def start(self) -> None:
        """Start the server process, once; it imports torch (1 to 3 real seconds)."""
        self.servers.start()

    def close(self) -> None:
        """Stop the server and everything that it forked; may be called again."""
        self.servers.close()

    @property
    def clock(self) -> ClockChoice:
        """The clock that was asked for."""
        return self.servers.rates.choice

    @property
    def network(self) -> Network:
        """The network that was asked for."""
        return self.servers.network

    @property
    def torch_version(self) -> str:
        """The version of torch in the ranks, empty before :meth:`start`."""
        return self.servers.root.torch_version

    @property
    def rate(self) -> float:
        """The rate that clusters run at unless they name one."""
        return self.servers.rates.rate

    @property
    def clock_note(self) -> str:
        """One line about the clock: its rate, or why it is real time and what to do."""
        return self.servers.rates.note

    @property
    def clock_problem(self) -> str:
        """:attr:`clock_note`, if clusters run in real time and nobody asked for it; else empty."""
        return self.servers.rates.problem

    @property
    def network_problem(self) -> str:
        """One line if ranks share the machine's network though nobody asked for it; else empty."""
        return self.servers.network_problem

    @property
    def arming_problem(self) -> str:
        """Why :meth:`Cluster.faults` cannot be used here, with the remedy; empty if it can be.

        Then faults also act on the messages by which ``rpc.shutdown()`` lets all ranks meet.
        """
        return self.servers.root.arming_problem

    def rate_of(self, clock: ClockChoice | None) -> float:
        """The rate that a cluster with this choice of clock runs at.

        Raises:
            MachineCannot: a rate was named that this machine cannot give.
        """
        chosen = self.servers.rates.of(clock)
        if self.auto_limit is not None and self.clock == "auto" and clock in (None, "auto"):
            chosen = min(chosen, self.auto_limit)
        return chosen if self.override_rate is None else min(chosen, self.override_rate)

    def cluster(self, **options: Unpack[ClusterOptions]) -> Cluster:
        """A cluster for one example; enter it to start its ranks, fresh ones unless it may reuse.

        Args:
            options: see :class:`rpcprops.cluster.ClusterOptions`.

        Raises:
            UsageError: an argument is out of its range; the message says which.
            MachineCannot: the clock's rate, or the network, cannot be had here.
        """
        return self.make_cluster(sys._getframe(1).f_globals.get("__name__", ""), **options)

    def make_cluster(self, *modules: str, **options: Unpack[ClusterOptions]) -> Cluster:
        """As :meth:`cluster`, for code in these modules, which the ranks import first."""
        self.servers.replace_if_dead()
        given: ClusterOptions = {"agent": self.agent, **options}
        world = complete(given, rate_of=self.rate_of, network=self.network)
        if self.only_fresh or self.override_rate is not None:
            # Only fresh ranks can confirm a failure.
            world = replace(world, reuse=False)
        return Cluster(
            self.servers,
            world,
            tuple(dict.fromkeys(modules)),
            on_start=self._tell_start,
            on_end=self._tell_end,
            on_output=self.on_output,
        )

    def _tell_start(self, cluster: Cluster) -> None:
        if self.on_start is not None:
            self.on_start(cluster)

    def _tell_end(self, plan: FaultPlan, outcome: Outcome) -> None:
        if self.on_end is not None:
            self.on_end(plan, outcome)
