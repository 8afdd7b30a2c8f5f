"""Faults of any message, as data: what they say, what they refuse, and where plans carry them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

import rpcprops
from rpcprops import MessageFault, NthMessage, agents
from rpcprops._json import from_json, to_json
from rpcprops.agents import Agent
from rpcprops.cluster.deadlines import Deadlines
from rpcprops.cluster.options import complete
from rpcprops.errors import UsageError
from rpcprops.faults import (
    MESSAGE_ACTIONS,
    RETRYABLE_MESSAGE_TYPES,
    FaultPlan,
    FaultTable,
    MessageAction,
    MessageType,
    WireMessageType,
    acted_on,
    agent_faults,
    wire_message_type,
)
from rpcprops.oracle import FaultCount, account, judge, predict
from rpcprops.outcomes import Outcome, RankOutcome, SentMessage, Violation
from rpcprops.programs import Call, Drop, Program, Remote
from rpcprops.report.artefact import Artefact
from rpcprops.report.as_test import regression_test
from rpcprops.report.script import script_of
from rpcprops.report.text import describe_faults, describe_plan

REQUESTS = tuple(kind for kind in WireMessageType if kind.is_request)
UNTIL = NthMessage(1, "PYTHON_RET", to=0)
HOLD = MessageFault(
    0, "hold", "PYTHON_CALL", to=1, which="first", n=3, delay=2.5, until=replace(UNTIL, n=2)
)
LOSE = MessageFault(1, "lose", "RREF_ACK")
FAULTS = (
    LOSE,
    HOLD,
    MessageFault(0, "fail", way="request", which="every"),
    MessageFault(0, "delay", delay=0.25),
    MessageFault(1, "delay", way="response", to=0, n=4, delay=3600),
    MessageFault(2, "duplicate", "RREF_USER_DELETE", which="first", n=2),
    MessageFault(2, "hold", delay=0.001, until=NthMessage(2, way="response", to=1, n=9)),
)
PLAN = FaultPlan(by_rank={0: FaultTable(["RREF_USER_DELETE"], 2)}, others=FAULTS)
PROGRAM = Program(2, (Call(0, 1),))


def sent(sender: int, receiver: int, kind: str, number: int = 0, **others: Any) -> SentMessage:
    """A message of a made-up run."""
    is_request = WireMessageType(kind).is_request
    return SentMessage(float(number), sender, receiver, number, kind, is_request, **others)


# Types.


def test_the_types_are_torch_s_own(header: str) -> None:
    """All names, and which are requests, are those of the installed torch's message.h."""
    body = header.partition("enum MessageType {")[2].partition("};")[0]
    rows = re.findall(r"(\w+) =\s*0x\w+(?: \|\s*MessageTypeFlags::(\w+)_TYPE)?", body)
    found = {name: way for name, way in rows if name != "UNKNOWN"}
    assert found == {
        str(kind): "REQUEST" if kind.is_request else "RESPONSE" for kind in WireMessageType
    }


