"""The model beyond the retry budget, against counts made by hand: what is lost, what follows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import ErrorClass, Prediction, predict
from rpcprops.outcomes import Counters
from rpcprops.programs import (
    Bump,
    Call,
    Chain,
    Context,
    Count,
    Drop,
    Fetch,
    Flavour,
    Linear,
    Module,
    Nest,
    Optimize,
    Own,
    Program,
    Refused,
    Remote,
    Settle,
    Share,
    Step,
    Through,
    Wait,
)

ACCEPT = MessageType.RREF_CHILD_ACCEPT
FORK = MessageType.RREF_FORK_REQUEST
DELETE = MessageType.RREF_USER_DELETE
CLEANUP = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
CALL = MessageType.PYTHON_CALL
REMOTE = MessageType.PYTHON_REMOTE_CALL
FETCH = MessageType.PYTHON_RREF_FETCH_CALL
SCRIPT_CALL = MessageType.SCRIPT_CALL
SCRIPT_REMOTE = MessageType.SCRIPT_REMOTE_CALL
SCRIPT_FETCH = MessageType.SCRIPT_RREF_FETCH_CALL

NOTHING = Counters()
ONE = Counters(owners=1, forks=1)


def losing(message: MessageType, count: int = 1, *ranks: int) -> FaultPlan:
    """A plan under which some ranks, or all, fail to send a type so often."""
    table = FaultTable([message], count)
    return FaultPlan(by_rank=dict.fromkeys(ranks, table)) if ranks else FaultPlan(table)


def predicted(plan: FaultPlan, *steps: Step, world_size: int = 3) -> Prediction:
    """The prediction for some steps."""
    return predict(Program(world_size, steps), plan)


def errors(prediction: Prediction) -> list[ErrorClass]:
    """How each step ends."""
    return [step.error for step in prediction.steps]


def lost(prediction: Prediction) -> list[MessageType]:
    """The messages that are never delivered."""
    return [send.message for send in prediction.sends if not send.delivered]


# Messages that torch sends once.


@pytest.mark.parametrize("count", [1, 5])
def test_a_lost_call_raises_at_its_caller_and_runs_nowhere(count: int) -> None:
    """Each Python call has a payload of its own, so each is lost, however often payloads fail."""
    seen = predicted(losing(CALL, count, 0), Call(0, 1), Call(0, 1), Call(1, 0))
    assert errors(seen) == ["injected", "injected", ""]
    assert [dict(calls) for calls in seen.calls] == [{"step2": 1}, {}, {}]
    assert seen.failures() == ({CALL: 2}, {}, {})
    assert lost(seen) == [CALL, CALL]


def test_a_lost_call_is_not_tried_again() -> None:
    """Its failure is no retry, so a settle waits for none."""
    seen = predicted(losing(CALL, 1, 0), Call(0, 1), Settle())
    assert seen.retried == (0, 0, 0)
    assert seen.steps[1].failures == (0, 0, 0)


def test_where_calls_are_lost_shutdown_cannot_be_graceful() -> None:
    """It gathers by Python calls, of any rank; other types leave it alone."""
    assert not predicted(losing(CALL, 1, 2), Call(0, 1)).graceful
    assert predicted(losing(CALL, 1, 2), Call(0, 1)).last_sends == ()
    assert predicted(losing(SCRIPT_CALL), Call(0, 1)).graceful


def test_the_builtin_calls_of_a_rank_have_one_payload() -> None:
    """A builtin call holds its function and no values, so two failures are two calls lost in all.

    TorchScript calls are apart from builtin ones, those that raise from those that do not, and one
    rank's from another's.
    """
    builtin = Call(0, 1, flavour="builtin")
    steps = (builtin, Call(0, 2, (9.0,), (9.0,), "builtin"), builtin, builtin)
    assert errors(predicted(losing(SCRIPT_CALL, 2), *steps)) == ["injected"] * 2 + [""] * 2
    others = (
        Call(0, 1, flavour="script"),
        Call(0, 1, flavour="script", raises=True),
        Call(1, 0, flavour="builtin"),
        Call(0, 1, flavour="script"),
        Call(0, 1, flavour="script", raises=True),
    )
    seen = predicted(losing(SCRIPT_CALL, 1), builtin, *others)
    assert errors(seen) == ["injected"] * 4 + ["", "remote"]


def test_the_fetches_of_one_value_at_one_rank_have_one_payload() -> None:
    """Whatever handle they go through; another value's are apart, and another rank's."""
    seen = predicted(
        losing(FETCH, 2),
        Remote(0, 1, "a"),
        Share(0, "a", 0, "same"),
        Share(0, "a", 2, "there"),
        Remote(0, 1, "other"),
        Fetch(0, "a"),
        Fetch(0, "same"),
        Fetch(0, "a"),
        Fetch(0, "other"),
        Fetch(2, "there"),
    )
    assert errors(seen)[4:] == ["injected", "injected", "", "injected", "injected"]
    assert [step.value for step in seen.steps[6:7]] == [[3.0]]


@pytest.mark.parametrize(
    ("flavour", "message"), [("python", FETCH), ("builtin", SCRIPT_FETCH), ("script", SCRIPT_FETCH)]
)
def test_a_lost_fetch_is_of_the_type_of_its_value(flavour: Flavour, message: MessageType) -> None:
    """A value of a Python function is fetched by another message than TorchScript's."""
    steps = (Remote(0, 1, "a", flavour=flavour), Fetch(0, "a"))
    for fails in (FETCH, SCRIPT_FETCH):
        error = "injected" if fails is message else ""
        assert errors(predicted(losing(fails, 1), *steps)) == ["", error]


