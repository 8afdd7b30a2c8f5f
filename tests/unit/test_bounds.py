"""What no fault of a message excuses in what ranks did and kept, where nothing is predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from rpcprops.faults import FaultPlan, MessageFault
from rpcprops.oracle import judge_unpredicted
from rpcprops.outcomes import (
    Counters,
    Outcome,
    PhaseOutcome,
    RankOutcome,
    SentMessage,
    StepOutcome,
)
from rpcprops.programs import Call, Context, Program, Remote

PROGRAM = Program(
    2, (Call(0, 1), Remote(0, 1, "a", left=(1.0,)), Context(0, "c", (1,))), rpc_timeout=70.0
)
#: Nothing predicts two copies of a creation.
FAULT = MessageFault(0, "duplicate", "PYTHON_REMOTE_CALL", to=1)
PLAN = FaultPlan(others=(FAULT,))


def _request(number: int, kind: str, **changes: Any) -> SentMessage:
    """A request of rank 0 to rank 1 that went well."""
    sent = SentMessage(
        float(number),
        0,
        1,
        number,
        kind,
        is_request=True,
        became="answered",
        first_id=number,
        processed=1,
        ended=number + 0.4,
    )
    return replace(sent, **changes)


def _answered(*requests: SentMessage) -> tuple[SentMessage, ...]:
    """These requests, and an answer of each that was answered."""
    answers = {
        "PYTHON_CALL": "PYTHON_RET",
        "PYTHON_REMOTE_CALL": "REMOTE_RET",
        "FORWARD_AUTOGRAD_REQ": "FORWARD_AUTOGRAD_RESP",
        "BACKWARD_AUTOGRAD_REQ": "BACKWARD_AUTOGRAD_RESP",
        "CLEANUP_AUTOGRAD_CONTEXT_REQ": "CLEANUP_AUTOGRAD_CONTEXT_RESP",
        "RREF_USER_DELETE": "RREF_ACK",
    }
    found: list[SentMessage] = []
    for one in requests:
        found.append(one)
        if one.became == "answered":
            kind = "EXCEPTION" if "raised" in one.marks else answers[one.type]
            found.append(
                SentMessage(
                    one.seconds + 0.2,
                    one.receiver,
                    one.sender,
                    one.id,
                    kind,
                    is_request=False,
                    became="written",
                    first_id=one.id,
                )
            )
    return tuple(found)


CALL = _request(1, "PYTHON_CALL")
CREATED = _request(2, "PYTHON_REMOTE_CALL", done="duplicate", fault=0, processed=2)
FORWARD = _request(3, "FORWARD_AUTOGRAD_REQ")
BACK = _request(4, "BACKWARD_AUTOGRAD_REQ")
CLEANUP = _request(5, "CLEANUP_AUTOGRAD_CONTEXT_REQ")
DELETE = _request(6, "RREF_USER_DELETE")
ALL = (CALL, CREATED, FORWARD, BACK, CLEANUP, DELETE)


def _run(
    *requests: SentMessage, calls: Mapping[str, int] | None = None, **left: int
) -> list[tuple[str, int | None]]:
    """What is wrong of a run with these requests.

    Args:
        calls: what ran at rank 1.
        left: what rank 1 holds after its shutdown.
    """
    ranks = (
        RankOutcome(0, "worker0", exit_code=0, counters_after_shutdown=Counters()),
        RankOutcome(
            1,
            "worker1",
            exit_code=0,
            calls={"step0": 1, "step1": 2} if calls is None else calls,
            counters_after_shutdown=Counters(**left),
        ),
    )
    outcome = Outcome(
        2,
        torch_version="2.13.0",
        phases=(PhaseOutcome("start"), PhaseOutcome("run"), PhaseOutcome("shutdown")),
        ranks=ranks,
        steps=(StepOutcome(0, value=[1.0]), StepOutcome(1), StepOutcome(2, value={})),
        messages=_answered(*requests),
        agent="WIRE",
    )
    steps = {"WrongValue"}  # what steps give is judged elsewhere
    found = judge_unpredicted(PROGRAM, PLAN, outcome)
    return [(one.promise, one.rank) for one in found if one.promise not in steps]


def test_a_run_that_went_well_breaks_nothing() -> None:
    """The creation came twice, so its function ran twice."""
    assert _run(*ALL) == []


def test_functions_run_once_for_each_request() -> None:
    """A third run of the creation, or a second one of the call, has no request."""
    assert _run(*ALL, calls={"step0": 1, "step1": 4}) == [("NotRunOnce", 1)]
    once = tuple(replace(one, processed=1, done="") for one in ALL)
    found = _run(*once, calls={"step0": 2, "step1": 1})
    assert ("NotRunOnce", 1) in found
    # Pickling and hooks of autograd are counted, too, and no request runs them.
    assert _run(*ALL, calls={"step0/unpickled": 9, "step0/hook": 9}) == []


def test_no_message_is_sent_too_often() -> None:
    """A delete has six tries, and a call one."""
    tries = [
        replace(DELETE, id=10 + n, first_id=10, retry=n, became="timed_out", seconds=10.0 + n)
        for n in range(7)
    ]
    assert _run(*ALL, *tries[:6]) == []
    assert _run(*ALL, *tries) == [("MessagesDiffer", 0)]
    again = [replace(CALL, id=20 + n, first_id=20, became="failed", processed=0) for n in (0, 1)]
    assert _run(*ALL, *again) == [("MessagesDiffer", 0)]


def test_what_was_answered_is_not_tried_again() -> None:
    """Unless the answer was an error."""
    second = replace(DELETE, id=7, first_id=6, retry=1)
    assert _run(*ALL, second) == [("MessagesDiffer", 0)]
    raised = replace(DELETE, marks=("raised",))
    assert _run(CALL, CREATED, FORWARD, BACK, CLEANUP, raised, second) == []


def test_each_answer_is_of_its_request() -> None:
    """The answers of the record are of the types that torch gives."""
    wrong = replace(CALL, type="RREF_USER_DELETE")
    assert _run(*ALL, replace(wrong, id=9, first_id=9)) == []
    (_, answer) = _answered(CALL)
    found = judge_unpredicted(
        PROGRAM,
        FaultPlan(),
        Outcome(2, torch_version="2.13.0", messages=(CALL, replace(answer, type="RREF_ACK"))),
    )
    assert "MessagesDiffer" in [one.promise for one in found]


@pytest.mark.parametrize(
    ("requests", "leaks"),
    [
        # No message of a context came to it, so it has none.
        ((CALL, CREATED), True),
        # The cleanup came after all that could make the context.
        (ALL, True),
        # No cleanup came, or it raised.
        ((CALL, CREATED, FORWARD, BACK), False),
        ((CALL, CREATED, FORWARD, BACK, replace(CLEANUP, marks=("raised",))), False),
        # A call, or its copy, may have come after the cleanup.
        ((CALL, CREATED, replace(FORWARD, became="timed_out"), CLEANUP), False),
        ((CALL, CREATED, replace(FORWARD, done="duplicate", fault=0), CLEANUP), False),
        ((CALL, CREATED, replace(FORWARD, seconds=8.0, ended=9.0), CLEANUP), False),
        # What was lost was never processed.
        ((CALL, CREATED, FORWARD, CLEANUP, replace(BACK, done="lose", processed=0)), True),
    ],
)
def test_contexts_that_nothing_can_have_made_anew(
    requests: tuple[SentMessage, ...], leaks: bool
) -> None:
    """A rank keeps no context whose cleanup it has answered."""
    found = [one for one in _run(*requests, contexts=1) if one[0] == "ContextLeak"]
    assert found == [("ContextLeak", 1)] * leaks


def test_forks_that_were_kept_are_reported() -> None:
    """An owner says which forks it has left when it shuts down."""
    once = tuple(replace(one, processed=1, done="") for one in ALL)
    calls = {"step0": 1, "step1": 1}
    assert ("RRefLeak", 1) in _run(*once, calls=calls, forks=1, owners=1)
    # A request that is processed late may add one after that.
    late = (*once[:-1], replace(DELETE, became="timed_out", processed=0))
    assert ("RRefLeak", 1) not in _run(*late, calls=calls, forks=1, owners=1)
