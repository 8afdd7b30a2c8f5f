"""Runs a test of PyTorch's suites once on our ranks, and says what it showed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rpcprops import agents
from rpcprops._replay import OfRanks
from rpcprops.agents import Agent
from rpcprops.cluster import Cluster, ClusterServer
from rpcprops.cluster.finder import UPSTREAM
from rpcprops.confirmation import OWN_CODE_SLACK
from rpcprops.errors import BrokenPromise, HarnessError, RankDied, UsageError
from rpcprops.faults import FaultPlan
from rpcprops.outcomes import Outcome, Violation
from rpcprops.programs import Program
from rpcprops.properties import Case, Observation, accounted
from rpcprops.report.artefact import Artefact
from rpcprops.runner import Runner
from rpcprops.upstream import _entry
from rpcprops.upstream.data import RankVerdict, UpstreamTest

#: Virtual seconds for each real second by default. The tests have timeouts of half a virtual second
#: or more, so 50 leaves the real work 10 ms. A failing test is run again, slower.
DEFAULT_RATE = 50.0
#: The transport: PyTorch's harness uses torch's default, which is this one on a single host.
TRANSPORT: Literal["tcp", "shm"] = "shm"
#: Real seconds that a test may take on top of what its faults need, with a fast and with a real
#: clock. The second is that of PyTorch's harness.
_FAST_DEADLINE = 30.0
_REAL_DEADLINE = 300.0
_LINES_OF_REASON = 60


@dataclass(frozen=True, slots=True)
class UpstreamCase(Case):
    """A test of PyTorch's under a plan. The test says what ranks do, so the program is empty.

    Attributes:
        test: the test; required, although dataclasses require a default here.
    """

    test: UpstreamTest = field(kw_only=True)

    @classmethod
    def of(cls, test: UpstreamTest, plan: FaultPlan | None = None) -> UpstreamCase:
        """The case of `test` under `plan`; without faults unless given."""
        program = Program(test.world_size, ())
        return cls(program, plan or FaultPlan(), kind="upstream", test=test)


@dataclass(frozen=True, slots=True)
class Seen:
    """One run of a test.

    Attributes:
        verdict: as in PyTorch's harness: failed if a rank raised, died or did not end, else what
            rank 0 reported.
        promise: the exception class of :mod:`rpcprops.errors` for the failure.
        reason: the traceback of the rank that failed, or why the test was skipped.
        rate: virtual seconds for each real second.
        seconds: real seconds, including the start and the end of the ranks.
        processor_seconds: processor time of the ranks.
    """

    verdict: Literal["passed", "failed", "skipped"]
    promise: str
    reason: str
    rate: float
    seconds: float
    processor_seconds: float
    outcome: Outcome

    @property
    def violations(self) -> tuple[Violation, ...]:
        """The violation of a failure; nobody knows how much time a test of PyTorch's needs."""
        if self.verdict != "failed":
            return ()
        return (Violation(self.promise, self.reason, timing_sensitive=True, slack=OWN_CODE_SLACK),)


