"""What is called, in real ranks: what it raises, what it is, on whom it calls, when it answers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import get_args

import pytest

from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import judge, predict, predict_for, set_apart
from rpcprops.outcomes import Violation
from rpcprops.programs import Deferred, Invoke, Program, Raising, Recurse, Scripted, Step
from rpcprops.runner import default_runner, run
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
from rpcprops.strategies import fault_tables, programs_under_faults
from tests._draws import draws
from tests.seeded._programs import CALLABLES, RAISED

pytestmark = pytest.mark.usefixtures("rpc_cluster")

OURS = ("raising", "invoke", "recurse", "deferred", "scripted")
RAISING = [
    Raising(0, to, kind, " 'é'" * (how == "then"), how=how)
    for to, kind, how in itertools.product((1, 0), get_args(Raised), get_args(RaisedIn))
]
#: A generator can be used by its owner, and only an object has methods.
CALLED = [
    Invoke(0, to, form, (1.0, 2.0), (3.0, 4.0), how)
    for to, form, how in itertools.product((1, 0), get_args(CallableForm), get_args(CalledBy))
    if (how == "proxy") <= (form in ("method", "static", "class", "script"))
    if (form, how) != ("generator", "remote")
]
DEFERRED = [
    Deferred(0, to, then, form, how=how)
    for (to, then), form, how in itertools.product(
        ((1, 2), (0, 0)), get_args(DeferredForm), get_args(DeferredBy)
    )
]

SCRIPTED = [
    Scripted(0, to, then, form, how=how)
    for (to, then), form, how in itertools.product(
        ((1, 2), (1, 1), (0, 0)), get_args(ScriptedForm), get_args(ScriptedBy)
    )
]


def unexplained(program: Program, plan: FaultPlan) -> tuple[Violation, ...]:
    """What the known findings do not explain."""
    outcome = default_runner().run_anew(program, plan)
    met = predict_for(program, plan, outcome).met
    return set_apart(program, met, outcome, judge(program, plan, outcome))[1]


@pytest.mark.parametrize(
    ("program", "plan"),
    [
        (RAISED, FaultPlan()),
        (CALLABLES, FaultPlan()),
        (CALLABLES, FaultPlan(FaultTable(["RREF_USER_DELETE"], 2, {"PYTHON_CALL": 0.5}))),
    ],
    ids=["raised", "callables", "faults"],
)
def test_they_run_as_predicted(program: Program, plan: FaultPlan) -> None:
    """Real ranks show what the oracle predicts, also where deletes are lost and calls are late."""
    assert judge(program, plan, run(program, plan)) == ()


@pytest.mark.parametrize(
    "plan",
    [
        FaultPlan(),
        FaultPlan(FaultTable(["RREF_USER_DELETE"], 2)),
        FaultPlan(FaultTable(["PYTHON_CALL", "PYTHON_REMOTE_CALL"], 1)),
    ],
    ids=["none", "retried", "lost"],
)
def test_an_exception_holds_an_rref_no_longer_than_its_function_runs(plan: FaultPlan) -> None:
    """The caller gets the text, and nobody holds the RRef, wherever it is raised."""
    steps = [Raising(0, to, "rref", how=how) for to in (1, 0) for how in get_args(RaisedIn)]
    # A creation that fails keeps the next one from failing (second-failed-remote).
    for part in (steps[:5], steps[5:]):
        assert unexplained(Program(2, tuple(part)), plan) == ()


@pytest.mark.parametrize("how", ["sync", "remote"])
@pytest.mark.parametrize("text", ["é", r"C:\users"])
def test_a_text_that_torch_breaks_is_reported(text: str, how: RaisedIn) -> None:
    """The steps that are not drawn are judged: stock torch loses these texts, or garbles them."""
    program = Program(2, (Raising(0, 1, text=text, how=how),))
    found = judge(program, None, run(program))
    promises = {violation.promise for violation in found} - {"ErrorInLog"}
    assert promises == {"UnclearError" if text == "é" else "UnexpectedError"}


def test_an_exception_that_is_set_on_a_future_is_reported() -> None:
    """Stock torch hands it to the caller as a value, and the judge says that nothing was raised."""
    program = Program(2, (Deferred(0, 1, 1, "exception"),))
    (violation,) = judge(program, None, run(program))
    assert violation.promise == "MissingError"


@pytest.mark.nightly
@pytest.mark.parametrize(
    "steps",
    [RAISING, CALLED, DEFERRED, SCRIPTED],
    ids=["raised", "called", "deferred", "scripted"],
)
def test_every_form_runs_as_predicted(steps: Sequence[Step]) -> None:
    """Each form of each step, from one rank to another and to itself, holds without faults."""
    for start in range(0, len(steps), 8):
        batch = tuple(steps[start : start + 8])
        assert not unexplained(Program(3, batch), FaultPlan()), batch


@pytest.mark.nightly
def test_drawn_ones_run_as_predicted() -> None:
    """Drawn programs break no promise under drawn faults, those that lose calls included."""
    lost = fault_tables(messages=("PYTHON_CALL", "PYTHON_RREF_FETCH_CALL"), max_fail_sends=2)
    for tables in (None, lost):
        drawn = programs_under_faults(max_world_size=3, kinds=OURS, max_steps=6, tables=tables)
        for program, plan in draws(drawn, 60):
            left = unexplained(program, plan)
            # A busy machine can show what the next run does not.
            assert not left or (left[0].timing_sensitive and not unexplained(program, plan))


def test_a_path_of_five_needs_no_more_threads_than_there_are() -> None:
    """Five calls that wait for each other at one rank end, as do five between two ranks."""
    program = Program(2, (Recurse(0, (0,) * 5), Recurse(1, (0, 1, 0, 1, 0), 2.0, spins=True)))
    assert judge(program, None, run(program)) == ()


@pytest.mark.parametrize("how", get_args(ScriptedBy))
def test_scripts_call_on_under_faults(how: ScriptedBy) -> None:
    """Where the rank between loses its call or delays it, or is slow, all is as predicted."""
    steps = tuple(Scripted(0, 1, 2, form, how=how) for form in get_args(ScriptedForm))
    assert judge(Program(3, steps), None, run(Program(3, steps))) == ()
    slow = (
        Scripted(0, 1, 2, timeout=3.0, seconds=12.0),
        Scripted(0, 1, 2, "future", timeout=3.0, seconds=12.0),
        Scripted(0, 1, 2, "fork", timeout=900.0, seconds=2.0),
    )
    delayed = FaultPlan(by_rank={1: FaultTable((), 0, {"SCRIPT_CALL": 2.0})})
    assert not unexplained(Program(3, (*steps, *slow)), delayed)
    lost = FaultPlan(by_rank={1: FaultTable(["SCRIPT_CALL"], 1)})
    errors = [step.error for step in predict(Program(3, steps), lost).steps]
    assert errors == ["" if step.form == "remote" else "injected" for step in steps]
    assert not unexplained(Program(3, steps), lost)


def test_a_script_that_waits_for_a_future_needs_no_thread() -> None:
    """With one thread each, ranks answer while a function waits, as TorchScript suspends it."""
    forms: tuple[ScriptedForm, ...] = ("wait", "future", "fork")
    steps = tuple(Scripted(0, 1, then, form) for form in forms for then in (0, 1))
    program = Program(2, steps, num_worker_threads=1)
    assert judge(program, None, run(program)) == ()
