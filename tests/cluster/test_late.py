"""Programs whose functions sleep, run in real ranks as predicted."""

from __future__ import annotations

import pytest

from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, FaultTable, MessageType
from rpcprops.oracle import judge, predict_for, set_apart
from rpcprops.outcomes import Violation
from rpcprops.programs import Call, Count, Parallel, Program
from rpcprops.runner import default_runner
from tests.seeded._programs import IMPATIENT_WAYS, SLOW, THREADS, UNDER_WAY, shared_late

RETRIED = FaultPlan(FaultTable(RETRYABLE_MESSAGE_TYPES, 3, {"PYTHON_CALL": 2.0}))
LOST = FaultPlan(by_rank={0: FaultTable([m for m in MessageType if not m.is_retryable], 1)})


def unexplained(program: Program, plan: FaultPlan) -> tuple[Violation, ...]:
    """What a run of a program shows that neither the prediction nor a finding explains."""
    outcome = default_runner().run_anew(program, plan)
    met = predict_for(program, plan, outcome).met
    return set_apart(program, met, outcome, judge(program, plan, outcome))[1]


def holds(program: Program, plan: FaultPlan) -> None:
    """A run is as predicted; a busy machine can show what the next run does not."""
    left = unexplained(program, plan)
    assert not left or (left[0].timing_sensitive and not unexplained(program, plan))


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize("plan", [FaultPlan(), RETRIED, LOST])
def test_slow_functions_run_as_predicted(plan: FaultPlan) -> None:
    """Timeouts that end before a function, and waits for values that are made for minutes."""
    holds(SLOW[0], plan)


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize("plan", [FaultPlan(), RETRIED])
def test_timeouts_of_every_way_of_calling_end_as_predicted(plan: FaultPlan) -> None:
    """Calls of each kind that end by their timeouts, and go on to their ends all the same."""
    holds(IMPATIENT_WAYS[0], plan)


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize("plan", [FaultPlan(), RETRIED])
def test_handles_are_used_while_their_values_are_made(plan: FaultPlan) -> None:
    """Shares, calls, drops of a handle whose creation is late or timed out end as predicted."""
    holds(UNDER_WAY[0], plan)


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize("plan", [FaultPlan(), RETRIED])
@pytest.mark.parametrize("number", [0, 5, 10])
def test_handles_are_used_while_they_are_shared(number: int, plan: FaultPlan) -> None:
    """What a call that has timed out brings is used, sent on and dropped before the call ends."""
    holds(shared_late()[number], plan)


@pytest.mark.usefixtures("rpc_cluster")
def test_a_function_that_holds_the_gil_changes_nothing() -> None:
    """Neither in a call alone nor beside others of its rank."""
    spinning = [Call(rank, 1, spins=True) for rank in range(3)]
    late = Call(0, 1, spins=True, timeout=3.0, seconds=12.0)
    branches = tuple((step, Count(step.at, step.at)) for step in spinning)
    holds(Program(3, (*spinning, late, Parallel(branches))), FaultPlan())


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize("plan", [FaultPlan(), RETRIED, LOST])
def test_threads_of_a_rank_run_as_predicted(plan: FaultPlan) -> None:
    """Several branches at one rank end as each would alone, also where faults strike them."""
    holds(THREADS, plan)
