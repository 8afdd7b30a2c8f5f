"""The state of one pytest process: the fork server, and what its clusters show."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext

import pytest

from rpcprops import agents
from rpcprops import runner as runners
from rpcprops._orphan import leave_with_parent
from rpcprops._printable import printable
from rpcprops.cluster import Cluster, ClusterServer
from rpcprops.errors import HarnessError, note_own
from rpcprops.faults import FaultPlan
from rpcprops.outcomes import Outcome
from rpcprops.plugin.options import Options, is_worker
from rpcprops.plugin.records import ItemRecord, Recorded
from rpcprops.plugin.timeouts import Limits
from rpcprops.report.in_flight import InFlight
from rpcprops.report.output import Echo

#: How many clusters of an example are kept for the report of its failure, about 8 KB each.
MOST_KEPT = 256


class Session:
    """The server of this process, which records what its clusters show.

    Attributes:
        options: the options of this run of pytest.
    """

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self.options = options
        self._plugins = config.pluginmanager
        self._writer = config.get_terminal_writer
        self._is_worker = is_worker(config)
        self.server = ClusterServer(
            clock=options.clock, network=options.network, agent=options.agent
        )
        runners.use_server(self.server)
        self.limits = Limits(self.server)
        self.in_flight = InFlight(config.rootpath, "pytest", self.server.agent)
        #: The process that controls this one, if this is an xdist worker that is not watched yet.
        self._controller = os.getppid() if self._is_worker else None
        self.server.on_start = self._on_start
        self.server.on_unconfirmed = self._note_unconfirmed
        if config.getoption("capture") == "no":
            self.server.on_output = lambda name: Echo(lambda line: print(f"[{name}] {line}"))
        self._recorded: deque[tuple[FaultPlan, Outcome]] = deque()
        #: What was wrong with us in the first of these clusters in which something was.
        self._own_error: HarnessError | None = None
        #: Unconfirmed failures of state machines, and whether each is undecided.
        self._unconfirmed: list[tuple[str, bool]] = []
        self._told_clock_problem = ""
        self._told_arming_problem = False
        #: The faults that clusters leave out now, besides those of the options.
        self.left_out: tuple[str, ...] = ()

    @property
    def without_fault(self) -> tuple[str, ...]:
        """The names of the faults that clusters leave out."""
        return (*self.options.without_fault, *self.left_out)

    def say(self, line: str) -> None:
        """Print a line now, beside pytest's progress; an xdist worker has no terminal for it."""
        reporter = self._plugins.get_plugin("terminalreporter")
        capture = self._plugins.get_plugin("capturemanager")
        if reporter is None:
            return
        # As pytest's own live log does it.
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            reporter.ensure_newline()
            if self._writer().width_of_current_line:  # With -q, where no line begins with a file.
                self._writer().line()
            reporter.write_line(f"rpcprops: {printable(line)}")

    def say_of_agent(self, line: str) -> None:
        """Say that the agent of a test is compiled, so that nobody takes the run for a hung one.

        The controller of an xdist worker has begun the test report, so a worker writes to stderr,
        which is that of the controller.
        """
        if not self._is_worker and self._plugins.has_plugin("terminalreporter"):
            self.say(line)
            return
        capture = self._plugins.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            agents.to_stderr(line)

    def started(self) -> ClusterServer:
        """The server, once it has started."""
        self.watch_controller()
        self.server.start()
        return self.server

    def close(self) -> None:
        """Remove the in-flight record, and end the server."""
        self.in_flight.clear()
        self.server.close()

    def _on_start(self, cluster: Cluster) -> None:
        self.watch_controller()
        if self.options.replay is None:
            self.in_flight(cluster)

    def watch_controller(self) -> None:
        """In an xdist worker: exit soon after the controller was killed."""
        if self._controller is not None:
            leave_with_parent(self._controller, self._on_orphaned)
            self._controller = None

    def _on_orphaned(self) -> None:
        # The run was killed, so leave the record in place.
        self.in_flight.stays = True

    @contextmanager
    def recording(self, record: ItemRecord) -> Generator[None, None, None]:
        """Record what clusters show that end in the block, and forget it afterwards."""

        def on_end(plan: FaultPlan, outcome: Outcome) -> None:
            self._recorded.append((plan, outcome))
            if len(self._recorded) > MOST_KEPT:
                record.leave_out(*self._recorded.popleft())

        with self.counting(record, on_end):
            yield

    @contextmanager
    def counting(
        self, record: ItemRecord, also: Callable[[FaultPlan, Outcome], None]
    ) -> Generator[None, None, None]:
        """Count the clusters that end in the block, and call `also` for each."""

        def on_end(plan: FaultPlan, outcome: Outcome) -> None:
            try:
                record.count_cluster(plan, outcome)
            except HarnessError as own:
                # The test may be about to fail, and its own error comes first: see ended().
                self._own_error = self._own_error or own
            also(plan, outcome)

        self.server.on_end = on_end
        try:
            yield
        finally:
            self.server.on_end = None
            self.take_recorded()

    def take_recorded(self) -> Recorded:
        """Take what the clusters showed that ended since the last call."""
        recorded = list(self._recorded)
        self._recorded.clear()
        self._own_error = None
        return recorded

    def ended(self, error: BaseException | None) -> tuple[BaseException | None, Recorded]:
        """By what a run of a test has failed, and what its clusters showed, which is taken.

        Args:
            error: what the test has raised. If its clusters showed an error of ours as well, that
                is a note of this one; and the failure, where the test has raised nothing.
        """
        own = self._own_error
        recorded = self.take_recorded()
        if own is None or error is None:
            return error or own, recorded
        note_own(error, own)
        return error, recorded

    def _note_unconfirmed(self, line: str, is_undecided: bool) -> None:
        self._unconfirmed.append((line, is_undecided))

    def take_unconfirmed(self) -> list[tuple[str, bool]]:
        """Take the unconfirmed failures of state machines, and whether each is undecided."""
        taken, self._unconfirmed = self._unconfirmed, []
        return taken

    def take_clock_problem(self) -> str:
        """Why ranks run in real time though nobody asked for it; once for each started server."""
        problem = self.server.clock_problem
        if problem == self._told_clock_problem:
            return ""
        self._told_clock_problem = problem
        return problem

    def take_arming_problem(self) -> str:
        """What faults cannot do here, and why; once for each process."""
        problem = self.server.arming_problem
        if not problem or self._told_arming_problem:
            return ""
        self._told_arming_problem = True
        return (
            "faults also act on the messages of rpc.shutdown() itself, so a lost one may hang it, "
            f"and cluster.faults cannot be used: {problem}"
        )


#: The key of this process's session in pytest's configuration.
SESSION = pytest.StashKey[Session]()
