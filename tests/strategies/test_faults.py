"""The strategies for faults: what they draw, what it shrinks to, what they refuse."""

from __future__ import annotations

import inspect
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

import rpcprops.strategies
from rpcprops.errors import UsageError
from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, FaultTable, MessageType
from rpcprops.strategies import (
    delay_tables,
    delays,
    fail_counts,
    fault_plans,
    fault_tables,
    message_types,
    register,
    retryable_subsets,
)
from tests._draws import QUIET, draws, smallest

NAMES = {"FaultPlan": FaultPlan, "FaultTable": FaultTable, "MessageType": MessageType}
CLEANUP, ACCEPT, FORK, DELETE = RETRYABLE_MESSAGE_TYPES
CALL = MessageType.PYTHON_CALL
SUBSETS = [
    kinds for size in range(5) for kinds in itertools.combinations(RETRYABLE_MESSAGE_TYPES, size)
]
#: Every table that fails retryable types within their budget, and delays nothing.
UNDELAYED = {FaultTable()} | {
    FaultTable(kinds, count) for kinds in SUBSETS if kinds for count in range(1, 6)
}
QUIET_FIND = settings(QUIET, max_examples=5000)
SEEDS = 2
WORLD = 4


def refusal(make: Any, **kwargs: Any) -> str:
    with pytest.raises(UsageError) as caught:
        make(**kwargs)
    return str(caught.value)


def is_canonical(table: FaultTable) -> bool:
    """Both types and a count or neither, and only delays of a whole millisecond or more."""
    return bool(table.messages_to_fail) == bool(table.num_fail_sends) and all(
        delay >= 0.001 and delay == round(delay * 1000) / 1000
        for delay in table.messages_to_delay.values()
    )


# What it shrinks to.


@pytest.mark.parametrize(
    ("strategy", "holds", "least"),
    [
        (message_types(), lambda _: True, MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ),
        (message_types(among=("PYTHON_CALL", DELETE)), lambda _: True, CALL),
        (message_types(), lambda m: not m.is_retryable, CALL),
        (retryable_subsets(), lambda _: True, ()),
        (retryable_subsets(min_size=2), lambda _: True, (CLEANUP, ACCEPT)),
        (retryable_subsets(), lambda s: DELETE in s, (DELETE,)),
        (retryable_subsets(), lambda s: {ACCEPT, DELETE} <= set(s), (ACCEPT, DELETE)),
        (retryable_subsets(messages=(FORK, ACCEPT)), len, (FORK,)),
        (fail_counts(), lambda _: True, 0),
        (fail_counts(min_fail_sends=2), lambda _: True, 2),
        (fail_counts(), lambda n: n >= 3, 3),
        (delays(), lambda _: True, 0.0),
        (delays(min_delay=0.25), lambda _: True, 0.25),
        (delays(), lambda d: d > 1, 1.001),
        (delay_tables(), lambda _: True, {}),
        (delay_tables(), len, {CLEANUP: 0.001}),
        (delay_tables(messages=(CALL, DELETE)), len, {CALL: 0.001}),
        (delay_tables(), lambda t: CALL in t, {CALL: 0.001}),
        (delay_tables(), lambda t: t.get(CALL, 0) >= 0.5, {CALL: 0.5}),
        (delay_tables(), lambda t: len(t) >= 2, {CLEANUP: 0.001, ACCEPT: 0.001}),
    ],
)
def test_the_smallest_part(strategy: st.SearchStrategy[Any], holds: Any, least: Any) -> None:
    """Types, subsets, counts and delays shrink to the value that a person would name."""
    assert smallest(strategy, holds, SEEDS) == [least] * SEEDS