@pytest.fixture(scope="module")
def header() -> str:
    """The header of the installed torch that names the types of message."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "include/torch/csrc/distributed/rpc/message.h"
    return path.read_text(encoding="utf-8")


def test_the_ten_of_the_faulty_agent_are_among_them() -> None:
    """They are equal by name and have the same retries; no other type is retried."""
    for kind in MessageType:
        assert str(wire_message_type(kind)) == str(kind)
        assert WireMessageType(kind).max_retries == kind.max_retries
        assert WireMessageType(kind).is_request
    retried = {str(kind) for kind in WireMessageType if kind.is_retryable}
    assert retried == set(map(str, RETRYABLE_MESSAGE_TYPES))


def test_every_request_has_its_answer() -> None:
    """Each response but EXCEPTION answers some request, and no response has an answer."""
    answers = {kind.answer for kind in REQUESTS}
    assert answers == set(WireMessageType) - set(REQUESTS) - {WireMessageType.EXCEPTION}
    assert all(kind.answer is None for kind in WireMessageType if not kind.is_request)


# One fault.


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_its_repr_rebuilds_it(fault: MessageFault) -> None:
    """What a report prints is the fault, with the names that the package exports."""
    assert eval(repr(fault), dict(vars(rpcprops))) == fault
    assert "WireMessageType" not in repr(fault)


def test_what_it_is_by_default() -> None:
    """The shortest form acts on one message, the first one, of any rank."""
    assert repr(MessageFault(1, "lose", "RREF_ACK")) == "MessageFault(1, 'lose', 'RREF_ACK')"
    assert repr(UNTIL) == "NthMessage(1, 'PYTHON_RET', to=0)"
    assert (LOSE.to, LOSE.way, LOSE.which, LOSE.n, LOSE.until) == (None, None, "nth", 1, None)


def test_one_effect_has_one_form() -> None:
    """The first one message is the first message, and the way of a type says nothing new."""
    assert MessageFault(1, "lose", "RREF_ACK", which="first", n=1) == LOSE
    assert MessageFault(1, "lose", WireMessageType.RREF_ACK, way="response") == LOSE
    call = MessageFault(0, "fail", MessageType.PYTHON_CALL)
    assert call == MessageFault(0, "fail", "PYTHON_CALL", way="request")
    assert isinstance(call.message, WireMessageType)


def test_names_are_stable_and_of_one_fault() -> None:
    """Files and command lines hold these names."""
    assert [fault.name for fault in FAULTS] == [
        "1:message:lose:RREF_ACK:nth-1",
        "0:message:hold:PYTHON_CALL:to-1:first-3:2.5s:until:1:PYTHON_RET:to-0:nth-2",
        "0:message:fail:any-request:every",
        "0:message:delay:any:nth-1:0.25s",
        "1:message:delay:any-response:to-0:nth-4:3600.0s",
        "2:message:duplicate:RREF_USER_DELETE:first-2",
        "2:message:hold:any:nth-1:0.001s:until:2:any-response:to-1:nth-9",
    ]


def test_the_agent_gets_plain_data() -> None:
    """The format that the C++ agent reads, word for word."""
    assert HOLD.for_agent() == {
        "to": 1,
        "type": "PYTHON_CALL",
        "way": "",
        "which": "first",
        "n": 3,
        "action": "hold",
        "seconds": 2.5,
        "until": {"at": 1, "to": 0, "type": "PYTHON_RET", "way": "", "n": 2},
    }
    every = MessageFault(0, "fail", way="request", which="every").for_agent()
    assert every == {
        "to": -1,
        "type": "",
        "way": "request",
        "which": "every",
        "n": 1,
        "action": "fail",
        "seconds": 0.0,
        "until": None,
    }
    for rank in range(3):
        mine = [fault for fault in PLAN.others if fault.rank == rank]
        assert agent_faults(PLAN, rank) == [fault.for_agent() for fault in mine]  # type: ignore[attr-defined]
        assert json.loads(json.dumps(agent_faults(PLAN, rank))) == agent_faults(PLAN, rank)


Make = Callable[[], object]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MessageFault(0, "drop"), "action='drop'.*'lose'"),  # type: ignore[arg-type]
        (lambda: MessageFault(0, ["fail"]), "action=.*must be one of"),  # type: ignore[arg-type]
        (lambda: MessageFault(-1, "lose"), "rank=-1"),
        (lambda: MessageFault(True, "lose"), "rank=True"),
        (
            lambda: MessageFault(0, "lose", "RREF_NACK"),
            "'RREF_NACK'.*It sends: SCRIPT_CALL, SCRIPT_RET",
        ),
        # A response that is listed would be refused next.
        (
            lambda: MessageFault(0, "fail", "RREF_NACK"),
            "'RREF_NACK'.*As a request it sends: SCRIPT_CALL, PYTHON_CALL, .*_REQ.$",
        ),
        (
            lambda: MessageFault(0, "lose", "RREF_NACK", way="response"),
            "'RREF_NACK'.*As a response it sends: SCRIPT_RET, PYTHON_RET, ",
        ),
        (lambda: MessageFault(0, "lose", "rref_ack"), "Did you mean 'RREF_ACK'"),
        (lambda: MessageFault(0, "lose", "UNKNOWN"), "'UNKNOWN'"),
        (lambda: MessageFault(0, "lose", 3), "got 3 .type int"),  # type: ignore[arg-type]
        (lambda: MessageFault(0, "lose", to=-1), "to=-1"),
        (lambda: MessageFault(0, "lose", to=1.0), "to=1.0"),  # type: ignore[arg-type]
        (lambda: MessageFault(0, "lose", way="back"), "way='back'.*'response'"),  # type: ignore[arg-type]
        (lambda: MessageFault(0, "lose", "RREF_ACK", way="request"), "is a response; leave way"),
        (lambda: MessageFault(0, "lose", which="last"), "which='last'"),  # type: ignore[arg-type]
        (lambda: MessageFault(0, "lose", n=0), "n=0.*counted from 1"),
        (lambda: MessageFault(0, "lose", n=True), "n=True"),
        (lambda: MessageFault(0, "lose", n=2**31), "n=2147483648"),
        (lambda: MessageFault(0, "lose", which="every", n=2), "n=2 means nothing"),
        (lambda: MessageFault(0, "fail", "PYTHON_RET"), "PYTHON_RET. cannot fail.*lose it"),
        (lambda: MessageFault(0, "fail", way="response"), "any-response. cannot fail"),
        (lambda: MessageFault(0, "fail"), "write way='request'"),
        (lambda: MessageFault(0, "duplicate", "RREF_ACK"), "torch aborts.*duplicate its request"),
        (
            lambda: MessageFault(0, "duplicate", way="response"),
            "cannot be duplicated: torch aborts",
        ),
        (lambda: MessageFault(0, "duplicate"), "write way='request'"),
        (lambda: MessageFault(0, "delay", "RREF_ACK"), "such as delay=1.0"),
        (lambda: MessageFault(0, "delay", delay=-1), "delay=-1 .*above 0 and up to 3600"),
        (lambda: MessageFault(0, "delay", delay=3600.5), "above 0 and up to 3600"),
        (lambda: MessageFault(0, "lose", delay=-1), "from 0 to 3600"),
        (lambda: MessageFault(0, "delay", delay=float("nan")), "delay=nan"),
        (lambda: MessageFault(0, "delay", delay="1"), "delay='1'"),  # type: ignore[arg-type]
        (lambda: MessageFault(0, "lose", delay=1), "delay=1.0 means nothing"),
        (lambda: MessageFault(0, "hold", delay=1), "needs until=NthMessage"),
        (lambda: MessageFault(0, "hold", until=UNTIL), "that they wait at most"),
        (lambda: MessageFault(0, "hold", delay=1, until=LOSE), "must be a NthMessage"),  # type: ignore[arg-type]
        (lambda: MessageFault(0, "lose", until=UNTIL), "until=Nth.*means nothing"),
        (lambda: NthMessage(0, n=0), "n=0"),
        (lambda: NthMessage(0, "RREF_ACK", way="request"), "is a response"),
    ],
)
def test_what_cannot_be_is_refused(make: Make, says: str) -> None:
    """The message names the value and what to write instead."""
    with pytest.raises(UsageError, match=says):
        make()


@pytest.mark.parametrize(
    ("which", "n", "until", "is_itself"),
    [
        ("nth", 1, 1, True),
        ("nth", 2, 1, False),
        ("nth", 2, 3, False),
        ("first", 3, 3, True),
        ("first", 3, 4, False),
        ("every", 1, 7, True),
    ],
)
def test_nothing_waits_for_itself(which: Any, n: int, until: int, is_itself: bool) -> None:
    """A message is not held until a message that is held by the same fault."""
    given: dict[str, Any] = {"to": 1, "which": which, "n": n, "delay": 1.0}

    def hold(**other: Any) -> MessageFault:
        after = {"to": 1, **other}
        return MessageFault(0, "hold", "PYTHON_CALL", until=NthMessage(**after), **given)

    same = {"rank": 0, "message": "PYTHON_CALL", "n": until}
    if is_itself:
        with pytest.raises(UsageError, match="would wait for itself"):
            hold(**same)
    else:
        hold(**same)
    for other in ({"to": 2}, {"rank": 1}, {"message": "PYTHON_RET"}):
        hold(**{**same, **other})


# What it may do.

ACK, CALL, DELETE = "RREF_ACK", "PYTHON_CALL", "RREF_USER_DELETE"
CLEANUP = "CLEANUP_AUTOGRAD_CONTEXT_REQ"


@pytest.mark.parametrize(
    ("fault", "survives"),
    [
        (MessageFault(0, "fail", DELETE), True),
        (MessageFault(0, "fail", DELETE, n=99), True),
        (MessageFault(0, "fail", DELETE, which="first", n=5), True),
        (MessageFault(0, "fail", DELETE, which="first", n=6), False),
        (MessageFault(0, "fail", CLEANUP, which="first", n=20), True),
        (MessageFault(0, "fail", CLEANUP, which="every"), False),
        (MessageFault(0, "fail", CALL), False),
        (MessageFault(0, "fail", way="request"), False),
        (MessageFault(0, "delay", ACK, delay=1, which="every"), True),
        (HOLD, True),
        (MessageFault(0, "duplicate", DELETE, which="every"), True),
        (MessageFault(0, "duplicate", CALL), False),
        (MessageFault(0, "duplicate", way="request"), False),
        (MessageFault(0, "lose", DELETE), False),
        (MessageFault(0, "lose", ACK), False),
    ],
)
def test_what_torch_survives(fault: MessageFault, survives: bool) -> None:
    """As torch's source and documentation promise; a plan with it is within the budget or not."""
    assert fault.is_survivable is survives
    assert FaultPlan(others=(fault,)).is_within_budget(2) is survives


