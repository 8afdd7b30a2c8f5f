"""Kinds of step with a timeout and a function that sleeps: what they predict, and what is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from random import Random
from typing import Any, TypeVar

import pytest

from rpcprops._json import from_json, to_json
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import predict
from rpcprops.programs import (
    STEP_TYPES,
    Bump,
    Call,
    Carry,
    Chain,
    Count,
    Default,
    Deferred,
    Drop,
    Fetch,
    Invoke,
    Method,
    Nest,
    Program,
    Raising,
    Reach,
    Recurse,
    Remote,
    Scripted,
    Settle,
    Share,
    Step,
    Through,
)
from rpcprops.strategies.drawing import StepDrawer
from tests.seeded._programs import IMPATIENT_WAYS

DELAYED = FaultPlan(FaultTable(messages_to_delay={"PYTHON_CALL": 2.0, "SCRIPT_CALL": 2.0}))
T = TypeVar("T")
LATE: dict[str, Any] = {"timeout": 3.0, "seconds": 12.0}
IN_TIME: dict[str, Any] = {"timeout": 900.0, "seconds": 12.0}
MAKERS: dict[str, Callable[..., Any]] = {
    "carry": lambda **timed: Carry(0, 1, "int", **timed),
    "echo": lambda **timed: Carry(0, 1, "list", "echo", **timed),
    "chain": lambda **timed: Chain(0, 1, 2, **timed),
    "count": lambda **timed: Count(0, 1, **timed),
    "deferred": lambda **timed: Deferred(0, 1, 2, "again", **timed),
    "scripted": lambda **timed: Scripted(0, 1, 2, "remote", **timed),
    "invoke": lambda **timed: Invoke(0, 1, "bound", **timed),
    "raising": lambda **timed: Raising(0, 1, **timed),
    "method": lambda **timed: Method(0, 1, **timed),
}
#: A call through an RRef whose type of value is known.
KNOWN = (Remote(0, 1, "a"), Fetch(0, "a"), Through(0, "a"))


def error(step: Step, plan: FaultPlan | None = None, rpc_timeout: float | None = None) -> str:
    """How a step alone must end."""
    return predict(Program(3, (step,), rpc_timeout=rpc_timeout), plan or FaultPlan()).steps[0].error


@pytest.mark.parametrize("kind", MAKERS)
def test_a_timeout_is_compared_with_what_the_answer_waits_for(kind: str) -> None:
    """A timeout ends before a function that sleeps longer, and before a delay of the call."""
    make = MAKERS[kind]
    assert error(make(**LATE)) == "timeout"
    assert error(make(**IN_TIME)) == ""
    assert error(make(seconds=12.0)) == ""
    assert error(make(timeout=1.0), DELAYED) == "timeout"
    assert error(make(seconds=130.0), rpc_timeout=100.0) == "timeout"
    assert error(make(seconds=145.0, timeout=800.0), rpc_timeout=100.0) == ""


@pytest.mark.parametrize(
    ("step", "waits"),
    [
        (Chain(0, 1, 2, timeout=3.0), 4.0),
        (Deferred(0, 1, 2, timeout=3.0), 4.0),
        (Deferred(0, 1, 2, "again", timeout=5.0), 6.0),
        (Deferred(0, 1, 2, "done", timeout=1.0), 2.0),
        (Scripted(0, 1, 2, timeout=3.0), 4.0),
        (Scripted(0, 1, 2, "future", timeout=3.0), 4.0),
    ],
)
def test_a_deferred_answer_waits_for_what_its_function_calls(step: Step, waits: float) -> None:
    """Each further call is delayed too, and its delay counts against the first timeout."""
    predicted = predict(Program(3, (step,)), DELAYED).steps[0]
    assert predicted.error == "timeout"
    assert predicted.slack == waits - step.timeout  # type: ignore[attr-defined]


def test_a_slow_argument_of_a_proxy_ends_by_the_timeout() -> None:
    """The owner reads it before it calls; where its type is asked for first, that is quick."""
    for before in (KNOWN, KNOWN[:2]):
        hows: tuple[Any, ...] = ("sync", "async")
        said = [
            predict(Program(2, (*before, Through(0, "a", how=how, **timed))), FaultPlan())
            for how in hows
            for timed in (LATE, IN_TIME)
        ]
        ends = [(one.steps[-1].error, one.steps[-1].value) for one in said]
        assert ends == [("timeout", None), ("", [4.0])] * 2
        # The first one may time out before it calls.
        assert [one.certain for one in said] == [before is KNOWN, True] * 2
    with pytest.raises(UsageError, match="seconds of how='remote'"):
        Program(2, (*KNOWN, Through(0, "a", "remote", out="b", seconds=1.0)))


def test_what_a_call_does_after_its_timeout_is_counted() -> None:
    """The function runs all the same, and so does what it calls; only shutdown may drop them."""
    steps = (Deferred(0, 1, 2, "again", **LATE), Settle())
    predicted = predict(Program(3, steps), FaultPlan())
    assert predicted.steps[1].calls == ({}, {"step0": 1}, {"step0/then": 1, "step0/again": 1})
    assert not any(predicted.abandoned_calls)
    unsettled = predict(Program(3, steps[:1], settles=False), FaultPlan())
    abandoned = [set(calls) for calls in unsettled.abandoned_calls]
    assert abandoned == [set(), {"step0"}, {"step0/then", "step0/again"}]


def test_a_program_does_not_end_before_a_script_that_makes_an_rref() -> None:
    """Its function may do that after the timeout, when a shutdown would not wait for it."""
    steps = (Scripted(0, 1, 2, "remote", **LATE), Settle())
    predicted = predict(Program(3, steps), FaultPlan())
    assert predicted.steps[1].calls == ({}, {"step0": 1}, {"step0/then": 1})
    assert not any(held.owners for held in predicted.steps[1].counters)
    with pytest.raises(UsageError, match="may end before its answer"):
        predict(Program(3, steps[:1], settles=False), FaultPlan())
    predict(Program(3, (Scripted(0, 1, 2, **LATE),), settles=False), FaultPlan())


def test_a_callback_raises_whether_its_call_timed_out_or_not() -> None:
    """Its error is the step's value, after a timeout too."""
    for timed in (LATE, IN_TIME):
        (predicted,) = predict(Program(2, (Raising(0, 1, how="then", **timed),)), FaultPlan()).steps
        assert (predicted.error, predicted.value) == ("", {"raised": "RuntimeError", "kept": True})


