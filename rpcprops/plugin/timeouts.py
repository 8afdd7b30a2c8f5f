"""Chooses a slower clock for a test whose code passes timeouts to torch.

A timeout of T virtual seconds at rate r is T / r real seconds, and honest work needs real time. So
such a test runs at the fastest rate that leaves each of its timeouts :data:`REAL_SECONDS`.
"""

from __future__ import annotations

from rpcprops.cluster import ClusterServer
from rpcprops.errors import MachineCannot
from rpcprops.plugin.records import Recorded

#: The real seconds that each timeout gets. Waits of ranks end up to 5 ms late on a machine with two
#: busy loops for each core (docs/clock.md), and a first call among fresh ranks often takes 20 ms.
REAL_SECONDS = 0.1
#: The rates to choose from: each rate of ranks is measured once before it is used.
_RATES = (200.0, 100.0, 50.0, 20.0, 10.0, 5.0, 2.0)


def shortest_in(recorded: Recorded) -> float | None:
    """The shortest timeout that code has passed, in virtual seconds; None if there was none."""
    seen = [rank.shortest_timeout for _, outcome in recorded for rank in outcome.ranks]
    return min((timeout for timeout in seen if timeout is not None), default=None)


def rate_for(timeout: float) -> float:
    """The fastest of our rates at which a timeout (virtual seconds) lasts long enough."""
    return next((rate for rate in _RATES if timeout / rate >= REAL_SECONDS), 1.0)


class Limits:
    """The rates to which the tests of a pytest process are held, by what they have passed.

    Only clusters whose clock nobody has chosen are held to a rate.
    """

    def __init__(self, server: ClusterServer) -> None:
        self._server = server
        self._test = ""
        self._found: dict[str, tuple[float, float]] = {}

    def begin(self, nodeid: str) -> None:
        """A test begins. All parametrisations of a function are held to the same rate."""
        self._test = nodeid.partition("[")[0]
        self._server.auto_limit = self._found.get(self._test, (None, 0.0))[0]

    def end(self) -> None:
        """The test has ended."""
        self._server.auto_limit = None

    def learn(self, recorded: Recorded) -> bool:
        """Hold the test to the rate that its timeouts need; whether that is slower than so far."""
        timeout = shortest_in(recorded)
        if timeout is None or self._server.clock != "auto":
            return False
        before = self._server.auto_limit or self._server.rate
        if timeout / before >= REAL_SECONDS:
            return False
        rate = rate_for(timeout)
        try:
            self._server.rate_of(rate)
        except MachineCannot:
            rate = 1.0  # always possible
        self._found[self._test] = rate, timeout
        self._server.auto_limit = rate
        return True

    @property
    def note(self) -> str:
        """What was chosen for the test, in a sentence; empty if it runs at the usual rate."""
        if self._test not in self._found:
            return ""
        rate, timeout = self._found[self._test]
        return f"ranks run at rate {rate:g}, because the code passes timeouts of {timeout:g} s"
