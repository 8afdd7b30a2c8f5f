"""Backward passes that fail at two ranks: what they show, what is left, and what is drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import predict, set_apart
from rpcprops.outcomes import Violation
from rpcprops.programs import Call, Context, FailTwice, Program
from rpcprops.strategies import programs
from rpcprops.torch_facts import UNKNOWN
from tests._draws import draws
from tests.seeded._ideal import ideal

PROGRAM = Program(3, (FailTwice(0, 1, 2, "x"), Call(0, 1)))
MENDED = UNKNOWN.as_if_mended()
#: What a rank writes whose fork request was sent six times in vain.
GAVE_UP = (
    "terminate called after throwing an instance of 'c10::Error'\n"
    "  what():  The RPC has not succeeded after the specified number of max retries (5).\n"
)


def test_it_raises_and_leaves_nothing_behind() -> None:
    """The loss is 2x from each rank; both are told to clean up, and the finding is marked."""
    seen = predict(PROGRAM, FaultPlan())
    assert seen.steps[0].value == {"loss": 12.0, "broke": True}
    assert [(send.rank, send.to) for send in seen.sends[:2]] == [(0, 1), (0, 2)]
    assert [calls.get("step0", 0) for calls in seen.calls] == [0, 1, 1]
    assert all(counters.contexts == 0 for counters in seen.counters)
    assert seen.known_bugs == {"freed-context-used"}
    assert predict(PROGRAM, FaultPlan(), MENDED).known_bugs == frozenset()


def test_a_lost_cleanup_leaves_the_context_where_it_was_to_come() -> None:
    """The failure of the pass changes nothing of that."""
    lost = FaultPlan(by_rank={0: FaultTable([MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ], 42)})
    seen = predict(PROGRAM, lost)
    assert [counters.contexts for counters in seen.counters] == [0, 1, 1]


@pytest.mark.parametrize(
    ("rank", "step", "promise", "explained"),
    [
        (0, None, "RankDied", True),
        (1, None, "RankDied", False),
        (0, 0, "UnexpectedError", False),
        (0, None, "ContextLeak", False),
    ],
)
def test_it_explains_the_death_of_its_rank_in_that_step(
    rank: int, step: int | None, promise: str, explained: bool
) -> None:
    """Nothing else, and no other rank."""
    program = Program(3, PROGRAM.steps[:1])
    met = predict(program, FaultPlan()).met
    wrong = Violation(promise, "worker0 died before its time: killed by SIGABRT", rank, step)
    names, left = set_apart(program, met, ideal(program, FaultPlan()), [wrong])
    assert (names, left) == ((("freed-context-used",), ()) if explained else ((), (wrong,)))


@pytest.mark.parametrize(("before", "explained"), [(False, True), (True, False)])
def test_its_rank_may_die_in_a_later_step(*, before: bool, explained: bool) -> None:
    """A busy machine may use the freed memory only then; in an earlier step nothing was freed."""
    failing, call = PROGRAM.steps
    program = Program(3, (call, failing, call) if before else (failing, call, call))
    outcome = ideal(program, FaultPlan())
    cut = replace(outcome, steps=outcome.steps[: 1 if before else 2])
    wrong = Violation("RankDied", "worker0 died before its time: killed by SIGABRT", 0)
    names, left = set_apart(program, predict(program, FaultPlan()).met, cut, [wrong])
    assert (names, left) == ((("freed-context-used",), ()) if explained else ((), (wrong,)))


def test_a_pass_that_is_never_answered_meets_it_as_well() -> None:
    """Its gradient fails by a timeout, or by the shutdown, so a rank of it may die later."""
    program = Program(3, (Context(0, "x", (1, 0), nested=True, breaks=0), Call(0, 1)))
    met = predict(program, FaultPlan()).met
    for rank, how, explained in ((0, "ABRT", True), (2, "ABRT", False), (0, "KILL", False)):
        died = f"worker{rank} died before its time: killed by SIG{how}"
        wrong = Violation("RankDied", died, rank)
        names, left = set_apart(program, met, ideal(program, FaultPlan()), [wrong])
        assert (names, left) == ((("freed-context-used",), ()) if explained else ((), (wrong,)))


@pytest.mark.parametrize(
    ("promise", "rank", "message", "explained"),
    [
        ("CallLeak", 0, "worker0 holds 1 client call; expected nothing", True),
        ("CallLeak", 0, "worker0 holds 2 client calls; expected nothing", False),
        ("CallLeak", 1, "worker1 holds 1 client call; expected nothing", False),
        ("CallLeak", 0, "worker0 holds 1 server call; expected nothing", False),
        ("RankHung", 1, "worker1 hung (phase shutdown, step -)", True),
        ("RankHung", 1, "worker1 hung (phase steps, step 1)", False),
    ],
)
def test_a_lock_that_raises_leaves_the_call_counted(
    promise: str, rank: int, message: str, explained: bool
) -> None:
    """Torch counts a call as ended after its callbacks, and a shutdown waits for calls."""
    program = Program(3, PROGRAM.steps[:1])
    met = predict(program, FaultPlan()).met
    wrong = Violation(promise, message, rank)
    names, left = set_apart(program, met, ideal(program, FaultPlan()), [wrong])
    assert (names, left) == ((("freed-context-used",), ()) if explained else ((), (wrong,)))


@pytest.mark.parametrize(
    ("log", "first_died", "explained"),
    [
        (GAVE_UP, True, True),
        (GAVE_UP, False, False),
        ("terminate called without an active exception", True, False),
    ],
)
def test_a_rank_that_cannot_reach_a_dead_one_dies_of_its_fork_request(
    log: str, first_died: bool, explained: bool
) -> None:
    """Its log says so; without another death that a finding explains, a fault must have done it."""
    program = Program(3, PROGRAM.steps[:1])
    outcome = ideal(program, FaultPlan())
    ranks = [replace(rank, log=log if rank.rank == 2 else "") for rank in outcome.ranks]
    outcome = replace(outcome, ranks=tuple(ranks))
    dead = [
        Violation("RankDied", f"worker{rank} died before its time: killed by SIGABRT", rank)
        for rank in ((0, 2) if first_died else (2,))
    ]
    names, left = set_apart(program, predict(program, FaultPlan()).met, outcome, dead)
    assert ("fork-request-given-up" in names) is explained
    assert left == (() if explained else (dead[-1],))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (FailTwice(0, 1, 1, "x"), "must be two ranks beside"),
        (FailTwice(0, 1, 0, "x"), "must be two ranks beside"),
        (FailTwice(0, 1, 2, "x", seconds=1.0), "must lie in 4 to 3600"),
    ],
)
def test_what_cannot_be_is_refused(step: FailTwice, message: str) -> None:
    """Three ranks take part, and there is time between the two errors."""
    with pytest.raises(UsageError, match=message):
        Program(3, (step,))


def test_it_is_drawn_for_a_torch_that_has_mended_it_only() -> None:
    """Where the finding is there, its rank would die; and two ranks are too few."""

    def steps(most: int, **facts: Any) -> list[FailTwice]:
        found = draws(programs(kinds=("fail_twice", "call"), max_world_size=most, **facts), 300)
        return [step for one in found for step in one.leaves if isinstance(step, FailTwice)]

    assert not steps(3)
    assert not steps(2, facts=MENDED)
    drawn = steps(3, facts=MENDED)
    assert {(step.at, step.to, step.then) for step in drawn} >= {(0, 1, 2), (1, 0, 2), (2, 1, 0)}
