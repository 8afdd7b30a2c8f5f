"""Further ways of calling: what they refuse, what is predicted of them, what real ranks show."""

from __future__ import annotations

from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import judge, predict, set_apart
from rpcprops.programs import (
    After,
    Ask,
    Call,
    Default,
    Drop,
    Gather,
    Method,
    Own,
    Program,
    Reach,
    Recurse,
    Remote,
    Settle,
    Step,
)
from rpcprops.runner import run
from rpcprops.torch_facts import installed
from tests.seeded._programs import WAYS

CALL = MessageType.PYTHON_CALL
LOST = FaultPlan(by_rank={0: FaultTable([CALL], 1)})
HELD_UP = FaultPlan(by_rank={0: FaultTable((), 0, {CALL: 2.0})})


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Reach(0, 1, "myself"),), "named='myself' needs to=0"),
        ((Gather(0, (1,)),), "must be a tuple of 2 to 4 ranks"),
        ((Gather(0, (1, 2)),), "targets=2 is no rank of a world of 2"),
        ((Gather(0, (1, 0), breaks=2),), "breaks=2 is the number of no call"),
        ((Own(0, "a"), Ask(0, "a", "local_value")), "needs a user's handle"),
        ((Default(0, 1, seconds=0.0),), "seconds=0.0 must be a positive, finite number"),
        ((Reach(0, 1, how="remote", timeout=1.0),), "timeout of how='remote' is not modelled"),
        ((Reach(0, 1, flavour="script", seconds=1.0),), "needs flavour 'python', not 'script'"),
        ((After(0, 1, seconds=-1.0),), "seconds=-1.0 must lie in 0 to"),
        ((Gather(0, (1, 0), seconds=-1.0),), "seconds=-1.0 must lie in 0 to"),
        ((Gather(0, (1, 0), "done", breaks=0, timeout=9.0),), "timeout=9.0 with how='done'"),
        ((Call(0, 1, timeout=3e6),), "timeout=3000000.0 must be 2147483 s at the most"),
        ((Call(0, 1, timeout=0.0005),), "timeout=0.0005 must be 2147483 s at the most"),
        ((Default(0, 1, 3e6, how="proxy"),), "seconds=3000000.0 with how='proxy' must be"),
    ],
)
def test_what_cannot_be_is_refused(steps: tuple[Step, ...], message: str) -> None:
    """A program says which field of such a step is wrong, and what it must be."""
    with pytest.raises(UsageError, match=message):
        Program(2, steps)


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (Reach(0, 1, "no id"), ["RuntimeError"]),
        (Reach(0, 1, "no type"), ["ValueError"]),
        (After(0, 1, "chain"), [3.0, 1.0, 2.0, 3.0]),
        (Gather(0, (1, 0)), [[3.0], [4.0]]),
        (Gather(0, (1, 0), "done"), [[3.0], [4.0]]),
        (After(0, 1, "exception late"), [3.0, 1.0, 1.0]),
        (After(0, 1, "exception twice"), [3.0, 1.0, 1.0]),
        (Method(0, 1, form="kwargs", start=2.0), [8.0, 14.0]),
        (Method(0, 1, form="missing"), ["AttributeError"]),
        (Method(0, 1, form="static", start=5.0), [6.0, 6.0]),
        (Method(0, 1, form="keyword rref"), [7.0, 13.0]),
        (Method(0, 1, form="named rref"), [3.0, 5.0]),
    ],
)
def test_values_are_predicted(step: Step, value: list[Any]) -> None:
    """The value of each is that of torch's documentation and source, worked out by hand."""
    assert predict(Program(2, (step,)), FaultPlan()).steps[0].value == value


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (After(0, 1, timeout=3.0, seconds=12.0), "timeout"),
        (After(0, 1, timeout=3.0, seconds=12.0, raises=True), "timeout"),
        (After(0, 1, timeout=100.0, seconds=12.0, raises=True), "remote"),
        (Reach(0, 1, "id", timeout=3.0, seconds=12.0), "timeout"),
        (Reach(0, 1, "id", "async", timeout=100.0, seconds=12.0), ""),
        (Reach(0, 1, how="remote", seconds=12.0), ""),
        (Gather(0, (1, 0), timeout=3.0, seconds=12.0, breaks=1), "timeout"),
        (Gather(0, (1, 0), "done", timeout=3.0, seconds=12.0), "timeout"),
        (Gather(0, (1, 0), "done", breaks=1, seconds=12.0), "remote"),
        (Reach(0, 1, timeout=3e6, seconds=12.0), ""),
        (Reach(0, 1, timeout=0.0005, seconds=12.0), "timeout"),
        (Reach(0, 1, timeout=0.0005), "unknown"),
        (Default(0, 1, 1e9, sleeps=12.0), ""),
        (Default(0, 1, 0.0001, sleeps=12.0, how="async"), "timeout"),
        (Default(0, 1, 0.0001, endless=True, sleeps=12.0), ""),
        (Gather(0, (1, 0), timeout=100.0, seconds=12.0), ""),
        (After(0, 1, timeout=3.0, seconds=12.0, of="proxy"), "timeout"),
        (After(0, 1, timeout=100.0, seconds=12.0, of="proxy", raises=True), "remote"),
        (Gather(0, (1, 0), timeout=3.0, seconds=12.0, of="proxy"), "timeout"),
        (Gather(0, (1, 0), "threads", timeout=100.0, seconds=12.0, of="proxy"), ""),
        (Gather(0, (1, 0, 1, 0), timeout=3.0, seconds=12.0, of="mixed"), "timeout"),
        (Gather(0, (1, 0, 1, 0), timeout=100.0, seconds=12.0, of="mixed"), ""),
        (Recurse(0, (1, 0, 1), 12.0, timeout=3.0), "timeout"),
        (Recurse(0, (1, 0, 1), 12.0, timeout=100.0), ""),
    ],
)
def test_timeouts_are_predicted(step: Step, error: str) -> None:
    """A call ends at its timeout, and what it has called runs once all the same."""
    predicted = predict(Program(2, (step,)), FaultPlan())
    assert predicted.steps[0].error == error
    assert {times for calls in predicted.calls for times in calls.values()} <= {1, 2}
    assert predicted.calls[1]


