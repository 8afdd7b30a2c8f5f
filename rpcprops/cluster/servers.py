"""All that forks the ranks of a test process: the fork server, and what belongs to it."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence

from rpcprops.cluster import _limits, finder, namespaces
from rpcprops.cluster._kept import KeptWorlds
from rpcprops.cluster._module_servers import ModuleServers
from rpcprops.cluster._peer import Peer
from rpcprops.cluster.fork_server import ForkServer
from rpcprops.cluster.options import ClockChoice, Network
from rpcprops.cluster.rates import Rates
from rpcprops.errors import HarnessError, MachineCannot


def shared_network(problem: str) -> str:
    """The line that says that ranks share the machine's network because of `problem`."""
    return (
        f"network: shared with this machine, so that any local user can connect to the ranks, and "
        f"run code in them (SECURITY.md): {' '.join(problem.split())}"
    )


class Servers:
    """The fork server, its module servers, its clocks and the networks of its worlds.

    Attributes:
        network: which network worlds get that name none.
        networks: the process that makes networks.
        kept: worlds that wait for another program.
    """

    def __init__(self, clock: ClockChoice, network: Network) -> None:
        self.network: Network = network
        self.networks = namespaces.Maker()
        self.kept = KeptWorlds()
        self.root = ForkServer()
        self.rates = Rates(self.root, clock)
        self._modules = ModuleServers(self.root)
        self._worlds = itertools.count(1)
        self._in_use = False
        #: Whether a signal ended the server the last time it was started.
        self._was_killed = False

    def begin(self) -> None:
        """Begin to start the fork server, and do not wait. What goes wrong is said by `start`."""
        with contextlib.suppress(MachineCannot, OSError):
            if not self.root.is_started:
                self.root.begin(self.rates.environment(os.environ))

    def start(self) -> None:
        """Start the fork server, once; it imports torch (1 to 3 real seconds).

        Raises:
            UsageError: this process is one that imports a module for ranks.
        """
        finder.check_not_importing()
        if self.root.is_started:
            return
        self._start()
        self._in_use = True

    def _start(self) -> None:
        """Start the server. If it is killed before it is ready, start it once more."""
        try:
            self._start_once()
        except (HarnessError, MachineCannot):
            if not self._was_killed:
                raise
            self._start_once()

    def _start_once(self) -> None:
        self._was_killed = False
        try:
            # If the machine is too limited for a world of one rank, it is so for all worlds.
            _limits.check(1, "tcp", 1)
            environ = self.rates.environment(os.environ)
            if self.network != "host":
                self.networks.start()
            self.root.start(environ)
            if self.network != "host":
                with contextlib.suppress(OSError):
                    # The next cluster tries again.
                    self.networks.try_out()
            self.rates.measure()
        except BaseException:
            self._was_killed = self.root.was_killed()
            # Also after an interrupt: a with block that was never entered is never left.
            self._stop()
            raise

    def close(self) -> None:
        """Stop the server and everything that it forked; may be called again."""
        self._in_use = False
        self._stop()

    def _stop(self) -> None:
        self.kept.close()
        self._modules.close()
        self.rates.forget()
        self.root.stop()
        self.networks.close()

    def replace_if_dead(self, rate: float = 1.0) -> None:
        """If the last server has died, start another, and make sure that it has that rate.

        Raises:
            MachineCannot: its clock does not run at that rate.
        """
        if self._in_use and (not self.root.is_started or self.root.is_gone):
            self.died()
            self._stop()
            self._start()
        self.rates.of(rate)

    def died(self) -> HarnessError:
        """The error that says which server died and how, and what the fork server wrote last."""
        return self._modules.died()

    def peer_for(self, first: Sequence[str]) -> tuple[Peer, finder.ModuleMap | None]:
        """The server that forks ranks with these modules, and what ranks import by themselves."""
        return self._modules.peer_for(first)

    @property
    def peers(self) -> list[Peer]:
        """The sockets of all servers that fork ranks; they may have died."""
        return [self.root.peer(), *self._modules.peers]

    def next_world(self) -> int:
        """A number that no world of these servers has had."""
        return next(self._worlds)

    @property
    def network_problem(self) -> str:
        """One line if ranks share the machine's network though nobody asked for it; else empty."""
        if self.network != "auto" or not self.networks.problem:
            return ""
        return shared_network(self.networks.problem)

    @contextlib.contextmanager
    def new_network(self, choice: Network) -> Iterator[list[int]]:
        """Descriptors of a network for one more world, closed at the end; none for "host".

        Raises:
            MachineCannot: there is no such network here.
        """
        try:
            descriptors = [] if choice == "host" else self.networks.take()
        except OSError as error:
            msg = f"the network of a world could not be had: {_limits.explain(error)}"
            raise MachineCannot(msg) from error
        if not descriptors:
            self._check_machine_network(choice)
        try:
            yield descriptors
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _check_machine_network(self, choice: Network) -> None:
        if choice == "private":
            msg = (
                f"network='private' cannot be had: {self.networks.problem}. network='auto' takes "
                f"the machine's, which local users can connect to."
            )
            raise MachineCannot(msg)
        if not namespaces.loopback_is_up():
            msg = (
                "the loopback interface, over which the ranks talk, is not there or is down; "
                "`ip link set lo up` brings it up."
            )
            raise MachineCannot(msg)