@pytest.mark.parametrize(
    ("holds", "least"),
    [
        (lambda _: True, FaultTable()),
        (lambda t: not t.is_empty, FaultTable((CLEANUP,), 1)),
        (lambda t: t.failing, FaultTable((CLEANUP,), 1)),
        (lambda t: DELETE in t.failing, FaultTable((DELETE,), 1)),
        (lambda t: len(t.failing) >= 2, FaultTable((CLEANUP, ACCEPT), 1)),
        (lambda t: {FORK, DELETE} <= set(t.failing), FaultTable((FORK, DELETE), 1)),
        (lambda t: len(t.failing) == 4, FaultTable(RETRYABLE_MESSAGE_TYPES, 1)),
        (lambda t: t.num_fail_sends >= 3, FaultTable((CLEANUP,), 3)),
        (lambda t: DELETE in t.failing and t.num_fail_sends > 3, FaultTable((DELETE,), 4)),
        (
            lambda t: DELETE in t.failing or {ACCEPT, FORK} <= set(t.failing),
            FaultTable((DELETE,), 1),
        ),
        (lambda t: t.messages_to_delay, FaultTable(messages_to_delay={CLEANUP: 0.001})),
        (lambda t: CALL in t.messages_to_delay, FaultTable(messages_to_delay={CALL: 0.001})),
        (
            lambda t: t.messages_to_delay.get(CALL, 0) >= 0.5,
            FaultTable(messages_to_delay={CALL: 0.5}),
        ),
        (
            lambda t: len(t.messages_to_delay) >= 2,
            FaultTable(messages_to_delay={CLEANUP: 0.001, ACCEPT: 0.001}),
        ),
        (
            lambda t: t.failing and any(d > 1 for d in t.messages_to_delay.values()),
            FaultTable((CLEANUP,), 1, {CLEANUP: 1.001}),
        ),
        (
            lambda t: FORK in t.failing and CALL in t.messages_to_delay,
            FaultTable((FORK,), 1, {CALL: 0.001}),
        ),
    ],
)
def test_the_smallest_table(holds: Any, least: FaultTable) -> None:
    """A table shrinks to nothing but the types, the count and the delays that a failure needs."""
    assert smallest(fault_tables(), holds, SEEDS) == [least] * SEEDS


ONE = FaultTable((CLEANUP,), 1)


@pytest.mark.parametrize(
    ("holds", "least"),
    [
        (lambda _: True, FaultPlan()),
        (lambda p: p != FaultPlan(), FaultPlan(by_rank={0: ONE})),
        (lambda p: p.faulty_ranks(WORLD), FaultPlan(by_rank={0: ONE})),
        (lambda p: p.table(2).failing, FaultPlan(by_rank={2: ONE})),
        (lambda p: DELETE in p.table(3).failing, FaultPlan(by_rank={3: FaultTable((DELETE,), 1)})),
        (
            lambda p: p.table(1).num_fail_sends > 2,
            FaultPlan(by_rank={1: FaultTable((CLEANUP,), 3)}),
        ),
        (
            lambda p: any(p.table(rank).messages_to_delay for rank in range(WORLD)),
            FaultPlan(by_rank={0: FaultTable(messages_to_delay={CLEANUP: 0.001})}),
        ),
        (lambda p: len(p.faulty_ranks(WORLD)) >= 2, FaultPlan(by_rank={0: ONE, 1: ONE})),
        (
            lambda p: p.table(1).failing and p.table(3).failing,
            FaultPlan(by_rank={1: ONE, 3: ONE}),
        ),
        (
            lambda p: all(DELETE in p.table(rank).failing for rank in (0, 2)),
            FaultPlan(by_rank={0: FaultTable((DELETE,), 1), 2: FaultTable((DELETE,), 1)}),
        ),
        (lambda p: len(p.faulty_ranks(WORLD)) == WORLD, FaultPlan(default=ONE)),
        (lambda p: p.default.num_fail_sends > 1, FaultPlan(default=FaultTable((CLEANUP,), 2))),
        (lambda p: DELETE in p.default.failing, FaultPlan(default=FaultTable((DELETE,), 1))),
    ],
)
def test_the_smallest_plan(holds: Any, least: FaultPlan) -> None:
    """A plan shrinks to the fewest and lowest ranks with the smallest tables that fail."""
    assert smallest(fault_plans(world_size=WORLD), holds, SEEDS) == [least] * SEEDS


