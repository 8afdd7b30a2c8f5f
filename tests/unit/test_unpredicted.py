"""What is wrong whatever the faults are: the judgement of runs of which nothing is predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from rpcprops.faults import FaultPlan, MessageFault
from rpcprops.oracle import endless_wait, judge_unpredicted, meeting
from rpcprops.oracle._meeting import Meeting
from rpcprops.outcomes import (
    Counters,
    Outcome,
    PhaseOutcome,
    RaisedError,
    RankOutcome,
    SentMessage,
    StepOutcome,
)
from rpcprops.programs import Call, Context, Drop, End, Program, Remote
from rpcprops.torch_facts import facts_of

PROGRAM = Program(2, (Context(0, "c", (1,)), Remote(0, 1, "a"), Drop(0, "a")), rpc_timeout=70.0)
FAULT = MessageFault(0, "lose", "PYTHON_REMOTE_CALL", to=1)
PLAN = FaultPlan(others=(FAULT,))
LOST = SentMessage(
    1.0, 0, 1, 1, "PYTHON_REMOTE_CALL", is_request=True, first_id=1, fault=0, done="lose"
)
WELL = Outcome(
    2,
    torch_version="2.13.0",
    phases=(PhaseOutcome("start"), PhaseOutcome("run"), PhaseOutcome("shutdown")),
    ranks=tuple(
        RankOutcome(rank, f"worker{rank}", exit_code=0, counters=Counters()) for rank in range(2)
    ),
    steps=(StepOutcome(0, value={"id": 1}), StepOutcome(1), StepOutcome(2)),
    messages=(LOST,),
)


def _promises(outcome: Outcome, plan: FaultPlan = PLAN) -> list[str]:
    return [violation.promise for violation in judge_unpredicted(PROGRAM, plan, outcome)]


def _hung(phase: Any, outcome: Outcome = WELL) -> Outcome:
    ranks = tuple(replace(rank, exit_code=None, killed=True) for rank in outcome.ranks)
    phases = (PhaseOutcome(phase, "hung", detail="worker0 hangs"),)
    return replace(outcome, phases=phases, ranks=ranks)


def _rank(number: int, **changes: Any) -> Outcome:
    ranks = [replace(r, **changes) if r.rank == number else r for r in WELL.ranks]
    return replace(WELL, ranks=tuple(ranks))


def _raised(kind: str, message: str) -> Outcome:
    step = StepOutcome(1, error=RaisedError(kind, message))
    return replace(WELL, steps=(WELL.steps[0], step, WELL.steps[2]))


def test_a_run_that_went_well_breaks_nothing() -> None:
    """The fault acted on the message that it is for, and each step gave a value of its type."""
    assert _promises(WELL) == []


@pytest.mark.parametrize(
    ("outcome", "promise"),
    [
        (_rank(1, signal=6, exit_code=None), "RankDied"),
        (_rank(1, exit_code=3), "UngracefulShutdown"),
        (_hung("run"), "RankHung"),
        (_hung("settle"), "RankHung"),
        (_hung("shutdown"), "RankHung"),
        (replace(WELL, steps=(StepOutcome(0, value=7), *WELL.steps[1:])), "WrongValue"),
        (_raised("KeyError", "'a'"), "UnexpectedError"),
        (_rank(0, shutdown_error=RaisedError("KeyError", "'b'")), "UngracefulShutdown"),
    ],
    ids=["abort", "exit", "run", "settle", "shutdown", "type", "error", "shutdown error"],
)
def test_each_defect_is_named(outcome: Outcome, promise: str) -> None:
    """What no fault of a message excuses is a violation."""
    assert _promises(outcome) == [promise]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RuntimeError", "RPC ran for more than set timeout (70000 ms)"),
        ("RuntimeError", "On WorkerInfo(id=1, name=worker1): ValueError('b')"),
        ("RuntimeError", "RRef creation via rpc.remote() timed out"),
        ("MissingHandleError", "rank 0 has no handle 'a'"),
        ("UnicodeDecodeError", "'utf-8' codec can't decode byte 0x80"),
        ("RuntimeError", 'fork.second INTERNAL ASSERT FAILED at "rref_context.cpp":1'),
    ],
)
def test_errors_of_torchs_are_allowed(kind: str, message: str) -> None:
    """Which of them comes is not predicted."""
    assert _promises(_raised(kind, message)) == []
    error = RaisedError(kind, message)
    assert _promises(_rank(0, shutdown_error=error, exit_code=1)) == []


def test_what_ranks_hold_is_not_judged() -> None:
    """A leak at shutdown follows from what was lost."""
    error = RaisedError("RuntimeError", "Leaking RRef GloballyUniqueId(0, 1)")
    assert _promises(_rank(1, shutdown_error=error, exit_code=1)) == []


def test_a_death_explains_errors_of_steps() -> None:
    """What the other ranks raise after it is no violation of its own."""
    died = _rank(1, signal=6, exit_code=None)
    broken = _raised("RuntimeError", "connection lost")
    assert _promises(replace(broken, ranks=died.ranks)) == ["RankDied"]


@pytest.mark.parametrize(
    "messages",
    [
        (replace(LOST, done="", fault=None),),
        (replace(LOST, done="", fault=None), replace(LOST, id=2, first_id=2)),
        (LOST, replace(LOST, id=2, first_id=2)),
    ],
    ids=["not acted", "on another", "on two"],
)
def test_a_fault_acts_on_its_message_alone(messages: tuple[SentMessage, ...]) -> None:
    """The record says on which messages it has acted."""
    assert _promises(replace(WELL, messages=messages)) == ["FaultsDiffer"]
    assert _promises(replace(WELL, messages=messages, messages_dropped=1)) == []


def test_a_fault_whose_message_did_not_come_breaks_nothing() -> None:
    """That is said by the sweep: nothing was tried."""
    assert _promises(replace(WELL, messages=(replace(LOST, type="PYTHON_CALL", done=""),))) == []


def _did(action: Any, kind: str, *more: SentMessage) -> Outcome:
    return replace(WELL, messages=(replace(LOST, type=kind, done=action, fault=None), *more))


THREW = _rank(
    0,
    counters=Counters(client_calls=1),
    log="[E thread_pool.cpp:137] Exception in thread pool task: Error on Node 1",
)
SERVING = _rank(1, counters=Counters(server_calls=1))
#: The creation of an RRef that the hanging rank would own is lost.
TO_OWNER = replace(WELL, messages=(replace(LOST, sender=1, receiver=0),))


@pytest.mark.parametrize(
    ("phase", "outcome", "timeout", "said"),
    [
        ("run", WELL, None, "what was lost has no timeout"),
        ("shutdown", _did("fail", "PYTHON_CALL"), 70.0, "have no timeout (api.py: _all_gather)"),
        ("shutdown", _did("lose", "PYTHON_RET"), 70.0, "have no timeout (api.py: _all_gather)"),
        ("shutdown", SERVING, 70.0, "a call that worker1 still serves"),
        ("shutdown", THREW, 70.0, "threw in its callback"),
        ("run", _did("duplicate", "BACKWARD_AUTOGRAD_REQ"), 70.0, "a backward pass has no timeout"),
        ("run", TO_OWNER, 70.0, "a value that is never made (PyRRef::toHere)"),
    ],
)
def test_waits_without_end_say_why(
    phase: Any, outcome: Outcome, timeout: float | None, said: str
) -> None:
    """torch gives these no timeout, so a rank that waits there breaks no promise."""
    program = replace(PROGRAM, rpc_timeout=timeout)
    hung = _hung(phase, outcome)
    why = endless_wait(program, hung)
    assert why.startswith("worker0 hangs: ")
    assert said in why
    assert not any(v.promise == "RankHung" for v in judge_unpredicted(program, PLAN, hung))


@pytest.mark.parametrize(
    ("phase", "outcome"),
    [
        ("shutdown", WELL),
        ("settle", WELL),
        ("run", _did("duplicate", "PYTHON_REMOTE_CALL")),
        ("run", SERVING),
        ("run", _did("delay", "BACKWARD_AUTOGRAD_REQ")),
        # A call of a step, not of the shutdown: another one of its kind comes after it.
        ("shutdown", _did("lose", "PYTHON_CALL", replace(LOST, type="PYTHON_CALL", done=""))),
    ],
)
def test_other_waits_are_hangs(phase: Any, outcome: Outcome) -> None:
    """A caller's wait ends by its timeout, so one that does not is a violation."""
    assert endless_wait(PROGRAM, _hung(phase, outcome)) == ""
    assert "RankHung" in _promises(_hung(phase, outcome))


