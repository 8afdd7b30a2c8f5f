"""Handles whose creation is late or has timed out: what uses of them show, and which are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TypeVar

import pytest

from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import Prediction, predict
from rpcprops.programs import (
    Call,
    Drop,
    Fetch,
    Local,
    Program,
    Remote,
    Settle,
    Share,
    Step,
    Through,
)
from rpcprops.strategies.drawing import StepDrawer
from rpcprops.torch_facts import NEWEST

SLOW = Remote(0, 1, "a", seconds=2.0)
LATE = Remote(0, 1, "a", timeout=3.0, seconds=12.0)
CALL = MessageType.PYTHON_CALL
PLAN = FaultPlan(FaultTable([MessageType.RREF_USER_DELETE], 2))
T = TypeVar("T")


def all_of(*steps: Step, plan: FaultPlan | None = None) -> tuple[Prediction, ...]:
    """Every prediction of a program of three ranks."""
    first = predict(Program(3, steps), plan or FaultPlan())
    return (first, *first.alternatives)


def errors(*steps: Step, plan: FaultPlan | None = None) -> set[tuple[str, ...]]:
    """How the steps after the first may end."""
    found = all_of(*steps, plan=plan)
    return {tuple(step.error for step in one.steps[1:]) for one in found}


def test_a_call_through_a_handle_waits_for_its_value() -> None:
    """So the value is made after it, also as far as the owner's early handle goes."""
    (seen,) = all_of(SLOW, Through(0, "a"), Share(0, "a", 1, "b"), Share(0, "a", 2, "c"))
    assert seen.steps[1].value == [4.0]
    assert not seen.known_bugs
    (seen,) = all_of(SLOW, Through(0, "a"), Share(0, "a", 1, "b"), Share(0, "a", 2, "c"))
    assert not seen.known_bugs


def test_what_is_sent_on_comes_or_is_refused() -> None:
    """torch refuses to send an RRef once it knows that the creation timed out, and not before."""
    steps = (LATE, Share(0, "a", 2, "c"), Settle(), Fetch(2, "c"), Fetch(0, "a"))
    assert errors(*steps) == {
        ("", "", "", "creation"),
        ("creation", "", "missing", "creation"),
    }
    held = {tuple(c.forks for c in one.steps[2].counters) for one in all_of(*steps)}
    assert held == {(0, 2, 0), (0, 1, 0)}


def test_an_error_that_an_rref_keeps_instead_of_its_type_comes_first() -> None:
    """The owner answers with what the function raised, whatever torch knows of the creation."""
    late = Remote(0, 1, "a", raises=True, timeout=3.0, seconds=12.0)
    steps = (late, Through(0, "a"), Fetch(0, "a"), Through(0, "a"))
    assert errors(*steps) == {
        ("remote", "creation", "remote"),
        ("remote",) * 3,
        ("creation",) * 3,
    }
    assert errors(late, Settle(), Through(0, "a")) == {("", "creation")}


def test_a_call_that_takes_one_as_its_argument_gets_the_value_or_is_refused() -> None:
    """The owner gives the value once it is made; by then torch knows of the timeout."""
    steps = (LATE, Call(0, 2, right="a"), Call(0, 2, right="a"), Share(0, "a", 1, "b"), Settle())
    assert errors(*steps) == {("", *("creation",) * 2, ""), (*("creation",) * 3, "")}
    (first, *_) = all_of(*steps)
    assert first.steps[1].value == [4.0]
    assert {sum(send.message is CALL for send in one.sends) for one in all_of(*steps)} == {0, 1}
    raised = errors(LATE, Call(0, 2, right="a", raises=True), Settle())
    assert raised == {("remote", ""), ("creation", "")}


def test_a_call_through_one_that_timed_out_is_refused_in_any_case() -> None:
    """The question for the type waits for the value; by then torch knows of the timeout."""
    steps = (LATE, Through(0, "a"), Through(0, "a"), Settle())
    assert errors(*steps) == {("creation", "creation", "")}
    asked = {sum(send.message is CALL for send in one.sends) for one in all_of(*steps)}
    assert asked == {0, 1}
    assert not any(one.certain for one in all_of(*steps))
    assert [one.unmarked_uses for one in all_of(*steps)] == [0, 0]
    delayed = FaultPlan(FaultTable(messages_to_delay={MessageType.PYTHON_REMOTE_CALL: 9.0}))
    (known,) = all_of(Remote(0, 1, "a", timeout=3.0), Through(0, "a"), plan=delayed)
    assert known.steps[1].error == "creation"
    assert known.certain