def test_the_smallest_plan_with_different_tables() -> None:
    """Two tables that must differ shrink to two ranks and one failure more in one of the two."""
    for plan in smallest(
        fault_plans(world_size=WORLD),
        lambda p: len({p.table(rank) for rank in p.faulty_ranks(WORLD)}) == 2,
        SEEDS,
    ):
        assert plan.faulty_ranks(WORLD) == (0, 1)
        assert {plan.table(0), plan.table(1)} == {ONE, FaultTable((CLEANUP,), 2)}


def test_the_smallest_plan_of_a_world_of_one() -> None:
    """A lone rank shares its table with every rank there is, so the table is the default."""
    assert smallest(fault_plans(world_size=1), lambda p: p.faulty_ranks(1), SEEDS) == (
        [FaultPlan(default=ONE)] * SEEDS
    )


# What is drawn.


def test_exactly_the_retryable_tables_are_drawn() -> None:
    """Draws without delays give all 76 tables (15 subsets, 1 to 5 times, or none) and no other."""
    assert len(UNDELAYED) == 76
    assert set(draws(fault_tables(max_delay=0), 1000)) == UNDELAYED


@pytest.mark.parametrize("kind", MessageType)
def test_any_type_may_be_late_by_all_of_max_delay(kind: MessageType) -> None:
    """Each of the ten types is late in some table, by the longest delay too, failing or not."""
    tables = fault_tables(max_delay=0.002)
    assert find(tables, lambda t: t.messages_to_delay.get(kind) == 0.002, settings=QUIET_FIND)
    assert find(tables, lambda t: t.failing and kind in t.messages_to_delay, settings=QUIET_FIND)


def test_all_subsets_are_drawn() -> None:
    """Every subset of the retryable types is drawn, sorted, and no other."""
    assert set(draws(retryable_subsets(), 500)) == set(SUBSETS)
    assert set(draws(retryable_subsets(min_size=3), 200)) == {s for s in SUBSETS if len(s) >= 3}
    assert set(draws(retryable_subsets(messages=[DELETE, "RREF_CHILD_ACCEPT"]), 50)) == {
        (),
        (ACCEPT,),
        (DELETE,),
        (ACCEPT, DELETE),
    }


def test_all_types_and_counts_are_drawn() -> None:
    """Every type and every count in bounds is drawn, and no other."""
    assert set(draws(message_types(), 200)) == set(MessageType)
    assert set(draws(message_types(among={CALL, DELETE}), 50)) == {CALL, DELETE}
    assert set(draws(fail_counts(), 100)) == set(range(6))
    assert set(draws(fail_counts(min_fail_sends=3, max_fail_sends=7), 100)) == set(range(3, 8))


@pytest.mark.parametrize(
    ("bounds", "milliseconds"),
    [
        ({"max_delay": 0.004}, [0, 1, 2, 3, 4]),
        ({"min_delay": 1, "max_delay": 1.001}, [1000, 1001]),
        # 1.001 * 1000, 1.009 * 1000 and 4.035 * 1000 are just off the whole number.
        ({"min_delay": 1.009, "max_delay": 1.009}, [1009]),
        ({"min_delay": 4.035, "max_delay": 4.035}, [4035]),
        ({"min_delay": 0.0005, "max_delay": 0.0025}, [1, 2]),
        ({"max_delay": 0.0009}, [0]),
        ({"min_delay": 3600, "max_delay": 3600}, [3600000]),
    ],
)
def test_delays_are_the_whole_milliseconds_in_bounds(
    bounds: dict[str, float], milliseconds: list[int]
) -> None:
    """Every whole millisecond from one bound to the other is drawn, both included, and no other."""
    assert set(draws(delays(**bounds), 100)) == {ms / 1000 for ms in milliseconds}


@settings(QUIET)
@given(fault_tables())
def test_a_table_is_survivable_by_default(table: FaultTable) -> None:
    """What the defaults draw is canonical, within every budget, and late by at most 2 s."""
    assert is_canonical(table)
    assert table.is_within_budget
    assert set(table.messages_to_fail) <= set(RETRYABLE_MESSAGE_TYPES)
    assert table.num_fail_sends <= 5
    assert all(delay <= 2 for delay in table.messages_to_delay.values())


