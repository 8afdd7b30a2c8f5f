"""The steps about what is called: what they predict and refuse, and what is drawn of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any, get_args

import pytest

from rpcprops._json import from_json, to_json
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import predict
from rpcprops.programs import (
    Call,
    Deferred,
    Invoke,
    Parallel,
    Program,
    Raising,
    Recurse,
    Remote,
    Scripted,
    Step,
)
from rpcprops.steps.functions import (
    CallableForm,
    CalledBy,
    DeferredBy,
    DeferredForm,
    Raised,
    RaisedIn,
    ScriptedBy,
    ScriptedForm,
)
from rpcprops.strategies import fault_tables, programs, programs_under_faults
from rpcprops.torch_facts import NEWEST
from tests._draws import draws
from tests.seeded._programs import CALLABLES, RAISED

CALL = MessageType.PYTHON_CALL
REMOTE = MessageType.PYTHON_REMOTE_CALL
FETCH = MessageType.PYTHON_RREF_FETCH_CALL
DELETE = MessageType.RREF_USER_DELETE
ACCEPT = MessageType.RREF_CHILD_ACCEPT
SCRIPT = MessageType.SCRIPT_CALL
SCRIPT_REMOTE = MessageType.SCRIPT_REMOTE_CALL
SCRIPT_FETCH = MessageType.SCRIPT_RREF_FETCH_CALL
LOSING = fault_tables(messages=[CALL])
OURS = ("raising", "invoke", "recurse", "deferred", "scripted")


def sent(step: Step) -> list[tuple[int, MessageType]]:
    """What a step alone sends, and from which rank."""
    found = predict(Program(3, (step,)), FaultPlan()).sends
    return [(send.rank, send.message) for send in found]


def leaves_of(found: list[Program]) -> list[Any]:
    """Our steps in programs."""
    return [leaf for program in found for leaf in program.leaves if leaf.op in OURS]


@pytest.mark.parametrize(
    ("step", "messages"),
    [
        (Raising(0, 1), [(0, CALL)]),
        (Raising(0, 1, how="remote"), [(0, REMOTE), (0, FETCH), (0, DELETE)]),
        (Raising(0, 0, how="remote"), [(0, REMOTE)]),
        (Raising(0, 1, "rref"), [(0, CALL), (1, DELETE)]),
        (
            Raising(0, 1, "rref", how="remote"),
            [(0, REMOTE), (1, DELETE), (0, FETCH), (0, DELETE)],
        ),
        (Raising(0, 0, "rref", how="deferred"), [(0, CALL)]),
        (Raising(0, 1, "rref", how="then"), [(0, CALL)]),
        (Invoke(0, 1, "lambda"), []),
        (Invoke(0, 1, "local", how="remote"), []),
        (Invoke(0, 1, "script"), []),
        (Invoke(0, 1, "generator"), [(0, CALL)]),
        (
            Invoke(0, 1, "static", how="proxy"),
            [(0, REMOTE), *[(0, CALL), (1, ACCEPT)] * 2, (0, DELETE)],
        ),
        (Recurse(0, (1, 0, 2)), [(0, CALL), (1, CALL), (0, CALL)]),
        (Deferred(0, 1, 2, "again"), [(0, CALL), (1, CALL), (1, CALL)]),
        (Deferred(0, 1, 2, "thread"), [(0, CALL)]),
        (
            Deferred(0, 1, 2, how="proxy_remote"),
            [
                (0, REMOTE),
                *[(0, CALL), (1, ACCEPT), (0, REMOTE), (1, ACCEPT)],
                *[(1, CALL), (0, FETCH), (0, DELETE), (0, DELETE)],
            ],
        ),
        (
            Deferred(0, 1, 2, how="class_proxy_async"),
            [(0, REMOTE), *[(0, CALL), (1, ACCEPT)] * 2, (1, CALL), (0, DELETE)],
        ),
        (Deferred(0, 0, 0, how="static_proxy_async"), [(0, REMOTE), (0, CALL), (0, CALL)]),
        (Deferred(0, 1, 2, how="static_async"), [(0, CALL), (1, CALL)]),
        (
            Deferred(0, 1, 2, how="class_remote"),
            [(0, REMOTE), (1, CALL), (0, FETCH), (0, DELETE)],
        ),
        (Scripted(0, 1, 2), [(0, SCRIPT), (1, SCRIPT)]),
        (Scripted(0, 1, 1, "fork"), [(0, SCRIPT), (1, SCRIPT)]),
        (
            Scripted(0, 1, 2, "future", how="remote"),
            [(0, SCRIPT_REMOTE), (1, SCRIPT), (0, SCRIPT_FETCH), (0, DELETE)],
        ),
        (
            Scripted(0, 1, 2, "remote"),
            [(0, SCRIPT), (1, SCRIPT_REMOTE), (1, SCRIPT_FETCH), (1, DELETE)],
        ),
        (Scripted(0, 1, 1, "remote"), [(0, SCRIPT), (1, SCRIPT_REMOTE)]),
    ],
    ids=repr,
)
def test_each_sends_what_torch_sends(step: Step, messages: list[tuple[int, MessageType]]) -> None:
    """The messages of each form are those of torch's source, by rank and in order."""
    assert sent(step) == messages


