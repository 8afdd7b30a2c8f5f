"""Programs under faults that the oracle does not predict, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpcprops import FaultPlan, MessageFault
from rpcprops._kinds import kind_of
from rpcprops._sweep import State
from rpcprops._sweep_points import PointSweep, has, key_of, points_of, rows, wanted
from rpcprops.agents.wire import NAME as WIRE
from rpcprops.errors import UsageError
from rpcprops.faults import MessageAction
from rpcprops.oracle import endless_wait, predict
from rpcprops.outcomes import Violation
from rpcprops.programs import Call, Drop, Fetch, Program, Remote
from rpcprops.properties import Case, Failure, Observation, observe
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.report import artefact as artefacts
from rpcprops.report.text import artefact_of
from rpcprops.runner import Runner
from tests._wire import needs_wire

pytestmark = needs_wire

PROGRAM = Program(
    2, (Remote(0, 1, "a", left=(1.0,)), Fetch(0, "a"), Drop(0, "a")), "small", rpc_timeout=70.0
)
#: What a shutdown needs on a busy machine, at most, in real seconds.
BOUND = 20.0


@pytest.fixture
def runner(rpc_cluster: ClusterFactory) -> Runner:
    return Runner(rpc_cluster.server)


def _observe(runner: Runner, program: Program, *faults: MessageFault) -> Observation:
    case = Case(program, FaultPlan(others=faults), kind="unpredicted")
    return observe(runner, case, anew=True, agent=WIRE)


def test_every_step_runs_whatever_the_others_show(runner: Runner) -> None:
    """The creation fails, and the fetch of it raises torch's error; the ranks shut down."""
    seen = _observe(runner, PROGRAM, MessageFault(0, "fail", "PYTHON_REMOTE_CALL", to=1))
    assert seen.violations == ()
    assert [step.index for step in seen.outcome.steps] == [0, 1, 2]
    error = seen.outcome.steps[1].error
    assert error is not None
    assert "RRef creation via rpc.remote" in error.message
    assert [rank.exit_code for rank in seen.outcome.ranks] == [0, 0]
    assert sum(sent.done == "fail" for sent in seen.outcome.messages) == 1


def test_what_is_not_predicted_is_run_and_judged(runner: Runner) -> None:
    """An RRef that is created twice: a value or torch's assertion, and no rank dies."""
    fault = MessageFault(0, "duplicate", "PYTHON_REMOTE_CALL", to=1)
    with pytest.raises(UsageError, match="does not predict"):
        predict(PROGRAM, FaultPlan(others=(fault,)))
    seen = _observe(runner, PROGRAM, fault)
    assert seen.violations == ()
    assert sum(sent.done == "duplicate" for sent in seen.outcome.messages) == 1


def test_a_lost_call_without_a_timeout_is_ended_in_time(runner: Runner) -> None:
    """Its caller would wait for a day. The run is ended, and says for what it waited."""
    program = Program(2, (Call(0, 1),), "endless")
    seen = _observe(runner, program, MessageFault(0, "lose", "PYTHON_CALL", to=1))
    assert seen.violations == ()
    assert "what was lost has no timeout" in endless_wait(program, seen.outcome)
    assert seen.outcome.real_seconds < BOUND


def test_a_shutdown_that_lacks_a_message_waits(runner: Runner) -> None:
    """The calls by which its ranks meet have no timeout."""
    seen = _observe(runner, PROGRAM, MessageFault(1, "lose", "PYTHON_CALL", to=0))
    assert seen.violations == ()
    assert "by which ranks meet in a shutdown" in endless_wait(PROGRAM, seen.outcome)
    assert seen.outcome.real_seconds < BOUND


def test_an_artefact_of_such_a_run_is_replayed(runner: Runner, tmp_path: Path) -> None:
    """It is judged without a prediction again, and holds."""
    seen = _observe(runner, PROGRAM, MessageFault(0, "duplicate", "PYTHON_REMOTE_CALL", to=1))
    broken = (Violation("RankDied", "planted", 0),)
    failure = Failure(
        property="sweep-small",
        promise="RankDied",
        case=seen.case,
        violations=broken,
        outcome=seen.outcome,
        faults=seen.faults,
    )
    file = artefacts.write(artefact_of(failure), tmp_path)
    artefact = artefacts.read(file)
    kind = kind_of(artefact.kind)
    assert kind.tag == "unpredicted"
    runs_again = kind.observer(runner, artefact, artefact.plans[0])
    assert runs_again(anew=True, agent=WIRE).violations == ()


def _is_of_step(fault: MessageFault) -> bool:
    """Whether it is about the call of the step, or its answer."""
    return fault.n == 1 and (fault.rank, str(fault.message)) in (
        (0, "PYTHON_CALL"),
        (1, "PYTHON_RET"),
    )


def test_each_point_of_a_program_is_run(runner: Runner, tmp_path: Path) -> None:
    """No fault is left out that its messages can have, and none is a failure.

    Of the messages of its shutdown only the copies are sent here: it waits for what is lost.
    Whether it waits where a copy comes is a race, so that may be undecided.
    """
    program = Program(2, (Call(0, 1),), "one call", rpc_timeout=70.0)
    state = State(
        program,
        torch_version=runner.server.torch_version,
        rate=runner.server.rate,
        transport="tcp",
        agent="WIRE, all points",
        root=tmp_path,
    )
    trial = PointSweep(program, runner, state)
    messages = trial.record_messages().messages
    points = points_of(messages, program)
    assert len(points) == len(wanted(messages))
    waiting = {
        key_of(point.faults[0])
        for point in points
        if point.faults[0].action in ("fail", "lose") and not _is_of_step(point.faults[0])
    }
    assert len(waiting) == 2 + 4
    tried = [point for point in points if key_of(point.faults[0]) not in waiting]
    assert len(list(trial.try_all(tried))) == len(tried)
    found = [row for row in rows(messages, state, points) if row["verdict"] != "not tried"]
    assert len(found) == len(tried)
    races = {
        key_of(point.faults[0])
        for point in tried
        if point.faults[0].action == "duplicate" and not _is_of_step(point.faults[0])
    }
    decided = [point for point in tried if key_of(point.faults[0]) not in races]
    assert all(has(state, point) for point in decided)
    good = {"holds", "documented", "overdue", "ran", "waits"}
    for row in found:
        key = tuple(row[name] for name in ("sender", "receiver", "type", "number", "action"))
        is_open = key in races and "a wait that is not confirmed" in row["said"]
        assert row["verdict"] in good or is_open, row
    actions: list[MessageAction] = ["fail", "delay", "hold", "duplicate", "lose"]
    assert {row["action"] for row in found} == set(actions)
    assert any(not row["predicted"] for row in found)
