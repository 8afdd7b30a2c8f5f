"""Calls that outlast their autograd context: what they show, what is left, and what is drawn."""

from __future__ import annotations

from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import judge, predict, set_apart
from rpcprops.programs import Call, Outlast, Program, Settle
from rpcprops.strategies import programs
from tests._draws import draws
from tests.seeded._ideal import ideal, settled_with

CLEANUP = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ


def plan(**table: Any) -> FaultPlan:
    """A plan of a table for rank 0."""
    return FaultPlan(by_rank={0: FaultTable(**table)})


LOST = plan(messages_to_fail=[CLEANUP], num_fail_sends=42)


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (Outlast(0, 1, "x"), {"sum": [3.0]}),
        (Outlast(0, 1, "x", "argument"), {"sum": [3.0]}),
        (Outlast(0, 1, "x", "gradient"), {"lost": True}),
        (Outlast(0, 1, "x", "call"), {"lost": True}),
        (Outlast(0, 1, "x", "call", "timeout"), {"timed out": True}),
    ],
)
def test_only_what_needs_the_context_is_refused(step: Outlast, value: dict[str, Any]) -> None:
    """The caller sends one cleanup; the callee had sent nothing in the context, and sends none."""
    seen = predict(Program(2, (step,)), FaultPlan())
    assert seen.steps[0].value == value
    assert [(send.rank, send.message) for send in seen.sends] == [(0, CLEANUP)]
    assert not any(counters.contexts for counters in seen.counters)


@pytest.mark.parametrize(
    ("step", "contexts"),
    [
        (Outlast(0, 1, "x"), (0, 1, 0)),
        (Outlast(0, 1, "x", "gradient"), (1, 1, 0)),
        (Outlast(0, 1, "x", "gradient", "timeout"), (0, 1, 0)),
        (Outlast(0, 1, "x", "call", then=2), (0, 1, 1)),
    ],
)
def test_a_lost_cleanup_leaves_what_the_call_has_made(
    step: Outlast, contexts: tuple[int, ...]
) -> None:
    """Each rank that took part keeps the context; the caller, if the answer belongs to it."""
    seen = predict(Program(3, (step,)), LOST)
    assert tuple(counters.contexts for counters in seen.counters) == contexts
    assert not seen.known_bugs


@pytest.mark.parametrize("what", ["gradient", "call"])
def test_a_cleanup_that_may_come_too_late_leaves_it_open(what: Any) -> None:
    """Whether the context is still there when it is asked for is then not predicted."""
    for table in (
        {"messages_to_delay": {CLEANUP: 25.0}},
        {"messages_to_fail": [CLEANUP], "num_fail_sends": 12},
    ):
        seen = predict(Program(2, (Outlast(0, 1, "x", what, seconds=40.0),)), plan(**table))
        assert (seen.steps[0].error, seen.certain) == ("unknown", False)


def test_a_context_that_is_made_anew_is_a_known_finding() -> None:
    """It explains one context more at the callee, and no other, nor one at the caller."""
    program = Program(2, (Outlast(0, 1, "x", "argument", seconds=4.0), Settle(), Call(0, 1)))
    prediction = predict(program, FaultPlan())
    assert prediction.known_bugs == {"context-after-cleanup"}
    clean = ideal(program, FaultPlan())
    for rank, contexts, explained in ((1, 1, True), (1, 2, False), (0, 1, False)):
        wrong = settled_with(clean, 1, rank, contexts=contexts)
        (violation,) = judge(program, FaultPlan(), wrong)
        assert violation.promise == "ContextLeak"
        names, left = set_apart(program, prediction.met, wrong, [violation])
        assert (bool(names), bool(left)) == (explained, not explained)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Outlast(0, 0, "x"), "must be another rank"),
        (lambda: Outlast(0, 1, "x", "gradient", seconds=4.0), "must lie in 40 to 3600"),
        (lambda: Outlast(0, 1, "x", seconds=1.0), "must lie in 4 to 3600"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    """A rank has a context once; and a call that asks for it lasts until it is surely gone."""
    with pytest.raises(UsageError, match=message):
        Program(2, (make(),))


def test_all_forms_are_drawn_but_that_of_the_finding() -> None:
    """Drawn programs make such calls, and none that this torch is known to get wrong."""
    found = draws(programs(kinds=("outlast", "settle"), max_world_size=3), 200)
    steps = [step for one in found for step in one.leaves if isinstance(step, Outlast)]
    assert {step.what for step in steps} == {"value", "gradient", "call"}
    assert {step.by for step in steps} == {"async", "timeout"}
    for one in found:
        assert not predict(one, FaultPlan()).known_bugs