def test_how_long_it_takes() -> None:
    """Delays as they are, failures as long as torch waits between tries, and nothing for others."""
    assert HOLD.seconds == 2.5
    assert HOLD.waits(3) == 7.5
    assert MessageFault(0, "fail", DELETE).seconds == 1.0
    assert MessageFault(0, "fail", DELETE, which="first", n=3).seconds == 3.5
    assert MessageFault(0, "fail", DELETE, which="every").seconds == 9.125
    assert MessageFault(0, "fail", DELETE).unseen_waits == ()
    assert MessageFault(0, "fail", CALL, which="every").seconds == 0.0
    assert MessageFault(0, "fail", CLEANUP, which="first", n=3).unseen_waits == (1.0, 1.0, 1.5)
    assert len(MessageFault(0, "fail", way="request", which="every").unseen_waits) == 20
    assert LOSE.seconds == LOSE.waits(4) == 0.0
    alone, none = (Deadlines.of(FaultPlan(others=o), 2, 1.0, 30.0) for o in ((HOLD,), ()))
    assert alone.run >= none.run + HOLD.seconds
    assert not any(fault.blocks_sender for fault in FAULTS)


def test_what_it_aims_at() -> None:
    """Of the ten types that programs are drawn for, those that it may act on."""
    assert LOSE.targets == ()
    assert HOLD.targets == (MessageType.PYTHON_CALL,)
    assert set(MessageFault(0, "lose").targets) == set(MessageType)
    assert MessageFault(0, "lose", way="response").targets == ()
    assert set(MessageFault(0, "lose", way="response").may_be) == set(WireMessageType) - set(
        REQUESTS
    )