class UpstreamRanks:
    """The suites of the torch of one server.

    Args:
        agent: the agent that runs all suites, by its name in :mod:`rpcprops.agents`; unless given,
            that of the server. With torch's faulty agent, which servers have unless they name one,
            each suite runs the agent for which it is written.

    Raises:
        UsageError: there is no such agent.
    """

    def __init__(self, server: ClusterServer, agent: str | None = None) -> None:
        self.server = server
        self.agent = agents.named(server.agent if agent is None else agent)
        self._tests: tuple[UpstreamTest, ...] = ()
        self._remembered: dict[tuple[str, FaultPlan, float, str], Seen] = {}

    def tests(self) -> tuple[UpstreamTest, ...]:
        """Every test of PyTorch's RPC suites, in torch's order, those that need CUDA last.

        Those that the agent cannot run are `not_applicable`, with the reason.
        """
        if not self._tests:
            with self._cluster(1, FaultPlan(), 1.0, self.agent) as cluster:
                found = cluster.on(0).call(_entry.list_tests)
            self._tests = tuple(
                replace(one, not_applicable=why_not(one, self.agent)) for one in found
            )
        return self._tests

    def test(self, name: str) -> UpstreamTest:
        """The test with that ``Suite::test`` name.

        Raises:
            UsageError: this torch has no such test.
        """
        for test in self.tests():
            if test.id == name:
                return test
        msg = f"torch {self.server.torch_version} has no RPC test {name!r} in its suites."
        raise UsageError(msg)

    def rate_of(self, test: UpstreamTest, clock: Any = None) -> float:
        """The rate at which a test runs: 1 if it needs real time, else that of `clock`.

        Raises:
            MachineCannot: a rate was named that this machine cannot give.
        """
        if test.real_time or self.server.rate == 1.0:
            return 1.0
        if clock is None and self.server.clock == "auto":
            clock = DEFAULT_RATE
        return self.server.rate_of(clock)

    def run(
        self,
        test: UpstreamTest,
        plan: FaultPlan | None = None,
        rate: float = 1.0,
        agent: Agent | None = None,
    ) -> Seen:
        """Run a test once, in fresh ranks; under another agent than usual if one is given."""
        plan = plan or FaultPlan()
        began = time.monotonic()
        results: dict[int, RankVerdict] = {}
        broken: BrokenPromise | None = None
        with tempfile.TemporaryDirectory(prefix="rpcprops-upstream-") as folder:
            meeting = Path(folder, "store")
            meeting.touch()
            cluster = self._cluster(test.world_size, plan, rate, agent or self.agent)
            cluster.program = Program(test.world_size, ())
            try:
                with cluster:
                    results = cluster.run_to_exit(
                        _entry.run_test, test.suite, test.name, str(meeting), is_last=_has_failed
                    )
            except BrokenPromise as error:
                broken = error
        seconds = time.monotonic() - began
        verdict, promise, reason = _verdict(results, broken)
        return Seen(
            verdict,
            promise,
            reason,
            rate,
            seconds,
            sum(rank.processor_seconds for rank in cluster.outcome.ranks),
            cluster.outcome,
        )

    def observe(
        self,
        runner: Runner,
        case: Case,
        *,
        anew: bool = False,
        with_findings: bool = True,
        clock: Any = None,
        transport: str = TRANSPORT,
        agent: str | None = None,
        reuse: bool = False,
    ) -> Observation:
        """Run a case for the engine of properties, which may ask for the same case repeatedly.

        Ranks never run a second test, for each test calls ``init_rpc`` and ``shutdown`` itself:
        after a second ``init_rpc``, torch sends no deletes (rref-lifetime-after-reinit).

        Raises:
            UsageError: the test asks for another agent.
            HarnessError: see :func:`rpcprops.properties.accounted`.
        """
        chosen = self.agent if agent is None else agents.named(agent)
        if not isinstance(case, UpstreamCase):
            msg = f"{case!r} is no test of PyTorch's."
            raise HarnessError(msg)
        reason = why_not(case.test, chosen)
        if reason:
            msg = f"{case.test.id} does not run under the agent {chosen.name}: {reason}."
            raise UsageError(msg)
        rate = self.rate_of(case.test, clock)
        key = (case.test.id, case.plan, rate, chosen.name)
        seen = None if anew else self._remembered.get(key)
        if seen is None:
            seen = self.run(case.test, case.plan, rate, chosen)
            self._remembered.setdefault(key, seen)
        faults = accounted(None, case.plan, seen.outcome, seen.violations)
        return Observation(case, seen.outcome, seen.violations, faults)

    def forget(self) -> None:
        """Forget the runs that :meth:`observe` remembers, including their logs."""
        self._remembered.clear()

    def _cluster(self, world_size: int, plan: FaultPlan, rate: float, agent: Agent) -> Cluster:
        return self.server.make_cluster(
            UPSTREAM,
            world_size=world_size,
            faults=plan,
            agent=agent.name,
            clock=rate,
            transport=TRANSPORT,
            leaks="allow",
            init=False,
            shutdown_faults=True,
            deadline=_REAL_DEADLINE if rate == 1.0 else _FAST_DEADLINE,
        )


class OfPyTorch(OfRanks):
    """A test of PyTorch's, identified by its suite and its method."""

    def describe(self, name: str, program: Program | None) -> list[str]:
        """Its name: its program is empty."""
        return [f"test     {name}, PyTorch's own"]

    def observer(
        self, runner: Runner, artefact: Artefact, plan: FaultPlan
    ) -> Callable[..., Observation]:
        """Judges a run as PyTorch's harness does."""
        ranks = UpstreamRanks(runner.server)
        case = UpstreamCase.of(ranks.test(artefact.subject), plan)
        return partial(ranks.observe, runner, case)


def why_not(test: UpstreamTest, agent: Agent) -> str:
    """Why an agent cannot run a test; empty if it can."""
    if test.not_applicable or agent.name == agents.default_name():
        return test.not_applicable
    if test.asks_for not in ("", agent.name):
        return f"asks for the agent {test.asks_for}: {test.asks_because}"
    if test.agent == "faulty" and not agent.can_fail:
        return f"its suite sets fault tables, and the agent {agent.name} injects no faults"
    return ""


def _has_failed(result: RankVerdict) -> bool:
    return result.verdict == "failed"


def _verdict(
    results: dict[int, RankVerdict], broken: BrokenPromise | None
) -> tuple[Literal["passed", "failed", "skipped"], str, str]:
    """The verdict of a run, the promise that a failure breaks, and the reason.

    If a rank has died, the errors of other ranks are consequences of that, not causes.
    """
    if isinstance(broken, RankDied):
        return "failed", "RankDied", _with_notes(broken)
    for rank, result in sorted(results.items()):
        if _has_failed(result):
            lines = result.reason.strip().splitlines()[-_LINES_OF_REASON:]
            return "failed", "UpstreamTestFails", "\n".join([f"in rank {rank}:", *lines])
    if broken is not None:
        return "failed", type(broken).__name__, _with_notes(broken)
    first = results[0]
    return first.verdict, "", first.reason


def _with_notes(broken: BrokenPromise) -> str:
    return "\n".join([str(broken), *getattr(broken, "__notes__", [])])
