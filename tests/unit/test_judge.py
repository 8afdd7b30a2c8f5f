"""The judge: nothing to say about what the model predicts, one promise for each way to fall short.

The *ideal* outcome is built from the prediction. It must be judged clean for every program that the
shipped properties run; then it is falsified, one thing at a time, and the judge must name exactly
the promise that this breaks, and where.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageFault, MessageType
from rpcprops.oracle import judge, predict
from rpcprops.outcomes import Counters, Outcome, PhaseOutcome, RaisedError
from rpcprops.programs import Call, Drop, End, Fetch, Own, Program, Remote, Settle, Share
from rpcprops.properties import PROPERTIES, Case
from rpcprops.properties import _programs as shipped
from tests.seeded._corpus import PLANS as WORLD_PLANS
from tests.seeded._ideal import (
    CONTEXT_LEAK,
    LEAK,
    LEAKING,
    TIMEOUT,
    calling,
    hanging,
    holding,
    ideal,
    place,
    settled_with,
    stopped,
    with_rank,
    with_step,
)
from tests.seeded._programs import EVERY_KIND, shipped_programs

DELETE = MessageType.RREF_USER_DELETE
PLANS = (
    *WORLD_PLANS,
    FaultPlan(FaultTable([DELETE], 5), {1: FaultTable()}),
    FaultPlan(by_rank={0: FaultTable([MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ], 20)}),
    FaultPlan(by_rank={1: FaultTable((), 0, dict.fromkeys(MessageType, 0.25))}),
    FaultPlan(
        FaultTable([DELETE], 1, {"PYTHON_CALL": 1.5, "RREF_CHILD_ACCEPT": 1.5, "SCRIPT_CALL": 0.1})
    ),
)

PROGRAMS = [*shipped_programs(), *EVERY_KIND]


def program_id(program: Program) -> str:
    """The name of a program, with its size."""
    return f"{program.name}-{program.world_size}"


def test_every_maker_of_programs_is_covered() -> None:
    """No function that makes shipped programs is missing from this file's list of programs."""
    makers = {
        name
        for name, value in vars(shipped).items()
        if callable(value) and getattr(value, "__module__", "") == shipped.__name__
    }
    named = {program.name.split("[")[0] for program in shipped_programs()}
    assert makers == named - {"context"} | {"context_over", "drop_orders"}


@pytest.mark.parametrize("program", PROGRAMS, ids=program_id)
def test_what_the_model_predicts_is_judged_ideal(program: Program) -> None:
    """A run that shows exactly what is predicted breaks no promise, under no plan."""
    for plan in PLANS:
        assert judge(program, plan, ideal(program, plan)) == (), plan


@pytest.mark.parametrize("program", PROGRAMS[::7], ids=program_id)
def test_idle_ranks_beyond_the_program_change_nothing(program: Program) -> None:
    """A world larger than the program is judged clean when its further ranks stay idle."""
    for plan in PLANS:
        size = program.world_size + 2
        assert judge(program, plan, ideal(program, plan, size)) == (), plan