RUN = (
    sent(0, 1, "PYTHON_CALL", 0),
    sent(1, 0, "PYTHON_RET", 1),
    sent(0, 2, "PYTHON_CALL", 2),
    sent(0, 1, "RREF_USER_DELETE", 3),
    sent(0, 1, "PYTHON_CALL", 4, marks=("spared",)),
    sent(0, 1, "PYTHON_CALL", 5),
    sent(0, 1, "RREF_ACK", 6),
)


@pytest.mark.parametrize(
    ("fault", "ids"),
    [
        (MessageFault(0, "lose", "PYTHON_CALL"), [0]),
        (MessageFault(0, "lose", "PYTHON_CALL", n=2), [2]),
        (MessageFault(0, "lose", "PYTHON_CALL", to=1, n=2), [5]),
        (MessageFault(0, "lose", "PYTHON_CALL", which="every"), [0, 2, 5]),
        (MessageFault(0, "lose", "PYTHON_CALL", which="first", n=2), [0, 2]),
        (MessageFault(0, "lose", way="response", which="every"), [6]),
        (MessageFault(0, "lose", way="request", to=1, which="every"), [0, 3, 5]),
        (MessageFault(0, "lose", which="first", n=4), [0, 2, 3, 5]),
        (MessageFault(1, "lose", n=2), []),
        (MessageFault(2, "lose", which="every"), []),
    ],
    ids=lambda value: value.name if isinstance(value, MessageFault) else None,
)
def test_which_messages_it_is_due_for(fault: MessageFault, ids: list[int]) -> None:
    """They are counted at their sender, from 1, and those of a spared shutdown are not."""
    assert [one.id for one in fault.due(RUN)] == ids