def test_a_method_that_is_slower_than_its_timeout_ends_with_it() -> None:
    """The question for the type could end by it as well, so the messages are not known."""
    assert not predict(Program(2, (Method(0, 1, **LATE),)), FaultPlan()).certain
    long = Method(0, 1, timeout=70.0, seconds=140.0)
    assert predict(Program(2, (long,)), FaultPlan()).certain


def test_an_argument_that_cannot_be_read_is_answered_at_once() -> None:
    """The function is not called, so it does not sleep."""
    unread = Carry(0, 1, "raises-unpickled", "echo", timeout=70.0, seconds=140.0)
    assert error(unread) == ""


@pytest.mark.parametrize(
    "make",
    [
        lambda: Carry(0, 1, "rref", timeout=3.0),
        lambda: Carry(0, 1, "int", "remote", timeout=3.0),
        lambda: Deferred(0, 1, 2, how="proxy", timeout=3.0),
        lambda: Invoke(0, 1, how="remote", timeout=3.0),
        lambda: Method(0, 1, "remote", timeout=3.0),
        lambda: Raising(0, 1, how="remote", timeout=3.0),
        lambda: Scripted(0, 1, 2, how="remote", timeout=3.0),
    ],
)
def test_a_timeout_that_is_not_modelled_is_refused(make: Any) -> None:
    """Where the value travels by an RRef, the timeout of a step says nothing."""
    with pytest.raises(UsageError, match="is not modelled"):
        Program(3, (make(),))


@pytest.mark.parametrize("form", ["operator", "math", "generator", "lambda", "script"])
def test_what_cannot_sleep_is_refused(form: Any) -> None:
    """A function that is not ours, and one that never runs, cannot be told to sleep."""
    with pytest.raises(UsageError, match="cannot sleep; write 0"):
        Program(2, (Invoke(0, 1, form, seconds=2.0),))