def test_a_fetch_that_a_called_function_loses_is_what_it_raises() -> None:
    """The caller sees a remote error, and the function has run."""
    seen = predicted(losing(FETCH, 1, 2), Remote(0, 1, "a"), Call(0, 2, right="a"), Drop(0, "a"))
    assert errors(seen) == ["", "remote", ""]
    assert dict(seen.calls[2]) == {"step1": 1}
    assert seen.counters == (NOTHING,) * 3


def test_a_lost_call_shows_when_its_future_is_waited_for() -> None:
    """Making it shows nothing."""
    seen = predicted(losing(CALL, 1, 0), Call(0, 1, wait="later", out="f"), Wait(0, "f"))
    assert errors(seen) == ["", "injected"]


def test_a_lost_count_does_not_count() -> None:
    """The counter has not heard of it."""
    seen = predicted(losing(CALL, 1, 0), Count(1, 2), Count(0, 2), Count(1, 2))
    assert errors(seen) == ["", "injected", ""]
    assert [step.value for step in seen.steps] == [1, None, 2]


def test_a_link_of_a_chain_that_is_lost_raises_at_its_beginning() -> None:
    """The first call has run, the second has not; torch passes the error on as it is."""
    seen = predicted(losing(CALL, 1, 1), Chain(0, 1, 2))
    assert errors(seen) == ["injected"]
    assert [dict(calls) for calls in seen.calls] == [{}, {"step0": 1}, {}]


def test_a_bump_that_is_lost_changes_nothing() -> None:
    """The value is what it was, but the user's handle can never be deleted (see below)."""
    steps = (Remote(0, 1, "a", flavour="builtin"), Bump(0, "a"), Fetch(0, "a"), Drop(0, "a"))
    seen = predicted(losing(SCRIPT_CALL, 1, 0), *steps)
    assert errors(seen) == ["", "injected", "", ""]
    assert seen.steps[2].value == [3.0]
    assert seen.counters == (NOTHING, ONE, NOTHING)


# Handles whose messages are lost.


def test_a_handle_that_is_lost_on_its_way_never_comes() -> None:
    """Every later step with it is without it, and no message of its own is ever sent."""
    seen = predicted(
        losing(CALL, 1, 0),
        Remote(0, 1, "a"),
        Share(0, "a", 2, "b"),
        Fetch(2, "b"),
        Share(2, "b", 1, "c"),
        Call(2, 0, right="b"),
        Through(2, "b"),
        Fetch(1, "c"),
        Drop(2, "b"),
        Drop(0, "a"),
    )
    assert errors(seen) == ["", "injected"] + ["missing"] * 6 + [""]
    assert Counter(send.message for send in seen.sends) == {REMOTE: 1, CALL: 1}


