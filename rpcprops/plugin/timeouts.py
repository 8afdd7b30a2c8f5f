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


def shortest_in(recorded: Recorded, rate: float) -> float | None:
    """The shortest timeout that code has passed in clusters of that rate; None if there was none.

    In virtual seconds.
    """
    seen = [
        rank.shortest_timeout
        for _, outcome in recorded
        for rank in outcome.ranks
        if outcome.clock_rate == rate
    ]
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
        self._told: set[str] = set()

    def begin(self, nodeid: str) -> None:
        """A test begins. All parametrisations of a function are held to the same rate."""
        self._test = nodeid.partition("[")[0]
        self._server.auto_limit = self._found.get(self._test, (None, 0.0))[0]

    def end(self) -> None:
        """The test has ended."""
        self._server.auto_limit = None

    def learn(self, recorded: Recorded) -> bool:
        """Hold the test to the rate that its timeouts need; whether that is slower than so far."""
        # Other rates were chosen by the code.
        return self.learn_timeout(shortest_in(recorded, self._rate))

    def learn_timeout(self, timeout: float | None) -> bool:
        """As :meth:`learn`, for a timeout that the options of a cluster name."""
        if timeout is None or self._server.clock != "auto" or not timeout > 0:
            return False  # what is no timeout is refused elsewhere
        if timeout / self._rate >= REAL_SECONDS:
            return False
        self._hold_to(rate_for(timeout), timeout)
        return True

    @property
    def _rate(self) -> float:
        return self._server.auto_limit or self._server.rate

    def slow_down(self) -> None:
        """A slower run did not show a failure: if the test passes timeouts, make it slower still.

        Its calls may need more real time than :data:`REAL_SECONDS`.
        """
        if self._test in self._found:
            rate, timeout = self._found[self._test]
            self._hold_to(next((slower for slower in _RATES if slower <= rate / 4), 1.0), timeout)

    def _hold_to(self, rate: float, timeout: float) -> None:
        try:
            self._server.rate_of(rate)
        except MachineCannot:
            rate = 1.0  # always possible
        self._found[self._test] = rate, timeout
        self._server.auto_limit = rate

    def take_note(self) -> str:
        """What was chosen for the test, in a sentence; empty after the first time, or if nothing.

        It is said once for all parametrisations of a function.
        """
        if self._test not in self._found or self._test in self._told:
            return ""
        self._told.add(self._test)
        rate, timeout = self._found[self._test]
        return f"ranks run at rate {rate:g}, because of a timeout of {timeout:g} s"

    def advice(self) -> str:
        """What to do about a test that has run once, too fast for its timeouts."""
        rate, timeout = self._found[self._test]
        choice = f"{rate:g}" if rate > 1 else "real"
        return (
            f"the code passes timeouts of {timeout:g} s, which is too short at rate "
            f"{self._server.rate:g}: choose --rpc-clock={choice}, or pass clock= to rpc_cluster"
        )