def test_they_travel_as_json() -> None:
    """Programs with their timeouts are the same after a trip through JSON."""
    for program in IMPATIENT_WAYS:
        assert from_json(to_json(program), Program) == program


class Chance(StepDrawer):
    """A drawer that does without Hypothesis, so that a thousand steps are drawn at once."""

    chance = Random(0)

    def pick(self, options: Sequence[T], weights: tuple[float, ...] = ()) -> T:
        """One of some options."""
        return self.chance.choices(options, weights)[0] if weights else self.chance.choice(options)


@pytest.mark.parametrize(
    "op", ["carry", "chain", "count", "deferred", "invoke", "method", "raising", "scripted"]
)
def test_timeouts_are_drawn(op: str) -> None:
    """Each kind is drawn with a function that sleeps, and with a timeout that ends before it."""
    drawn: list[Any] = []
    for _ in range(1000):
        drawer = Chance(lambda _: 0, 2, kinds=(op,))
        assert drawer.add_kind(op)
        drawn += drawer.steps
    assert any(step.seconds and step.timeout is None for step in drawn)
    assert any(step.timeout and not step.seconds for step in drawn)
    assert any(step.seconds > (step.timeout or step.seconds) for step in drawn)


_NO_CALL = "it calls no function of a user"
_SEVERAL = "several calls, of which some come from other ranks: torch has no timeout for them all"
_OF_ITS_OWN = "a function of its own sleeps, and its timeout has another name"
_LIFE = "what it does is the life of a rank, and the calls in it are only its witnesses"
_NOT_SLOW = "its function is one of TorchScript, which cannot sleep"
#: The kinds of step without a timeout, and why.
UNTIMED = {
    **dict.fromkeys(("pause", "settle", "parallel", "refused", "own", "local", "drop"), _NO_CALL),
    **dict.fromkeys(("graph", "train", "optimize", "module", "linear"), _SEVERAL),
    **dict.fromkeys(("outlast", "onward", "default"), _OF_ITS_OWN),
    **dict.fromkeys(("member", "profile", "rejoin"), _LIFE),
    "wait": "the timeout is that of its call",
    "unreached": "its pass waits for ever, and is left alone after a while",
    "fail_twice": "its gradients have the default timeout, which must be longer than the step",
    "ask": "it asks of RRefs what each rank knows without a call, but for the type",
}
#: The kinds of step that have a timeout, and no function that sleeps, and why.
AWAKE = {
    "fetch": "the function is that of its Remote, which may sleep",
    "bump": _NOT_SLOW,
    "retry": "its message is to be late for another reason",
}


def test_each_kind_has_a_timeout_or_a_reason() -> None:
    """A kind of step takes a timeout and may sleep, or one of the lists above says why not."""
    has = {op: {item.name for item in fields(cls)} for op, cls in STEP_TYPES.items()}
    assert set(UNTIMED) == {op for op, names in has.items() if "timeout" not in names}
    timed = {op: names for op, names in has.items() if "timeout" in names}
    assert set(AWAKE) == {op for op, names in timed.items() if "seconds" not in names}


@pytest.mark.parametrize(
    ("timeout", "delay", "error"),
    [(None, 0.0, "remote"), (100.0, 0.0, "remote"), (3.0, 0.0, "unknown"), (3.0, 5.0, "timeout")],
)
def test_what_a_nested_call_raises_may_come_too_late(
    timeout: float | None, delay: float, error: str
) -> None:
    """The error that a function raises has as long as a value to come back."""
    calls = FaultTable([MessageType.PYTHON_CALL], 1)
    late = FaultTable(messages_to_delay={MessageType.PYTHON_CALL: delay} if delay else {})
    plan = FaultPlan(by_rank={0: late, 1: calls})
    seen = predict(Program(3, (Recurse(0, (1, 2), timeout=timeout),)), plan)
    assert seen.steps[0].error == error
    assert seen.certain == (error != "unknown")


def test_after_a_count_that_timed_out_the_next_one_is_not_known() -> None:
    """Nobody knows which of the two comes first, until a settle."""
    steps = (Count(0, 1, **LATE), Count(0, 1), Count(0, 2), Settle(), Count(2, 1))
    predicted = predict(Program(3, steps), FaultPlan())
    shown = [(step.error, step.value) for step in predicted.steps]
    assert [*shown[:3], shown[4]] == [("timeout", None), ("unknown", None), ("", 1), ("", 3)]
    assert not predicted.certain
    assert predict(Program(3, steps[:1] + steps[2:]), FaultPlan()).certain


