"""Runs a program under a plan that the oracle does not predict.

Every step is run, whatever those before it have shown. A wait is a hang when nothing has changed
for longer than the faults and torch's timeouts explain.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rpcprops import agents
from rpcprops._kinds import Kind
from rpcprops.cluster import Cluster
from rpcprops.cluster.options import ClockChoice, Transport
from rpcprops.faults import FaultPlan
from rpcprops.oracle.ranks import OWNER_WAITS
from rpcprops.outcomes import Outcome, StepOutcome
from rpcprops.programs import Program, Settle
from rpcprops.properties._base import Case, OfProgram
from rpcprops.runner import Runner, run_step

#: Real seconds that a busy machine needs for a shutdown, besides what torch waits for.
_SHUTDOWN_SECONDS = 5.0
#: A message that torch tries again ends by its timeout twice.
_TIMEOUTS = 2


class OfUnpredicted(OfProgram):
    """A program under a plan that the oracle does not predict."""

    is_predicted = False
    foreword = ("case     without a prediction: deaths, hangs, types of values, classes of errors",)
    test = """
def test_{name}() -> None:
    # The oracle does not predict this: deaths, hangs, types of values, classes of errors.
    case = Case(PROGRAM, PLAN, kind="unpredicted")
    found = observe(default_runner(), case, anew=True, agent="wire"{transport}).violations
    assert not found, f"{{RECORDED}}; now {{'; '.join(map(str, found))}}"
"""
    test_imports = (
        "from rpcprops.properties import Case, observe",
        "from rpcprops.runner import default_runner",
    )

    def in_cluster(self, *, init: bool) -> Kind:
        """The kind itself."""
        return self

    def run(self, runner: Runner, case: Case, *, anew: bool, **options: Any) -> Outcome:
        """Run the case in fresh ranks; a remembered outcome is never used."""
        options.pop("reuse", None)
        return _run(runner, case.program, case.plan, **options)


def _run(
    runner: Runner,
    program: Program,
    plan: FaultPlan,
    *,
    clock: ClockChoice | None = None,
    transport: Transport = "tcp",
    agent: str | None = None,
) -> Outcome:
    agent = agents.named(runner.server.agent if agent is None else agent).name
    rate = runner.rate_of(program, clock)
    cluster = runner.make_cluster(program, plan, program.world_size, rate, transport, agent)
    cluster.program = program
    lasts = program.lasts + _TIMEOUTS * (program.rpc_timeout or 0.0)
    cluster.take_time(lasts)
    cluster.deadlines.shutdown = (OWNER_WAITS + lasts) / rate + _SHUTDOWN_SECONDS
    steps: list[StepOutcome] = []
    try:
        cluster.start()
        _run_steps(cluster, program, steps)
        if not cluster.has_found and program.settles:
            cluster.come_to_rest()
        elif not cluster.has_found:
            cluster.look()
        if not cluster.has_found:
            cluster.shutdown()
    finally:
        cluster.kill()
    return replace(cluster.outcome, steps=tuple(steps))


def _run_steps(cluster: Cluster, program: Program, steps: list[StepOutcome]) -> None:
    """Run each step, until a rank dies or hangs."""
    contexts: dict[str, int] = {}
    for first, step in program.numbered:
        if cluster.has_found:
            return
        if isinstance(step, Settle):
            steps.append(StepOutcome(first, counters=cluster.come_to_rest()))
        else:
            steps += run_step(cluster, first, step, contexts, lambda seen: seen.ended)