def test_no_wait_without_a_hang() -> None:
    """A run that came to its end has nothing to explain."""
    assert endless_wait(PROGRAM, WELL) == ""


MEETS = Program(3, (Call(0, 1),), rpc_timeout=70.0)


def _meeting(done: str, sender: int, receiver: int, *, answer: bool = False) -> Outcome:
    """A run whose meeting is disturbed, in which all ranks wait until they are killed."""
    asks, asked = (receiver, sender) if answer else (sender, receiver)
    call = SentMessage(
        9.0, asks, asked, 9, "PYTHON_CALL", is_request=True, first_id=9, marks=("leaving",)
    )
    if answer:
        ret = SentMessage(9.5, sender, receiver, 9, "PYTHON_RET", is_request=False, first_id=9)
        messages = [call, replace(ret, fault=0, done="lose")]
    else:
        messages = [replace(call, fault=0, done=cast("Any", done))]
    hung = PhaseOutcome("shutdown", "hung", detail="worker0 does not shut down")
    ranks = tuple(RankOutcome(n, f"worker{n}", killed=True) for n in range(3))
    return Outcome(
        3,
        torch_version="2.13.0",
        phases=(PhaseOutcome("start"), PhaseOutcome("run"), hung),
        ranks=ranks,
        steps=(StepOutcome(0, value=2),),
        messages=tuple(messages),
    )


