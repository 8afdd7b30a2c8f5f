"""How a program ends: what is refused, what the oracle says of it, and what is drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rpcprops import agents
from rpcprops.errors import UsageError
from rpcprops.faults import (
    CUT_OFF,
    FaultPlan,
    FaultTable,
    MessageFault,
    MessageType,
    WireMessageType,
)
from rpcprops.oracle import accepted, judge, predict, set_apart
from rpcprops.outcomes import Counters, Violation
from rpcprops.programs import (
    After,
    Call,
    Carry,
    Chain,
    Context,
    Default,
    Drop,
    End,
    Fetch,
    Gather,
    Graph,
    Invoke,
    Member,
    Method,
    Nest,
    Onward,
    Optimize,
    Own,
    Program,
    Raising,
    Remote,
    Settle,
    Share,
    Step,
    Through,
    Wait,
)
from rpcprops.programs._end import SHUTDOWNS
from rpcprops.properties import Case
from rpcprops.properties._sample import real_waits
from rpcprops.strategies import programs
from tests._draws import draws
from tests.seeded._ideal import LEAKED, OWNER_WAITED, ideal, with_rank

#: The agent that holds messages back.
AGENT = Path(agents.__file__).with_name("wire") / "_agent.cpp"
HOLDS = Program(3, (Remote(0, 1, "a"), Fetch(0, "a"), Share(0, "a", 2, "b")))
AT_ONCE = replace(HOLDS, end=End("at once"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"how": "never"}, "how='never'"),
        ({"how": None}, "how=None"),
        ({"waits": (-1.0,)}, "must be a tuple of virtual seconds"),
        ({"waits": (1001.0,)}, "must be a tuple of virtual seconds"),
        ({"waits": (True,)}, "must be a tuple of virtual seconds"),
        ({"waits": 3.0}, "must be a tuple of virtual seconds"),
        ({"waits": (0.0,) * 17}, "must be a tuple of virtual seconds"),
        ({"how": "timed out", "waits": (0.0, 91.0)}, "must be at most 90 where how='timed out'"),
    ],
)
def test_an_odd_end_is_refused(given: dict[str, Any], message: str) -> None:
    """The message names the value and what is right."""
    with pytest.raises(UsageError, match=message):
        End(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"end": "at once"}, "must be an End"),
        ({"end": End(waits=(0.0, 0.0, 1.0))}, "there are 2 ranks, and 3 waits"),
        (
            {"end": End("timed out"), "settles": False, "num_worker_threads": 3},
            "needs settles=True or num_worker_threads=None",
        ),
        (
            {"end": End("at once"), "settles": False, "num_worker_threads": 3},
            "needs settles=True: a shutdown that finds no free thread never ends",
        ),
        (
            {"end": End("at once"), "settles": False, "steps": (Member(0),)},
            "needs settles=True: who of a dynamic group has left",
        ),
    ],
)
def test_a_program_refuses_an_end_that_it_cannot_have(given: dict[str, Any], message: str) -> None:
    """It is refused when the program is made."""
    with pytest.raises(UsageError, match=message):
        Program(2, **given)


@pytest.mark.parametrize("how", SHUTDOWNS[:4])
def test_a_graceful_end_shows_what_it_always_did(how: Any) -> None:
    """A timeout, reached or not, a second call and ranks that come late change nothing."""
    plan = FaultPlan(FaultTable(["RREF_USER_DELETE"], 6))
    program = replace(HOLDS, end=End(how, (30.0,)))
    assert predict(program, plan) == predict(HOLDS, plan)


def test_an_end_at_once_reports_what_users_hold() -> None:
    """Nothing is deleted, and the owner reports the forks; that is documented, and counted."""
    predicted = predict(AT_ONCE, FaultPlan())
    assert not predicted.last_sends
    assert predicted.leaking == {1}
    outcome = ideal(AT_ONCE, FaultPlan())
    assert outcome.ranks[1].shutdown_error == LEAKED
    assert judge(AT_ONCE, None, outcome) == ()
    assert [(one.kind, one.rank) for one in accepted(AT_ONCE, FaultPlan(), outcome)] == [
        ("held-at-once", 1)
    ]
    silent = with_rank(outcome, 1, shutdown_error=None, exit_code=0)
    assert [v.promise for v in judge(AT_ONCE, None, silent)] == ["MissingError"]


def test_an_end_at_once_waits_for_nobody() -> None:
    """An owner that says that it has waited for deletes is a violation there."""
    outcome = ideal(AT_ONCE, FaultPlan())
    waited = with_rank(outcome, 1, log=OWNER_WAITED)
    assert [(v.promise, v.rank) for v in judge(AT_ONCE, None, waited)] == [("ErrorInLog", 1)]


def test_a_dropped_rref_is_no_leak_at_once() -> None:
    """The program settles before, so what nobody holds is gone."""
    program = replace(AT_ONCE, steps=(*HOLDS.steps, Drop(2, "b"), Drop(0, "a")))
    assert predict(program, FaultPlan()).leaking == set()


#: A value that rank 1 owned at the last settle; since then one that rank 2 makes, calls of which
#: nobody waits for one, and a context.
HASTY = Program(
    3,
    (
        Remote(0, 1, "a"),
        Settle(),
        Remote(0, 2, "b"),
        Call(0, 1, wait="later", out="f"),
        Call(0, 2),
        Context(0, "x", (1, 2)),
    ),
    settles=False,
    end=End("at once"),
)


def test_what_is_under_way_at_once_is_known_within_bounds() -> None:
    """Certain is what was known at the last settle, and what somebody has waited for."""
    predicted = predict(HASTY, FaultPlan())
    assert predicted.leaking == {1}
    assert predicted.may_leak == {2}
    # An RRef that rank 0 has made; at rank 2 that one, with its fork, and at each the context.
    assert predicted.most_left == (
        Counters(pending_users=1, backward_passes=1),
        Counters(owners=1, forks=1, backward_passes=1),
        Counters(owners=1, forks=1, backward_passes=1),
    )
    assert not predicted.last_sends
    assert [*map(sorted, predicted.abandoned_calls)] == [[], ["step3"], ["step2"]]
    assert predicted.contexts_left == (range(2),) * 3
    assert (0, 1, WireMessageType.PYTHON_REMOTE_CALL) not in predicted.may_lack
    assert predicted.may_lack[0, 1, WireMessageType.PYTHON_CALL] == 1
    assert judge(HASTY, None, ideal(HASTY, FaultPlan())) == ()


@pytest.mark.parametrize(
    ("rank", "call", "times", "promises"),
    [
        (1, "step3", 0, []),
        (1, "step3", 2, ["NotRunOnce"]),
        (2, "step2", 0, []),
        (2, "step4", 0, ["NotRunOnce"]),
        (1, "step0", 0, ["NotRunOnce"]),
    ],
)
def test_only_a_call_that_nobody_waited_for_may_not_run(
    rank: int, call: str, times: int, promises: list[str]
) -> None:
    """It is cut off by a shutdown, which is counted; no call runs twice."""
    outcome = ideal(HASTY, FaultPlan())
    calls = {**outcome.ranks[rank].calls, call: times}
    cut = with_rank(outcome, rank, calls=calls)
    assert [v.promise for v in judge(HASTY, None, cut)] == promises
    if not promises:
        assert ("cut-off-at-once", rank) in [
            (one.kind, one.rank) for one in accepted(HASTY, FaultPlan(), cut)
        ]


def test_a_fork_request_may_be_given_up_once_its_owner_has_left() -> None:
    """The rank that asks aborts then, and no other; not where all has settled before."""
    steps = (Remote(1, 0, "a"), Settle(), Remote(1, 1, "b", right="a"))
    hasty = Program(2, steps, settles=False, end=End("at once", waits=(0.0, 30.0)))
    name = "fork-request-given-up"
    met = [one for one in predict(hasty, FaultPlan()).met if one.finding == name]
    assert [one.rank for one in met] == [1]
    died = Violation("RankDied", "worker1 died in its shutdown: killed by SIGABRT", 1)
    aborted = with_rank(ideal(hasty, FaultPlan()), 1, log="terminate called after throwing")
    assert set_apart(hasty, met, aborted, [died]) == ((name,), ())
    for other in (Violation("RankDied", died.message, 0), Violation("RankHung", died.message, 1)):
        assert set_apart(hasty, met, aborted, [other]) == ((), (other,))
    settled = predict(replace(hasty, settles=True), FaultPlan()).met
    assert name not in {one.finding for one in settled}


def test_what_may_stay_at_once() -> None:
    """One context at each of its ranks, and RRefs where some may be; an owner must say so."""
    outcome = ideal(HASTY, FaultPlan())

    def left(rank: int, **held: int) -> list[str]:
        seen = with_rank(outcome, rank, counters_after_shutdown=Counters(**held))
        return [v.promise for v in judge(HASTY, None, seen)]

    assert left(2, contexts=1, owners=1, forks=1) == left(0, pending_users=1) == []
    assert left(2, contexts=2) == left(2, backward_passes=2) == ["ContextLeak"]
    assert left(0, owners=1, forks=1) == left(0, pending_users=2) == ["RRefLeak"]
    assert left(2, owners=2) == left(2, forks=2) == left(2, pending_futures=1) == ["RRefLeak"]
    silent = with_rank(outcome, 1, shutdown_error=None, exit_code=0)
    assert [v.promise for v in judge(HASTY, None, silent)] == ["MissingError"]


@pytest.mark.parametrize(
    ("step", "most"),
    [
        (Own(0, "a"), Counters()),
        (Remote(0, 0, "a"), Counters(owners=1, forks=1)),
        (Context(0, "x", (1,)), Counters(backward_passes=1)),
    ],
)
def test_an_rref_of_its_own_keeps_nothing_at_a_rank(step: Step, most: Counters) -> None:
    """Nobody counts it before a message carries it; a rank holds what something is under way of."""
    program = Program(2, (step,), settles=False, end=End("at once"))
    predicted = predict(program, FaultPlan())
    assert predicted.most_left[0] == most
    assert predicted.may_leak == ({0} if most.owners else set())
    for name in ("owners", "forks", "pending_users", "pending_futures", "backward_passes"):
        promise = "ContextLeak" if name == "backward_passes" else "RRefLeak"
        held = replace(most, **{name: getattr(most, name) + 1})
        seen = with_rank(ideal(program, FaultPlan()), 0, counters_after_shutdown=held)
        assert [v.promise for v in judge(program, None, seen)] == [promise]


def hasty(*steps: Step) -> Program:
    return Program(3, steps, settles=False, end=End("at once"))


#: Steps that give a value which their functions have made, by the calls of these at ranks 1 and 2.
WAITED_FOR = {
    "through": (hasty(Remote(0, 1, "a"), Through(0, "a")), {"step0"}),
    "raising": (hasty(Raising(0, 1), Raising(0, 1, how="remote")), {"step0", "step1"}),
    "invoke": (hasty(Invoke(0, 1), Invoke(0, 1, "method", how="proxy")), {"step0", "step1"}),
    "graph": (hasty(Graph(0, "x", ((0, "plain"),), (("add", (0, 0), 1, "sync"),))), {"step0"}),
    "carry": (hasty(Carry(0, 1), Carry(0, 1, way="remote")), {"step0", "step1"}),
    "default": (hasty(Default(0, 1)), {"step0"}),
    "optimize": (hasty(Optimize(0, "x", (1,))), {"step0"}),
    "later": (hasty(Call(0, 1, wait="later", out="f"), Wait(0, "f")), {"step0"}),
    "methods": (hasty(Method(0, 1), After(0, 1)), {"step0", "step1"}),
    "fetch": (hasty(Remote(0, 1, "a"), Share(0, "a", 2, "b"), Fetch(2, "b")), {"step0", "step1"}),
    "argument": (hasty(Remote(0, 1, "a"), Remote(0, 2, "b", right="a"), Fetch(0, "b")), None),
    "nest": (hasty(Nest(0, 2, 1, "a"), Fetch(0, "a")), {"step0", "step0/nested"}),
}


@pytest.mark.parametrize(("program", "calls"), WAITED_FOR.values(), ids=WAITED_FOR)
def test_what_gave_a_value_has_run(program: Program, calls: set[str] | None) -> None:
    """So none of these calls may be missing, nor a request by which they are made."""
    predicted = predict(program, FaultPlan())
    known = {call for ran in predicted.calls for call in ran}
    assert known == (calls or {"step0", "step1"})
    assert not any(predicted.abandoned_calls)
    assert {one for _, _, one in predicted.may_lack} <= {
        message for message in MessageType if message.is_retryable
    }
    outcome = ideal(program, FaultPlan())
    for rank in (1, 2):
        silent = with_rank(outcome, rank, calls={})
        missing = ["NotRunOnce"] * len(predicted.calls[rank])
        assert [v.promise for v in judge(program, None, silent)] == missing


def test_what_raised_has_run() -> None:
    """Its caller has its exception, by the call or by the future or the RRef."""
    made = (Remote(0, 1, "a", raises=True), Call(0, 1, raises=True, wait="later", out="f"))
    program = hasty(Call(0, 1, raises=True), *made, Fetch(0, "a"), Wait(0, "f"))
    assert not any(predict(program, FaultPlan()).abandoned_calls)
    silent = with_rank(ideal(program, FaultPlan()), 1, calls={})
    assert [v.promise for v in judge(program, None, silent)] == ["NotRunOnce"] * 3


@pytest.mark.parametrize(
    ("program", "calls"),
    [
        (hasty(Remote(0, 1, "a")), {"step0"}),
        (hasty(Call(0, 1, wait="later", out="f")), {"step0"}),
        (hasty(Nest(0, 2, 1, "a")), {"step0/nested"}),
        (hasty(Call(0, 1, timeout=3.0, seconds=12.0)), {"step0"}),
        (hasty(Gather(0, (1, 2), breaks=0)), {"step0/0", "step0/1"}),
        (hasty(Remote(0, 1, "a"), Share(0, "a", 2, "b")), {"step0"}),
        (hasty(Onward(0, 1, 2, within=3.0, seconds=12.0)), {"step0/0/then"}),
    ],
)
def test_what_gave_no_value_may_not_have_run(program: Program, calls: set[str]) -> None:
    """A future or an RRef of which nobody has the value, and calls that a timeout has ended."""
    predicted = predict(program, FaultPlan())
    assert {call for ran in predicted.abandoned_calls for call in ran} == calls
    # Rank 0 has asked, and perhaps in vain.
    assert any(at == 0 and not one.endswith("DELETE") for at, _, one in predicted.may_lack)


def test_functions_that_are_cut_off_may_say_so() -> None:
    """Their calls get an error, which Python writes where they run, and nowhere else."""
    lost = "RuntimeError: eof (this error originated at tensorpipe/transport/uv/x.cc:1)"
    log = f"Traceback (most recent call last):\n  File x\n{lost}\n"

    def written(program: Program, rank: int) -> list[str]:
        wrote = with_rank(ideal(program, FaultPlan()), rank, log=log)
        return [v.promise for v in judge(program, None, wrote)]

    assert written(HASTY, 1) == written(HASTY, 2) == []
    assert written(HASTY, 0) == ["ErrorInLog"]
    assert written(replace(HASTY, settles=True), 1) == ["ErrorInLog"]
    assert written(replace(HASTY, steps=(Call(0, 1), Chain(0, 1, 2))), 1) == ["ErrorInLog"]


def test_an_end_at_once_needs_no_call() -> None:
    """A plan that breaks the calls of a graceful shutdown does not keep ranks from leaving."""
    plan = FaultPlan(FaultTable(["PYTHON_CALL"], 1))
    program = Program(2, (Remote(0, 1, "a", flavour="script"),))
    assert not predict(program, plan).graceful
    assert predict(replace(program, end=End("at once")), plan).graceful


def test_the_deletes_of_a_late_rank_must_come_before_owners_give_up() -> None:
    """A plan that delays them by too much is refused where a timeout of shutdown is reached."""
    steps = (Remote(1, 0, "a"), Fetch(1, "a"))
    late = FaultPlan(FaultTable(messages_to_delay={"RREF_USER_DELETE": 20.0}))
    with pytest.raises(UsageError, match="owners give up what is deleted late"):
        predict(Program(2, steps, end=End("timed out", (0.0, 30.0))), late)
    for end in (End("graceful", (0.0, 30.0)), End("timed out", (0.0, 30.0))):
        assert predict(Program(2, steps, end=end), FaultPlan()).graceful


def test_a_call_of_a_shutdown_must_not_miss_its_timeout() -> None:
    """A rank whose call does raises, and the others wait for it; such ends are not drawn."""
    end = End("timed out", (30.0,))
    late, in_time = (FaultTable(messages_to_delay={"PYTHON_CALL": x}) for x in (10.5, 10.0))
    assert predict(Program(2, end=end), FaultPlan(in_time)).graceful
    with pytest.raises(UsageError, match="a rank whose call misses it raises"):
        predict(Program(2, end=end), FaultPlan(late))
    for table, comes in ((late, False), (in_time, True)):
        drawn = draws(programs(max_world_size=2, max_steps=1, plan=FaultPlan(table)), 150)
        assert any(program.end.timeout for program in drawn) is comes


#: Message faults that have acted before the end, or that no shutdown notices.
ACTED: dict[str, tuple[Program, MessageFault]] = {
    "late": (HOLDS, MessageFault(0, "delay", "PYTHON_REMOTE_CALL", delay=2.0)),
    "fails": (
        replace(HOLDS, steps=(*HOLDS.steps, Call(0, 1))),
        MessageFault(0, "fail", "PYTHON_CALL"),
    ),
    "twice": (
        replace(HOLDS, steps=(*HOLDS.steps, Call(2, 1))),
        MessageFault(2, "duplicate", "PYTHON_CALL"),
    ),
    "lost": (
        replace(HOLDS, steps=(*HOLDS.steps, Call(2, 1)), rpc_timeout=65.0),
        MessageFault(2, "lose", "PYTHON_CALL"),
    ),
}


@pytest.mark.parametrize("how", SHUTDOWNS[:4])
@pytest.mark.parametrize(("program", "fault"), ACTED.values(), ids=ACTED)
def test_message_faults_change_nothing_of_a_graceful_end(
    how: Any, program: Program, fault: MessageFault
) -> None:
    """Where they have acted before, it is predicted as the usual end is."""
    plan = FaultPlan(others=(fault,))
    assert predict(replace(program, end=End(how, (30.0,))), plan) == predict(program, plan)


@pytest.mark.parametrize(("program", "fault"), ACTED.values(), ids=ACTED)
def test_an_end_at_once_under_message_faults(program: Program, fault: MessageFault) -> None:
    """What the steps show is what they show before the usual end, and nothing is deleted then."""
    plan = FaultPlan(others=(fault,))
    usual, at_once = (
        predict(replace(program, end=End(how)), plan) for how in ("graceful", "at once")
    )
    assert at_once.steps == usual.steps
    assert at_once.counters == usual.counters
    assert not at_once.last_sends
    assert at_once.leaking == {1}
    under_way = predict(replace(program, end=End("at once"), settles=False), plan)
    assert under_way.steps == usual.steps
    assert under_way.most_left[1].owners


def test_an_end_at_once_breaks_for_no_message_fault() -> None:
    """It sends nothing, so a fault of the calls by which ranks meet elsewhere does nothing."""
    plan = FaultPlan(others=(MessageFault(0, "lose", "PYTHON_CALL", n=3),))
    program = replace(HOLDS, rpc_timeout=65.0)
    assert not predict(program, plan).graceful
    assert predict(replace(program, end=End("at once")), plan).graceful


def test_the_second_of_two_copies_may_be_cut_off() -> None:
    """Its caller has the answer to the first one, and nobody waits for the other."""
    program, fault = ACTED["twice"]
    plan = FaultPlan(others=(fault,))
    at_once = predict(replace(program, end=End("at once"), settles=False), plan)
    call = f"step{len(program.steps) - 1}"
    assert at_once.calls[1][call] == 2
    assert call in at_once.abandoned_calls[1]
    settled = predict(replace(program, end=End("at once")), plan)
    assert not any(settled.abandoned_calls)


def test_message_faults_may_not_miss_the_timeout_of_a_shutdown() -> None:
    """A late rank adds to the seconds for which owners wait, and calls have that timeout, too."""
    late = End("timed out", (0.0, 30.0))
    steps = (Remote(1, 0, "a"), Fetch(1, "a"))
    for end, delay, why in (
        (End(), 65.0, ""),
        (late, 35.0, ""),
        (late, 65.0, "a shutdown waits for 100 s; let it be 40 s"),
    ):
        plan = FaultPlan(others=(MessageFault(1, "delay", "RREF_USER_DELETE", delay=delay),))
        program = Program(2, steps, end=end)
        if not why:
            assert predict(program, plan).graceful
            continue
        with pytest.raises(UsageError, match=why):
            predict(program, plan)
    for delay in (9.0, 11.0):
        plan = FaultPlan(others=(MessageFault(1, "delay", "PYTHON_RET", delay=delay),))
        if delay < 10.0:
            assert predict(Program(2, steps, end=late), plan).graceful
            continue
        with pytest.raises(UsageError, match="misses the timeout of its shutdown"):
            predict(Program(2, steps, end=late), plan)


def test_what_is_held_back_is_cut_off() -> None:
    """The agent ends it by an error of its own, as torch ends what was written."""
    held = f"RuntimeError: the agent was shut down while {CUT_OFF} (this error originated at x:1)"
    log = f"Traceback (most recent call last):\n  File x\n{held}\n"
    assert f'"the agent was shut down while {CUT_OFF}"' in AGENT.read_text()

    def written(program: Program, rank: int) -> list[str]:
        wrote = with_rank(ideal(program, FaultPlan()), rank, log=log)
        return [v.promise for v in judge(program, None, wrote)]

    assert written(HASTY, 1) == written(HASTY, 2) == []
    assert written(HASTY, 0) == written(replace(HASTY, settles=True), 1) == ["ErrorInLog"]


def test_a_late_rank_counts_in_real_time() -> None:
    """The seconds by which it comes late are seconds of a run at rate 1."""
    late = real_waits(Case(replace(HOLDS, end=End("graceful", (0.0, 30.0)))))
    assert late == real_waits(Case(HOLDS)) + 30.0


def test_programs_of_each_end_are_drawn() -> None:
    """Most end as usual; the others end in every way, with ranks that come first and last."""
    drawn = draws(programs(min_world_size=2, max_steps=2, plan=FaultPlan()), 300)
    ways = Counter(program.end.how for program in drawn)
    assert set(ways) == set(SHUTDOWNS)
    assert sum(program.end == End() for program in drawn) > 100
    assert any(program.end.wait_of(0) > program.end.wait_of(1) for program in drawn)
    assert any(program.end.wait_of(program.world_size - 1) for program in drawn)
    drawn = draws(programs(max_world_size=2, max_steps=3), 500)
    hasty = [program for program in drawn if program.ends_hastily]
    assert any(leaf.lasts for program in hasty for leaf in program.leaves)
    for program in hasty:
        predict(program, FaultPlan())