@settings(QUIET)
@given(st.data())
def test_a_table_keeps_to_what_was_asked(data: st.DataObject) -> None:
    """Only the types named fail, at most as often as allowed, and delays keep their bound."""
    kinds = data.draw(st.sets(message_types()))
    most = data.draw(fail_counts(max_fail_sends=25))
    longest = data.draw(st.sampled_from([0, 0.0005, 0.001, 0.5, 3600]))
    table = data.draw(fault_tables(messages=kinds, max_fail_sends=most, max_delay=longest))
    assert is_canonical(table)
    assert set(table.messages_to_fail) <= kinds
    assert table.num_fail_sends <= most
    assert all(delay <= longest for delay in table.messages_to_delay.values())


def test_tables_beyond_the_budget_are_drawn_when_asked_for() -> None:
    """Types that torch never retries, and counts above its retries, come when they are named."""
    tables = draws(fault_tables(messages=tuple(MessageType), max_fail_sends=25), 300)
    assert {kind for table in tables for kind in table.failing} == set(MessageType)
    assert max(table.num_fail_sends for table in tables) == 25
    assert any(not table.is_within_budget for table in tables)


@settings(QUIET)
@given(st.data())
def test_a_delay_table_keeps_to_what_was_asked(data: st.DataObject) -> None:
    """Only the types named are late, no more of them than allowed, and none by 0 s."""
    kinds = data.draw(st.sets(message_types()))
    size = data.draw(st.none() | st.integers(0, 12))
    table: Mapping[MessageType, float] = data.draw(
        delay_tables(messages=kinds, max_delay=0.75, max_size=size)
    )
    assert set(table) <= kinds
    assert size is None or len(table) <= size
    assert is_canonical(FaultTable(messages_to_delay=table))
    assert all(delay <= 0.75 for delay in table.values())


#: Few tables, empty ones among them, so that ranks often share one or have none.
FEW_TABLES = st.sampled_from([FaultTable(), ONE, FaultTable((), 3), FaultTable((DELETE,), 2)])


@settings(QUIET, max_examples=200)
@given(
    st.data(), st.integers(1, 5), st.none() | st.integers(0, 6), st.sampled_from([None, FEW_TABLES])
)
def test_a_plan_is_canonical(
    data: st.DataObject,
    world_size: int,
    most: int | None,
    tables: st.SearchStrategy[FaultTable] | None,
) -> None:
    """A plan names faulty ranks of its world only, or has one default table, never both."""
    plan = data.draw(fault_plans(world_size=world_size, tables=tables, max_faulty_ranks=most))
    plan.check(world_size)
    faulty = plan.faulty_ranks(world_size)
    assert most is None or len(faulty) <= most
    if plan.default == FaultTable():
        assert tuple(plan.by_rank) == faulty
        assert len(faulty) < world_size or len(set(plan.by_rank.values())) > 1
    else:
        assert not plan.by_rank
        assert not plan.default.is_empty
    if tables is None:
        assert plan.is_within_budget(world_size)
        assert all(is_canonical(plan.table(rank)) for rank in range(world_size))


def test_plans_come_in_every_kind() -> None:
    """No rank, one rank, a few with a table each or one for all of them, all ranks with one."""
    plans = draws(fault_plans(world_size=3), 300)
    assert FaultPlan() in plans
    assert {plan.faulty_ranks(3) for plan in plans} == {
        ranks for size in range(4) for ranks in itertools.combinations(range(3), size)
    }
    shares = {
        "one for all": sum(not plan.default.is_empty for plan in plans),
        "one rank": sum(len(plan.by_rank) == 1 for plan in plans),
        "several, one table": sum(
            len(plan.by_rank) > 1 and len(set(plan.by_rank.values())) == 1 for plan in plans
        ),
        "several, own tables": sum(len(set(plan.by_rank.values())) > 1 for plan in plans),
    }
    assert min(shares.values()) >= 15, shares