@pytest.mark.parametrize(
    ("done", "sender", "receiver", "answer", "waiting", "raising"),
    [
        ("fail", 1, 0, False, {0, 2}, {1}),
        ("lose", 1, 0, False, {0, 1, 2}, set()),
        ("lose", 0, 1, True, {1}, set()),
        ("fail", 0, 2, False, {2}, {0}),
        ("lose", 0, 2, False, {0, 2}, set()),
        ("lose", 2, 0, True, {0}, set()),
    ],
)
def test_ranks_that_do_not_meet_wait_as_their_source_says(
    done: str, sender: int, receiver: int, answer: bool, waiting: set[int], raising: set[int]
) -> None:
    """Each rank that must wait for ever, or raise, and leaves, is a violation; others may leave."""
    message = "PYTHON_RET" if answer else "PYTHON_CALL"
    fault = MessageFault(sender, cast("Any", done), message, to=receiver)
    plan = FaultPlan(others=(fault,))
    seen = _meeting(done, sender, receiver, answer=answer)
    injected = RaisedError("RuntimeError", "RPCErr:2:Send attempt failed intentionally for ")
    ends = {"killed": False, "exit_code": 72, "shutdown_error": injected}
    right = tuple(
        replace(rank, **cast("Any", ends)) if rank.rank in raising else rank for rank in seen.ranks
    )
    seen = replace(seen, ranks=right)
    facts = facts_of("2.13.0")
    assert meeting(MEETS, plan, seen, facts) == Meeting(frozenset(waiting), frozenset(raising))
    assert not [v for v in judge_unpredicted(MEETS, plan, seen) if v.promise != "FaultsDiffer"]
    # Where a rank is ended while it still logs the failure that it raises, nobody can tell.
    slow = [replace(one, killed=True, exit_code=None, shutdown_error=None) for one in right]
    found = judge_unpredicted(MEETS, plan, replace(seen, ranks=tuple(slow)))
    assert not [v for v in found if v.promise != "FaultsDiffer"]
    for rank in range(3):
        left = {"killed": False, "exit_code": 0}
        wrong = [
            replace(one, **cast("Any", left), shutdown_error=None) if one.rank == rank else one
            for one in right
        ]
        found = judge_unpredicted(MEETS, plan, replace(seen, ranks=tuple(wrong)))
        promises = [(v.promise, v.rank) for v in found if v.promise != "FaultsDiffer"]
        expected = [("UngracefulShutdown", rank)] if rank in waiting | raising else []
        assert promises == expected, found


def test_other_meetings_are_not_predicted() -> None:
    """With another fault, a timeout, no rest before it, or where a bug may keep ranks as well."""
    seen = _meeting("lose", 1, 0)
    fault = MessageFault(1, "lose", "PYTHON_CALL", to=0)
    facts, plan = facts_of("2.13.0"), FaultPlan(others=(fault,))
    assert meeting(MEETS, plan, seen, facts)
    two = FaultPlan(others=(fault, MessageFault(2, "lose", "PYTHON_CALL", to=0)))
    assert meeting(MEETS, two, seen, facts) is None
    for program in (
        replace(MEETS, settles=False),
        replace(MEETS, end=End("timeout")),
        replace(MEETS, end=End("at once")),
    ):
        assert meeting(program, plan, seen, facts) is None
    calm = replace(seen, messages=(replace(seen.messages[0], marks=()),))
    assert meeting(MEETS, plan, calm, facts) is None
    assert meeting(MEETS, plan, replace(seen, phases=seen.phases[:2]), facts) is None
