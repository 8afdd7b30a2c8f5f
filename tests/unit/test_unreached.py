"""Backward passes that do not reach what was sent: what they show, keep and send."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageFault, WireMessageType
from rpcprops.oracle import predict
from rpcprops.outcomes import Counters
from rpcprops.programs import Program, Settle, Unreached
from rpcprops.strategies import programs
from tests._draws import draws

CLEANUP = "CLEANUP_AUTOGRAD_CONTEXT_REQ"


def test_such_a_pass_never_ends_and_its_context_is_cleaned_up() -> None:
    """The rank counts the pass for ever; callee and caller clean up, each the other."""
    said = predict(Program(2, (Unreached(0, 1, "x", (1.0, 3.0)),)), FaultPlan())
    assert said.steps[0].value == {"loss": 10.0, "ended": False}
    assert said.counters == (Counters(backward_passes=1), Counters())
    assert said.calls == ({}, {"step0": 1})
    assert {(one.rank, one.to, one.message) for one in said.sends} == {
        (0, 1, CLEANUP),
        (1, 0, CLEANUP),
    }
    # The call's argument and its answer each wait for a gradient, and none is sent.
    assert said.wire_sends == {(0, 1, WireMessageType.FORWARD_AUTOGRAD_REQ): 1}
    assert said.known_bugs == frozenset()


def test_a_call_that_timed_out_keeps_the_pass_waiting() -> None:
    """Its answer has no gradient, so only its caller cleans up."""
    said = predict(Program(2, (Unreached(0, 1, "x", by="timeout"), Settle())), FaultPlan())
    assert said.steps[0].value == {"loss": 5.0, "ended": False, "late": True}
    assert said.counters == (Counters(backward_passes=1), Counters())
    assert said.calls == ({}, {"step0/late": 1, "step0/slept": 1})
    assert {(one.rank, one.to, one.message) for one in said.sends} == {(0, 1, CLEANUP)}
    # The call, and another one that waits until its function has begun.
    assert said.wire_sends == {(0, 1, WireMessageType.FORWARD_AUTOGRAD_REQ): 2}
    assert said.known_bugs == frozenset()


def test_a_lost_cleanup_keeps_the_context_where_it_does_not_come() -> None:
    """The pass stays in any case."""
    plan = FaultPlan(by_rank={0: FaultTable([CLEANUP], 21)})
    said = predict(Program(2, (Unreached(0, 1, "x"),)), plan)
    assert said.counters == (Counters(backward_passes=1), Counters(contexts=1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Unreached(0, 1, "x", seconds=0.0), "must lie above 0, up to 3600"),
        (lambda: Unreached(0, 2, "x"), "to=2"),
    ],
)
def test_what_cannot_be_run_is_refused(make: Callable[[], Unreached], words: str) -> None:
    """The message has the value and what is allowed."""
    with pytest.raises(UsageError, match=words):
        Program(2, (make(),))


def test_faults_of_its_messages_are_refused() -> None:
    """Nothing is predicted where a call of its context is lost."""
    fault = MessageFault(0, "lose", "FORWARD_AUTOGRAD_REQ")
    with pytest.raises(UsageError, match="the oracle does not predict"):
        predict(Program(2, (Unreached(0, 1, "x"),)), FaultPlan(others=(fault,)))


def test_it_is_drawn_at_every_rank_towards_every_rank() -> None:
    """Also towards itself."""
    found = draws(programs(kinds=("unreached", "settle"), max_world_size=2), 300)
    placed = [
        (program.world_size, step)
        for program in found
        for step in program.leaves
        if isinstance(step, Unreached)
    ]
    ways = {(size, step.at, step.to) for size, step in placed}
    assert {(1, 0, 0), (2, 0, 1), (2, 1, 0), (2, 0, 0), (2, 1, 1)} <= ways
    assert {step.by for _, step in placed} == {"unused", "timeout"}