@pytest.mark.parametrize("name", PROPERTIES)
def test_every_case_of_every_property_can_be_ideal(name: str) -> None:
    """Whatever case a shipped property draws, the run that the model predicts is judged clean."""

    @settings(
        max_examples=60,
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(PROPERTIES[name].cases())
    def check(case: Case) -> None:
        assert judge(case.program, case.plan, ideal(case.program, case.plan)) == ()

    check()


def test_a_rank_without_the_clock_library_is_judged_by_the_rest() -> None:
    """Delays that nobody could see are not held against a run."""
    program, plan = shipped.create_and_fetch("python"), PLANS[-1]
    outcome = with_rank(ideal(program, plan), 0, delayed_sends=None)
    assert judge(program, plan, outcome) == ()


# One thing wrong at a time. The program and plan of each group, then how the outcome is falsified
# and what must be said of it.

FETCH = shipped.create_and_fetch("python")  # remote 0->1, fetch, settle, fetch, drop
FORK = Program(
    3,
    (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Settle(), Fetch(2, "b"), Drop(0, "a"), Drop(2, "b")),
)
HELD = Program(3, (Remote(0, 1, "a"), Share(0, "a", 2, "b")))  # both handles outlive the steps
CONTEXT = shipped.context_over(3, (1, 2))  # context, settle, refused at 0, 1 and 2
RAISES = shipped.context_over(3, (1, 2), raises=True)
BUMP = shipped.bump_from_everywhere()
LATE = shipped.timed_call("python", 0.2)
LATE_PLAN = FaultPlan(by_rank={0: FaultTable(messages_to_delay={"PYTHON_CALL": 1.0})})
DELETES = FaultPlan(FaultTable([DELETE], 2))
# Rank 0 fails two deletes of b, which it drops, and up to six of a, whose creation is lost.
HURRIED = Program(
    2,
    (Remote(0, 1, "a"), Remote(0, 1, "b", flavour="builtin"), Drop(0, "b")),
)
HURRIED_PLAN = FaultPlan(by_rank={0: FaultTable([DELETE, MessageType.PYTHON_REMOTE_CALL], 2)})
NONE = FaultPlan()

Falsify = Callable[[Outcome], Outcome]
Place = tuple[str, int | None, int | None]

FALSIFIED: dict[str, tuple[Program, FaultPlan, Falsify, list[Place]]] = {
    "a fetch gives another value": (
        FETCH,
        NONE,
        lambda o: with_step(o, 1, value=[4.0]),
        [("WrongValue", 0, 1)],
    ),
    "a fetch gives nothing": (
        FETCH,
        NONE,
        lambda o: with_step(o, 3, value=None),
        [("WrongValue", 0, 3)],
    ),
    "a fetch gives no number": (
        FETCH,
        NONE,
        lambda o: with_step(o, 1, value=[math.nan]),
        [("WrongValue", 0, 1)],
    ),
    "a bump counted twice": (
        BUMP,
        NONE,
        lambda o: with_step(o, 6, value=[7.0]),
        [("WrongValue", 0, 6)],
    ),
    "two fetches give other values": (
        FETCH,
        NONE,
        lambda o: with_step(with_step(o, 1, value=[0.0]), 3, value=[0.0]),
        [("WrongValue", 0, 1), ("WrongValue", 0, 3)],
    ),
    "another gradient": (
        CONTEXT,
        NONE,
        lambda o: with_step(o, 0, value={**o.steps[0].value, "gradient": [24.0, 47.0]}),
        [("WrongGradient", 0, 0)],
    ),
    "a gradient of another length": (
        CONTEXT,
        NONE,
        lambda o: with_step(o, 0, value={**o.steps[0].value, "gradient": [24.0]}),
        [("WrongGradient", 0, 0)],
    ),
    "no gradient": (
        CONTEXT,
        NONE,
        lambda o: with_step(o, 0, value={**o.steps[0].value, "gradient": None}),
        [("WrongGradient", 0, 0)],
    ),
    "another loss": (
        CONTEXT,
        NONE,
        lambda o: with_step(o, 0, value={**o.steps[0].value, "loss": 70.5}),
        [("WrongValue", 0, 0)],
    ),
    "a loss that is no number": (
        CONTEXT,
        NONE,
        lambda o: with_step(o, 0, value={**o.steps[0].value, "loss": math.nan}),
        [("WrongValue", 0, 0)],
    ),
    "another loss and gradient": (
        CONTEXT,
        NONE,
        lambda o: with_step(o, 0, value={"loss": 0.0, "gradient": [0.0, 0.0]}),
        [("WrongValue", 0, 0), ("WrongGradient", 0, 0)],
    ),
    "an exception that left its context was swallowed": (
        RAISES,
        NONE,
        lambda o: with_step(o, 0, value={**o.steps[0].value, "raised": False}),
        [("MissingError", 0, 0)],
    ),
    "a context raised that should not": (
        CONTEXT,
        NONE,
        lambda o: with_step(o, 0, value={**o.steps[0].value, "raised": True}),
        [("MissingError", 0, 0)],
    ),
    "the id of an ended context is accepted": (
        CONTEXT,
        NONE,
        lambda o: with_step(o, 3, value={"refused": False}),
        [("ContextLeak", 1, 3)],
    ),
    "a call ran twice": (
        FORK,
        NONE,
        lambda o: calling(o, 2, {"step1": 2}),
        [("NotRunOnce", 2, None)],
    ),
    "a call never ran": (
        FORK,
        NONE,
        lambda o: calling(o, 1, {"step0": 0}),
        [("NotRunOnce", 1, None)],
    ),
    "a call ran on another rank": (
        FORK,
        NONE,
        lambda o: calling(calling(o, 2, {"step1": 0}), 0, {"step1": 1}),
        [("NotRunOnce", 0, None), ("NotRunOnce", 2, None)],
    ),
    "a call that nobody made": (
        FORK,
        NONE,
        lambda o: calling(o, 0, {"step4": 1}),
        [("NotRunOnce", 0, None)],
    ),
    "a nested call ran twice": (
        shipped.nested_remote("python"),
        NONE,
        lambda o: calling(o, 2, {"step0/nested": 2}),
        [("NotRunOnce", 2, None)],
    ),
    "an owner is left at the end": (
        FORK,
        NONE,
        lambda o: holding(o, 1, owners=1, forks=1),
        [("RRefLeak", 1, None)],
    ),
    "a fork is left at the end": (
        FORK,
        NONE,
        lambda o: holding(o, 1, forks=1),
        [("RRefLeak", 1, None)],
    ),
    "a pending user is left": (
        FORK,
        NONE,
        lambda o: holding(o, 2, pending_users=1),
        [("RRefLeak", 2, None)],
    ),
    "a pending future is left": (
        FORK,
        NONE,
        lambda o: holding(o, 0, pending_futures=1),
        [("RRefLeak", 0, None)],
    ),
    "a fork too many while handles live": (
        FORK,
        NONE,
        lambda o: settled_with(o, 2, 1, forks=3),
        [("RRefLeak", 1, 2)],
    ),
    "an owner is gone while users live": (
        FORK,
        NONE,
        lambda o: settled_with(o, 2, 1, owners=0, forks=0),
        [("OwnerGone", 1, 2)],
    ),
    "an owner forgot one of two users": (
        FORK,
        NONE,
        lambda o: settled_with(o, 2, 1, forks=1),
        [("OwnerGone", 1, 2)],
    ),
    "an owner is gone while handles outlive the steps": (
        HELD,
        NONE,
        lambda o: holding(o, 1, owners=0, forks=0),
        [("OwnerGone", 1, None)],
    ),
    "a context is kept": (
        CONTEXT,
        NONE,
        lambda o: settled_with(o, 1, 2, contexts=1),
        [("ContextLeak", 2, 1)],
    ),
    "a context is kept at the end": (
        CONTEXT,
        NONE,
        lambda o: holding(o, 1, contexts=1),
        [("ContextLeak", 1, None)],
    ),
    "a backward pass is kept": (
        CONTEXT,
        NONE,
        lambda o: holding(o, 0, backward_passes=1),
        [("ContextLeak", 0, None)],
    ),
    "a context and what it holds are kept": (
        CONTEXT,
        NONE,
        lambda o: holding(o, 2, contexts=1, owners=1, forks=1),
        [("RRefLeak", 2, None), ("ContextLeak", 2, None)],
    ),
    "a call is served for ever": (
        FETCH,
        NONE,
        lambda o: holding(o, 1, server_calls=1),
        [("CallLeak", 1, None)],
    ),
    "an asynchronous call is served for ever": (
        FETCH,
        NONE,
        lambda o: holding(o, 1, server_async_calls=1),
        [("CallLeak", 1, None)],
    ),
    "a call is awaited for ever": (
        FETCH,
        NONE,
        lambda o: holding(o, 0, client_calls=2),
        [("CallLeak", 0, None)],
    ),
    "a step raises": (
        FETCH,
        NONE,
        lambda o: with_step(o, 1, value=None, error=RaisedError("RuntimeError", "no such node")),
        [("UnexpectedError", 0, 1)],
    ),
    "a step times out that has no timeout": (
        FETCH,
        NONE,
        lambda o: with_step(o, 1, value=None, error=TIMEOUT),
        [("UnexpectedError", 0, 1)],
    ),
    "a step raises and ends the run": (
        FORK,
        NONE,
        lambda o: stopped(with_step(o, 1, error=RaisedError("ValueError", "no")), 2),
        [("UnexpectedError", 0, 1)],
    ),
    "a timeout does not come": (
        LATE,
        LATE_PLAN,
        lambda o: with_step(o, 1, value=[3.0], error=None),
        [("MissingError", 0, 1)],
    ),
    "another error than the timeout": (
        LATE,
        LATE_PLAN,
        lambda o: with_step(o, 1, error=RaisedError("RuntimeError", "pipe closed")),
        [("UnexpectedError", 0, 1)],
    ),
    "the program stopped early": (
        FETCH,
        NONE,
        lambda o: stopped(o, 3),
        [("UnexpectedError", None, None)],
    ),
    "the last step never ended": (
        FETCH,
        NONE,
        lambda o: with_step(stopped(o, 5), 4, ended=False),
        [("UnexpectedError", None, None)],
    ),
    "a rank is killed while the program runs": (
        FORK,
        NONE,
        lambda o: with_rank(stopped(o, 1), 2, killed=False, signal=11),
        [("RankDied", 2, None)],
    ),
    "a rank leaves while the program runs": (
        FORK,
        NONE,
        lambda o: with_rank(stopped(o, 1), 1, killed=False, exit_code=0),
        [("RankDied", 1, None)],
    ),
    "a rank leaves with an error while the program runs": (
        FORK,
        NONE,
        lambda o: with_rank(stopped(o, 1), 1, killed=False, exit_code=1),
        [("RankDied", 1, None)],
    ),
    "a rank is killed during shutdown": (
        FORK,
        NONE,
        lambda o: with_rank(o, 1, exit_code=None, signal=6),
        [("RankDied", 1, None)],
    ),
    "a rank exits with an error": (
        FORK,
        NONE,
        lambda o: with_rank(o, 0, exit_code=3),
        [("UngracefulShutdown", 0, None)],
    ),
    "shutdown raises": (
        FORK,
        NONE,
        lambda o: with_rank(o, 0, shutdown_error=RaisedError("RuntimeError", "timed out")),
        [("UngracefulShutdown", 0, None)],
    ),
    "shutdown raises and the rank exits with an error": (
        FORK,
        NONE,
        lambda o: with_rank(
            o, 0, shutdown_error=RaisedError("RuntimeError", "timed out"), exit_code=1
        ),
        [("UngracefulShutdown", 0, None)],
    ),
    "shutdown raises for a leak": (
        FORK,
        NONE,
        lambda o: with_rank(o, 1, shutdown_error=RaisedError("RuntimeError", f"x\n{LEAKING}")),
        [("RRefLeak", 1, None)],
    ),
    "the log warns of leaks": (
        FORK,
        NONE,
        lambda o: with_rank(o, 1, log=f"before\n{LEAK}\n{LEAKING}\nafter"),
        [("RRefLeak", 1, None)],
    ),
    "the log names a leaking RRef": (
        shipped.unsettled_exit(),
        NONE,
        lambda o: with_rank(o, 0, log=LEAKING),
        [("RRefLeak", 0, None)],
    ),
    "a context could not be released": (
        CONTEXT,
        NONE,
        lambda o: with_rank(o, 2, log=f"before\n{CONTEXT_LEAK}\nafter"),
        [("ContextLeak", 2, None)],
    ),
    "the start hangs": (
        FORK,
        NONE,
        lambda o: hanging(o, "start", 1, 0),
        [("RankHung", 1, None)],
    ),
    "a step hangs": (
        FORK,
        NONE,
        lambda o: with_step(hanging(o, "run", 0, 2), 1, ended=False, value=None),
        [("RankHung", 0, None)],
    ),
    "settling hangs": (
        FORK,
        NONE,
        lambda o: hanging(o, "settle", 2, 6),
        [("RankHung", 2, None)],
    ),
    "shutdown hangs": (
        FORK,
        NONE,
        lambda o: hanging(o, "shutdown", 1, 6),
        [("RankHung", 1, None)],
    ),
    "the start fails": (
        FORK,
        NONE,
        lambda o: dataclasses.replace(
            stopped(o, 0), phases=(PhaseOutcome("start", "failed", detail="no"),)
        ),
        [("UnexpectedError", None, None)],
    ),
    "one failed send more than predicted": (
        FORK,
        DELETES,
        lambda o: with_rank(o, 2, failed_sends=3),
        [("FaultsDiffer", 2, None)],
    ),
    "one failed send fewer than predicted": (
        FORK,
        DELETES,
        lambda o: with_rank(o, 0, failed_sends=1),
        [("FaultsDiffer", 0, None)],
    ),
    "a failed send where none is armed": (
        FORK,
        NONE,
        lambda o: with_rank(o, 1, failed_sends=1),
        [("FaultsDiffer", 1, None)],
    ),
    "fewer sends failed than had by the last settle, of a rank in a hurry": (
        HURRIED,
        HURRIED_PLAN,
        lambda o: with_rank(o, 0, failed_sends=1),
        [("FaultsDiffer", 0, None)],
    ),
    "more sends failed than a rank in a hurry tries": (
        HURRIED,
        HURRIED_PLAN,
        lambda o: with_rank(o, 0, failed_sends=9),
        [("FaultsDiffer", 0, None)],
    ),
    "a delayed send is missing": (
        LATE,
        LATE_PLAN,
        lambda o: with_rank(o, 0, delayed_sends={1000: 1}),
        [("FaultsDiffer", 0, None)],
    ),
    "a send was delayed where none is armed": (
        LATE,
        LATE_PLAN,
        lambda o: with_rank(o, 1, delayed_sends={1000: 1}),
        [("FaultsDiffer", 1, None)],
    ),
    "a send was delayed by another length": (
        LATE,
        LATE_PLAN,
        lambda o: with_rank(o, 0, delayed_sends={999: 2, 1000: 0}),
        [("FaultsDiffer", 0, None)],
    ),
}


@pytest.mark.parametrize("how", FALSIFIED)
def test_each_broken_promise_is_named_where_it_broke(how: str) -> None:
    """One thing that is not as predicted gives exactly the promise that it breaks, at its place."""
    program, plan, falsify, expected = FALSIFIED[how]
    before = ideal(program, plan)
    assert judge(program, plan, before) == ()
    assert [place(v) for v in judge(program, plan, falsify(before))] == expected


@pytest.mark.parametrize("how", FALSIFIED)
def test_every_message_is_a_sentence_that_shows_what_was_seen(how: str) -> None:
    """No violation has an empty message, and none spans lines that a report would break."""
    program, plan, falsify, _ = FALSIFIED[how]
    for violation in judge(program, plan, falsify(ideal(program, plan))):
        assert violation.message.strip()
        assert "\n" not in violation.message


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("a fetch gives another value", ["[3.0]", "[4.0]"]),
        ("another gradient", ["[24.0, 48.0]", "[24.0, 47.0]"]),
        ("an owner is gone while users live", ["worker1", "nothing", "1 owner, 2 forks"]),
        ("a call ran twice", ["step1", "2 times", "worker2", "expected 1"]),
        ("one failed send more than predicted", ["3 sends", "predicts 2", "RREF_USER_DELETE 2"]),
        ("a rank is killed while the program runs", ["worker2", "SIGSEGV"]),
        ("shutdown raises", ["worker0", "timed out"]),
        ("a context could not be released", ["worker2", "pipe closed"]),
        ("a timeout does not come", ["torch's timeout", "[3.0]"]),
    ],
)
def test_a_message_names_what_was_expected_and_what_was_seen(how: str, parts: list[str]) -> None:
    """A reader learns the values, the rank and the counts from the sentence alone."""
    program, plan, falsify, _ = FALSIFIED[how]
    (violation,) = judge(program, plan, falsify(ideal(program, plan)))
    for part in parts:
        assert part in violation.message