def test_one_that_timed_out_is_safely_dropped_once_its_value_is_there() -> None:
    """Only a delete that may overtake the creation meets the finding."""
    assert {one.known_bugs for one in all_of(LATE, Drop(0, "a"))} == {
        frozenset({"timed-out-remote-dropped"})
    }
    fetched = all_of(LATE, Share(0, "a", 2, "c"), Fetch(2, "c"), Drop(0, "a"))
    met = {one.steps[1].error: "timed-out-remote-dropped" in one.known_bugs for one in fetched}
    assert met == {"": False, "creation": True}


@pytest.mark.parametrize(
    ("steps", "meets"),
    [
        ((Share(0, "a", 1, "b"), Share(0, "a", 2, "c"), Drop(2, "c")), True),
        ((Share(0, "a", 2, "c"), Drop(2, "c"), Share(0, "a", 1, "b")), True),
        ((Call(0, 2, right="a", raises=True), Share(0, "a", 1, "b")), True),
        ((Share(0, "a", 2, "c"), Drop(2, "c"), Through(0, "a")), True),
        ((Share(0, "a", 2, "c"), Drop(2, "c"), Settle(), Share(0, "a", 1, "b")), False),
        ((Share(0, "a", 1, "b"), Drop(0, "a")), False),
        ((Share(0, "a", 1, "b"), Local(1, "b"), Share(0, "a", 2, "c"), Drop(2, "c")), False),
    ],
)
def test_an_owner_with_an_early_handle_forgets_what_nobody_else_holds(
    steps: tuple[Step, ...], meets: bool
) -> None:
    """The delete may come before the early handle or after it, but not after the value."""
    (seen,) = all_of(SLOW, *steps)
    assert ("early-owner-fork" in seen.known_bugs) == meets


@pytest.mark.parametrize(
    ("steps", "settles", "meets"),
    [
        ((Remote(0, 1, "b", right="a"),), False, True),
        ((Remote(0, 1, "b", right="a"),), True, False),
        ((Remote(0, 1, "b", right="a"), Fetch(0, "b")), False, False),
        ((Remote(0, 2, "b", right="a"),), False, False),
        ((Share(0, "a", 1, "b"),), False, False),
    ],
)
def test_a_shutdown_forgets_what_a_function_waits_for(
    steps: tuple[Step, ...], *, settles: bool, meets: bool
) -> None:
    """A function at the owner that got the RRef before its value waits for ever."""
    program = Program(3, (Remote(0, 1, "a", seconds=12.0), *steps), settles=settles)
    assert ("early-owner-fork" in predict(program, FaultPlan()).known_bugs) == meets


def uses(program: Program) -> Iterator[tuple[str, Remote, Step]]:
    """Uses of handles before their values are surely made: of which sort, how made, by what."""
    making: dict[str, tuple[str, Remote]] = {}
    for leaf in program.leaves:
        handle = getattr(leaf, "right" if isinstance(leaf, Call) else "handle", "")
        if isinstance(leaf, Settle):
            making.clear()
        elif isinstance(leaf, Remote) and leaf.seconds and leaf.at != leaf.to:
            late = leaf.seconds > (leaf.timeout or leaf.seconds)
            making[leaf.out] = ("late" if late else "slow", leaf)
        elif handle in making:
            yield (*making[handle], leaf)


class Chance(StepDrawer):
    """A drawer that does without Hypothesis, so that a thousand programs are drawn at once."""

    chance: Random

    def pick(self, options: Sequence[T], weights: tuple[float, ...] = ()) -> T:
        """One of some options."""
        return self.chance.choices(options, weights)[0] if weights else self.chance.choice(options)


def drawn(number: int) -> list[Program]:
    """Programs that make an RRef and use it, as they are drawn for a plan of retried deletes."""
    chance = Random(0)
    found: list[Program] = []
    while len(found) < number:
        drawer = Chance(lambda _: 0, 3, plan=PLAN)
        drawer.chance = chance
        drawer.add_kind("remote")
        (made,) = drawer.steps
        if isinstance(made, Remote) and made.seconds and made.at != made.to:
            for _ in range(4):
                drawer.add_kind(
                    chance.choice(("share", "share", "through", "fetch", "drop", "call"))
                )
            found.append(Program(3, tuple(drawer.steps)))
    return found


def test_uses_of_what_is_still_being_made_are_drawn() -> None:
    """Shares with its owner, calls through it, and drops of what timed out if its value came.

    None of them meets a finding of this torch, if it does what the first prediction says.
    """
    found = drawn(150)
    seen = {
        (sort, type(use), isinstance(use, Share) and use.to == made.to)
        for program in found
        for sort, made, use in uses(program)
    }
    for sort in ("slow", "late"):
        assert seen >= {(sort, Share, True), (sort, Share, False), (sort, Through, False)}
    assert ("late", Drop, False) in seen
    assert ("late", Call, False) in seen
    assert NEWEST.has_bug("timed-out-remote-dropped")
    assert NEWEST.has_bug("early-owner-fork")
    for program in found:
        assert not predict(program, PLAN).known_bugs - {"second-failed-remote"}