def test_a_table_seldom_is_empty_and_mostly_has_no_delay() -> None:
    """Draws are worth their time: faults in most, all four types in some, delays in the fewer."""
    # Next to another argument, as in a real test: alone, Hypothesis never repeats a draw.
    pairs = [
        p for start in range(8) for p in draws(st.tuples(st.integers(), fault_tables()), 80, start)
    ]
    tables = [table for _, table in pairs]
    empty = sum(table.is_empty for table in tables)
    late = [len(table.messages_to_delay) for table in tables if table.messages_to_delay]
    whole = sum(len(table.failing) == 4 for table in tables)
    high = sum(table.num_fail_sends >= 4 for table in tables)
    assert empty < 0.25 * len(tables)
    assert 0.15 * len(tables) < len(late) < 0.5 * len(tables)
    assert sum(late) < 2.5 * len(late)
    assert whole > 0.15 * len(tables)
    assert high > 0.15 * len(tables)


@pytest.mark.parametrize(
    "strategy",
    [
        message_types(),
        retryable_subsets(),
        fail_counts(max_fail_sends=25),
        delays(),
        delay_tables(),
        fault_tables(),
        fault_tables(messages=tuple(MessageType), max_fail_sends=25, max_delay=3600),
        fault_plans(world_size=4),
        fault_plans(world_size=2, tables=fault_tables(max_delay=0.5)),
    ],
)
def test_what_is_drawn_prints_as_python_that_makes_it_again(
    strategy: st.SearchStrategy[Any],
) -> None:
    """A value from a failing test can be pasted from its report."""
    for value in draws(strategy, 100):
        assert eval(repr(value), NAMES) == value


# Determinism.


@pytest.mark.parametrize("strategy", [fault_tables(), delay_tables(), fault_plans(world_size=4)])
def test_a_seed_draws_one_sequence(strategy: st.SearchStrategy[Any]) -> None:
    """Ten runs with one seed draw the same values in the same order; another seed draws others."""
    first = draws(strategy, 20, start=1)
    assert all(draws(strategy, 20, start=1) == first for _ in range(9))
    assert draws(strategy, 20, start=2) != first


SEQUENCE = """
from hypothesis import given, seed, settings
from rpcprops.strategies import delay_tables, fault_plans, fault_tables, message_types
from tests._draws import QUIET, draws, smallest

names = {"RREF_USER_DELETE", "PYTHON_CALL", "SCRIPT_CALL", "RREF_CHILD_ACCEPT"}

@seed(3)
@settings(max_examples=40, database=None, deadline=None)
@given(
    fault_plans(world_size=4), fault_tables(messages=names), message_types(among=names),
    delay_tables(messages=names),
)
def show(plan, table, kind, late):
    print(plan, table, kind, late)

show()
"""


def run_python(code: str, *path: Path, **variables: str) -> str:
    """The output of `code` in a fresh interpreter that sees `path` and what this one sees."""
    environment = {k: v for k, v in os.environ.items() if k != "HYPOTHESIS_NO_PLUGINS"}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=150,
    )
    return done.stdout


def test_another_process_draws_the_same() -> None:
    """The order of sets, which changes with the hash seed, does not reach what is drawn."""
    first, second = (run_python(SEQUENCE, PYTHONHASHSEED=each) for each in ("1", "2"))
    assert first.count("\n") == 40
    assert first == second


# Registration with Hypothesis.


def test_a_table_is_drawn_from_its_type() -> None:
    """After registration from_type(FaultTable), and so any builds() of a caller's, draws faults."""
    register.register()
    drawn = draws(st.from_type(FaultTable), 100)
    assert sum(not table.is_empty for table in drawn) > 50
    assert all(is_canonical(table) and table.is_within_budget for table in drawn)


def test_a_message_type_is_drawn_from_its_type() -> None:
    """Hypothesis draws an enumeration's members by itself."""
    assert set(draws(st.from_type(MessageType), 100)) == set(MessageType)