@pytest.mark.parametrize(
    ("how", "timing_sensitive"),
    [
        ("a fetch gives another value", False),
        ("another gradient", False),
        ("a call ran twice", False),
        ("a rank is killed while the program runs", False),
        ("a step raises", False),
        ("a step times out that has no timeout", True),
        ("a timeout does not come", True),
        ("an owner is left at the end", True),
        ("settling hangs", True),
        ("shutdown raises", True),
        ("one failed send fewer than predicted", True),
    ],
)
def test_only_what_a_slow_machine_could_show_needs_time(how: str, timing_sensitive: bool) -> None:
    """A wrong value stays one on any machine; what was not over in time might just be late."""
    program, plan, falsify, _ = FALSIFIED[how]
    for violation in judge(program, plan, falsify(ideal(program, plan))):
        assert violation.timing_sensitive is timing_sensitive


@pytest.mark.parametrize("value", [None, [3.0]])
def test_a_call_that_may_time_out_may_do_either(value: Any) -> None:
    """A timeout that is close to the delay is met, or not, and neither breaks a promise."""
    program, plan = Program(2, (Call(0, 1, timeout=1.1),)), LATE_PLAN
    assert predict(program, plan).steps[0].error == "unknown"
    error = TIMEOUT if value is None else None
    outcome = with_step(ideal(program, plan), 0, value=value, error=error)
    assert judge(program, plan, outcome) == ()