def test_the_message_that_is_waited_for() -> None:
    """It is found in a run as the agent finds it, if there are so many."""
    assert NthMessage(0, "PYTHON_CALL", to=1, n=2).find(RUN) == RUN[5]
    assert NthMessage(0, "PYTHON_CALL", to=1, n=3).find(RUN) is None


# What it did.


def test_the_record_says_on_what_it_acted() -> None:
    """A fault is known by its number at its rank, so two that match the same are told apart."""
    first, second = sorted(MessageFault(0, "lose", "PYTHON_CALL", n=n) for n in (1, 2))
    other = MessageFault(1, "lose", "RREF_ACK")
    plan = FaultPlan(others=(second, other, first))
    messages = (
        sent(0, 1, "PYTHON_CALL", 0, fault=0, done="lose"),
        sent(0, 1, "PYTHON_CALL", 1, fault=1, done="lose"),
        sent(0, 1, "PYTHON_CALL", 2),
        sent(1, 0, "RREF_ACK", 3, fault=0, done="lose"),
        sent(1, 0, "RREF_ACK", 4, fault=0, done="lose"),
    )
    found = [[one.id for one in acted_on(f, plan, messages)] for f in (first, second, other)]
    assert found == [[0], [1], [3, 4]]
    with pytest.raises(UsageError, match="the plan does not have MessageFault"):
        acted_on(HOLD, plan, messages)


def test_it_is_accounted_for_by_the_record() -> None:
    """Reports count what the record shows, and know nothing where nobody recorded messages."""
    plan = FaultPlan(others=(LOSE,))
    ranks = tuple(RankOutcome(rank, f"worker{rank}") for rank in range(2))
    answered = sent(1, 0, "RREF_ACK", 3, fault=0, done="lose")
    outcome = Outcome(2, ranks=ranks, messages=(answered, sent(1, 0, "RREF_ACK", 4)))
    count = FaultCount(1, "message", "lose:RREF_ACK:nth-1", None, 1, "recorded")
    assert account(None, plan, outcome) == (count,)
    assert account(None, plan, replace(outcome, messages=outcome.messages[1:]))[0].fired == 0
    assert account(None, plan, replace(outcome, messages=()))[0].fired is None
    assert account(None, plan, replace(outcome, messages=(), agent="WIRE"))[0].fired == 0
    (line,) = describe_faults(account(None, plan, outcome))
    assert "rank 1: message lose:RREF_ACK:nth-1: 1" in line
    assert repr(LOSE) in describe_plan(plan, 2)[0]


def test_a_record_travels_as_json() -> None:
    """An outcome with messages comes back whole."""
    outcome = Outcome(2, messages=(sent(1, 0, "RREF_ACK", 3, fault=0, done="lose"), *RUN))
    assert from_json(json.loads(json.dumps(to_json(outcome))), Outcome) == outcome


# Where plans carry it.


def test_a_plan_lists_names_and_leaves_out() -> None:
    """By their names, as ``--without-fault`` takes them."""
    for fault in FAULTS:
        assert PLAN.named([fault.name], 3) == (fault,)
        less = PLAN.without([fault.name], 3)
        assert set(less.others) == set(FAULTS) - {fault}
        assert set(fault.put_into(less).others) == set(FAULTS)
    assert set(PLAN.fault_names(3)) == {f.name for f in FAULTS} | {"0:RREF_USER_DELETE"}
    assert eval(repr(PLAN), dict(vars(rpcprops))) == PLAN
    assert from_json(json.loads(json.dumps(to_json(PLAN))), FaultPlan) == PLAN


