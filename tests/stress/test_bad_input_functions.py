"""Bad input of functions: every public function and class, called with whatever a caller may have.

The right names and number of arguments, and any values: what is wrong with one is a UsageError (or
MachineCannot), never a TypeError, an AttributeError or a hang. Values whose own repr() raises are
not among them: no message could name one.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import inspect
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Required, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rpcprops
from rpcprops import ClusterServer, Counters, Outcome, faults, fixture, programs, strategies
from rpcprops import runner as runners
from rpcprops.errors import MachineCannot, UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.outcomes import PhaseOutcome, RaisedError, RankOutcome, StepOutcome
from rpcprops.programs import STEP_TYPES, Parallel, Program
from rpcprops.pytest_plugin import ClusterFactory
from tests.stress.test_bad_input import (
    OUTCOME,
    PLAN,
    PROGRAM,
    ReachedError,
    bounded,
    many,
)


class Number(enum.IntEnum):
    TWO = 2


class Text(str):
    __slots__ = ()


class NotHashable:
    __hash__ = None  # type: ignore[assignment]


class NoItems:
    def __iter__(self) -> Any:
        msg = "no items"
        raise ArithmeticError(msg)

    def __len__(self) -> int:
        return 3


ODD: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 17, 2**31, 2**63, 10**30, -(10**30), 0.5, 2.0, -0.0),
    *(float("nan"), float("inf"), float("-inf"), 1e308, 1j, Number.TWO, Text("tcp")),
    *("", " ", "x", "tcp", "shm", "auto", "real", "\x00", "\ud800", "\x1b[31m", "x" * 100_000),
    *("RREF_USER_DELETE", "rref_user_delete", "PYTHON_CALL", "remote", "settle", "worker0", "1"),
    *(b"", b"x", bytearray(b"x"), (), [], {}, set(), frozenset({1}), range(3), (None,), [[]]),
    *(["RREF_USER_DELETE"], {"RREF_USER_DELETE"}, ["RREF_USER_DELETE", 5], {"PYTHON_CALL": 1.0}),
    *({"PYTHON_CALL": float("nan")}, {"PYTHON_CALL": "x"}, {1: FaultTable()}, {-1: FaultTable()}),
    *({10**30: FaultTable()}, {True: FaultTable()}, {"0": FaultTable()}, {0: None}, {None: None}),
    *(object(), object, int, len, lambda: None, ..., NotImplemented, NotHashable()),
    *(NoItems(), [NotHashable()], ValueError("x"), Path("x"), threading, 1 << 10_000),
    *(decimal.Decimal(1), decimal.Decimal("sNaN"), fractions.Fraction(1, 2), datetime.timedelta(1)),
    *(np.int64(2), np.float64(1.0), np.array([1, 2]), np.array(1), np.bool_(True), np.str_("tcp")),
    *(FaultTable(), FaultTable(["RREF_USER_DELETE"], 2), PLAN, PROGRAM, OUTCOME, Counters()),
    *(st.integers(), st.just(FaultTable()), st.nothing(), st.just(5), FaultTable, FaultPlan),
    *(programs.Settle(), programs.Remote(0, 1, "a"), (programs.Settle(),), [programs.Settle(), 5]),
    *([Parallel(())], [Parallel(((),))], "FaultTable()", memoryview(b"x")),
]
odd = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=5)

OMITTED = object()


def named(module: Any) -> dict[str, Callable[..., Any]]:
    """The functions that a module defines and does not hide."""
    prefix = module.__name__.rpartition(".")[2]
    return {
        f"{prefix}.{name}": found
        for name, found in vars(module).items()
        if inspect.isfunction(found)
        and not name.startswith("_")
        and found.__module__.startswith(module.__name__)
    }


def calls() -> dict[str, Callable[..., Any]]:
    """Everything public that can be called with values, by name.

    Not here: MessageType, whose call is enum's own; Cluster, which ClusterServer makes; and the
    classes that only say what was seen.
    """
    table = FaultTable(["RREF_USER_DELETE"], 2)
    server = ClusterServer()
    found = {
        **named(faults),
        **named(strategies),
        **{f"strategies.{name}": getattr(strategies, name) for name in strategies.__all__},
        **named(programs),
        "check_world_size": programs.check_world_size,
        "FaultTable": FaultTable,
        "FaultPlan": FaultPlan,
        "Program": Program,
        "Program.without": PROGRAM.without,
        "FaultTable.is_survivable": table.is_survivable,
        "FaultTable.retry_seconds": table.retry_seconds,
        "ClusterServer": ClusterServer,
        "ClusterServer.cluster": server.cluster,
        "MessageFault": rpcprops.MessageFault,
        "NthMessage": rpcprops.NthMessage,
        "judge": rpcprops.judge,
        "run": rpcprops.run,
        "load_script": rpcprops.load_script,
        "fixture.setup_fault_injection": _set_up,
        "fixture.attributes": _attributes,
    }
    plan_methods = ["of", "check", "faulty_ranks", "is_within_budget", "fault_names", "without"]
    plan_methods += ["faults", "faults_at", "named", "with_table"]
    return found | {f"FaultPlan.{name}": getattr(PLAN, name) for name in plan_methods}


def _set_up(faulty_messages: Any, messages_to_delay: Any) -> Any:
    made = fixture.FaultyRpcAgentTestFixture()
    made.setup_fault_injection(faulty_messages, messages_to_delay)
    return made.fault_table


def _attributes(messages_to_fail: Any, num_fail_sends: Any, messages_to_delay: Any) -> Any:
    made = fixture.FaultyRpcAgentTestFixture()
    made.messages_to_fail = messages_to_fail
    made.num_fail_sends = num_fail_sends
    made.messages_to_delay = messages_to_delay
    return made.fault_table


CALLS = calls()

#: Right values, so that one wrong one is what is refused.
RIGHT: dict[str, Any] = {
    **{"program": PROGRAM, "plan": PLAN, "outcome": OUTCOME, "world_size": 2, "steps": ()},
    **{"faults": PLAN, "index": 0, "names": ("0:RREF_USER_DELETE",), "message": "PYTHON_CALL"},
    **{"value": 1.0, "name": "a value", "failures": 2, "delay": 1.0, "messages_to_delay": {}},
    **{"messages_to_fail": ("RREF_USER_DELETE",), "num_fail_sends": 1, "default": FaultTable()},
    **{"by_rank": {}, "faulty_messages": None, "rank": 0},
}


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Those that have names, with the options of a TypedDict one by one."""
    found: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            found += [parameter] * (parameter.kind is not parameter.VAR_POSITIONAL)
            continue
        options = get_args(get_type_hints(function, include_extras=True)[parameter.name])
        hints = get_type_hints(options[0], include_extras=True) if options else {}
        for name, hint in hints.items():
            default = parameter.empty if get_origin(hint) is Required else None
            found.append(inspect.Parameter(name, parameter.KEYWORD_ONLY, default=default))
    return found


