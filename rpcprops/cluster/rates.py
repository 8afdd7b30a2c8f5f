"""The clock rates of ranks: which one was chosen, and whether this machine can have it."""

from __future__ import annotations

from collections.abc import Mapping

from rpcprops import clock as clocks
from rpcprops._given import shown
from rpcprops.cluster._spec import PROBE_SAYS
from rpcprops.cluster.fork_server import ForkServer
from rpcprops.cluster.options import ClockChoice, check_clock
from rpcprops.errors import MachineCannot

#: Virtual seconds for each real one when `clock="auto"` (docs/clock.md has the curve behind it).
DEFAULT_RATE = 400.0
#: The same for a program in a world that may be used again, where no verdict rests on a time. It
#: cannot make a failure: what fails there runs again in a new world at the default rate.
REUSED_RATE = 2000.0


def unasked_real_time(problem: str) -> str:
    """The line that says that ranks run in real time because of `problem`."""
    return f"clock: real time, though it was not asked for: {' '.join(problem.split())}"


class Rates:
    """The rates of the ranks of one fork server.

    Attributes:
        choice: what the user has chosen.
        rate: the rate that results here, 1.0 before :meth:`measure`.
        note: one line about the clock: its rate, or why it is real time and what to do.
        problem: `note` if it is real time and nobody asked for that, else empty.
    """

    def __init__(self, server: ForkServer, choice: ClockChoice) -> None:
        self.choice: ClockChoice = choice
        self.rate = 1.0
        self.note = ""
        self.problem = ""
        self._server = server
        self._library_problem = ""
        self._verified = {1.0}

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """`environ` for the fork server: with the clock library, if that can be loaded.

        Raises:
            MachineCannot: it cannot be loaded, and a rate was chosen by number.
        """
        self.rate = 1.0
        self.problem = ""
        # A library that cannot be loaded may kill the server, so another program tries it first.
        self._library_problem = clocks.library_problem()
        if self._library_problem:
            if self.choice not in ("auto", "real"):
                msg = f"clock={self.choice!r} cannot be had: {self._library_problem}"
                raise MachineCannot(msg)
            return dict(environ)
        # Load it in real time too: the library also counts delays and lateness.
        return clocks.preload_environment(dict(environ))

    def measure(self) -> None:
        """Measure whether ranks of the started fork server run at the rate that was chosen.

        Raises:
            MachineCannot: they do not, and the rate was chosen by number.
        """
        if self.choice == "real":
            self.note = "clock: real time, as asked for"
            return
        if self._library_problem:
            self._fall_back(self._library_problem)
            return
        rate = DEFAULT_RATE if self.choice == "auto" else float(self.choice)
        try:
            self._verify(rate)
        except MachineCannot as error:
            if self.choice != "auto":
                raise
            self._fall_back(str(error))
            return
        self.rate = rate
        self.note = f"clock: {rate:g} virtual seconds for each real second (measured)"

    def of(self, clock: ClockChoice | None) -> float:
        """The rate for this choice, or for the server's choice if it is None.

        Raises:
            MachineCannot: a rate was named that this machine cannot give.
        """
        if clock is None:
            return self.rate
        choice = check_clock(clock)
        if choice == "real":
            return 1.0
        if choice == "auto":
            return self.rate
        rate = float(choice)
        if rate != 1.0:
            if self._library_problem:
                msg = f"clock={shown(clock)} cannot be had: {self._library_problem}"
                raise MachineCannot(msg)
            self._verify(rate)
        return rate

    def forget(self) -> None:
        """Measure every rate again, for another fork server."""
        self._verified = {1.0}

    def _fall_back(self, problem: str) -> None:
        """Stay in real time, and say why in one line."""
        self.note = self.problem = unasked_real_time(problem)

    def _verify(self, rate: float) -> None:
        """Measure the rate in a child of the server, once for each rate.

        Raises:
            MachineCannot: the child's clock does not run at that rate.
        """
        if rate in self._verified:
            return
        written = self._server.log_size()
        with self._server.ask(("probe", rate)) as ours:
            try:
                clocks.observe(ours.fileno(), rate)
            except (clocks.ClockError, clocks.ClockUnavailable) as error:
                if self._server.is_gone:
                    raise self._server.died() from error
                said = self._server.log_from(written).splitlines()
                own = [line for line in said if line.startswith(PROBE_SAYS)]
                raise MachineCannot("; ".join([str(error), *own])) from error
        self._verified.add(rate)