@pytest.mark.parametrize(
    "damage",
    [
        {"action": "fail"},
        {"message": "RREF_NACK"},
        {"n": 0},
        {"until": {"rank": 0}},
        {"delay": "soon"},
        {"rank": -1},
    ],
)
def test_damaged_json_is_refused(damage: dict[str, Any]) -> None:
    """What a fault refuses, it refuses in a file, in a sentence."""
    plan = FaultPlan(others=(LOSE,))
    data = to_json(plan)
    data["others"][0] |= damage
    with pytest.raises(UsageError):
        from_json(data, FaultPlan)


@pytest.mark.parametrize(
    ("fault", "rank"),
    [
        (MessageFault(2, "lose"), 2),
        (MessageFault(0, "lose", to=3), 3),
        (MessageFault(0, "hold", delay=1, until=NthMessage(4)), 4),
        (MessageFault(0, "hold", delay=1, until=NthMessage(1, to=5)), 5),
    ],
)
def test_every_rank_that_it_names_is_in_the_world(fault: MessageFault, rank: int) -> None:
    """A receiver or an awaited message outside the world would never come."""
    plan = FaultPlan(others=(fault,))
    with pytest.raises(UsageError, match=f"names rank {rank}, .*out of others"):
        plan.check(2)
    plan.check(rank + 1)


def test_it_gets_simpler() -> None:
    """Fewer messages, shorter delays and earlier messages to wait for; an end is always reached."""
    for fault in FAULTS:
        found = list(fault.simpler())
        assert fault not in found
        kept = {(one.rank, one.action, one.message, one.to) for one in found}
        assert kept <= {(fault.rank, fault.action, fault.message, fault.to)}
        for _ in range(50):
            fault = next(fault.simpler(), fault)
        assert not list(fault.simpler())
    assert [f.n for f in MessageFault(0, "lose", n=4).simpler()] == [1, 2, 3]
    assert [(f.which, f.n) for f in MessageFault(0, "lose", which="every").simpler()] == [
        ("nth", 1),
        ("first", 2),
    ]
    # It does not come to wait for itself.
    tight = MessageFault(0, "hold", CALL, n=2, delay=0.001, until=NthMessage(0, CALL, n=3))
    assert all(f.until is not None and f.until.n != f.n for f in tight.simpler())


@pytest.mark.parametrize(
    ("every", "until", "is_itself"),
    [
        ({}, {"message": "PYTHON_CALL"}, True),
        ({}, {"to": 1}, True),
        ({"way": "request"}, {"message": "PYTHON_CALL", "to": 1}, True),
        ({"message": "PYTHON_CALL"}, {"message": "PYTHON_CALL", "to": 1, "n": 3}, True),
        ({"to": 1}, {"message": "PYTHON_CALL", "to": 1}, True),
        # These may be messages that are not held.
        ({"to": 1}, {"message": "PYTHON_CALL"}, False),
        ({"way": "request"}, {}, False),
        ({"way": "request"}, {"message": "PYTHON_RET"}, False),
        ({}, {"rank": 1, "message": "PYTHON_CALL"}, False),
    ],
)
def test_who_holds_every_message_waits_for_another_one(
    every: dict[str, Any], until: dict[str, Any], *, is_itself: bool
) -> None:
    """It is refused where each message that `until` may be is held, also by a wider pattern."""
    after = NthMessage(**{"rank": 0, **until})
    given: dict[str, Any] = {"which": "every", "delay": 20.0, "until": after, **every}
    if is_itself:
        with pytest.raises(UsageError, match="would wait for itself"):
            MessageFault(0, "hold", **given)
    else:
        assert MessageFault(0, "hold", **given).until == after