def test_a_call_that_may_time_out_still_gives_the_right_value() -> None:
    """A value that came in time is held to what the call must give, and an error to a timeout."""
    program, plan = Program(2, (Call(0, 1, timeout=1.1),)), LATE_PLAN
    before = ideal(program, plan)
    wrong = with_step(before, 0, value=[4.0])
    assert [place(v) for v in judge(program, plan, wrong)] == [("WrongValue", 0, 0)]
    other = with_step(before, 0, value=None, error=RaisedError("RuntimeError", "pipe closed"))
    assert [place(v) for v in judge(program, plan, other)] == [("UnexpectedError", 0, 0)]


def test_a_run_that_does_not_settle_is_not_asked_for_its_counters_or_faults() -> None:
    """A program that goes straight into shutdown has no last look to be judged by."""
    program = shipped.unsettled_exit()
    outcome = holding(ideal(program, DELETES), 1, owners=2, forks=3)
    assert judge(program, DELETES, with_rank(outcome, 0, failed_sends=0)) == ()


@pytest.mark.parametrize("failed", range(2, 9))
def test_a_rank_in_a_hurry_may_fail_any_of_its_last_tries(failed: int) -> None:
    """Nobody waits for its last delete, and whom it is for may have left."""
    outcome = with_rank(ideal(HURRIED, HURRIED_PLAN), 0, failed_sends=failed)
    assert judge(HURRIED, HURRIED_PLAN, outcome) == ()