@st.composite
def arguments(draw: st.DrawFn, function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments by the names that a function has for them; at least one is anything."""
    parameters = parameters_of(function)
    given: dict[str, Any] = {}
    wrong = draw(st.sampled_from([p.name for p in parameters])) if parameters else ""
    for parameter in parameters:
        if parameter.name == wrong or not draw(st.integers(0, 3)):
            given[parameter.name] = draw(odd)
        elif parameter.default is parameter.empty:
            given[parameter.name] = RIGHT.get(parameter.name, 1)
    return given


def call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call it; None where it refuses as it may."""
    positional = [
        given.pop(p.name)
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.POSITIONAL_ONLY
    ]
    try:
        with bounded():
            return function(*positional, **given)
    except (UsageError, MachineCannot) as error:
        said = str(error)
    except ReachedError:
        return None
    assert said
    return None


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner of its own whose clusters do not start: what is accepted would run."""

    def reached(*_: object, **__: object) -> None:
        raise ReachedError

    monkeypatch.setattr(runners, "_default", runners.Runner(ClusterServer()))
    monkeypatch.setattr(ClusterServer, "start", lambda _: None)
    monkeypatch.setattr(rpcprops.Cluster, "start", reached)


def test_what_is_called() -> None:
    """Every public name is fed, but those that only say what was seen or that others make."""
    others = {"MessageType", "Cluster", "Counters", "Outcome", "RpcCluster", "Violation"}
    constants = {"DEFAULT_MESSAGES_TO_DELAY", "RETRYABLE_MESSAGE_TYPES"}
    fed = {name for name in CALLS if "." not in name}
    assert set(rpcprops.__all__) <= fed | others | constants
    assert {name.partition(".")[2] for name in CALLS} >= set(strategies.__all__)
    assert len(CALLS) >= 30


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("name", CALLS)
def test_functions(name: str) -> None:
    """A public function takes what it is given or refuses it with an error of ours."""

    @many(40, 0.3)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        made = call(CALLS[name], data.draw(arguments(CALLS[name])))
        if isinstance(made, st.SearchStrategy):
            # What is wrong with a strategy that was passed on shows when it draws.
            with bounded():
                try:
                    data.draw(made)
                except (UsageError, MachineCannot):
                    pass

    check()


@many(120, 1.5)
@given(data=st.data())
def test_steps(data: st.DataObject) -> None:
    """A step of a program holds anything; the program refuses what it cannot be."""
    step = STEP_TYPES[data.draw(st.sampled_from(sorted(STEP_TYPES)))]
    right = {"at": 0, "to": 1, "out": "b", "handle": "a", "future": "f", "then": 1, "via": 1}
    given: dict[str, Any] = {}
    for field in dataclasses.fields(step):
        needed = field.default is dataclasses.MISSING
        if field.name in right and needed and data.draw(st.integers(0, 2)):
            given[field.name] = right[field.name]
        elif needed or not data.draw(st.integers(0, 2)):
            given[field.name] = data.draw(odd)
    make: Any = step
    made = make(**given)
    program = call(Program, {"world_size": 2, "steps": (programs.Own(0, "a"), made)})
    if program is not None:
        repr(program)
        hash(program)
        assert call(rpcprops.judge, {"program": program, "plan": None, "outcome": OUTCOME}) != ()


_counts = st.integers(-1, 3)
_errors = st.none() | st.builds(RaisedError, st.text(max_size=4), st.text(max_size=4))
_counters = st.builds(Counters, _counts, _counts, _counts)
outcomes = st.builds(
    Outcome,
    st.integers(0, 4),
    st.sampled_from([1.0, 400.0, 0.0, float("nan")]),
    st.sampled_from(["tcp", "x"]),
    st.text(max_size=3),
    st.lists(
        st.builds(
            PhaseOutcome,
            st.sampled_from(["start", "run", "settle", "shutdown"]),
            st.sampled_from(["ok", "failed", "hung"]),
            ranks=st.lists(st.integers(-1, 9), max_size=2).map(tuple),
        ),
        max_size=4,
    ).map(tuple),
    st.lists(
        st.builds(
            RankOutcome,
            st.integers(-1, 5),
            st.text(max_size=3),
            st.none() | st.integers(-1, 300),
            st.integers(-1, 99),
            counters=st.none() | _counters,
            failed_sends=st.integers(-1, 9),
            delayed_sends=st.none() | st.dictionaries(_counts, _counts, max_size=2),
            calls=st.dictionaries(st.sampled_from(["step0", "step1", "x"]), _counts, max_size=2),
            shutdown_error=_errors,
            log=st.sampled_from(["", "Leaking RRef\n", "] Send try 1 failed\n", "\x00\ud800"]),
        ),
        max_size=4,
    ).map(tuple),
    st.lists(
        st.builds(
            StepOutcome,
            st.integers(-2, 9),
            st.sampled_from([None, 3.0, [3.0], [float("nan")], "x", {}, {"id": 1}, [[3.0]]]),
            _errors,
            counters=st.lists(_counters, max_size=3).map(tuple),
            ended=st.booleans(),
        ),
        max_size=5,
    ).map(tuple),
)


@many(120, 1.5)
@given(outcome=outcomes, program=strategies.programs(max_world_size=3, max_steps=4))
def test_outcomes(outcome: Outcome, program: Program) -> None:
    """Whatever an outcome says, it is judged or refused: it may come from another program's run."""
    call(rpcprops.judge, {"program": program, "plan": None, "outcome": outcome})


def test_a_live_cluster(rpc_cluster: ClusterFactory) -> None:
    """What a running cluster is asked wrongly is refused, and it goes on."""
    with rpc_cluster(world_size=2) as cluster:

        @many(60, 2.0)
        @given(value=odd, where=st.sampled_from(["on", "call", "each", "argument", "settle"]))
        def ask(value: Any, where: str) -> None:
            if where == "on":
                call(cluster.on, {"rank": value})
            elif callable(value) and where in ("call", "each"):
                return
            elif where == "call":
                call(partial(cluster.on(0).call, value), {})
            elif where == "each":
                call(partial(cluster.each, value), {})
            elif where == "argument":
                call(partial(cluster.on(1).call, type, value), {})
            elif value is not None:
                call(cluster.settle, {"expect": value})

        ask()
        assert cluster.each(abs, -1) == [1, 1]


@many(60, 1.5)
@given(data=st.data())
def test_options_of_a_cluster(rpc_cluster: ClusterFactory, data: st.DataObject) -> None:
    """The fixture refuses what a cluster cannot be made of, and what it makes need not start."""
    names = ["world_size", "faults", "names", "clock", "transport", "rpc_timeout", "leaks", "init"]
    names += ["num_worker_threads", "deadline"]
    wrong = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    given: Any = {"world_size": 2} | {name: data.draw(odd) for name in wrong}
    call(partial(rpc_cluster, **given), {})