def test_a_plan_shrinks_to_the_smallest_that_fails() -> None:
    """As for the faults of tables: without each, then with each replaced by a simpler one."""

    def fails(plan: FaultPlan) -> bool:
        return any(getattr(fault, "delay", 0) >= 1 and fault.targets for fault in plan.others)

    plan = PLAN
    while smaller := next((one for one in plan.simpler(3) if fails(one)), None):
        plan = smaller
    assert len(plan.faults(3)) == 1
    (left,) = plan.others
    assert isinstance(left, MessageFault)
    assert (left.which, left.n) == ("nth", 1)
    assert left.delay == 1.0


# Who carries it out, and who judges.


class Able(Agent):
    """An agent that can lose messages."""

    name = "ABLE"
    can_fail = can_delay = tuple(MessageType)
    can_act: ClassVar[tuple[MessageAction, ...]] = ("lose",)


@pytest.mark.parametrize("agent", ["FAULTY_TENSORPIPE", "TENSORPIPE"])
@pytest.mark.parametrize("action", MESSAGE_ACTIONS)
def test_torch_s_agents_refuse_it(agent: str, action: MessageAction) -> None:
    """The message names the fault, and the agent that can."""
    late: dict[str, Any] = {"delay": 1.0} if action in ("delay", "hold") else {}
    if action == "hold":
        late["until"] = UNTIL
    plan = FaultPlan(others=(MessageFault(0, action, "PYTHON_CALL", **late),))
    with pytest.raises(UsageError, match=f"{agent} cannot carry out Mess.*Write agent='wire'"):
        agents.named(agent).check_plan(plan, 2)
    agents.named(agent).check_plan(FaultPlan(), 2)


def test_an_agent_says_what_it_can() -> None:
    """An agent is asked for each action, once its tables are carried out."""
    Able().check_plan(FaultPlan(others=(LOSE,)), 2)
    with pytest.raises(UsageError, match=r"ABLE cannot carry out .*'delay'.*it can do: lose"):
        Able().check_plan(PLAN, 2)


def test_a_cluster_refuses_it_before_it_starts() -> None:
    """The options of a cluster are where a plan meets an agent."""

    def rate(_: object) -> float:
        return 1.0

    with pytest.raises(UsageError, match="Write agent='wire'"):
        complete(
            {"world_size": 2, "faults": FaultPlan(others=(LOSE,))}, rate_of=rate, network="host"
        )


def test_the_oracle_says_why_it_predicts_nothing_under_it() -> None:
    """A program under it is refused by name; what ranks hold and how they exit is judged."""
    plan, program = FaultPlan(others=(LOSE,)), Program(2, (Remote(0, 1, "a"), Drop(0, "a")))
    says = r"does not predict .* under 1:message:lose:RREF_ACK:nth-1 .*rpc_timeout.*; take it out"
    with pytest.raises(UsageError, match=says):
        predict(program, plan)
    ranks = (RankOutcome(0, "a"), RankOutcome(1, "b", signal=6))
    with pytest.raises(UsageError, match=says):
        judge(program, plan, Outcome(2, ranks=ranks))
    (found,) = judge(None, plan, Outcome(2, ranks=ranks, messages=RUN))
    assert found.promise == "RankDied"
    assert judge(None, plan, Outcome(2, ranks=ranks[:1], messages=RUN)) == ()


def test_a_script_refuses_it_and_a_test_imports_it() -> None:
    """Plain torch cannot do it, which the script says; a regression test imports its names."""
    plan = FaultPlan(others=(HOLD,))
    broken = (Violation("WrongValue", "planted", 0, 0),)
    artefact = Artefact(
        "program",
        "planted",
        "WrongValue",
        program=PROGRAM,
        plans=(plan,),
        violations=broken,
        outcomes=(Outcome(2),),
    )
    with pytest.raises(UsageError, match=r"no agent of torch's makes the fault 0:message:hold"):
        script_of(artefact)
    finding = replace(artefact, subject="early-owner-fork")
    remedy = r"run `rpcprops check early-owner-fork --agent FAULTY_TENSORPIPE` and replay"
    with pytest.raises(UsageError, match=remedy):
        script_of(finding)
    source = regression_test(artefact)
    assert "from rpcprops import FaultPlan, MessageFault, NthMessage" in source
    made: dict[str, Any] = {}
    exec(source, made)
    assert made["PLAN"] == plan
