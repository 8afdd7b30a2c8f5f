"""Attribution of fired faults: exact where it can be, and said to be unknown where it cannot."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, FaultTable, MessageType
from rpcprops.oracle import FaultCount, account, fired, fired_by_type
from rpcprops.outcomes import ArmedFaults, Outcome, RankOutcome
from rpcprops.programs import Call, Drop, Fetch, Program, Remote, Share
from tests.seeded._ideal import ideal, with_step

DELETE = "RREF_USER_DELETE"
FORK = "RREF_FORK_REQUEST"
ACCEPT = "RREF_CHILD_ACCEPT"
CLEANUP = "CLEANUP_AUTOGRAD_CONTEXT_REQ"
CALL = "PYTHON_CALL"
FETCH = "PYTHON_RREF_FETCH_CALL"
REMOTE = "PYTHON_REMOTE_CALL"

#: Rank 0 sends a create, a call, a fetch and a delete; rank 2 a fork request and an accept, and a
#: delete with the payload of the request. Rank 1, the owner, sends nothing.
PROGRAM = Program(
    3, (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Fetch(0, "a"), Drop(0, "a"), Drop(2, "b"))
)


def outcome(
    failed: tuple[int, ...] = (0, 0, 0),
    delayed: tuple[Mapping[int, int] | None, ...] = (None, None, None),
) -> Outcome:
    """An outcome of which only the signs of faults matter."""
    ranks = tuple(
        RankOutcome(rank, f"worker{rank}", failed_sends=sends, delayed_sends=held)
        for rank, (sends, held) in enumerate(zip(failed, delayed, strict=True))
    )
    return Outcome(len(ranks), ranks=ranks)


def at(rank: int, table: FaultTable) -> FaultPlan:
    """A plan with faults at one rank."""
    return FaultPlan(by_rank={rank: table})


@pytest.mark.parametrize("seen", [0, 1, 3, 7])
def test_one_armed_type_gets_every_failure(seen: int) -> None:
    """With one type armed, every failed send is of it, whether or not the count is as predicted."""
    plan = at(2, FaultTable([FORK], 3))
    counts = account(PROGRAM, plan, outcome((0, 0, seen)))
    assert counts == (FaultCount(2, "failure", FORK, 3, seen),)


def test_counts_that_add_up_are_told_apart() -> None:
    """With several types armed, failures are given to them when the total is what is predicted.

    Rank 2 fails its fork request and its accept twice each; its delete has no failures left.
    """
    plan = at(2, FaultTable([FORK, DELETE, ACCEPT], 2))
    assert account(PROGRAM, plan, outcome((0, 0, 4))) == (
        FaultCount(2, "failure", ACCEPT, 2, 2),
        FaultCount(2, "failure", FORK, 2, 2),
        FaultCount(2, "failure", DELETE, 0, 0),
    )


@pytest.mark.parametrize("seen", [0, 3, 5])
def test_counts_that_do_not_add_up_are_unattributed(seen: int) -> None:
    """With several types armed and another total, no type is credited with what it may not own."""
    plan = at(2, FaultTable([FORK, DELETE, ACCEPT], 2))
    counts = account(PROGRAM, plan, outcome((0, 0, seen)))
    assert counts == (FaultCount(2, "failure", "", 4, seen, "unattributed"),)


def test_without_a_program_nothing_is_known_of_what_could_strike() -> None:
    """A user's own code has no prediction: one armed type is still exact, several are not."""
    one = account(None, at(0, FaultTable([DELETE], 2)), outcome((5, 0, 0)))
    assert one == (FaultCount(0, "failure", DELETE, None, 5),)
    several = account(None, at(0, FaultTable(RETRYABLE_MESSAGE_TYPES, 2)), outcome((5, 0, 0)))
    assert several == (FaultCount(0, "failure", "", None, 5, "unattributed"),)


def test_a_program_without_messages_of_an_armed_type_could_fail_nothing() -> None:
    """An armed type that the program never sends could not strike, and that shows as zero."""
    counts = account(PROGRAM, at(0, FaultTable([CLEANUP], 3)), outcome())
    assert counts == (FaultCount(0, "failure", CLEANUP, 0, 0),)


