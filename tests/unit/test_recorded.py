"""The record of all messages, compared with what the model predicts: made-up runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rpcprops.faults import FaultPlan, FaultTable, WireMessageType
from rpcprops.oracle import Prediction, predict
from rpcprops.oracle._recorded import recorded_violations
from rpcprops.outcomes import Outcome, SentMessage
from rpcprops.programs import Context, Drop, Fetch, Program, Remote

PREDICTION = predict(Program(2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a"))), FaultPlan())


def _run() -> tuple[SentMessage, ...]:
    """What a right torch sends: a creation, a fetch, a delete, and the two calls of a shutdown."""
    found: list[SentMessage] = []
    requests = (
        ("PYTHON_REMOTE_CALL", 0),
        ("PYTHON_RREF_FETCH_CALL", 0),
        ("RREF_USER_DELETE", 0),
        ("PYTHON_CALL", 1),
        ("PYTHON_CALL", 0),
    )
    for number, (name, at) in enumerate(requests):
        kind = WireMessageType(name)
        request = SentMessage(
            float(number), at, 1 - at, number, name, is_request=True, became="answered"
        )
        found += [
            replace(request, first_id=number),
            replace(request, sender=1 - at, receiver=at, type=str(kind.answer), is_request=False),
        ]
    return tuple(found)


RUN = _run()


def said(*messages: SentMessage, dropped: int = 0) -> list[str]:
    outcome = Outcome(2, messages=messages, messages_dropped=dropped)
    found = recorded_violations(PREDICTION, outcome)
    assert {violation.promise for violation in found} <= {"MessagesDiffer"}
    return [violation.message for violation in found]


def test_the_record_of_a_right_run_is_as_promised() -> None:
    """Nothing differs, and without a record nothing is compared."""
    assert said(*RUN) == []
    assert said() == []


@pytest.mark.parametrize("number", [6, 8])
def test_a_shutdown_that_waits_for_nobody_makes_no_calls(number: int) -> None:
    """Where ranks end at once, the record without those calls is right, and one with them wrong."""
    outcome = Outcome(2, messages=RUN[:number])
    found = recorded_violations(PREDICTION, outcome, gathers=False)
    more = ["the record shows 1 PYTHON_CALL from rank 1 to rank 0, and none were promised"]
    assert [violation.message for violation in found] == (more if number > 6 else [])


def test_a_message_too_many_is_named() -> None:
    """Type, ranks and both numbers."""
    more = [replace(one, id=99, first_id=99 if one.is_request else -1) for one in RUN[4:6]]
    assert said(*RUN, *more) == [
        "the record shows 2 RREF_USER_DELETE from rank 0 to rank 1, and 1 was promised"
    ]


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, "PYTHON_REMOTE_CALL"), (2, "PYTHON_RREF_FETCH_CALL"), (4, "RREF_USER_DELETE")],
)
def test_a_message_that_lacks_is_named(number: int, name: str) -> None:
    """The same for a message that was never sent."""
    less = RUN[:number] + RUN[number + 2 :]
    assert said(*less) == [f"the record shows 0 {name} from rank 0 to rank 1, and 1 was promised"]


def test_a_message_to_a_wrong_rank_is_named_twice() -> None:
    """It lacks where it should have gone, and nobody was promised what went elsewhere."""
    wrong = replace(RUN[4], receiver=0)
    assert said(*RUN[:4], wrong, *RUN[5:]) == [
        "the record shows 1 RREF_USER_DELETE from rank 0 to rank 0, and none were promised",
        "the record shows 0 RREF_USER_DELETE from rank 0 to rank 1, and 1 was promised",
    ]


def test_what_is_tried_again_is_one_message() -> None:
    """Tries share the id of the first one."""
    again = replace(RUN[4], id=50, first_id=2, retry=1)
    answer = replace(RUN[5], id=50)
    assert said(*RUN[:4], replace(RUN[4], became="failed"), *RUN[6:], again, answer) == []


def _tried(times: int) -> tuple[SentMessage, ...]:
    """The run in which the delete is sent so often, and fails but for the last time."""
    failed = replace(RUN[4], became="failed", failed_by_table=True)
    tries = [replace(failed, id=50 + n, first_id=50, retry=n) for n in range(times - 1)]
    last = replace(RUN[4], id=70, first_id=50 if tries else 70, retry=times - 1)
    return (*RUN[:4], *tries, last, replace(RUN[5], id=70), *RUN[6:])


def test_tries_are_counted_for_each_rank() -> None:
    """A try more or less than the faults ask for is named, unless tries may lack."""
    program = Program(2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a")))
    twice = FaultPlan(by_rank={0: FaultTable(["RREF_USER_DELETE"], 2)})

    def found(plan: FaultPlan, times: int, *, settles: bool = True) -> list[str]:
        outcome = Outcome(2, messages=_tried(times))
        seen = recorded_violations(predict(program, plan), outcome, settles=settles)
        assert {violation.promise for violation in seen} <= {"MessagesDiffer"}
        return [violation.message for violation in seen]

    words = "RREF_USER_DELETE from rank 0 with all tries, and"
    assert found(FaultPlan(), 1) == found(twice, 3) == []
    assert found(FaultPlan(), 2) == [f"the record shows 2 {words} 1 was promised"]
    assert found(twice, 2) == [f"the record shows 2 {words} 3 were promised"]
    assert found(twice, 4) == [f"the record shows 4 {words} 3 were promised"]
    assert found(twice, 2, settles=False) == []
    refused = replace(_tried(2)[4], failed_by_table=False)
    messages = (*_tried(2)[:4], refused, *_tried(2)[5:])
    assert recorded_violations(predict(program, FaultPlan()), Outcome(2, messages=messages)) == []
    early = replace(predict(program, twice), may_exit_early=frozenset({0}))
    assert recorded_violations(early, Outcome(2, messages=_tried(2))) == []


def test_an_answer_that_lacks_or_comes_twice_is_named() -> None:
    """Each request that was answered has one answer, of its type."""
    asked = "as the answer to the RREF_USER_DELETE of rank 0 with id 2, and one RREF_ACK was"
    assert said(*RUN[:5], *RUN[6:]) == [f"the record shows nothing {asked} promised"]
    assert said(*RUN, RUN[5]) == [f"the record shows RREF_ACK and RREF_ACK {asked} promised"]
    assert said(*RUN[:5], replace(RUN[5], type="PYTHON_RET"), *RUN[6:]) == [
        f"the record shows PYTHON_RET {asked} promised"
    ]
    assert said(*RUN, replace(RUN[5], marks=("swallowed",))) == []
    assert said(*RUN, replace(RUN[5], became="lost")) == []


def _errors(prediction: Prediction, number: int, kind: str, **others: Any) -> list[str]:
    """What is said where the answer of that number is of another kind."""
    answer = replace(RUN[number], type=kind)
    request = replace(RUN[number - 1], **others)
    messages = (*RUN[: number - 1], request, answer, *RUN[number + 1 :])
    found = recorded_violations(prediction, Outcome(2, messages=messages))
    assert {(v.promise, v.rank) for v in found} <= {("MessagesDiffer", 1)}
    return [violation.message for violation in found]


def test_an_exception_answers_only_what_was_to_fail() -> None:
    """As many as are promised; of some kinds there may be more; no answer is no value."""
    kind = WireMessageType.PYTHON_RREF_FETCH_CALL
    words = "EXCEPTION as the answer to a PYTHON_RREF_FETCH_CALL of rank 0 at rank 1, and"
    assert _errors(PREDICTION, 3, "EXCEPTION") == [f"the record shows 1 {words} none were promised"]
    fails = replace(PREDICTION, errors={(0, 1, kind): 1})
    assert _errors(fails, 3, "EXCEPTION") == []
    assert _errors(fails, 3, str(kind.answer)) == [f"the record shows 0 {words} 1 was promised"]
    assert _errors(fails, 3, str(kind.answer), became="timed_out") == []
    more = replace(PREDICTION, more_errors=frozenset({(0, 1, kind)}))
    assert _errors(more, 3, "EXCEPTION") == []


def test_no_more_exceptions_than_what_may_lack() -> None:
    """What a shutdown at once cuts off is answered so, and nothing that somebody has waited for."""
    kind = (0, 1, WireMessageType.PYTHON_RREF_FETCH_CALL)
    send = next(one for one in PREDICTION.sends if one.message == str(kind[2]))
    two = replace(PREDICTION, sends=(*PREDICTION.sends, send), may_lack={kind: 1})
    request, answer = RUN[2:4]
    for second, right in ((str(kind[2].answer), True), ("EXCEPTION", False)):
        messages = (
            *RUN[:3],
            replace(answer, type="EXCEPTION"),
            *RUN[4:],
            replace(request, id=99, first_id=99),
            replace(answer, id=99, type=second),
        )
        found = recorded_violations(two, Outcome(2, messages=messages))
        words = "EXCEPTION as the answer to a PYTHON_RREF_FETCH_CALL of rank 0 at rank 1"
        said_of_two = [f"the record shows 2 {words}, and none were promised"]
        assert [v.message for v in found] == ([] if right else said_of_two)


def test_a_profiled_call_is_answered_as_such() -> None:
    """A call in a context is answered as the call in it, or with a gradient; one in a profiler not.

    Which of the two it is in a context is predicted.
    """
    for name, fits in (("FORWARD_AUTOGRAD_REQ", True), ("RUN_WITH_PROFILING_REQ", False)):
        kind = WireMessageType(name)
        prediction = replace(PREDICTION, sends=(), last_sends=(), wire_sends={(0, 1, kind): 1})
        request = replace(RUN[0], type=name)
        for answer, right in ((str(kind.answer), True), ("PYTHON_RET", fits), ("RREF_ACK", False)):
            messages = (request, replace(RUN[1], type=answer), *RUN[6:])
            graded = answer == "FORWARD_AUTOGRAD_RESP"
            one = replace(prediction, graded={(0, 1): 1} if graded else {})
            found = recorded_violations(one, Outcome(2, messages=messages))
            assert (found == []) == right, (name, answer, found)
            if name != "FORWARD_AUTOGRAD_REQ":
                continue
            other = replace(prediction, graded={} if graded else {(0, 1): 1})
            assert recorded_violations(other, Outcome(2, messages=messages))
            is_open = replace(other, more_graded=frozenset({(0, 1)}))
            found = recorded_violations(is_open, Outcome(2, messages=messages))
            assert (found == []) == right, (name, answer, found)


def test_a_record_without_room_is_not_compared() -> None:
    """Where messages were dropped, nobody knows what they were."""
    assert said(*RUN[:3], dropped=1) == []


@pytest.mark.parametrize(("settles", "differs"), [(False, False), (True, True)])
def test_a_rank_that_no_cleanup_reached_sends_none_on(*, settles: bool, differs: bool) -> None:
    """A shutdown straight after it waits for no cleanup that is tried again; a settle does."""
    program = Program(2, (Context(0, "x", path=(1,)),), settles=settles)
    lost = FaultTable(["CLEANUP_AUTOGRAD_CONTEXT_REQ"], 3)
    prediction = predict(program, FaultPlan(by_rank={0: lost}))
    wanted = [send for send in (*prediction.sends, *prediction.last_sends) if send.to is not None]
    requests = [(str(s.message), s.rank, s.to) for s in wanted if s.rank == 0]
    requests += [("PYTHON_CALL", 0, 1), ("PYTHON_CALL", 1, 0)]
    requests += [(str(message), at, to) for at, to, message in prediction.wire_sends]
    messages = tuple(
        SentMessage(0.0, at, to or 0, number, name, is_request=True, first_id=number)
        for number, (name, at, to) in enumerate(requests)
    )
    found = recorded_violations(prediction, Outcome(2, messages=messages), settles=settles)
    said = (
        "the record shows 0 CLEANUP_AUTOGRAD_CONTEXT_REQ from rank 1 to rank 0, and 1 was promised"
    )
    assert [violation.message for violation in found] == ([said] if differs else [])


def test_a_request_that_the_agent_could_not_write_was_not_sent() -> None:
    """It may be promised or not; one that a fault has failed is a message."""
    extra = replace(RUN[0], id=90, first_id=90, became="failed")
    assert said(*RUN, extra) == []
    assert said(replace(RUN[0], became="failed"), *RUN[2:]) == []
    for failed in (replace(extra, failed_by_table=True), replace(extra, written=1.0)):
        assert said(*RUN, failed) == [
            "the record shows 2 PYTHON_REMOTE_CALL from rank 0 to rank 1, and 1 was promised"
        ]