def test_a_user_keeps_a_handle_whose_child_is_lost() -> None:
    """It waits for an accept that never comes, so it sends no delete: the documented leak.

    Its graceful shutdown waits for that accept first, and may delete too late for the owner.
    """
    plan = losing(SCRIPT_CALL, 1, 0)
    steps = (Remote(0, 1, "a", flavour="builtin"), Bump(0, "a"), Drop(0, "a"), Settle())
    seen = predicted(plan, *steps)
    assert DELETE not in [send.message for send in seen.sends]
    assert seen.steps[3].counters == seen.counters == (NOTHING, ONE, NOTHING)
    assert seen.may_exit_early == {0}
    assert [send.message for send in seen.last_sends] == [DELETE]
    assert not seen.leaking
    assert seen.may_leak == {1}


def test_an_owner_keeps_a_fork_that_is_lost() -> None:
    """It has counted the fork when it sent it, and nobody will ever delete it: it must say so."""
    steps = (Own(0, "a"), Bump(0, "a"), Share(0, "a", 1, "b"), Drop(0, "a"))
    seen = predicted(losing(CALL, 1, 0), *steps)
    assert errors(seen)[2] == "injected"
    assert seen.counters == (ONE, NOTHING, NOTHING)
    typed = predicted(losing(SCRIPT_CALL, 1, 0), *steps)
    assert errors(typed) == ["", "injected", "", ""]
    assert typed.counters == (Counters(owners=1, forks=2), NOTHING, NOTHING)
    assert typed.leaking == {0}


def test_a_lost_question_for_the_type_is_asked_once() -> None:
    """The handle remembers that asking failed: the next call through it sends nothing."""
    steps = (Remote(0, 1, "a"), Through(0, "a"), Through(0, "a", "async"))
    seen = predicted(losing(CALL, 1, 0), *steps)
    assert errors(seen) == ["", "injected", "injected"]
    assert [send.message for send in seen.sends] == [REMOTE, CALL]


# Creations that are lost.


@pytest.mark.parametrize(
    ("flavour", "message"),
    [("python", REMOTE), ("builtin", SCRIPT_REMOTE), ("script", SCRIPT_REMOTE)],
)
def test_a_creation_that_is_lost_shows_when_it_is_used(
    flavour: Flavour, message: MessageType
) -> None:
    """``remote`` itself raises nothing; each use does, sends nothing, and nothing is kept."""
    seen = predicted(
        losing(message, 1, 0),
        Remote(0, 1, "a", flavour=flavour),
        Fetch(0, "a"),
        Share(0, "a", 2, "b"),
        Call(0, 1, right="a"),
        Remote(0, 2, "c", right="a"),
        Through(0, "a"),
        Drop(0, "a"),
        Settle(),
    )
    assert errors(seen) == ["", *["creation"] * 5, "", ""]
    assert [send.message for send in seen.sends] == [message, DELETE]
    assert not any(seen.calls)
    assert seen.counters == seen.steps[7].counters == (NOTHING,) * 3


def test_the_second_creation_that_fails_at_a_rank_is_a_known_finding() -> None:
    """One is fine, one at each of two ranks is; the second of a process is marked."""
    plan = losing(REMOTE, 1)
    assert predicted(plan, Remote(0, 1, "a"), Remote(1, 0, "b")).known_bugs == frozenset()
    seen = predicted(plan, Remote(0, 1, "a"), Remote(0, 2, "b"))
    assert seen.known_bugs == {"second-failed-remote"}


def test_a_nested_creation_that_is_lost() -> None:
    """The function ran and returned its handle, which cannot be sent: no handle comes back."""
    seen = predicted(losing(REMOTE, 1, 1), Nest(0, 1, 2, "n"), Fetch(0, "n"))
    assert errors(seen) == ["creation", "missing"]
    assert [dict(calls) for calls in seen.calls] == [{}, {"step0": 1}, {}]
    assert seen.counters == (NOTHING,) * 3