@pytest.mark.parametrize(
    ("kind", "how", "to", "raised"),
    [
        ("own", "sync", 1, "RuntimeError"),
        ("own", "remote", 1, "RaisedOnPurposeError"),
        ("value", "async", 1, "ValueError"),
        ("value", "then", 1, "RuntimeError"),
        ("unicode", "deferred", 1, "ValueError"),
        ("unicode", "remote", 1, "UnicodeError"),
        ("type", "sync", 1, "TypeError"),
        ("stop", "remote", 1, "StopIteration"),
        ("code", "remote", 1, "RuntimeError"),
        ("local", "remote", 1, "RuntimeError"),
        ("local", "remote", 0, "LocalRaisedOnPurposeError"),
        ("exit", "remote", 0, "RuntimeError"),
        ("rref", "sync", 1, "RuntimeError"),
        ("rref", "remote", 1, "HoldingRaisedOnPurposeError"),
        ("rref", "then", 1, "RuntimeError"),
    ],
)
def test_the_class_at_the_caller(kind: Raised, how: RaisedIn, to: int, raised: str) -> None:
    """A future keeps two classes, an RRef all that can be made of a text alone."""
    (step,) = predict(Program(2, (Raising(0, to, kind, how=how),)), FaultPlan()).steps
    assert step.value == {"raised": raised, "kept": True}


@pytest.mark.parametrize("how", get_args(RaisedIn))
@pytest.mark.parametrize("to", [0, 1])
def test_an_exception_that_holds_an_rref_leaves_nothing(how: RaisedIn, to: int) -> None:
    """The exception does not travel, so its RRef is gone with the function, which ran once."""
    prediction = predict(Program(2, (Raising(0, to, "rref", how=how),)), FaultPlan())
    assert not any(held.owners or held.forks for held in prediction.counters)
    assert prediction.calls[to] == {"step0": 1}
    assert not prediction.met


def test_a_lost_call_keeps_the_rref_that_an_exception_would_hold() -> None:
    """It was forked when the call was written (RRefContext::prepareChildFork)."""
    lost = FaultPlan(FaultTable([CALL], 1))
    prediction = predict(Program(2, (Raising(0, 1, "rref"),)), lost)
    assert prediction.steps[0].error == "injected"
    assert prediction.counters[0].owners == 1


