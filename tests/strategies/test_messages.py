"""What the strategies of message faults draw, and what they shrink to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import strategies as st

from rpcprops import MessageFault, NthMessage
from rpcprops.errors import UsageError
from rpcprops.faults import (
    MESSAGE_ACTIONS,
    FaultPlan,
    FaultTable,
    MessageType,
    WireMessageType,
)
from rpcprops.strategies import fault_plans, hints, message_faults
from tests._draws import draws, smallest

ANY = message_faults(world_size=3, actions=MESSAGE_ACTIONS)


def test_by_default_torch_survives_it() -> None:
    """Nothing is lost for good, and what arrives twice is what torch calls idempotent."""
    found = draws(message_faults(world_size=3), 150)
    assert all(fault.is_survivable for fault in found)
    assert {fault.action for fault in found} == {"fail", "delay", "hold", "duplicate"}
    for fault in found:
        FaultPlan(others=(fault,)).check(3)
        assert fault.delay <= 2.0
        assert fault.which == "every" or fault.n <= 5


def test_everything_comes() -> None:
    """Each action, each rank, each way to count, receivers and all types are drawn."""
    found = draws(ANY, 250)
    assert {fault.action for fault in found} == set(MESSAGE_ACTIONS)
    assert {fault.rank for fault in found} == {0, 1, 2}
    assert {fault.to for fault in found} == {None, 0, 1, 2}
    assert {fault.which for fault in found} == {"nth", "first", "every"}
    kinds = Counter(fault.message for fault in found if fault.action != "fail")
    assert len(kinds) > 12
    assert any(kind and not kind.is_request for kind in kinds)


def test_bounds_hold() -> None:
    """Types, actions, numbers and delays are those of the arguments."""
    bounded = message_faults(
        world_size=1, actions={"lose", "hold"}, messages=["RREF_ACK"], max_messages=2, max_delay=0.1
    )
    for fault in draws(bounded, 60):
        assert fault.action in ("lose", "hold")
        assert (fault.rank, fault.message) == (0, "RREF_ACK")
        assert fault.n <= 2
        assert fault.delay <= 0.1
    mixed = message_faults(world_size=2, messages={MessageType.PYTHON_CALL, "PYTHON_RET"})
    for fault in draws(mixed, 100):
        is_late = fault.action in ("delay", "hold")
        assert fault.message == "PYTHON_CALL" or (is_late and fault.message == "PYTHON_RET")


@pytest.mark.parametrize(
    ("action", "least"),
    [
        ("fail", MessageFault(0, "fail", "CLEANUP_AUTOGRAD_CONTEXT_REQ")),
        ("delay", MessageFault(0, "delay", "PYTHON_CALL", delay=0.001)),
        (
            "hold",
            MessageFault(
                0, "hold", "PYTHON_CALL", delay=0.001, until=NthMessage(0, "PYTHON_CALL", n=2)
            ),
        ),
        ("duplicate", MessageFault(0, "duplicate", "CLEANUP_AUTOGRAD_CONTEXT_REQ")),
        ("lose", MessageFault(0, "lose", "PYTHON_CALL")),
    ],
)
def test_each_action_shrinks_to_one_message(action: str, least: MessageFault) -> None:
    """The first message of a plain type at rank 0, for as short a time as there is."""
    assert smallest(ANY, lambda fault: fault.action == action, 2) == [least] * 2


def test_plans_have_them_beside_tables() -> None:
    """Up to three in a plan, where the plan is asked for them, and none where it is not."""
    assert not any(plan.others for plan in draws(fault_plans(world_size=3), 30))
    found = draws(fault_plans(world_size=3, message_faults=ANY), 100)
    assert {len(plan.others) for plan in found} == {0, 1, 2, 3}
    assert any(plan.others and plan.by_rank for plan in found)
    plain = fault_plans(world_size=3, message_faults=message_faults(world_size=3))
    assert all(plan.is_within_budget(3) for plan in draws(plain, 40))


def test_plans_shrink_to_one_fault() -> None:
    """Other faults and tables go, the simplest plan has none, and of the one the rest is least."""
    plans = fault_plans(world_size=3, message_faults=ANY)

    def is_held(plan: FaultPlan) -> bool:
        return any(fault.seconds > 1 for fault in plan.others if fault.targets)

    assert smallest(plans, lambda _: True, 1) == [FaultPlan()]
    for plan in smallest(plans, is_held, 2):
        assert plan.by_rank == {}
        assert plan.default == FaultTable()
        (left,) = plan.others
        assert isinstance(left, MessageFault)
        assert (left.rank, left.to) == (0, None)


def test_a_hint_makes_what_is_sent_come_more_often() -> None:
    """Requests of a rank come at that rank, and what answers them at the others."""
    late = message_faults(world_size=3, actions=["delay"])
    share: list[float] = []
    for sends in ({}, {1: frozenset({MessageType.SCRIPT_CALL})}):
        with hints.known(hints.Hint(sends)):
            found = draws(late, 150)
        likely = [
            fault.message is WireMessageType.SCRIPT_RET
            or (fault.message is WireMessageType.SCRIPT_CALL and fault.rank == 1)
            for fault in found
        ]
        share.append(sum(likely) / len(found))
    assert share[1] > 0.5 > share[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "world_size"),
        ({"world_size": 0}, "world_size=0"),
        ({"world_size": True}, "world_size=True"),
        ({"actions": ()}, "actions is empty"),
        ({"actions": "lose"}, "actions="),
        ({"actions": ["drop"]}, "'drop'.*name at least one of"),
        ({"actions": [["lose"]]}, "name at least one of"),
        ({"messages": "RREF_ACK"}, "messages="),
        ({"messages": ["RREF_NACK"]}, "RREF_NACK"),
        ({"messages": ()}, "holds no message that can fail"),
        ({"messages": ["RREF_ACK"]}, "no message that can fail.*name a request"),
        ({"max_messages": 0}, "max_messages=0"),
        ({"max_delay": 0}, "max_delay=0"),
        ({"max_delay": 3601}, "max_delay=3601"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(arguments: dict[str, Any], says: str) -> None:
    """The message names the argument and what to write."""
    given: dict[str, Any] = {"world_size": 2, **arguments} if arguments else {}
    with pytest.raises((UsageError, TypeError), match=says):
        message_faults(**given)


@pytest.mark.parametrize("odd", [3, [MessageFault(0, "lose")]])
def test_a_plan_wants_a_strategy(odd: Any) -> None:
    """What is no strategy is refused at the call, and what draws other things when drawn."""
    with pytest.raises(UsageError, match=r"write message_faults\("):
        fault_plans(world_size=2, message_faults=odd)
    wrong: Any = st.just(FaultTable())
    with pytest.raises(UsageError, match="must draw MessageFault only"):
        draws(fault_plans(world_size=2, message_faults=wrong), 20)
