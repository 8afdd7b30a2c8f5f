"""A program's own default timeout: what the oracle says of it, and how it is drawn."""

from __future__ import annotations

import json

import pytest

from rpcprops._json import from_json, to_json
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import predict
from rpcprops.programs import (
    Call,
    Chain,
    Context,
    Count,
    Default,
    Drop,
    Fetch,
    Nest,
    Program,
    Recurse,
    Remote,
    Settle,
    Share,
    Step,
    Through,
    Wait,
)
from rpcprops.strategies import programs, programs_under_faults
from tests._draws import draws

QUIET = FaultPlan()
LATE = FaultPlan(FaultTable(messages_to_delay={"PYTHON_CALL": 70.0}))


#: The handle arrives before its function sleeps.
_SHARED = ["", "timeout", ""]


def _errors(steps: tuple[Step, ...], timeout: float, plan: FaultPlan = QUIET) -> list[str]:
    program = Program(3, steps, rpc_timeout=timeout)
    return [step.error for step in predict(program, plan).steps]


@pytest.mark.parametrize(
    ("steps", "errors"),
    [
        ((Call(0, 1, seconds=130.0), Call(0, 1, seconds=40.0), Call(0, 1)), ["timeout", "", ""]),
        ((Call(0, 1, seconds=130.0, timeout=300.0),), [""]),
        ((Call(0, 1, seconds=130.0, wait="later", out="f"), Wait(0, "f")), ["", "timeout"]),
        ((Call(0, 1, raises=True, seconds=130.0),), ["timeout"]),
        ((Remote(0, 1, "a", seconds=130.0), Settle(), Fetch(0, "a")), ["", "", "creation"]),
        ((Remote(0, 1, "a", seconds=140.0, timeout=800.0), Fetch(0, "a")), ["", "timeout"]),
        ((Remote(0, 1, "a", seconds=140.0, timeout=800.0), Fetch(0, "a", 800.0)), ["", ""]),
        ((Remote(0, 1, "a"), Share(0, "a", 2, "b", seconds=130.0), Fetch(2, "b")), _SHARED),
        ((Default(0, 1, endless=True), Default(0, 1, 36000.0)), ["", ""]),
    ],
)
def test_what_outlasts_the_default_fails(steps: tuple[Step, ...], errors: list[str]) -> None:
    """A call, creation, fetch or share without a timeout of its own ends at the program's."""
    assert _errors(steps, 100.0) == errors


def test_without_one_nothing_ends() -> None:
    """A program that names no default waits for a function that sleeps for an hour."""
    program = Program(2, (Call(0, 1, seconds=3600.0),))
    assert predict(program, QUIET).steps[0].error == ""


def test_a_delay_outlasts_it() -> None:
    """A delayed call ends at the default, and so does the question for a type; others do not."""
    steps = (Call(0, 1), Call(0, 1, timeout=200.0), Remote(0, 1, "a"), Through(0, "a"), Count(0, 1))
    assert _errors(steps, 60.0, LATE) == ["timeout", "", "", "timeout", "timeout"]
    assert _errors((Nest(0, 1, 2, "a"),), 60.0, LATE) == ["timeout"]


def test_a_delete_does_not_wait_for_a_value() -> None:
    """Its owner answers it at once, also while the function runs that is to make the value."""
    slow = Remote(0, 1, "a", seconds=12.0, timeout=3.0)
    assert _errors((slow, Drop(0, "a")), 65.0) == ["", ""]


def test_what_is_not_known_is_refused() -> None:
    """Where the default may come for a message of which nothing is predicted, there is an error."""
    for steps in (
        (Chain(0, 1, 2),),
        (Recurse(0, (1, 0), 3.0),),
        (Remote(0, 1, "a"), Share(0, "a", 2, "b")),
    ):
        with pytest.raises(UsageError, match="default"):
            _errors(steps, 60.0, LATE)
    # The called function fetches it.
    call = Call(0, 2, (1.0,), "a", timeout=800.0)
    with pytest.raises(UsageError, match="its messages may take 130 s"):
        _errors((Remote(0, 1, "a", seconds=130.0, timeout=800.0), call), 150.0)
    # Nobody waits for a cleanup, but a delayed one would be sent again.
    cleanups = FaultPlan(FaultTable(messages_to_delay={"CLEANUP_AUTOGRAD_CONTEXT_REQ": 70.0}))
    with pytest.raises(UsageError, match="its messages may take 70 s"):
        _errors((Context(0, "x", (1,)),), 100.0, cleanups)
    assert _errors((Count(0, 1), Context(0, "x", (1,))), 60.0) == ["", ""]


def test_calls_that_time_out_have_run() -> None:
    """The function of a call that ended at the default has run once, and shutdown may drop it."""
    program = Program(2, (Call(0, 1, seconds=130.0),), settles=False, rpc_timeout=100.0)
    predicted = predict(program, QUIET)
    assert predicted.calls == ({}, {"step0": 1})
    assert predicted.abandoned_calls == (frozenset(), frozenset({"step0"}))


def test_it_travels_and_is_printed() -> None:
    """JSON and repr keep it, and JSON of older versions has none."""
    program = Program(2, (Call(0, 1),), rpc_timeout=60.0)
    data = json.loads(json.dumps(to_json(program)))
    assert from_json(data, Program) == program
    del data["rpc_timeout"]
    assert from_json(data, Program) == Program(2, (Call(0, 1),))
    assert "rpc_timeout=60.0," in repr(program)
    assert "rpc_timeout" not in repr(Program(2))


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf"), float("nan"), True, "60", 1e7])
def test_a_wrong_one_is_refused(wrong: object) -> None:
    """It is a positive number that torch can count."""
    with pytest.raises(UsageError, match="rpc_timeout="):
        Program(2, (), rpc_timeout=wrong)  # type: ignore[arg-type]


def test_drawn_ones_are_predicted() -> None:
    """What is drawn with a default is a part of all, ends at it in some steps, and is certain.

    But for a fetch of what timed out while it was made: which of two errors comes first, or a
    value, is a race that the drawer takes into account (:meth:`Fetch.drawn`).
    """
    kinds = ("call", "remote", "share", "fetch")
    quiet = programs(max_world_size=3, min_steps=8, max_steps=12, plan=QUIET, kinds=kinds)
    pairs = [(program, QUIET) for start in range(8, 16) for program in draws(quiet, 40, start)]
    under = programs_under_faults(max_world_size=3, max_steps=6)
    pairs += [pair for start in (0, 1) for pair in draws(under, 20, start)]
    chosen = [(program, plan) for program, plan in pairs if program.rpc_timeout is not None]
    assert 20 < len(chosen) < 200
    ended: set[str] = set()
    for program, plan in chosen:
        predicted = predict(program, plan)
        made = {leaf.out: leaf for leaf in program.leaves if isinstance(leaf, Remote)}
        assert predicted.certain or any(step.error == "unknown" for step in predicted.steps)
        for leaf, step in zip(program.leaves, predicted.steps, strict=True):
            if step.error == "unknown":
                assert isinstance(leaf, Fetch)
                creation = made[leaf.handle]
                assert creation.lasts > (creation.timeout or program.rpc_timeout or 0.0)
            elif step.error == "timeout" and getattr(leaf, "timeout", 0) is None:
                ended.add(type(leaf).__name__)
    assert ended


def test_those_for_any_plan_have_none() -> None:
    """A program that is for no plan in particular meets delays of an hour."""
    assert all(program.rpc_timeout is None for program in draws(programs(max_steps=4), 20))
