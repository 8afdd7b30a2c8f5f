"""Each message of a run without faults as a point for a fault, and two of them the other way."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import (
    FaultPlan,
    MessageFault,
    NthMessage,
    WireMessageType,
    pairs,
    points,
    reversal,
)
from rpcprops.outcomes import SentMessage


def sent(number: int, sender: int, receiver: int, kind: str, seconds: float) -> SentMessage:
    """A message of a made-up run."""
    is_request = WireMessageType(kind).is_request
    return SentMessage(seconds, sender, receiver, number, kind, is_request)


#: Two calls of rank 0, which rank 1 and rank 2 answer; then two deletes; one call of a shutdown.
RUN = (
    sent(0, 0, 1, "PYTHON_CALL", 0.1),
    sent(1, 0, 2, "PYTHON_CALL", 0.2),
    sent(0, 1, 0, "PYTHON_RET", 0.4),
    sent(1, 2, 0, "PYTHON_RET", 0.3),
    sent(2, 0, 1, "RREF_USER_DELETE", 0.5),
    sent(3, 0, 1, "RREF_USER_DELETE", 0.5),
    sent(3, 1, 0, "RREF_ACK", 0.6),
    sent(2, 1, 0, "RREF_ACK", 0.7),
    replace(sent(4, 0, 1, "PYTHON_CALL", 0.8), marks=("spared",)),
)
COUNTED = RUN[:-1]


def test_each_point_acts_on_its_message_alone() -> None:
    """By the faults' own count, each is due for exactly the message it is made for, once."""
    found = points(RUN)
    hit = [(fault.due(RUN), fault.action) for fault in found]
    assert all(len(messages) == 1 for messages, _ in hit)
    expected = [
        (message, action)
        for message in COUNTED
        for action in ("fail", "delay", "duplicate", "lose")
        if message.is_request or action in ("delay", "lose")
    ]
    assert [(messages[0], action) for messages, action in hit] == expected


def test_names_are_stable() -> None:
    """A point has the same name if other messages come between, and no two share a name."""
    names = [fault.name for fault in points(RUN)]
    assert len(set(names)) == len(names)
    assert names[0] == "0:message:fail:PYTHON_CALL:to-1:nth-1"
    assert names[-1] == "1:message:lose:RREF_ACK:to-0:nth-2"
    between = sent(9, 0, 1, "RREF_CHILD_ACCEPT", 0.15)
    more = [fault.name for fault in points((RUN[0], between, *RUN[1:]))]
    assert [name for name in more if "ACCEPT" not in name] == names
    plan = FaultPlan(others=points(RUN))
    assert plan.named(names[3:4], 3) == (points(RUN)[3],)


def test_what_is_done_can_be_chosen() -> None:
    """Only the actions named, with the delay given, in the order of the run."""
    found = points(RUN, actions=["delay"], delay=2.5)
    assert len(found) == len(COUNTED)
    assert {fault.delay for fault in found} == {2.5}
    assert points(RUN, actions=["fail", "fail"]) == points(RUN, actions=["fail"])
    assert points(()) == ()


def test_pairs_are_of_two_messages() -> None:
    """Each two points about different messages, once."""
    found = list(pairs(points(RUN, actions=["lose", "delay"])))
    messages = len(COUNTED)
    assert len(found) == 4 * messages * (messages - 1) // 2
    assert len(set(map(frozenset, found))) == len(found)
    assert all(one.due(RUN) != other.due(RUN) for one, other in found)
    assert list(pairs(points(RUN[:1]))) == []


@pytest.mark.parametrize("actions", ["lose", ["hold"], ["drop"], 3, [["lose"]]])
def test_other_actions_are_refused(actions: Any) -> None:
    """A hold is about two messages, and anything else is no action."""
    with pytest.raises(UsageError, match="actions"):
        points(RUN, actions=actions)


@pytest.mark.parametrize("change", [{"done": "lose"}, {"failed_by_table": True}])
def test_a_run_under_faults_has_no_points(change: dict[str, Any]) -> None:
    """What a fault acted on has changed what was sent, and in which order."""
    with pytest.raises(UsageError, match="without faults"):
        points((replace(RUN[0], **change), *RUN[1:]))


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(range(len(COUNTED)), 2)])
def test_two_messages_the_other_way(first: int, second: int) -> None:
    """The earlier one is held until the later one has passed, whichever is named first."""
    one, other = RUN[first], RUN[second]
    if one.id == other.id:
        with pytest.raises(UsageError, match="own response"):
            reversal(one, other, RUN)
        return
    hold = reversal(one, other, RUN, delay=4.0)
    assert hold == reversal(other, one, RUN, delay=4.0)
    (held,) = hold.due(RUN)
    assert hold.until is not None
    awaited = hold.until.find(RUN)
    assert awaited is not None
    assert {held, awaited} == {one, other}
    assert held.seconds <= awaited.seconds
    assert hold.delay == 4.0


def test_messages_of_one_instant_have_the_order_of_the_record() -> None:
    """The two deletes were sent in the same instant by one rank, which counted one first."""
    assert reversal(RUN[5], RUN[4], RUN, delay=1.0) == MessageFault(
        0,
        "hold",
        "RREF_USER_DELETE",
        to=1,
        delay=1.0,
        until=NthMessage(0, "RREF_USER_DELETE", to=1, n=2),
    )


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        (RUN[0], RUN[0], "they are one message"),
        (RUN[0], replace(RUN[1], id=77), "is not among messages"),
        (RUN[0], RUN[-1], "is not among messages"),
    ],
)
def test_what_has_no_order_is_refused(one: SentMessage, other: SentMessage, says: str) -> None:
    """One message, and one of another run or that no fault can touch, are no two."""
    with pytest.raises(UsageError, match=says):
        reversal(one, other, RUN)
    with pytest.raises(UsageError, match="delay"):
        reversal(RUN[0], RUN[1], RUN, delay=-1)