@pytest.mark.parametrize(
    "imported",
    ["import hypothesis", "import rpcprops.strategies", "import rpcprops.strategies.register"],
)
def test_the_entry_point_works_whoever_imports_first(imported: str, tmp_path: Path) -> None:
    """Importing Hypothesis registers the tables without torch, and from rpcprops.strategies too."""
    distribution = tmp_path / "entry_point_of_a_test-1.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: entry-point-of-a-test\nVersion: 1\n"
    )
    (distribution / "entry_points.txt").write_text(
        "[hypothesis]\ntables = rpcprops.strategies.register:register\n"
    )
    code = f"""
import sys
{imported}
assert "torch" not in sys.modules
from hypothesis import strategies as st
from rpcprops.faults import FaultTable
print(st.from_type(FaultTable))
"""
    assert "fault_tables" in run_python(code, tmp_path)


# What is refused.

PLANS_OF_TWO = {"world_size": 2}


@pytest.mark.parametrize(
    ("make", "arguments", "expected"),
    [
        (message_types, {"among": ()}, ["among=() (type tuple)", "at least one"]),
        (message_types, {"among": "PYTHON_CALL"}, ["among='PYTHON_CALL' (type str)", "collection"]),
        (message_types, {"among": 3}, ["among=3 (type int)", "collection"]),
        (message_types, {"among": ["python_call"]}, ["among=['python_call']", "'PYTHON_CALL'"]),
        (message_types, {"among": [1.5]}, ["among=[1.5] (type list)", "got 1.5 (type float)"]),
        (retryable_subsets, {"messages": None}, ["messages=None (type NoneType)", "collection"]),
        (retryable_subsets, {"messages": [CALL]}, ["messages=", "PYTHON_CALL", "fault_tables("]),
        (retryable_subsets, {"min_size": 5}, ["min_size=5 (type int)", "0 to 4", "lower it"]),
        (retryable_subsets, {"min_size": -1}, ["min_size=-1 (type int)", "0 to 4"]),
        (retryable_subsets, {"min_size": True}, ["min_size=True (type bool)", "must be an int"]),
        (
            retryable_subsets,
            {"messages": [DELETE, DELETE], "min_size": 2},
            ["min_size=2", "0 to 1", "name more types"],
        ),
        (fail_counts, {"max_fail_sends": -1}, ["max_fail_sends=-1", "0 to 2147483647", "1 to 5"]),
        (fail_counts, {"max_fail_sends": 2**31}, ["max_fail_sends=2147483648", "0 to 2147483647"]),
        (fail_counts, {"max_fail_sends": 5.0}, ["max_fail_sends=5.0 (type float)", "an int"]),
        (fail_counts, {"min_fail_sends": "1"}, ["min_fail_sends='1' (type str)", "an int"]),
        (
            fail_counts,
            {"min_fail_sends": 6},
            ["min_fail_sends=6 (type int)", "max_fail_sends=5", "raise max_fail_sends"],
        ),
        (delays, {"max_delay": math.inf}, ["max_delay=inf (type float)", "0 to 3600"]),
        (delays, {"max_delay": math.nan}, ["max_delay=nan (type float)", "0 to 3600"]),
        (delays, {"max_delay": 3601}, ["max_delay=3601 (type int)", "0 to 3600"]),
        (delays, {"min_delay": -0.001}, ["min_delay=-0.001 (type float)", "0 to 3600"]),
        (delays, {"max_delay": "2"}, ["max_delay='2' (type str)", "int or float"]),
        (delays, {"max_delay": True}, ["max_delay=True (type bool)", "int or float"]),
        (delays, {"min_delay": 3}, ["min_delay=3 (type int)", "max_delay=2.0", "raise max_delay"]),
        (
            delays,
            {"min_delay": 0.0102, "max_delay": 0.0108},
            ["min_delay=0.0102 (type float)", "whole millisecond", "0.01,", "0.011"],
        ),
        (delay_tables, {"messages": "PYTHON_CALL"}, ["messages='PYTHON_CALL' (type str)"]),
        (delay_tables, {"max_delay": -1}, ["max_delay=-1 (type int)", "0 to 3600"]),
        (delay_tables, {"max_size": -1}, ["max_size=-1 (type int)", "from 0 up", "None for all"]),
        (delay_tables, {"max_size": 1.5}, ["max_size=1.5 (type float)", "must be an int"]),
        (
            fault_tables,
            {"messages": "RREF_USER_DELETE"},
            ["messages='RREF_USER_DELETE' (type str)"],
        ),
        (
            fault_tables,
            {"messages": ["NOPE"]},
            ["messages=['NOPE'] (type list)", "RREF_USER_DELETE"],
        ),
        (fault_tables, {"max_fail_sends": -1}, ["max_fail_sends=-1 (type int)", "1 to 5"]),
        (fault_tables, {"max_fail_sends": None}, ["max_fail_sends=None (type NoneType)", "an int"]),
        (fault_tables, {"max_delay": math.inf}, ["max_delay=inf (type float)", "0 to 3600"]),
        (
            fault_plans,
            {"world_size": 0},
            ["world_size=0 (type int)", "in 1 to 1024", "number of ranks"],
        ),
        (fault_plans, {"world_size": True}, ["world_size=True (type bool)", "must be an int"]),
        (fault_plans, {"world_size": "2"}, ["world_size='2' (type str)", "must be an int"]),
        (
            fault_plans,
            PLANS_OF_TWO | {"tables": FaultTable()},
            ["tables=FaultTable() (type FaultTable)", "just(table)"],
        ),
        (
            fault_plans,
            PLANS_OF_TWO | {"tables": fault_tables},
            ["tables=<function fault_tables", "(type function)", "fault_tables(...)"],
        ),
        (
            fault_plans,
            PLANS_OF_TWO | {"max_faulty_ranks": -1},
            ["max_faulty_ranks=-1 (type int)", "from 0 up", "None for all"],
        ),
        (
            fault_plans,
            PLANS_OF_TWO | {"max_faulty_ranks": 1.0},
            ["max_faulty_ranks=1.0 (type float)", "must be an int"],
        ),
    ],
)
def test_a_wrong_argument_is_refused_at_the_call(
    make: Any, arguments: dict[str, Any], expected: list[str]
) -> None:
    """The call itself raises, before any draw, and names the argument, its type and the remedy."""
    message = refusal(make, **arguments)
    assert all(part in message for part in expected), message


