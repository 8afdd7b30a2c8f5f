"""Attribution of fired faults: exact where it can be, and said to be unknown where it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from rpcprops.errors import HarnessError
from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, FaultTable, MessageType
from rpcprops.oracle import FaultCount, account, fired, fired_by_type
from rpcprops.outcomes import (
    ArmedFaults,
    Counters,
    Outcome,
    RankOutcome,
    SentMessage,
    Violation,
)
from rpcprops.programs import Call, Drop, Fetch, Program, Remote, Share
from rpcprops.properties import accounted
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


# Where the agent records all messages.


def recorded(*messages: SentMessage, **others: Any) -> Outcome:
    """An outcome of three ranks of the agent WIRE; rank 2 was killed before it was asked."""
    ranks = (
        RankOutcome(0, "worker0", killed=True),
        RankOutcome(1, "worker1", killed=True),
        RankOutcome(2, "worker2", signal=6, failed_sends=1),
    )
    return Outcome(3, ranks=ranks, agent="WIRE", messages=messages, **others)


def failed(kind: str, rank: int = 2, part: int = 0) -> SentMessage:
    """A send that a table failed."""
    return SentMessage(
        0.0, rank, 1, 1, kind, is_request=True, failed_by_table=True, table_part=part
    )


def late(kind: str, seconds: float | None, rank: int = 2, **others: Any) -> SentMessage:
    """A send that a table held up."""
    one = SentMessage(0.0, rank, 1, 1, kind, is_request=True, delayed_by_table=True, **others)
    return replace(one, table_part=one.table_part or 0, table_delay=seconds)


def sent(kind: str, rank: int = 2) -> SentMessage:
    """A send that no table touched."""
    return SentMessage(0.0, rank, 1, 1, kind, is_request=True)


def with_rank_2(outcome: Outcome, **changes: Any) -> Outcome:
    """The outcome, where its last rank showed something else."""
    *others, last = outcome.ranks
    return replace(outcome, ranks=(*others, replace(last, **changes)))


def test_the_record_tells_the_types_of_a_dead_rank_apart() -> None:
    """Both types of a table are known by the record, whatever the log and the prediction say."""
    plan = at(2, FaultTable([FORK, ACCEPT], 6))
    outcome = recorded(*[failed(FORK)] * 6, failed(FORK, rank=0), sent(ACCEPT))
    for program, could in ((PROGRAM, 6), (None, None)):
        assert account(program, plan, outcome) == (
            FaultCount(2, "failure", ACCEPT, could, 0, "recorded"),
            FaultCount(2, "failure", FORK, could, 6, "recorded"),
        )


def test_the_record_shows_the_delays_of_a_dead_rank() -> None:
    """Those of one length too, but not those of a shutdown, which nobody predicts."""
    plan = at(2, FaultTable(messages_to_delay={FETCH: 1.5, CALL: 1.5}))
    outcome = recorded(
        late(FETCH, 1.5), late(CALL, 1.5, marks=("leaving",)), late(FETCH, 1.5), sent(CALL)
    )
    assert account(None, plan, outcome) == (
        FaultCount(2, "delay", CALL, None, 0, "recorded"),
        FaultCount(2, "delay", FETCH, None, 2, "recorded"),
    )


def test_nothing_is_inferred_where_there_is_a_record() -> None:
    """A lost call is counted by the record, also where its step raised what was predicted."""
    program, plan = Program(2, (Call(0, 1),)), at(0, FaultTable([CALL], 1, {CALL: 0.5}))
    for messages in ((), (sent(CALL, rank=0),), (failed(CALL, rank=0),)):
        outcome = replace(ideal(program, plan), agent="WIRE", messages=messages)
        outcome = replace(
            outcome,
            ranks=tuple(
                replace(rank, failed_by_type=None, delayed_by_type=None, delayed_sends=None)
                for rank in outcome.ranks
            ),
        )
        fired_now = int(any(one.failed_by_table for one in messages))
        assert account(program, plan, outcome) == (
            FaultCount(0, "failure", CALL, 1, fired_now, "recorded"),
            FaultCount(0, "delay", CALL, 0, 0, "recorded"),
        )


def test_a_record_that_is_not_whole_does_not_count() -> None:
    """If messages had no room, and where no agent records them, all is as without a record."""
    plan = at(2, FaultTable([FORK, ACCEPT], 6))
    unknown = (FaultCount(2, "failure", "", None, 1, "unattributed"),)
    full = recorded(failed(FORK), messages_dropped=1)
    assert not full.is_recorded
    assert account(None, plan, full) == unknown
    assert account(None, plan, replace(recorded(), agent="")) == unknown


def test_the_record_tells_parts_of_a_run_apart() -> None:
    """Each message names the table that acted, so the parts of a rank that died are known."""
    table = FaultTable([CALL], 1)
    armed = (ArmedFaults(at(2, table), 0.0, 1.0), ArmedFaults(at(2, table), 1.0))
    outcome = recorded(failed(CALL), *[failed(CALL, part=2)] * 3, armed=armed)
    counts = account(None, at(2, table), outcome)
    assert [(one.part, one.fired, one.attribution) for one in counts] == [
        (0, 1, "recorded"),
        (1, 0, "recorded"),
        (2, 3, "recorded"),
    ]


def test_what_a_dead_rank_had_counted_may_be_less() -> None:
    """It went on after its last look, and the record is right."""
    plan = at(2, FaultTable([FORK], 6, {FORK: 0.5}))
    outcome = recorded(*[failed(FORK)] * 6, late(FORK, 0.5))
    seen = with_rank_2(outcome, failed_by_type={FORK: 4}, delayed_by_type={})
    assert [one.fired for one in account(None, plan, seen)] == [6, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"failed_by_type": {FORK: 3}},
        {"delayed_by_type": {FORK: 2}},
        {
            "failed_by_type": {FORK: 1},
            "signal": 0,
            "exit_code": 0,
            "counters_after_shutdown": Counters(),
        },
    ],
    ids=["more failures", "more delays", "fewer failures of a rank that has ended"],
)
def test_counts_that_contradict_the_record_are_an_error_of_ours(changes: dict[str, Any]) -> None:
    """Nobody chooses between the two: one of them is wrong, and both are ours."""
    plan = at(2, FaultTable([FORK], 6, {FORK: 0.5}))
    outcome = recorded(failed(FORK), failed(FORK), late(FORK, 0.5))
    with pytest.raises(HarnessError, match=r"worker2 has counted [123] firings .* shows [12]\."):
        account(None, plan, with_rank_2(outcome, **changes))


def test_such_an_error_says_what_the_run_broke() -> None:
    """An error of ours must not hide that torch may be at fault as well."""
    plan = at(2, FaultTable([FORK], 6))
    outcome = with_rank_2(recorded(failed(FORK)), failed_by_type={FORK: 3})
    broken = Violation("RRefLeak", "worker2 owns 1 RRef", 2)
    with pytest.raises(HarnessError, match="worker2 has counted 3 firings") as caught:
        accounted(None, plan, outcome, [broken])
    (note,) = caught.value.__notes__
    assert note.endswith("this was shown, and may be right: RRefLeak (rank 2): worker2 owns 1 RRef")


def test_the_same_holds_for_a_part_of_a_run() -> None:
    """What a part has failed by its rank's count is in the record, under its number."""
    armed = ArmedFaults(at(2, FaultTable([CALL], 1)), 0.0, 1.0, ({}, {}, {CALL: 1}), ({}, {}, {}))
    right, wrong = (recorded(failed(CALL, part=part), armed=(armed,)) for part in (1, 0))
    assert account(None, FaultPlan(), with_rank_2(right, failed_sends=0))[0].fired == 1
    with pytest.raises(HarnessError, match="worker2 has counted 1 firings of the fault '2:PYTHON"):
        account(None, FaultPlan(), with_rank_2(wrong, failed_sends=0))


def test_a_record_that_does_not_say_which_table_it_was_is_not_read() -> None:
    """As one that was written before records said it: what ranks have counted holds then."""
    plan = at(2, FaultTable([FORK], 1))
    (fault,) = plan.faults_at(2)
    assert fault.recorded(plan, recorded(failed(FORK))) == 1
    unsaid = recorded(replace(failed(FORK), table_part=None))
    assert fault.recorded(plan, unsaid) is None
    (count,) = account(None, plan, unsaid)
    assert (count.fired, count.attribution) == (1, "exact")