def test_ranks_without_faults_are_left_out() -> None:
    """A plan that arms nothing asks for nothing, and nothing is accounted for."""
    plans = (FaultPlan(), FaultPlan(FaultTable([DELETE], 0)), FaultPlan(FaultTable((), 3)))
    for plan in plans:
        assert account(PROGRAM, plan, outcome()) == ()


def test_types_that_torch_does_not_retry_leave_no_line() -> None:
    """The log line comes from the retries: it is not credited to a type that is never sent again.

    Without a program nobody knows whether such a type struck, and that is not zero.
    """
    lost = FaultCount(0, "failure", CALL, None, None, "inferred")
    assert account(None, at(0, FaultTable([CALL], 1)), outcome((1, 0, 0))) == (lost,)
    both = account(None, at(0, FaultTable([CALL, DELETE], 1)), outcome((1, 0, 0)))
    assert both == (FaultCount(0, "failure", DELETE, None, 1), lost)


def test_a_lost_call_shows_at_its_caller() -> None:
    """A step that raised the injected failure is the sign of it; a step that did not is none."""
    program, plan = Program(2, (Call(0, 1),)), at(0, FaultTable([CALL], 1))
    seen = account(program, plan, ideal(program, plan))
    assert seen == (FaultCount(0, "failure", CALL, 1, 1, "inferred"),)
    other = with_step(ideal(program, plan), 0, value=[3.0], error=None)
    assert account(program, plan, other) == (FaultCount(0, "failure", CALL, 1, None, "inferred"),)


def test_each_rank_is_accounted_by_its_own_table() -> None:
    """Two faulty ranks are two entries, in the order of ranks, each with its own signs."""
    plan = FaultPlan(by_rank={2: FaultTable([ACCEPT], 1), 0: FaultTable([DELETE], 4)})
    assert account(PROGRAM, plan, outcome((4, 0, 1))) == (
        FaultCount(0, "failure", DELETE, 4, 4),
        FaultCount(2, "failure", ACCEPT, 1, 1),
    )


def test_delays_of_different_lengths_are_told_apart() -> None:
    """The clock library counts by length, so each length that is one type's is that type's."""
    plan = at(0, FaultTable(messages_to_delay={FETCH: 1.5, REMOTE: 0.25}))
    assert account(PROGRAM, plan, outcome(delayed=({1500: 2, 250: 1}, {}, {}))) == (
        FaultCount(0, "delay", REMOTE, 1, 1),
        FaultCount(0, "delay", FETCH, 1, 2),
    )


def test_delays_of_one_length_are_told_apart_when_they_add_up() -> None:
    """Types that share a length are told apart when the total is what is predicted."""
    plan = at(0, FaultTable(messages_to_delay={FETCH: 1.5, REMOTE: 1.5}))
    assert account(PROGRAM, plan, outcome(delayed=({1500: 2}, {}, {}))) == (
        FaultCount(0, "delay", REMOTE, 1, 1),
        FaultCount(0, "delay", FETCH, 1, 1),
    )


def test_delays_of_one_length_that_do_not_add_up_are_unattributed() -> None:
    """Three delays of a length where two types could have one each are nobody's."""
    plan = at(0, FaultTable(messages_to_delay={FETCH: 1.5, REMOTE: 1.5}))
    assert account(PROGRAM, plan, outcome(delayed=({1500: 3}, {}, {}))) == (
        FaultCount(0, "delay", "", 2, 3, "unattributed"),
    )
    assert account(None, plan, outcome(delayed=({1500: 2}, {}, {}))) == (
        FaultCount(0, "delay", "", None, 2, "unattributed"),
    )


def test_delays_that_nobody_could_see_are_not_zero() -> None:
    """Without the clock library a delay's count is unknown, and says so."""
    plan = at(0, FaultTable(messages_to_delay={FETCH: 1.5}))
    assert account(PROGRAM, plan, outcome()) == (FaultCount(0, "delay", FETCH, 1, None),)
    seen = account(PROGRAM, plan, outcome(delayed=({}, {}, {})))
    assert seen == (FaultCount(0, "delay", FETCH, 1, 0),)


def test_delays_below_a_millisecond_are_none() -> None:
    """The agent cuts a delay to whole milliseconds, so nothing is asked for below one."""
    plan = at(0, FaultTable(messages_to_delay={FETCH: 0.0009}))
    assert account(PROGRAM, plan, outcome()) == ()