def test_a_strategy_that_draws_no_tables_is_refused_when_drawn() -> None:
    """What `tables` draws is known only then; the message shows it."""
    wrong: Any = st.just("RREF_USER_DELETE")
    with pytest.raises(UsageError, match=r"drew 'RREF_USER_DELETE' \(type str\)"):
        draws(fault_plans(world_size=2, tables=wrong), 20)


@pytest.mark.parametrize(
    ("strategy", "only"),
    [
        (retryable_subsets(messages=()), ()),
        (fail_counts(max_fail_sends=0), 0),
        (delays(max_delay=0), 0.0),
        (delay_tables(messages=()), {}),
        (delay_tables(max_delay=0), {}),
        (delay_tables(max_size=0), {}),
        (fault_tables(messages=(), max_delay=0), FaultTable()),
        (fault_tables(max_fail_sends=0, max_delay=0), FaultTable()),
        (fault_plans(world_size=3, max_faulty_ranks=0), FaultPlan()),
        (fault_plans(world_size=3, tables=st.just(FaultTable((), 2))), FaultPlan()),
    ],
)
def test_arguments_that_leave_nothing_draw_nothing(
    strategy: st.SearchStrategy[Any], only: Any
) -> None:
    """Bounds of zero and empty collections are no mistake: they switch a fault off."""
    assert all(value == only for value in draws(strategy, 20))


def test_arguments_are_keyword_only_and_described() -> None:
    """Strategies take their arguments by name, and say what they shrink to and what they raise."""
    for name in rpcprops.strategies.__all__:
        function = getattr(rpcprops.strategies, name)
        if function.__module__ != "rpcprops.strategies.faults":
            continue
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert kinds == {inspect.Parameter.KEYWORD_ONLY}
        text = inspect.getdoc(function) or ""
        assert "Shrinks to" in text
        assert "UsageError" in text