def test_a_first_wrong_step_hides_what_may_follow_from_it() -> None:
    """Leaks and counts after a step that broke a promise are not reported on top of it."""
    outcome = with_step(ideal(FORK, DELETES), 3, value=[9.0])
    outcome = calling(holding(outcome, 1, owners=1, forks=1), 2, {"step1": 2})
    outcome = with_rank(outcome, 0, failed_sends=0, log=LEAKING)
    assert [place(v) for v in judge(FORK, DELETES, outcome)] == [("WrongValue", 2, 3)]


def test_every_rank_that_leaks_is_named() -> None:
    """Two ranks that hold what they should not are two violations, by rank."""
    outcome = holding(holding(ideal(FORK, NONE), 2, pending_users=1), 0, contexts=1)
    expected = [("ContextLeak", 0, None), ("RRefLeak", 2, None)]
    assert [place(v) for v in judge(FORK, NONE, outcome)] == expected


def test_a_table_and_none_are_plans_too() -> None:
    """A table is for every rank and None for none, as everywhere."""
    table = FaultTable([DELETE], 2)
    assert judge(FORK, table, ideal(FORK, DELETES)) == ()
    assert judge(FORK, None, ideal(FORK, NONE)) == ()
    assert [v.promise for v in judge(FORK, None, ideal(FORK, DELETES))] == ["FaultsDiffer"] * 2