def test_a_lost_call_of_a_path_is_an_error_of_the_rank_that_called() -> None:
    """The first call fails as itself, a later one as what the function before it raised."""
    program = Program(2, (Recurse(0, (1, 0, 1)),))
    lost = FaultTable([CALL], 1)
    first = predict(program, FaultPlan(by_rank={0: lost}))
    assert (first.steps[0].error, first.calls) == ("injected", ({}, {}))
    second = predict(program, FaultPlan(by_rank={1: lost}))
    assert (second.steps[0].error, second.calls) == ("remote", ({}, {"step0": 1}))


def test_two_calls_of_a_builtin_have_one_payload() -> None:
    """torch counts failures by payload, and such a call carries no name, so one failure is one."""
    program = Program(2, (Invoke(0, 1, "operator"), Invoke(0, 1, "operator"), Invoke(0, 1)))
    steps = predict(program, FaultPlan(FaultTable([CALL], 1))).steps
    assert [step.error for step in steps] == ["injected", "", "injected"]


def test_a_callback_that_asks_nothing_does_not_notice_a_lost_call() -> None:
    """Where the call of the function is lost, one callback still raises its own error."""
    plan = FaultPlan(by_rank={1: FaultTable([CALL], 1)})
    program = Program(3, (Deferred(0, 1, 2, "raises"), Deferred(0, 1, 2, "call")))
    prediction = predict(program, plan)
    assert [step.error for step in prediction.steps] == ["", "injected"]
    assert prediction.calls[2] == {}


@pytest.mark.parametrize(
    ("form", "value"),
    [
        ("wait", [5.0, -1.0]),
        ("sync", [5.0, -1.0]),
        ("remote", [5.0, -1.0]),
        ("future", [3.0, 0.0]),
        ("fork", [5.0, -1.0]),
    ],
)
def test_what_a_script_that_calls_gives(form: ScriptedForm, value: list[float]) -> None:
    """All forms add once more but the one that returns the future as it is; each runs once."""
    step = Scripted(0, 1, 2, form, (1.0, 1.0), (2.0, -1.0))
    prediction = predict(Program(3, (step,)), FaultPlan())
    assert prediction.steps[0].value == value
    assert prediction.calls == ({}, {"step0": 1}, {"step0/then": 1})


@pytest.mark.parametrize("how", get_args(ScriptedBy))
@pytest.mark.parametrize("form", get_args(ScriptedForm))
def test_a_script_ends_with_the_error_of_what_it_calls(form: Any, how: Any) -> None:
    """No Python comes between, so the caller gets what was injected at the rank between."""
    program = Program(3, (Scripted(0, 1, 2, form, how=how),))
    lost = FaultTable([SCRIPT, SCRIPT_REMOTE], 1)
    prediction = predict(program, FaultPlan(by_rank={1: lost}))
    assert prediction.steps[0].error == ("creation" if form == "remote" else "injected")
    assert prediction.calls == ({}, {"step0": 1}, {})
    prediction = predict(program, FaultPlan(by_rank={0: lost}))
    assert prediction.steps[0].error == ("creation" if how == "remote" else "injected")
    assert prediction.calls == ({}, {}, {})


