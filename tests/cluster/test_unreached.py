"""Backward passes that never end, in real ranks."""

from __future__ import annotations

import pytest

from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import accepted, judge
from rpcprops.programs import Call, Context, Program, Refused, Settle, Unreached
from rpcprops.runner import run

CLEANUP = "CLEANUP_AUTOGRAD_CONTEXT_REQ"
PROGRAM = Program(
    2,
    (
        Unreached(0, 1, "x"),
        Unreached(1, 1, "y", by="timeout"),
        Context(0, "z", (1,)),
        Call(1, 0),
        Settle(),
        Refused(1, "x"),
    ),
)


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize("agent", [None, "wire"])
@pytest.mark.parametrize("failures", [0, 3])
def test_such_a_pass_waits_and_nothing_else_does(agent: str | None, failures: int) -> None:
    """Later passes end, the contexts go, and the ranks leave; torch still counts the passes."""
    plan = FaultPlan(FaultTable([CLEANUP], failures)) if failures else FaultPlan()
    outcome = run(PROGRAM, plan, agent=agent)
    assert judge(PROGRAM, plan, outcome) == ()
    assert [one.step for one in accepted(PROGRAM, plan, outcome)] == [0, 1]
    left = [one.counters_after_shutdown for one in outcome.ranks]
    assert [one and one.backward_passes for one in left] == [1, 1]