@pytest.mark.parametrize(("message", "error"), [(REMOTE, "creation"), (CALL, "injected")])
@pytest.mark.parametrize("step", [Module(0, 1), Optimize(0, "x", (1,))])
def test_what_trains_shows_what_was_lost_first(
    step: Step, message: MessageType, error: ErrorClass
) -> None:
    """A module or a parameter that was not made, or the first call with it that was not sent."""
    seen = predicted(losing(message, 1, 0), step)
    assert errors(seen) == [error]


def test_a_module_that_is_sent_raises_what_was_lost_there() -> None:
    """The call that its new rank makes is lost, so the function there raises."""
    assert errors(predicted(losing(CALL, 1, 1), Module(0, 1, sent=True))) == ["remote"]


def test_a_parameter_that_cannot_be_fetched() -> None:
    """Inside the context it is fetched by another message, so it shows once the step was made.

    The context has ended by then, and is cleaned up.
    """
    seen = predicted(losing(FETCH, 1, 0), Optimize(0, "x", (1,)), Settle())
    assert errors(seen) == ["injected", ""]
    assert Counter(send.message for send in seen.sends)[CLEANUP] == 2
    assert seen.counters == (NOTHING,) * 3


# Retries that run out.


SHARED = (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Drop(0, "a"), Drop(2, "b"))


@pytest.mark.parametrize(("count", "left"), [(5, NOTHING), (6, ONE), (600, ONE)])
def test_a_delete_that_is_given_up_leaves_its_fork(count: int, left: Counters) -> None:
    """Six tries, and no more however many would fail; the owner keeps the value and says so."""
    seen = predicted(losing(DELETE, count, 2), *SHARED)
    assert seen.counters == (NOTHING, left, NOTHING)
    assert seen.failures() == ({}, {}, {DELETE: min(count, 6)})
    assert seen.leaking == ({1} if left == ONE else frozenset())
    assert seen.graceful


def test_a_fork_request_that_is_given_up_is_a_known_finding() -> None:
    """It and its delete share six failures and more: what is left over hits the delete."""
    seen = predicted(losing(FORK, 6, 2), *SHARED)
    assert seen.known_bugs == {"fork-request-given-up"}
    assert seen.failures() == ({}, {}, {FORK: 6})
    both = FaultPlan(by_rank={2: FaultTable([FORK, DELETE], 9)})
    assert predicted(both, *SHARED).failures() == ({}, {}, {FORK: 6, DELETE: 3})


def test_a_rank_in_a_hurry_may_fail_some_of_its_last_deletes() -> None:
    """What failed before the last settle has; of its last delete none to all six tries may."""
    table = FaultTable([SCRIPT_CALL, ACCEPT, DELETE], 2)
    steps = (
        Remote(0, 1, "a", flavour="builtin"),
        Remote(0, 1, "c"),
        Drop(0, "c"),
        Bump(0, "a"),
        Settle(),
    )
    seen = predicted(FaultPlan(by_rank={0: table, 2: table}), *steps)
    assert seen.may_exit_early == {0}
    assert seen.retried == (2, 0, 0)
    assert seen.failed_sends() == (range(2, 9), range(1), range(1))


@pytest.mark.parametrize(("failing", "error"), [([], ""), ([CALL], "missing")])
def test_a_context_that_was_never_entered_has_no_id(
    failing: list[MessageType], error: ErrorClass
) -> None:
    """A layer's step asks for the parameters first, and where that fails no context is made."""
    lost = FaultPlan(by_rank={0: FaultTable(failing, len(failing))})
    seen = predict(Program(2, (Linear(0, "x", 1), Settle(), Refused(0, "x"))), lost)
    assert seen.steps[2].error == error


