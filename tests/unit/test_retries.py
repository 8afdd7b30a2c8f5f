"""The step whose fork request torch must try again: what it refuses, and what it predicts."""

from __future__ import annotations

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import predict
from rpcprops.programs import ENOUGH_THREADS, Call, Program, Retry, Settle, Step

LOST_CALL = FaultTable(["PYTHON_CALL"], 1)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Retry(0, 0, 1), "via=0 owns the RRef"),
        (Retry(0, 1, 1), "via=1 owns the RRef"),
        (Retry(0, 1, 2, ()), "must hold a number"),
        (Retry(0, 1, 2, timeout=2.0), "timeout=2.0 must be above 2"),
        (Retry(0, 1, 2, timeout=None), "timeout=None must be above 2"),
    ],
)
def test_a_program_refuses_what_cannot_be_tried_again(step: Step, message: str) -> None:
    """The owner takes no part, and the caller waits for a second try."""
    with pytest.raises(UsageError, match=message):
        Program(3, (step,))


@pytest.mark.parametrize(
    ("steps", "plan", "message"),
    [
        ((Call(0, 1), Retry(0, 1, 2)), FaultPlan(), "put a Settle"),
        ((Retry(0, 1, 2),), FaultPlan(by_rank={0: LOST_CALL}), "the plan loses a call"),
        (
            (Retry(0, 1, 2),),
            FaultPlan(by_rank={2: FaultTable(["RREF_FORK_REQUEST"], 1)}),
            "strikes a fork request",
        ),
        (
            (Retry(0, 1, 2, timeout=10.0),),
            FaultPlan(by_rank={0: FaultTable(messages_to_delay={"PYTHON_CALL": 8.0})}),
            "may take as long",
        ),
    ],
)
def test_a_plan_must_leave_it_open_nowhere_what_is_tried(
    steps: tuple[Step, ...], plan: FaultPlan, message: str
) -> None:
    """Where nobody can tell which try comes when, the prediction is refused."""
    with pytest.raises(UsageError, match=message):
        predict(Program(3, steps), plan)


def test_each_rank_sends_and_runs_what_it_must() -> None:
    """The second try has done what it must, so the function has run and nothing is held."""
    predicted = predict(Program(3, (Retry(0, 1, 2, (1.0, 2.0)), Settle())), FaultPlan())
    assert predicted.steps[0].value == [2.0, 3.0]
    assert predicted.steps[0].slack == 118.0
    assert predicted.calls == ({}, {}, {"step0": 1})
    assert [(send.rank, send.message) for send in predicted.sends if send.rank == 2] == [
        (2, MessageType.RREF_FORK_REQUEST),
        (2, MessageType.RREF_CHILD_ACCEPT),
        (2, MessageType.SCRIPT_RREF_FETCH_CALL),
        (2, MessageType.RREF_USER_DELETE),
    ]
    assert not any(held.owners or held.forks for held in predicted.counters)


@pytest.mark.parametrize("threads", [None, 9, 16])
def test_the_try_that_times_out_is_a_failed_send(threads: int | None) -> None:
    """Torch logs it as one, and sends the request twice; the owner calls itself meanwhile."""
    program = Program(3, (Retry(0, 1, 2), Settle()), num_worker_threads=threads)
    predicted = predict(program, FaultPlan())
    assert predicted.retried == (0, 0, 1)
    assert predicted.failed_sends() == (range(1), range(1), range(1, 2))
    assert predicted.failures()[2] == {MessageType.RREF_FORK_REQUEST: 1}
    busy = [send for send in predicted.sends if (send.rank, send.to) == (1, 1)]
    assert len(busy) == (threads or ENOUGH_THREADS) - 1
    assert {send.message for send in busy} == {MessageType.PYTHON_CALL}


def test_failures_of_other_messages_are_added() -> None:
    """A table that fails deletes of the same rank fails those besides."""
    table = FaultTable(["RREF_USER_DELETE"], 2)
    program = Program(3, (Retry(0, 1, 2), Settle()))
    predicted = predict(program, FaultPlan(by_rank={2: table}))
    assert predicted.failures()[2] == {
        MessageType.RREF_FORK_REQUEST: 1,
        MessageType.RREF_USER_DELETE: 2,
    }
