"""JSON both ways: everything comes back equal, and what is damaged is refused in one sentence."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcprops import strategies
from rpcprops._json import from_json, to_json
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.outcomes import (
    ArmedFaults,
    Counters,
    Outcome,
    PhaseOutcome,
    RaisedError,
    RankOutcome,
    StepOutcome,
    Violation,
)
from rpcprops.programs import STEP_TYPES, Own, Program
from rpcprops.properties import _programs as shipped
from tests.seeded._programs import ENDS, EVERY_KIND, GROUPS, LIVES, REFUSED_INITS, RETRIES

#: Tables far beyond what the defaults draw: every type, any count, delays up to an hour.
WIDE_TABLES = strategies.fault_tables(
    messages=tuple(MessageType), max_fail_sends=2**31 - 1, max_delay=3600.0
)

FLAGS = itertools.product((False, True), repeat=4)
SHIPPED = [
    *(shipped.create_and_fetch(flavour) for flavour in shipped.FLAVOURS),
    shipped.create_on_self(),
    shipped.fork_user_to_user(),
    shipped.fork_user_to_owner(),
    shipped.fork_back_to_creator(),
    shipped.fork_to_self(),
    shipped.fork_chain(4),
    shipped.owner_shares(4),
    *shipped.drop_orders(),
    *(shipped.nested_remote(flavour) for flavour in shipped.FLAVOURS),
    shipped.handle_as_argument(),
    shipped.calls_of_each_kind(),
    shipped.bump_from_everywhere(),
    *(
        shipped.context_over(3, (1, 2), nested=n, rrefs=r, backward=b, raises=x)
        for n, r, b, x in FLAGS
    ),
    shipped.two_contexts(),
    shipped.unsettled_exit(4),
    shipped.just_dropped(),
    *(shipped.timed_call(flavour, 0.25) for flavour in shipped.FLAVOURS),
    shipped.create_and_drop(),
    Program(16, name="no steps"),
    *EVERY_KIND,
    LIVES[-1],
    REFUSED_INITS[0],
    RETRIES[0],
    *GROUPS,
    *ENDS,
]

OUTCOME = Outcome(
    2,
    clock_rate=50.0,
    transport="shm",
    torch_version="2.13.0+cpu",
    phases=(
        PhaseOutcome("start"),
        PhaseOutcome("run", "hung", 1.5, 0.25, 30.0, "worker1 hangs", (1,)),
        PhaseOutcome("settle", "failed"),
        PhaseOutcome("shutdown"),
    ),
    ranks=(
        RankOutcome(
            0,
            "worker0",
            exit_code=0,
            counters=Counters(*range(9)),
            failed_sends=3,
            delayed_sends={1500: 2, 3: 0},
            sent={"PYTHON_CALL": 5},
            failed_by_type={"PYTHON_CALL": 4},
            delayed_by_type={},
            calls={"step0": 1, "step4/nested": 2},
            log="two\nlines \x1b[31m \N{SNOWMAN}",
            processor_seconds=0.25,
            late_seconds=1e-9,
        ),
        RankOutcome(
            1,
            "worker1",
            signal=11,
            killed=True,
            shutdown_error=RaisedError("RuntimeError", "a\nb", "Traceback …"),
            stack="Thread 0x1",
        ),
    ),
    armed=(
        ArmedFaults(
            FaultPlan(by_rank={1: FaultTable(["PYTHON_CALL"], 2)}),
            1.5,
            2.5,
            failed=({"PYTHON_CALL": 4}, {}),
            delayed=({}, {}),
        ),
    ),
    steps=(
        StepOutcome(0, [1.0, -0.0, 1e300]),
        StepOutcome(1, {"loss": 70.0, "gradient": [24.0], "id": 1 << 48, "raised": True}),
        StepOutcome(2, counters=(Counters(owners=1), Counters())),
        StepOutcome(3, error=RaisedError("ValueError", ""), seconds=0.5, ended=False),
    ),
)
VIOLATIONS = [
    Violation("WrongValue", "expected [3.0], got [4.0]", 1, 2),
    Violation("RankHung", "worker0 hangs", timing_sensitive=True),
    Violation("RRefLeak", "", 0),
]


def there_and_back(value: Any) -> Any:
    """`value` as JSON text, and made again from that text."""
    return from_json(json.loads(json.dumps(to_json(value))), type(value))


@given(WIDE_TABLES)
def test_tables_come_back(table: FaultTable) -> None:
    """Any table is the same value, with the same hash and text, after a trip through JSON."""
    again = there_and_back(table)
    assert (again, hash(again), repr(again)) == (table, hash(table), repr(table))


@given(st.integers(1, 16).flatmap(lambda n: strategies.fault_plans(world_size=n)))
def test_plans_come_back(plan: FaultPlan) -> None:
    """Any plan of the default tables is the same value after a trip through JSON."""
    again = there_and_back(plan)
    assert (again, hash(again), repr(again)) == (plan, hash(plan), repr(plan))


@given(strategies.fault_plans(world_size=4, tables=WIDE_TABLES))
def test_wide_plans_come_back(plan: FaultPlan) -> None:
    """Plans beyond every budget come back too: an artefact may hold whatever a user drew."""
    assert there_and_back(plan) == plan


@pytest.mark.parametrize("program", SHIPPED, ids=lambda p: p.name)
def test_programs_come_back(program: Program) -> None:
    """Each shipped program is the same value, with the same hash and text, after the trip."""
    again = there_and_back(program)
    assert (again, hash(again), repr(again)) == (program, hash(program), repr(program))


def test_every_step_type_makes_the_trip() -> None:
    """No type of step is left out of the programs above."""
    used = {step.op for program in SHIPPED for step in program.steps}
    assert used == set(STEP_TYPES)


def test_a_program_without_an_end_is_that_of_before() -> None:
    """What an older version wrote is still read, and a program that ends as usual says nothing."""
    program = Program(2, (Own(0, "a"),))
    data = to_json(program)
    assert "end" not in data
    assert from_json(data, Program) == program
    with pytest.raises(UsageError):
        from_json({**data, "end": {"how": "never"}}, Program)


def test_an_outcome_comes_back() -> None:
    """Phases, ranks, counters, errors and every step survive, with ints as keys where they were."""
    again = there_and_back(OUTCOME)
    assert again == OUTCOME
    assert again.ranks[0].delayed_sends == {1500: 2, 3: 0}
    assert again.ranks[1].delayed_sends is None
    assert again.ranks[1].sent is None
    assert again.armed[0].of(again.ranks[1]).failed_by_type == {}
    assert math.copysign(1.0, again.steps[0].value[1]) == -1.0


def test_values_that_are_no_numbers_come_back() -> None:
    """NaN and infinities, which a broken computation gives, survive."""
    outcome = Outcome(1, steps=(StepOutcome(0, [math.nan, math.inf, -math.inf]),))
    value = there_and_back(outcome).steps[0].value
    assert math.isnan(value[0])
    assert value[1:] == [math.inf, -math.inf]


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_violations_come_back(violation: Violation) -> None:
    """A violation keeps its promise, sentence and place."""
    assert there_and_back(violation) == violation


def test_what_is_left_out_has_its_default() -> None:
    """An older file that lacks a field which has a default can still be read."""
    assert from_json({}, FaultPlan) == FaultPlan()
    assert from_json({"num_fail_sends": 2}, FaultTable) == FaultTable((), 2)
    assert from_json({"world_size": 2}, Outcome) == Outcome(2)
    steps = [{"op": "own", "at": 0, "out": "a"}]
    assert from_json({"world_size": 1, "steps": steps}, Program) == Program(1, (Own(0, "a"),))


#: Steps within steps, more deeply than Python can follow.
_NESTED: list[Any] = [{"op": "settle"}]
for _ in range(2000):
    _NESTED = [{"op": "parallel", "branches": [_NESTED]}]


@pytest.mark.parametrize(
    ("cls", "data", "said"),
    [
        (FaultTable, None, "FaultTable"),
        (FaultTable, [], "array"),
        (FaultTable, {"messages_to_fail": ["RREF_USER_DELET"]}, "RREF_USER_DELET"),
        (FaultTable, {"messages_to_fail": "RREF_USER_DELETE"}, "messages_to_fail"),
        (FaultTable, {"num_fail_sends": "3"}, "num_fail_sends"),
        (FaultTable, {"num_fail_sends": True}, "num_fail_sends"),
        (FaultTable, {"num_fail_sends": -1}, "num_fail_sends=-1"),
        (FaultTable, {"num_fail_sends": 2**31}, "num_fail_sends=2147483648"),
        (FaultTable, {"messages_to_delay": {"PYTHON_CALL": 1e30}}, "1e+30"),
        (FaultTable, {"messages_to_delay": {"PYTHON_CALL": math.nan}}, "nan"),
        (FaultTable, {"messages_to_delay": {"nobody": 1}}, "nobody"),
        (FaultPlan, {"by_rank": {"-1": {}}}, "-1"),
        (FaultPlan, {"by_rank": {"one": {}}}, "by_rank"),
        (FaultPlan, {"by_rank": {"1": []}}, "by_rank"),
        (FaultPlan, {"default": None}, "default"),
        (Outcome, {}, "world_size"),
        (Outcome, {"world_size": "2"}, "world_size"),
        (Outcome, {"world_size": 2, "phases": [{"name": "lunch"}]}, "phases[0].name"),
        (Outcome, {"world_size": 2, "ranks": [{"rank": 0}]}, "ranks[0]"),
        (Outcome, {"world_size": 2, "steps": [{"index": None}]}, "steps[0].index"),
        (Violation, {"promise": "WrongValue"}, "message"),
        (Violation, {"promise": 1, "message": ""}, "promise"),
        (Program, None, "steps"),
        (Program, [], "steps"),
        (Program, {"world_size": 2}, "steps"),
        (Program, {"world_size": 2, "steps": {}}, "steps"),
        (Program, {"steps": []}, "missing required field `world_size`"),
        (Program, {"world_size": "2", "steps": []}, "world_size: Expected"),
        (
            Program,
            {"world_size": 2, "steps": [], "rpc_time_out": 3},
            "unknown field 'rpc_time_out'",
        ),
        (
            Program,
            {"world_size": 2, "steps": [{"op": "settle"}, {"op": "own", "at": 0, "output": "a"}]},
            "step 1, own: Object has the unknown field 'output'; its fields are at, op, out, ",
        ),
        (Program, {"world_size": 2.5, "steps": []}, "int"),
        (Program, {"world_size": "\ud800", "steps": []}, "surrogates not allowed"),
        (Program, {"world_size": 2, "steps": _NESTED}, "recursion"),
        (Program, {"world_size": 99, "steps": []}, "world_size=99"),
        (Program, {"world_size": 2, "steps": ["own"]}, "'own'"),
        (Program, {"world_size": 2, "steps": [{}]}, "Unknown step"),
        (Program, {"world_size": 2, "steps": [{"op": "explode"}]}, "explode"),
        (Program, {"world_size": 2, "steps": [{"op": ["own"]}]}, "Unknown step"),
        (Program, {"world_size": 2, "steps": [{"op": "own", "at": 0}]}, "out"),
        (Program, {"world_size": 2, "steps": [{"op": "own", "at": "0", "out": "a"}]}, "at"),
        (Program, {"world_size": 2, "steps": [{"op": "fetch", "at": 0, "handle": "a"}]}, "'a'"),
        (
            Program,
            {"world_size": 2, "steps": [{"op": "call", "at": 0, "to": 1, "flavour": "rust"}]},
            "rust",
        ),
        (Program, {"world_size": 2, "steps": [{"op": "parallel"}]}, "array"),
        (Program, {"world_size": 2, "steps": [{"op": "parallel", "branches": [1]}]}, "array"),
        (Program, {"world_size": 2, "steps": [{"op": "parallel", "branches": [["own"]]}]}, "'own'"),
        (Program, {"world_size": 2, "steps": [{"op": "parallel", "branches": [[]]}]}, "empty"),
        (Program, {"world_size": 2, "steps": [], "settles": "no"}, "bool"),
        (Program, {"world_size": 2, "steps": [], "name": 7}, "str"),
    ],
)
def test_malformed_data_is_refused(cls: type[Any], data: Any, said: str) -> None:
    """What holds no such value is the file's fault: a UsageError in one line that says where."""
    with pytest.raises(UsageError) as caught:
        from_json(data, cls)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    st.sampled_from([FaultTable, FaultPlan, Program, Outcome, Violation]),
)
def test_no_json_makes_anything_but_a_value_or_a_usage_error(data: Any, cls: type[Any]) -> None:
    """Whatever a file holds, reading it ends in a value of the type or in a UsageError."""
    try:
        value = from_json(data, cls)
    except UsageError:
        return
    assert type(value) is cls


def test_what_is_no_data_is_not_written() -> None:
    """A value that has no place in an artefact raises when it is written, not when it is read."""
    with pytest.raises(NotImplementedError, match="object is not data"):
        to_json(object())