@pytest.mark.parametrize(
    ("steps", "failures", "early"),
    [
        ((), 2, {0}),
        ((Settle(),), 2, set()),
        ((), 0, set()),
    ],
)
def test_no_shutdown_waits_for_the_delete_of_what_was_never_made(
    steps: tuple[Step, ...], failures: int, early: set[int]
) -> None:
    """Its owner has nothing to delete, so the rank may leave while the delete is sent again."""
    table = FaultTable([REMOTE, *([DELETE] if failures else [])], 2)
    lost = FaultPlan(by_rank={0: table})
    program = Program(2, (Remote(0, 1, "a"), Drop(0, "a"), *steps), settles=False)
    assert predict(program, lost).may_exit_early == early


def test_a_rank_in_no_hurry_fails_all_of_its_last_deletes() -> None:
    """Nor more, nor less, wherever it still holds a handle."""
    seen = predicted(losing(DELETE, 2, 0), Remote(0, 1, "a"), Remote(0, 1, "b"), Drop(0, "b"))
    assert seen.may_exit_early == frozenset()
    assert seen.failed_sends() == (range(4, 5), range(1), range(1))


def test_an_accept_that_is_given_up_keeps_the_parent() -> None:
    """The sender of the handle waits for ever, and does not delete; the receiver is well."""
    seen = predicted(losing(ACCEPT, 6, 2), *SHARED)
    assert [send.message for send in seen.sends if send.rank == 0] == [REMOTE, CALL]
    assert seen.counters == (NOTHING, ONE, NOTHING)
    assert seen.may_exit_early == {0}
    assert seen.may_leak == {1}


def test_what_is_still_held_is_deleted_by_shutdown() -> None:
    """Those deletes come after the last settle and are counted apart; they may be given up too."""
    held = (Remote(0, 1, "a"), Share(0, "a", 2, "b"))
    seen = predicted(losing(DELETE, 3), *held)
    assert seen.failures() == ({}, {}, {})
    assert seen.last_failures() == ({DELETE: 3}, {}, {DELETE: 3})
    assert seen.leaking == frozenset()
    assert predicted(losing(DELETE, 6), *held).leaking == {1}


def test_a_cleanup_that_is_given_up_leaves_the_context_behind() -> None:
    """The rank that gave up says so, and those that it could not reach still know the id."""
    steps = (Context(0, "x", (1,)), Settle(), Refused(0, "x"), Refused(1, "x"), Refused(2, "x"))
    seen = predicted(losing(CLEANUP, 21, 0), *steps)
    assert [step.value["refused"] for step in seen.steps[2:]] == [True, False, True]
    assert seen.counters == (NOTHING, Counters(contexts=1), NOTHING)
    assert seen.may_warn_unreleased_context == {0}
    assert seen.failures() == ({CLEANUP: 21}, {}, {})
    # What rank 1 fails is no loss: rank 0 has let go of the context before.
    other = predicted(losing(CLEANUP, 21, 1), *steps)
    assert other.counters == (NOTHING,) * 3
    assert other.may_warn_unreleased_context == {1}


def test_a_cleanup_stops_where_it_is_given_up() -> None:
    """In 0 -> 1 -> 2 the middle rank is reached, and the last is not."""
    chain = Context(0, "x", (1, 2), nested=True)
    seen = predicted(losing(CLEANUP, 50, 1), chain)
    assert seen.counters == (NOTHING, NOTHING, Counters(contexts=1))
    assert seen.may_warn_unreleased_context == {1}


@pytest.mark.parametrize(
    ("count", "certain", "kept"), [(40, True, 0), (41, False, 1), (42, True, 1), (99, True, 1)]
)
def test_the_cleanups_of_a_rank_share_their_failures(count: int, certain: bool, kept: int) -> None:
    """Two peers, 21 tries each: 40 failures are survived by both and 42 by neither.

    Between, one of them gives up; nobody can say which, so nothing after is certain.
    """
    seen = predicted(losing(CLEANUP, count, 0), Context(0, "x", (1, 2)))
    assert seen.certain is certain
    assert seen.failures()[0] == {CLEANUP: min(count, 42)}
    assert [counters.contexts for counters in seen.counters] == [0, kept, kept]


# Timeouts that are not a call's.