@pytest.mark.parametrize(
    ("falsify", "expected"),
    [
        (lambda o: o, []),
        (lambda o: with_rank(o, 1, log=LEAK), [("RRefLeak", 1, None)]),
        (lambda o: with_rank(o, 1, log=CONTEXT_LEAK), [("ContextLeak", 1, None)]),
        (lambda o: with_rank(o, 2, exit_code=1), [("UngracefulShutdown", 2, None)]),
        (lambda o: with_rank(o, 2, exit_code=None, signal=9), [("RankDied", 2, None)]),
        (lambda o: hanging(o, "run", 0, 0), [("RankHung", 0, None)]),
        (lambda o: with_step(o, 3, value=[9.0]), []),
    ],
)
def test_without_a_program_only_the_ranks_lives_are_judged(
    falsify: Falsify, expected: list[Place]
) -> None:
    """A user's own code is judged by how its ranks lived and left, and by nothing it computed."""
    assert [place(v) for v in judge(None, NONE, falsify(ideal(FORK, NONE)))] == expected


def test_an_outcome_of_a_smaller_world_is_refused() -> None:
    """An outcome that cannot be of this program is the caller's mistake, and says so."""
    small = ideal(FETCH, NONE)
    with pytest.raises(UsageError, match=r"2 ranks.* for 3"):
        judge(FORK, NONE, small)