def test_after_a_bump_that_timed_out_the_value_is_not_known() -> None:
    """A TorchScript function does not say that it ran; what is held is known all the same."""
    plan = FaultPlan(FaultTable(messages_to_delay={"SCRIPT_CALL": 2.0}))
    made = Remote(0, 1, "a", flavour="builtin")
    steps = (made, Bump(0, "a", 1.0), Settle(), Fetch(0, "a"), Drop(0, "a"), Settle())
    seen = predict(Program(2, steps), plan)
    assert [step.error for step in seen.steps] == ["", "timeout", "", "unknown", "", ""]
    assert [counters.owners for counters in seen.steps[2].counters or ()] == [0, 1]
    assert [counters.owners for counters in seen.counters] == [0, 0]
    in_time = predict(Program(2, (made, Bump(0, "a", 100.0), Fetch(0, "a"))), plan)
    assert [step.value for step in in_time.steps] == [None, [4.0], [4.0]]


def test_a_handle_in_a_late_answer_never_comes() -> None:
    """The caller gets the timeout and no handle, and nobody may keep the RRef."""
    name = "late-answer-keeps-rref"
    assert error(Nest(0, 1, 2, "a", **IN_TIME)) == ""
    for make, plan, default in (
        (Nest(0, 1, 2, "a", **LATE), FaultPlan(), None),
        (Nest(0, 1, 2, "a", timeout=1.0), DELAYED, None),
        (Nest(0, 1, 2, "a", seconds=130.0), FaultPlan(), 100.0),
    ):
        steps = (make, Fetch(0, "a"), Settle(), Fetch(0, "a"), Drop(0, "a"))
        seen = predict(Program(3, steps, rpc_timeout=default), plan)
        errors = [step.error for step in seen.steps]
        assert errors == [
            "timeout",
            "missing",
            "",
            "missing",
            "missing",
        ]
        assert [held.owners for held in (*seen.steps[2].counters, *seen.counters)] == [0] * 6
        assert seen.known_bugs == {name}
        assert {one.rank for one in seen.met if "RRefLeak" in one.breaks} == {2}
        # What its user sends for it is another matter, and that its shutdown waits for it.
        promises = {one.breaks for one in seen.met if one.rank == 1}
        assert promises == {("MessagesDiffer",), ("ErrorInLog",)}
    with pytest.raises(UsageError, match="nobody can tell whether its handle comes"):
        error(Nest(0, 1, 2, "a", timeout=3.0, seconds=2.9))
    # A function whose remote fails has no RRef to answer with.
    lost = FaultPlan(by_rank={1: FaultTable(["PYTHON_REMOTE_CALL"], 1)})
    assert predict(Program(3, (Nest(0, 1, 2, "a", **LATE),)), lost).known_bugs == set()


def test_a_program_does_not_end_before_an_answer_with_a_handle() -> None:
    """What a shutdown that comes first leaves is not predicted; a settle after the step does."""
    late = Nest(0, 1, 2, "a", **LATE)
    with pytest.raises(UsageError, match="may end before its answer"):
        predict(Program(3, (late,), settles=False), FaultPlan())
    predict(Program(3, (late, Settle()), settles=False), FaultPlan())


def test_a_default_that_is_set_ends_what_sleeps_longer() -> None:
    """It ends a slow function and a delayed call, but not a call that names no timeout at all."""
    short = Default(0, 1, 3.0, sleeps=12.0)
    assert error(short) == "timeout"
    assert error(Default(0, 1, 3.0, endless=True, sleeps=12.0)) == ""
    assert error(Default(0, 1, 1.0), DELAYED) == "timeout"
    (called, ended) = predict(Program(3, (Call(0, 1), short)), FaultPlan()).steps
    assert (called.error, ended.error) == ("", "timeout")
    for before in (
        (Remote(0, 1, "a"), Share(0, "a", 2, "b")),
        (Call(0, 1, **LATE),),
        (Remote(0, 1, "a", seconds=2.0),),
    ):
        with pytest.raises(UsageError, match="still on their way"):
            predict(Program(3, (*before, short)), FaultPlan())