def late(message: MessageType) -> FaultPlan:
    """A plan under which a type of rank 0 is two seconds late."""
    return FaultPlan(by_rank={0: FaultTable(messages_to_delay={message: 2.0})})


def test_a_fetch_that_is_late_times_out() -> None:
    """Only a fetch by message can; at the owner it is a look at one's own value."""
    seen = predicted(late(FETCH), Remote(0, 1, "a"), Fetch(0, "a", timeout=0.5), Fetch(0, "a"))
    assert errors(seen) == ["", "timeout", ""]
    assert [step.value for step in seen.steps] == [None, None, [3.0]]
    assert errors(predicted(late(FETCH), Own(0, "a"), Fetch(0, "a", timeout=0.5))) == ["", ""]


def test_a_share_that_is_late_arrives_all_the_same() -> None:
    """After a settle the handle is there, and has sent what it sends."""
    seen = predicted(
        late(CALL),
        Remote(0, 1, "a"),
        Share(0, "a", 2, "b", timeout=0.5),
        Settle(),
        Fetch(2, "b"),
    )
    assert errors(seen) == ["", "timeout", "", ""]
    assert seen.steps[3].value == [3.0]
    assert seen.steps[2].counters[1] == Counters(owners=1, forks=2)


def test_a_creation_that_is_late_shows_when_it_is_used() -> None:
    """Its user believes that it failed, though the value is made, and deleted once dropped.

    A drop before the settle may overtake the creation: a known finding. After it, it does not.
    """
    made = Remote(0, 1, "a", timeout=0.5)
    seen = predicted(late(REMOTE), made, Fetch(0, "a"), Settle(), Drop(0, "a"))
    assert errors(seen) == ["", "creation", "", ""]
    assert seen.steps[2].counters == (NOTHING, ONE, NOTHING)
    assert seen.counters == (NOTHING,) * 3
    assert dict(seen.calls[1]) == {"step0": 1}
    assert seen.known_bugs == frozenset()
    assert predicted(late(REMOTE), made, Drop(0, "a")).known_bugs == {"timed-out-remote-dropped"}


@pytest.mark.parametrize(("settles", "met"), [(False, {"timed-out-remote-dropped"}), (True, set())])
def test_a_shutdown_drops_a_creation_that_has_timed_out(
    *, settles: bool, met: frozenset[str]
) -> None:
    """It deletes what is still held, before the owner has made it; a settle waits for that."""
    made = Remote(0, 1, "a", timeout=3.0, seconds=12.0)
    program = Program(2, (made,), settles=settles)
    assert predict(program, FaultPlan()).known_bugs == met


@pytest.mark.parametrize("at", [0, 1])
def test_a_shutdown_waits_only_so_long_for_a_value(at: int) -> None:
    """What takes longer is said to be lost, so a program must wait for it, at its owner too."""
    made = Remote(at, 1, "a", seconds=130.0)
    for waits in (Fetch(at, "a"), Settle()):
        predict(Program(2, (made, waits), settles=False), FaultPlan())
    predict(Program(2, (replace(made, seconds=12.0),), settles=False), FaultPlan())
    with pytest.raises(UsageError, match=r"130 s \(virtual\) to make.*put a Fetch or a Settle"):
        predict(Program(2, (made,), settles=False), FaultPlan())


def test_an_owner_that_has_forgotten_its_rref_is_not_waited_for() -> None:
    """Its rank has forgotten it when its creation times out: late-remote-to-self."""
    made = Remote(1, 1, "a", timeout=20.0, seconds=130.0)
    met = {"late-remote-to-self"}
    assert predict(Program(2, (made,), settles=False), FaultPlan()).known_bugs == met
    with pytest.raises(UsageError, match=r"may take 90 s \(virtual\) to make"):
        predict(Program(2, (replace(made, timeout=90.0),), settles=False), FaultPlan())


def test_a_future_that_is_late_times_out_where_it_is_waited_for() -> None:
    """The timeout is the call's, wherever its value is asked for."""
    call = Call(0, 1, timeout=0.5, wait="later", out="f")
    assert errors(predicted(late(CALL), call, Wait(0, "f"))) == ["", "timeout"]