def test_a_plan_beyond_the_budget_is_judged_by_what_it_does() -> None:
    """Lost deletes leak as predicted: that is no broken promise, and a run without the leak is one.

    Ranks 0 and 2 give up deleting their forks, so rank 1 keeps them and must say so at the end.
    """
    plan = FaultPlan(FaultTable([DELETE], 6))
    outcome = ideal(FORK, plan)
    assert outcome.ranks[1].counters == Counters(owners=1, forks=2)
    assert judge(FORK, plan, outcome) == ()
    drained = judge(FORK, plan, holding(outcome, 1, owners=0, forks=0))
    assert [place(v) for v in drained] == [("OwnerGone", 1, None)]
    silent = with_rank(outcome, 1, exit_code=0, shutdown_error=None)
    assert [place(v) for v in judge(FORK, plan, silent)] == [("MissingError", 1, None)]


def test_a_plan_of_another_world_is_refused() -> None:
    """A plan with faults at a rank that is not there is the caller's mistake."""
    outcome = ideal(FORK, NONE)
    with pytest.raises(UsageError, match="rank 7"):
        judge(FORK, FaultPlan(by_rank={7: FaultTable([DELETE], 1)}), outcome)


def test_judging_changes_nothing_and_repeats() -> None:
    """The same outcome gives the same verdict every time, and stays as it was."""
    outcome = holding(ideal(FORK, DELETES), 1, owners=1, forks=1)
    before = repr(outcome)
    first = judge(FORK, DELETES, outcome)
    assert judge(FORK, DELETES, outcome) == first
    assert repr(outcome) == before


def test_a_call_that_shutdown_may_drop_need_not_run() -> None:
    """A late call runs once or not at all where shutdown comes at once; after a settle, once."""
    plan = FaultPlan(by_rank={0: FaultTable(messages_to_delay={"PYTHON_CALL": 1.0})})
    program = Program(2, (Call(0, 1, timeout=0.5), Call(0, 1)), settles=False)
    outcome = ideal(program, plan)
    assert judge(program, plan, outcome) == ()
    assert judge(program, plan, calling(outcome, 1, {"step0": 0})) == ()
    for wrong in ({"step0": 2}, {"step1": 0}):
        (violation,) = judge(program, plan, calling(outcome, 1, wrong))
        assert (violation.promise, violation.rank) == ("NotRunOnce", 1)
    settled = dataclasses.replace(program, settles=True)
    (violation,) = judge(settled, plan, calling(ideal(settled, plan), 1, {"step0": 0}))
    assert (violation.promise, violation.rank) == ("NotRunOnce", 1)


def test_a_run_that_ends_at_a_settle_owes_no_report_of_its_shutdown() -> None:
    """A finding may explain what ranks hold there; then no rank has shut down, or said it leaks."""
    steps = (Own(0, "a"), Share(0, "a", 1, "b"), Settle())
    plan = FaultPlan(others=(MessageFault(0, "fail", "PYTHON_CALL", to=1),))
    program = Program(2, steps, settles=False, end=End("at once"))
    outcome = ideal(program, plan)
    silent = tuple(
        dataclasses.replace(rank, shutdown_error=None, exit_code=0) for rank in outcome.ranks
    )
    shut = dataclasses.replace(outcome, ranks=silent)
    assert [one.promise for one in judge(program, plan, shut, aside={2})] == ["MissingError"]
    failed = PhaseOutcome("settle", "failed", 40.0, 1.0, 30.0)
    kept = tuple(phase for phase in shut.phases if phase.name != "shutdown")
    killed = tuple(dataclasses.replace(rank, exit_code=None) for rank in silent)
    cut = dataclasses.replace(shut, phases=(*kept, failed), ranks=killed)
    promises = {one.promise for one in judge(program, plan, cut, aside={2})}
    assert promises <= {"MessagesDiffer", "FaultsDiffer"}