def test_two_calls_of_a_script_with_a_name_have_two_payloads() -> None:
    """The name is an argument, which the payload holds; two calls without one share a failure."""
    plain = Call(0, 1, flavour="script")
    program = Program(3, (Scripted(0, 1, 2), Scripted(0, 1, 2), plain, plain))
    steps = predict(program, FaultPlan(by_rank={0: FaultTable([SCRIPT], 1)})).steps
    assert [step.error for step in steps] == ["injected", "injected", "injected", ""]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Raising(0, 1, text="a\0"), "must have no zero and no surrogate"),
        (Raising(0, 1, text="\ud800"), "must have no zero and no surrogate"),
        (Raising(0, 1, "rref", timeout=3.0), "a timeout of kind='rref' is not modelled"),
        (Raising(0, 1, more=-1), "must lie in 0 to 1000000"),
        (Raising(0, 1, "oops"), r"kind='oops' \(type str\) must be Literal\['own'"),  # type: ignore[arg-type]
        (Invoke(0, 1, how="proxy"), "'function' cannot be called by how='proxy'"),
        (Invoke(0, 1, "generator", how="remote"), "cannot be called by how='remote'"),
        (Invoke(0, 1, "function", (1.0,), ()), "hold 1 and 0 numbers"),
        (Recurse(0, ()), "must have 1 to 5 ranks"),
        (Recurse(0, (1,) * 6), "must have 1 to 5 ranks"),
        (Recurse(0, (1, 3)), "path=3 is no rank of a world of 2"),
        (Recurse(0, (1,), -1.0), r"must lie in 0 to"),
        (Deferred(0, 1, 7), "then=7 is no rank"),
        (Scripted(0, 1, 7), "then=7 is no rank"),
        (Scripted(0, 1, 1, left=()), "hold 0 and 1 numbers"),
        (Deferred(0, 1, 1, "oops"), r"form='oops' \(type str\) must be Literal"),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_what_cannot_be_is_refused(step: Step, message: str) -> None:
    """A program names the argument, its value, and what is allowed."""
    with pytest.raises(UsageError, match=message):
        Program(2, (step,))


def test_they_travel_as_json() -> None:
    """The fields of each are the same after a trip through JSON."""
    for program in (RAISED, CALLABLES):
        assert from_json(json.loads(json.dumps(to_json(program))), Program) == program


def test_every_form_is_drawn_and_none_that_torch_breaks() -> None:
    """Draws reach each form but an exception that is set, and no text that torch cannot decode."""
    raising = leaves_of(draws(programs(kinds=("raising",), min_steps=12, branches=False), 20))
    assert {step.kind for step in raising} == set(get_args(Raised))
    assert {step.how for step in raising} == set(get_args(RaisedIn))
    assert any(step.more for step in raising)
    for step in raising:
        if not step.text.isascii():
            assert step.how == "then" or step.kind in ("unprintable", "keyboard", "exit", "close")
        assert step.how == "then" or not re.search(r"\\[xuUN]", step.text)
    invoked = leaves_of(draws(programs(kinds=("invoke",), min_steps=12, branches=False), 12))
    assert {step.form for step in invoked} == set(get_args(CallableForm))
    assert {step.how for step in invoked} == set(get_args(CalledBy))
    deferred = leaves_of(draws(programs(kinds=("deferred",), min_steps=12, branches=False), 20))
    assert {step.form for step in deferred} == set(get_args(DeferredForm)) - {"exception"}
    assert {step.how for step in deferred} == set(get_args(DeferredBy))
    scripted = leaves_of(draws(programs(kinds=("scripted",), min_steps=12, branches=False), 8))
    assert {step.form for step in scripted} == set(get_args(ScriptedForm))
    assert {step.how for step in scripted} == set(get_args(ScriptedBy))


def test_paths_in_branches_visit_no_rank_twice() -> None:
    """A path keeps a thread for each of its calls; those of branches that run at once add up."""
    found = draws(programs(kinds=("recurse",), min_world_size=2, min_steps=6), 25)
    branched = [s for p in found for x in p.steps if isinstance(x, Parallel) for s in x.leaves]
    paths = [leaf.path for leaf in branched if isinstance(leaf, Recurse)]
    assert len(paths) > 5
    assert all(len(set(path)) == len(path) for path in paths)
    alone = [x.path for p in found for x in p.steps if isinstance(x, Recurse)]
    assert any(len(set(path)) < len(path) for path in alone)


def test_they_are_aimed_at_faults() -> None:
    """Where a plan loses calls, most programs have a step of ours that sends one."""
    lost = FaultTable([CALL], 1)
    drawn = programs(min_world_size=2, min_steps=6, kinds=OURS, plan=FaultPlan(by_rank={1: lost}))
    found = leaves_of(draws(drawn, 12))
    assert sum(step.at == 1 for step in found) > len(found) / 2