def test_a_call_through_a_handle_may_time_out_in_the_question_or_in_the_call() -> None:
    """The question is asked once, so the second call asks no more; a timed-out question would."""
    asked = (Remote(0, 1, "a"), Through(0, "a"), Through(0, "a", timeout=0.5))
    seen = predicted(late(CALL), *asked)
    assert errors(seen) == ["", "", "timeout"]
    assert seen.known_bugs == frozenset()
    seen = predicted(late(CALL), Remote(0, 1, "a"), Through(0, "a", timeout=0.5), Through(0, "a"))
    assert errors(seen) == ["", "timeout", ""]
    assert seen.known_bugs == {"timed-out-type-query"}


@pytest.mark.parametrize(
    ("steps", "plan", "met"),
    [
        # The function that was to make the value has raised, so its type is an error.
        ((Remote(0, 1, "a", raises=True), Through(0, "a", how="async")), FaultPlan(), True),
        ((Remote(0, 1, "a", raises=True), Through(0, "a")), FaultPlan(), False),
        # The owner keeps no fork of its own for it.
        ((Remote(0, 0, "a", raises=True), Through(0, "a", how="async")), FaultPlan(), False),
        ((Remote(0, 1, "a"), Through(0, "a", how="async")), FaultPlan(), False),
        ((Remote(0, 1, "a"), Through(0, "a", timeout=0.5, how="async")), late(CALL), True),
        # A question that cannot be sent raises at once: there is no future yet.
        ((Remote(0, 1, "a"), Through(0, "a", how="async")), losing(CALL), False),
        (
            (
                Remote(0, 1, "a", raises=True),
                Through(0, "a"),
                Through(0, "a", how="async"),
            ),
            FaultPlan(),
            True,
        ),
        # The type is known, and the timeout of the call comes while its sender delays it.
        (
            (Remote(0, 1, "a"), Through(0, "a"), Through(0, "a", timeout=0.5, how="async")),
            late(CALL),
            True,
        ),
        (
            (Remote(0, 1, "a"), Through(0, "a"), Through(0, "a", timeout=0.5)),
            late(CALL),
            False,
        ),
        # It may come after that, in a thread of the agent, because the answer is late.
        (
            (Remote(0, 1, "a"), Through(0, "a"), Through(0, "a", timeout=0.5, how="async")),
            FaultPlan(by_rank={1: FaultTable(messages_to_delay={ACCEPT: 2.0})}),
            False,
        ),
    ],
)
def test_an_asynchronous_call_through_a_handle_whose_type_is_an_error(
    steps: tuple[Step, ...], plan: FaultPlan, met: bool
) -> None:
    """The future of such a call keeps the RRef; a synchronous call has no future to keep it."""
    assert ("failed-async-proxy" in predicted(plan, *steps).known_bugs) is met


def test_an_error_of_the_function_does_not_hide_the_timeout() -> None:
    """What a late function raises comes later than the timeout; what was lost comes at once."""
    late_call = FaultTable(messages_to_delay={CALL: 2.0})
    plan = FaultPlan(by_rank={0: late_call})
    assert errors(predicted(plan, Call(0, 1, raises=True, timeout=0.5))) == ["timeout"]
    lost_call = FaultTable([CALL], 1, {CALL: 2.0})
    plan = FaultPlan(by_rank={0: lost_call})
    assert errors(predicted(plan, Call(0, 1, raises=True, timeout=0.5))) == ["injected"]


def test_what_may_go_either_way_makes_nothing_after_it_certain() -> None:
    """A timeout near its delay: either is right, and what fired cannot be told."""
    plan = late(CALL)
    assert not predicted(plan, Call(0, 1, timeout=2.0)).certain
    assert predicted(plan, Call(0, 1, timeout=0.5), Call(0, 1, timeout=90)).certain


def test_a_creation_that_may_go_either_way_is_refused() -> None:
    """What then exists where cannot be told, so there is nothing to judge."""
    with pytest.raises(UsageError, match="nobody can tell whether its creation times out"):
        predicted(late(REMOTE), Remote(0, 1, "a", timeout=2.0))