def test_failures_and_delays_of_one_rank_come_together() -> None:
    """A table that does both is accounted for in both ways."""
    plan = at(0, FaultTable([DELETE], 2, {DELETE: 0.5}))
    assert account(PROGRAM, plan, outcome((2, 0, 0), ({500: 1}, {}, {}))) == (
        FaultCount(0, "failure", DELETE, 2, 2),
        FaultCount(0, "delay", DELETE, 1, 1),
    )


def test_ranks_beyond_the_program_are_idle_but_asked() -> None:
    """In a larger world a faulty idle rank is accounted for, and predicted to send nothing."""
    program = Program(2, (Remote(0, 1, "a"), Drop(0, "a")))
    plan = FaultPlan(FaultTable([DELETE], 2))
    assert account(program, plan, outcome((2, 0, 0))) == (
        FaultCount(0, "failure", DELETE, 2, 2),
        FaultCount(1, "failure", DELETE, 0, 0),
        FaultCount(2, "failure", DELETE, 0, 0),
    )


def test_totals_leave_out_what_did_not_fire() -> None:
    """Sums are by kind and type over all ranks, in a fixed order, without zeros and unknowns."""
    counts = (
        FaultCount(0, "failure", DELETE, 4, 2),
        FaultCount(1, "failure", DELETE, 4, 1),
        FaultCount(1, "delay", DELETE, 1, 1),
        FaultCount(2, "failure", "", 4, 5, "unattributed"),
        FaultCount(2, "failure", FORK, 4, 0),
        FaultCount(2, "delay", CALL, 4, None),
    )
    assert list(fired_by_type(counts).items()) == [
        (f"delay {DELETE}", 1),
        (f"failure {DELETE}", 3),
        ("failure unattributed", 5),
    ]
    assert fired(counts) == 9
    assert fired(()) == 0
    assert fired_by_type(()) == {}


def test_every_type_can_be_accounted_for() -> None:
    """No message type is unknown to the account, failing or late."""
    for kind in MessageType:
        counts = account(None, at(0, FaultTable([kind], 1, {kind: 1.0})), outcome((1, 0, 0)))
        kinds = [(count.kind, count.message) for count in counts]
        assert kinds == [("failure", kind), ("delay", kind)]
        assert counts[0].fired == (1 if kind.is_retryable else None)


def test_counts_by_type_tell_every_fault_apart() -> None:
    """Where sends are counted by type, so is each fault, lost calls too, whatever is predicted."""
    rank = RankOutcome(
        2,
        "worker2",
        failed_sends=5,
        failed_by_type={FORK: 3, DELETE: 2, CALL: 1},
        delayed_by_type={FETCH: 4},
    )
    plan = at(2, FaultTable([FORK, DELETE, CALL], 3, {FETCH: 0.5, REMOTE: 0.5}))
    counts = account(None, plan, Outcome(1, ranks=(rank,)))
    assert {(c.kind, c.message): c.fired for c in counts} == {
        ("failure", FORK): 3,
        ("failure", DELETE): 2,
        ("failure", CALL): 1,
        ("delay", FETCH): 4,
        ("delay", REMOTE): 0,
    }
    assert {c.attribution for c in counts} == {"exact"}


def test_counts_of_a_rank_that_died_are_not_taken_for_complete() -> None:
    """If the log of a rank that died shows more failures than its last look, the log counts."""
    died = RankOutcome(0, "worker0", signal=11, failed_sends=3, failed_by_type={DELETE: 2})
    (count,) = account(None, at(0, FaultTable([DELETE], 3)), Outcome(1, ranks=(died,)))
    assert count.fired == 3


def test_what_was_armed_for_a_part_is_accounted_for_by_itself() -> None:
    """A part has what its own table did, and the cluster's table the rest."""
    rank = RankOutcome(0, "worker0", failed_by_type={CALL: 5}, delayed_by_type={})
    table = FaultTable([CALL], 3)
    armed = ArmedFaults(FaultPlan(table), 0.0, 1.0, ({CALL: 3},), ({},))
    never_looked = ArmedFaults(FaultPlan(table), 2.0)
    seen = Outcome(1, ranks=(rank,), armed=(armed, never_looked))
    counts = account(None, at(0, FaultTable([CALL], 2)), seen)
    assert [(c.part, c.fired) for c in counts] == [(0, 2), (1, 3), (2, 0)]
    assert fired_by_type(counts) == {"failure PYTHON_CALL": 5}