def test_callbacks_that_wait_are_not_drawn_where_their_call_is_lost() -> None:
    """Their error would be about the text of a lost call, which nobody can read."""
    drawn = programs_under_faults(kinds=("deferred",), min_steps=4, tables=LOSING)
    for program, plan in draws(drawn, 25):
        for leaf in program.leaves:
            if isinstance(leaf, Deferred) and CALL in plan.table(leaf.to).failing:
                assert leaf.form not in ("then", "thens", "again")


def test_a_deferred_answer_that_fails_may_stay_in_the_frames_of_a_proxy() -> None:
    """Only the error of an asynchronous call is put into a second future, and none is drawn."""
    lost = FaultPlan(by_rank={1: FaultTable([CALL], 1)})
    for how in get_args(DeferredBy):
        prediction = predict(Program(3, (Deferred(0, 1, 2, "call", how=how),)), lost)
        assert prediction.steps[0].error == "injected"
        met = "failed-async-proxy" in prediction.known_bugs
        assert met == how.endswith("proxy_async")
    drawn = programs_under_faults(kinds=("deferred",), min_steps=4, tables=LOSING)
    for program, plan in draws(drawn, 25):
        for leaf in program.leaves:
            if isinstance(leaf, Deferred) and CALL in plan.table(leaf.to).failing:
                assert not leaf.how.endswith("proxy_async")


def test_no_script_makes_an_rref_where_its_creation_may_fail() -> None:
    """A rank that uses a second such RRef waits for ever, and so would the script."""
    tables = fault_tables(messages=[SCRIPT_REMOTE, SCRIPT])
    drawn = programs_under_faults(kinds=("scripted",), min_steps=4, tables=tables)
    forms = set()
    for program, plan in draws(drawn, 25):
        for leaf in program.leaves:
            if isinstance(leaf, Scripted):
                forms.add(leaf.form)
                if SCRIPT_REMOTE in plan.table(leaf.to).failing:
                    assert leaf.form != "remote"
                if SCRIPT_REMOTE in plan.table(leaf.at).failing:
                    assert leaf.how != "remote"
    assert forms == set(get_args(ScriptedForm))


def test_of_two_failing_creations_none_may_be_in_a_script_that_nobody_waits_for() -> None:
    """A torch with second-failed-remote may take its for the second, and wait for ever."""
    both = ["SCRIPT_REMOTE_CALL", "PYTHON_REMOTE_CALL"]
    plan = FaultPlan(by_rank={1: FaultTable(both, 1)})
    late = Scripted(0, 1, 2, "remote", timeout=3.0, seconds=12.0)
    other = Remote(1, 2, "a")
    predict(Program(3, (late,)), plan)
    for steps in ((late, other), (other, late)):
        with pytest.raises(UsageError, match="give its step no timeout, or another form"):
            predict(Program(3, steps), plan)
        predict(Program(3, steps), plan, NEWEST.as_if_mended())
    predict(Program(3, (replace(late, timeout=None), other)), plan)
    predict(Program(3, (replace(late, form="wait"), other)), plan)


def test_no_script_that_nobody_waits_for_is_drawn_where_its_creation_may_fail() -> None:
    """Not for a mended torch either: a hunt may run that on one which waits for ever."""
    tables = fault_tables(messages=[SCRIPT_REMOTE], max_delay=0.0)
    mended = NEWEST.as_if_mended()
    drawn = programs_under_faults(kinds=("scripted",), min_steps=6, tables=tables, facts=mended)
    seen = set()
    for program, plan in draws(drawn, 600):
        for leaf in program.leaves:
            if isinstance(leaf, Scripted) and leaf.form == "remote":
                is_late = leaf.timeout is not None and leaf.seconds > leaf.timeout
                seen.add((SCRIPT_REMOTE in plan.table(leaf.to).failing, is_late))
    assert seen == {(True, False), (False, True), (False, False)}