def test_fault_seconds_add_up_waits_and_delays() -> None:
    """A delete that fails twice waits 1 s and 1 s, and then is sent half a second late."""
    plan = FaultPlan(FaultTable([DELETE], 2, {DELETE: 0.5}))
    seen = predicted(plan, Remote(0, 1, "a"), Drop(0, "a"))
    assert seen.fault_seconds(plan) == pytest.approx(2.5)
    # Given up after the fifth wait: never sent, so never late.
    abandoned_calls = FaultPlan(FaultTable([DELETE], 6, {DELETE: 0.5}))
    seen = predicted(abandoned_calls, Remote(0, 1, "a"), Drop(0, "a"))
    assert seen.fault_seconds(abandoned_calls) == pytest.approx(1 + 1 + 1.5 + 2.25 + 3.375)


def test_a_call_that_is_late_may_be_dropped_by_a_shutdown_that_comes_at_once() -> None:
    """Its caller no longer waits for it; a settle does, so it must have run by then."""
    calls = (
        Call(0, 1, timeout=0.5),
        Settle(),
        Own(0, "a"),
        Share(0, "a", 1, "b", timeout=0.5),
        Call(0, 1, timeout=0.5, wait="later", out="f"),
        Call(0, 1, flavour="builtin", timeout=0.5),
        Call(0, 2),
    )
    program = Program(3, calls, settles=False)
    delays = {CALL: 2.0, SCRIPT_CALL: 2.0}
    seen = predict(program, FaultPlan(by_rank={0: FaultTable(messages_to_delay=delays)}))
    assert [set(names) for names in seen.abandoned_calls] == [set(), {"step3", "step4"}, set()]
    assert dict(seen.calls[1]) == {"step0": 1, "step3": 1, "step4": 1}
    assert dict(seen.steps[1].calls[1]) == {"step0": 1}
    assert predicted(late(CALL), *calls).abandoned_calls == (frozenset(),) * 3
    made = Program(3, (Remote(0, 1, "a", timeout=0.5),), settles=False)
    assert predict(made, late(REMOTE)).abandoned_calls[1] == {"step0"}


@pytest.mark.parametrize(
    ("steps", "meets"),
    [
        ((Remote(0, 1, "a"),), True),
        ((Remote(0, 1, "a"), Drop(0, "a")), True),
        ((Remote(0, 1, "a", flavour="script"), Share(0, "a", 2, "b"), Drop(0, "a")), True),
        ((Nest(0, 2, 1, "a"),), True),
        ((Remote(0, 1, "a"), Fetch(0, "a")), False),
        ((Remote(0, 1, "a"), Settle()), False),
        ((Remote(0, 1, "a"), Settle(), Drop(0, "a")), False),
        ((Remote(0, 1, "a", flavour="builtin"), Bump(0, "a")), False),
        ((Context(0, "x", (1,), rrefs=True),), False),
        ((Module(0, 1, (1.0,)),), False),
        ((Own(0, "a"), Share(0, "a", 1, "b")), False),
    ],
)
def test_a_shutdown_may_overtake_a_creation(steps: tuple[Step, ...], meets: bool) -> None:
    """Where its delete is tried again, and nothing has shown that the owner has the RRef."""
    program = Program(3, steps, settles=False)
    expected = {"shutdown-overtakes-creation"} if meets else set()
    assert predict(program, losing(DELETE)).known_bugs == expected
    assert predict(program, FaultPlan()).known_bugs == set()
    assert predicted(losing(DELETE), *steps).known_bugs == set()


def test_a_creation_that_is_lost_is_overtaken_by_nothing() -> None:
    """Its owner never has the RRef, so nothing can stay there."""
    table = FaultTable([DELETE, REMOTE], 1)
    for steps in ((Remote(0, 1, "a"),), (Remote(0, 1, "a"), Drop(0, "a"))):
        program = Program(2, steps, settles=False)
        assert predict(program, FaultPlan(table)).known_bugs == set()