#: Steps that meet findings about timeouts and futures, by the finding.
FLAWED: list[tuple[str, Step]] = [
    ("long-timeout-ends-at-once", Reach(0, 1, timeout=2147484.0, seconds=12.0)),
    ("long-timeout-ends-at-once", Reach(0, 1, how="async", timeout=1e9, seconds=12.0)),
    ("long-timeout-ends-at-once", Default(0, 1, 3e6, sleeps=12.0)),
    ("short-timeout-never-comes", Reach(0, 1, how="async", timeout=0.0001, seconds=12.0)),
    ("short-timeout-never-comes", Default(0, 1, 0.0005, sleeps=12.0, how="async")),
    ("refused-exception-kept", After(0, 1, "exception late")),
    ("refused-exception-kept", After(0, 1, "exception late", raises=True)),
    ("collect-all-ends-early", Gather(0, (1, 1), "done", breaks=0, seconds=12.0)),
    ("collect-all-ends-early", Gather(0, (1, 0, 1), "done", breaks=2, seconds=12.0)),
]


@pytest.mark.usefixtures("rpc_cluster")
def test_findings_about_timeouts_and_futures_show() -> None:
    """Each shows in its step, and explains all that is wrong in the run."""
    for name, step in FLAWED:
        program = Program(2, (step, Settle()))
        outcome = run(program)
        met = predict(program, FaultPlan(), installed()).met
        wrong = judge(program, FaultPlan(), outcome)
        found = (name,) if installed().has_bug(name) else ()
        assert set_apart(program, met, outcome, wrong) == (found, ()), step


def test_paths_that_time_out_leave_threads_for_others() -> None:
    """A program is refused where all threads of a rank may wait for each other."""
    late = Recurse(0, (0,) * 5, 12.0, timeout=3.0)
    with pytest.raises(UsageError, match=r"may keep all 7 threads of rank 0 busy; put a Settle"):
        predict(Program(1, (late, late)), FaultPlan())
    assert predict(Program(1, (late, Settle(), late)), FaultPlan()).steps[2].error == "timeout"


def test_each_gathered_call_is_a_message_of_its_own() -> None:
    """Every call is sent and fails by itself, also those after one that was lost."""
    lost = predict(Program(2, (Gather(0, (1, 0, 1)),)), LOST)
    assert lost.steps[0].error == "injected"
    assert len({send.payload for send in lost.sends if send.failures}) == 3
    assert lost.calls == ({}, {})
    broken = predict(Program(2, (Gather(0, (1, 0, 1), breaks=0),)), FaultPlan())
    assert broken.steps[0].error == "remote"
    assert broken.calls == ({"step0/1": 1}, {"step0/0": 1, "step0/2": 1})


def test_a_short_default_strikes_its_call_alone() -> None:
    """The call times out unless it is endless; messages on their way must not meet the default."""
    short = Default(0, 1, seconds=0.5)
    endless = Default(0, 1, seconds=0.5, endless=True)
    assert predict(Program(2, (short,)), HELD_UP).steps[0].error == "timeout"
    assert predict(Program(2, (endless,)), HELD_UP).steps[0].value == [3.0]
    with pytest.raises(UsageError, match=r"put a Settle\(\) before it"):
        predict(Program(2, (Remote(0, 1, "a"), Drop(0, "a"), short)), HELD_UP)


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize(
    ("program", "plan"),
    [
        (WAYS, FaultPlan()),
        (WAYS, LOST),
        (Program(2, (Default(0, 1, seconds=0.5),)), HELD_UP),
        (Program(2, (Default(0, 1, seconds=0.5, endless=True), Reach(0, 1))), HELD_UP),
    ],
    ids=["clean", "lost", "short", "endless"],
)
def test_real_ranks_do_as_predicted(program: Program, plan: FaultPlan) -> None:
    """Every form of every one of these steps shows what is predicted, with and without faults."""
    assert judge(program, plan, run(program, plan)) == ()