@pytest.mark.parametrize("how", ["sync", "async", "fetch", "proxy"])
def test_a_default_ends_what_is_sent_under_it(how: Any) -> None:
    """Each message has the default of the moment at which it is sent, and none with a timeout."""
    short = Default(0, 1, 3.0, sleeps=12.0, how=how)
    assert error(short) == "timeout"
    assert error(replace(short, endless=True)) == ""
    assert error(replace(short, seconds=900.0)) == ""


def test_what_is_made_under_a_default_is_fetched_after_it() -> None:
    """The creation must be in time; a fetch has its own timeout, and what it leaves must settle."""
    assert error(Default(0, 1, 900.0, sleeps=12.0, how="remote")) == ""
    with pytest.raises(UsageError, match="its creation may time out"):
        predict(Program(2, (Default(0, 1, 3.0, sleeps=12.0, how="remote"),)), FaultPlan())
    with pytest.raises(UsageError, match="an owner fetches without a message"):
        Program(2, (Default(0, 0, how="fetch"),))
    late = Default(0, 1, 3.0, sleeps=12.0, how="fetch")
    with pytest.raises(UsageError, match="may end before its answer"):
        predict(Program(2, (late,), settles=False), FaultPlan())
    seen = predict(Program(2, (late, Settle())), FaultPlan())
    assert [str(send.message) for send in seen.sends] == [
        "PYTHON_REMOTE_CALL",
        "PYTHON_RREF_FETCH_CALL",
        "RREF_USER_DELETE",
    ]
    assert not any(held.owners for held in seen.counters)


def test_a_timeout_between_a_function_and_the_retries_before_it_ends_the_call() -> None:
    """The function begins once the owner has answered the fork request, which is tried again."""
    plan = FaultPlan(by_rank={2: FaultTable(["RREF_FORK_REQUEST"], 3)})
    for step in (
        Share(0, "a", 2, "b", timeout=1.75),
        Call(0, 2, right="a", timeout=1.75),
    ):
        ended = predict(Program(3, (Remote(0, 1, "a"), Fetch(0, "a"), step)), plan).steps[-1]
        assert (ended.error, ended.slack) == ("timeout", 1.75)
    drawer = Chance(lambda _: 0, 3, kinds=("remote",), plan=plan)
    drawer.scope.new_handle("a", 0, 1, typed=False, size=1)
    assert [drawer.announces("a", to) for to in range(3)] == [0.0, 0.0, 3.5]
    assert drawer.announces((1.0,), 2) == 0.0
    drawn = {drawer.timing(0, MessageType.PYTHON_CALL, waits=3.5) for _ in range(100)}
    assert (1.75, 0.0) in drawn


def test_short_defaults_are_drawn() -> None:
    """Of steps that set a default timeout, many are ended by it, after other steps too."""
    drawn: list[Program] = []
    while len(drawn) < 200:
        drawer = Chance(lambda _: 0, 2, kinds=("call", "reach", "remote", "settle", "default"))
        drawer.add_kind(drawer.chance.choice(("call", "reach", "remote", "settle")))
        if drawer.add_kind("default"):
            drawn.append(Program(2, tuple(drawer.steps)))
    ended = [p for p in drawn if predict(p, FaultPlan()).steps[-1].error == "timeout"]
    assert len(ended) > 20
    assert {type(p.steps[0]) for p in ended} == {Call, Reach, Settle}


@pytest.mark.parametrize("op", ["bump", "nest"])
def test_timeouts_that_nothing_meets_are_drawn(op: str) -> None:
    """A bump and a nest get timeouts that come later than their answers; a nest may be slow."""
    drawn: list[Any] = []
    for _ in range(200):
        drawer = Chance(lambda _: 0, 2, kinds=("remote", op))
        assert drawer.add_kind("remote")
        if drawer.add_kind(op):
            drawn += drawer.steps[1:]
    steps = [step for step in drawn if step.op == op]
    assert any(step.timeout for step in steps)
    assert op == "bump" or any(step.seconds for step in steps)
