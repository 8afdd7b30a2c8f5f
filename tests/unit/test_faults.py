"""Fault tables and plans as data: what they refuse, what they promise about themselves."""

from __future__ import annotations

import copy
import enum
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis.vendor.pretty import pretty

from rpcprops.errors import UsageError
from rpcprops.faults import (
    DEFAULT_MESSAGES_TO_DELAY,
    MAX_DELAY,
    RETRYABLE_MESSAGE_TYPES,
    FaultPlan,
    FaultTable,
    MessageType,
    SendDelay,
    SendFailure,
    checked_delay,
    delay_milliseconds,
    message_type,
    retry_wait,
)

NAMES = {"FaultPlan": FaultPlan, "FaultTable": FaultTable, "MessageType": MessageType}
RETRYABLE = {
    "CLEANUP_AUTOGRAD_CONTEXT_REQ",
    "RREF_CHILD_ACCEPT",
    "RREF_FORK_REQUEST",
    "RREF_USER_DELETE",
}
TABLES = [
    FaultTable(),
    FaultTable(("RREF_USER_DELETE",), 1),
    FaultTable((MessageType.RREF_USER_DELETE,), 5),
    FaultTable(RETRYABLE_MESSAGE_TYPES, 3, {MessageType.PYTHON_CALL: 1.5}),
    FaultTable((), 7),
    FaultTable((MessageType.SCRIPT_CALL,), 0),
    FaultTable(messages_to_delay={MessageType.SCRIPT_CALL: 0.0}),
    FaultTable(messages_to_delay={MessageType.SCRIPT_CALL: 0.1, MessageType.PYTHON_CALL: 3600}),
]
PLANS = [
    FaultPlan(),
    FaultPlan(default=TABLES[1]),
    FaultPlan(by_rank={2: TABLES[3]}),
    FaultPlan(by_rank={2: TABLES[3], 0: TABLES[0]}),
    FaultPlan(default=TABLES[7], by_rank={1: TABLES[2]}),
]
EVERYTHING: list[FaultTable | FaultPlan] = [*TABLES, *PLANS]


class Rank(enum.IntEnum):
    """A rank as a user's own enumeration names it."""

    OWNER = 0


def refusal(make: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UsageError) as caught:
        make(*args, **kwargs)
    return str(caught.value)


def test_there_are_ten_types_of_which_torch_retries_four() -> None:
    """The names are the ten that torch's agent accepts, and the four retryable ones are marked."""
    assert len(MessageType) == 10
    assert {str(m) for m in RETRYABLE_MESSAGE_TYPES} == RETRYABLE
    assert {str(m) for m in MessageType if m.is_retryable} == RETRYABLE
    assert list(RETRYABLE_MESSAGE_TYPES) == sorted(RETRYABLE_MESSAGE_TYPES)


@pytest.mark.parametrize("kind", MessageType)
def test_max_retries(kind: MessageType) -> None:
    """Context cleanup is retried 20 times, the RRef messages 5 times, everything else never."""
    expected = 5 if kind.startswith("RREF_") else 0
    assert kind.max_retries == (20 if kind == "CLEANUP_AUTOGRAD_CONTEXT_REQ" else expected)


@pytest.mark.parametrize("kind", MessageType)
def test_a_message_type_is_found_by_its_name(kind: MessageType) -> None:
    """A type and its plain name are the same thing, and its repr rebuilds it."""
    assert message_type(kind) is message_type(str(kind)) is kind
    assert eval(repr(kind), NAMES) is kind


def test_what_torch_delays_by_default() -> None:
    """The default delays are those of torch's own fixture: plain calls, late by 1.5 s."""
    assert DEFAULT_MESSAGES_TO_DELAY == {"PYTHON_CALL": 1.5, "SCRIPT_CALL": 1.5}


@pytest.mark.parametrize("name", ["", "RREF", "FORWARD_AUTOGRAD_REQ", "PYTHON_CALL ", "0"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    """The message repeats the unknown name and lists all that could be meant."""
    for make in (
        lambda: message_type(name),
        lambda: FaultTable((name,), 1),
        lambda: FaultTable(messages_to_delay={name: 1.0}),
    ):
        message = refusal(make)
        assert repr(name) in message
        assert all(kind in message for kind in MessageType)


@pytest.mark.parametrize("name", ["rref_user_delete", "Python_Call"])
def test_a_name_in_lower_case_is_refused_with_the_right_one(name: str) -> None:
    """The message names the upper-case spelling that was meant."""
    message = refusal(FaultTable, (name,), 1)
    assert repr(name) in message
    assert f"Did you mean {name.upper()!r}?" in message


@pytest.mark.parametrize("item", [3, None, b"PYTHON_CALL", ("PYTHON_CALL",), MessageType, [1]])
def test_what_is_no_name_is_refused_with_its_type(item: object) -> None:
    """The message shows the value, its type, and what to give instead."""
    message = refusal(FaultTable, [item], 1)
    assert f"{item!r} (type {type(item).__name__})" in message
    assert "MessageType" in message


@pytest.mark.parametrize("value", ["RREF_USER_DELETE", None, 3, MessageType.PYTHON_CALL])
def test_types_to_fail_must_be_a_collection(value: Any) -> None:
    """A single name is refused, rather than read letter by letter, and a collection is shown."""
    message = refusal(FaultTable, messages_to_fail=value, num_fail_sends=1)
    assert f"messages_to_fail={value!r} (type {type(value).__name__})" in message
    assert "('RREF_USER_DELETE',)" in message


@pytest.mark.parametrize("count", [True, False, 1.0, math.nan, "1", None, (1,)])
def test_a_count_must_be_an_int(count: Any) -> None:
    """The message shows the count, its type, and that an int is wanted."""
    message = refusal(FaultTable, num_fail_sends=count)
    assert f"num_fail_sends={count!r} (type {type(count).__name__})" in message
    assert "must be an int" in message


@pytest.mark.parametrize("count", [-1, -(2**31), 2**31, 2**64])
def test_a_count_must_fit_torchs_own(count: int) -> None:
    """The message shows the count, the bounds, and the counts that make sense."""
    message = refusal(FaultTable, num_fail_sends=count)
    assert f"num_fail_sends={count}" in message
    assert "0 to 2147483647" in message
    assert "1 to 5" in message


def test_the_largest_count_is_accepted() -> None:
    """An int32's largest value is a count like any other."""
    assert FaultTable(("PYTHON_CALL",), 2**31 - 1).num_fail_sends == 2**31 - 1


@pytest.mark.parametrize(
    "delay",
    [math.inf, -math.inf, math.nan, -0.001, -1, math.nextafter(MAX_DELAY, math.inf), 1e30, 10**400],
)
def test_a_delay_must_be_finite_and_at_most_an_hour(delay: float) -> None:
    """The message shows the type that is delayed, the delay, and the bounds."""
    message = refusal(FaultTable, messages_to_delay={"PYTHON_CALL": delay})
    assert f"messages_to_delay['PYTHON_CALL']={delay!r} (type {type(delay).__name__})" in message
    assert "from 0 to 3600" in message


@pytest.mark.parametrize("delay", [True, "1", None, [1.0], 1j])
def test_a_delay_must_be_a_number(delay: Any) -> None:
    """The message shows the type that is delayed, the delay, its type, and what is wanted."""
    message = refusal(FaultTable, messages_to_delay={"PYTHON_CALL": delay})
    assert f"messages_to_delay['PYTHON_CALL']={delay!r} (type {type(delay).__name__})" in message
    assert "seconds as an int or float" in message


@pytest.mark.parametrize("value", ["PYTHON_CALL", ["PYTHON_CALL"], (), 1.5])
def test_delays_must_be_a_mapping(value: Any) -> None:
    """The message shows the value, its type, and a mapping to write instead."""
    message = refusal(FaultTable, messages_to_delay=value)
    assert f"messages_to_delay={value!r} (type {type(value).__name__})" in message
    assert "{'PYTHON_CALL': 1.5}" in message


def test_no_delays_may_be_written_as_none() -> None:
    """None delays nothing, as an empty mapping does."""
    assert FaultTable(messages_to_delay=None) == FaultTable(messages_to_delay={}) == FaultTable()


@pytest.mark.parametrize("delay", [0, 0.0, 0.001, 1, 1.5, 3600, MAX_DELAY])
def test_a_delay_in_bounds_is_kept_as_a_float(delay: float) -> None:
    """Both bounds and everything between are accepted, ints among them."""
    kept = checked_delay(delay, "delay")
    assert type(kept) is float
    assert kept == delay


def test_a_negative_zero_is_a_plain_zero() -> None:
    """Two equal tables print alike, even if one was given -0.0."""
    table = FaultTable(messages_to_delay={MessageType.PYTHON_CALL: -0.0})
    assert repr(table) == repr(FaultTable(messages_to_delay={MessageType.PYTHON_CALL: 0.0}))


@pytest.mark.parametrize("rank", [True, "1", 1.0, None, (0,)])
def test_a_rank_must_be_an_int(rank: Any) -> None:
    """The message shows the key of the plan, its type, and what a rank is."""
    message = refusal(FaultPlan, by_rank={rank: FaultTable()})
    assert f"{rank!r} (type {type(rank).__name__})" in message
    assert "a rank is an int" in message


def test_a_rank_must_not_be_negative() -> None:
    """The message shows the rank and where ranks begin."""
    message = refusal(FaultPlan, by_rank={-1: FaultTable()})
    assert "-1" in message
    assert "from 0" in message


@pytest.mark.parametrize("table", [None, {}, "PYTHON_CALL", FaultTable, FaultPlan()])
def test_a_plan_holds_tables_only(table: Any) -> None:
    """The message shows what was given as a table, where, its type, and the type wanted."""
    for where, plan in (("default", {"default": table}), ("by_rank[3]", {"by_rank": {3: table}})):
        message = refusal(FaultPlan, **plan)
        assert f"{where}={table!r} (type {type(table).__name__})" in message
        assert "must be a FaultTable" in message


@pytest.mark.parametrize("value", [None, [FaultTable()], FaultTable()])
def test_a_plans_ranks_must_be_a_mapping(value: Any) -> None:
    """The message shows the value and a mapping to write instead."""
    message = refusal(FaultPlan, by_rank=value)
    assert f"by_rank={value!r}" in message
    assert "{1: FaultTable()}" in message


@pytest.mark.parametrize("value", ["PYTHON_CALL", {}, 0, [FaultTable()]])
def test_faults_are_a_table_or_a_plan_or_none(value: Any) -> None:
    """The message shows the value, its type, and the three things that are accepted."""
    message = refusal(FaultPlan.of, value)
    assert f"faults={value!r} (type {type(value).__name__})" in message
    assert all(word in message for word in ("FaultTable", "FaultPlan", "None"))


def test_a_plan_fits_its_world_or_says_how() -> None:
    """A rank outside the world is refused with both numbers; one inside is not."""
    plan = FaultPlan(by_rank={3: TABLES[1]})
    plan.check(4)
    message = refusal(plan.check, 3)
    assert "rank 3" in message
    assert "world of 3" in message
    assert "raise world_size" in message


@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_for_every_rank_and_none_for_nobody(table: FaultTable) -> None:
    """FaultPlan.of makes a plan of a table, leaves a plan alone, and takes None for no faults."""
    assert FaultPlan.of(table) == FaultPlan(default=table)
    assert all(FaultPlan.of(table).table(rank) == table for rank in range(4))
    assert FaultPlan.of(PLANS[2]) is PLANS[2]
    assert FaultPlan.of(None) == FaultPlan()


def test_a_rank_has_its_own_table_or_the_default() -> None:
    """`by_rank` wins over the default, and only ranks with faults count as faulty."""
    plan = FaultPlan(default=TABLES[1], by_rank={1: TABLES[0], 2: TABLES[3]})
    assert [plan.table(rank) for rank in range(4)] == [TABLES[n] for n in (1, 0, 3, 1)]
    assert plan.faulty_ranks(4) == (0, 2, 3)
    assert plan.is_within_budget(4)
    assert not FaultPlan(by_rank={2: FaultTable(RETRYABLE_MESSAGE_TYPES, 6)}).is_within_budget(3)


@pytest.mark.parametrize(
    ("failures", "seconds"), [(0, 0), (1, 1), (2, 2), (3, 3.5), (4, 5.75), (5, 9.125)]
)
def test_retry_wait(failures: int, seconds: float) -> None:
    """The first waits are torch's 1, 1, 1.5, 2.25 and 3.375 s, summed."""
    assert retry_wait(failures) == seconds


def test_retry_wait_of_a_whole_cleanup_budget() -> None:
    """Twenty retries of a context cleanup take 4432.7 virtual seconds."""
    assert retry_wait(20) == pytest.approx(4432.7, abs=0.05)


@pytest.mark.parametrize("kind", MessageType)
@pytest.mark.parametrize("count", [0, 1, 5, 6, 20, 21])
def test_a_table_is_within_budget_up_to_the_types_retries(kind: MessageType, count: int) -> None:
    """A type that fails survives as many failures as torch retries, and not one more."""
    table = FaultTable((kind,), count)
    survives = count <= kind.max_retries
    assert table.is_within_budget is survives
    assert table.is_survivable(kind) is survives
    assert table.is_survivable(str(kind)) is survives
    assert table.retry_seconds(kind) == retry_wait(min(count, kind.max_retries))
    other = next(m for m in MessageType if m is not kind)
    assert table.is_survivable(other)
    assert table.retry_seconds(other) == 0


def test_one_type_beyond_its_budget_puts_the_table_beyond() -> None:
    """Six failures are too many for an RRef message, though not for a context cleanup."""
    cleanup, delete = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ, MessageType.RREF_USER_DELETE
    assert FaultTable((cleanup,), 6).is_within_budget
    assert not FaultTable((cleanup, delete), 6).is_within_budget


@pytest.mark.parametrize(
    ("table", "empty"),
    [
        (FaultTable(), True),
        (FaultTable((), 3), True),
        (FaultTable(RETRYABLE_MESSAGE_TYPES, 0), True),
        (FaultTable(messages_to_delay={MessageType.PYTHON_CALL: 0.0009}), True),
        (FaultTable(messages_to_delay={MessageType.PYTHON_CALL: 0.001}), False),
        (FaultTable(RETRYABLE_MESSAGE_TYPES, 1), False),
    ],
)
def test_a_table_that_changes_nothing_is_empty(table: FaultTable, empty: bool) -> None:
    """Types without a count, a count without types, and delays below 1 ms are no faults."""
    assert table.is_empty is empty


def test_a_delay_in_milliseconds_is_what_c_floats_make_of_it() -> None:
    """Every millisecond of 10 s, and each seventh up to an hour, is cut as the agent cuts it."""
    milliseconds = np.concatenate([np.arange(10_000), np.arange(10_000, 3_600_001, 7)])
    seconds = milliseconds / 1000
    expected = (seconds.astype(np.float32) * np.float32(1000)).astype(np.int64)
    assert [delay_milliseconds(s) for s in seconds.tolist()] == expected.tolist()


@pytest.mark.parametrize(
    ("seconds", "milliseconds"),
    [
        (0, 0),
        (0.0009999, 0),
        (0.001, 1),
        (0.251, 250),
        (1.5, 1500),
        (1.9999, 1999),
        (3600, 3600000),
    ],
)
def test_a_delay_in_milliseconds(seconds: float, milliseconds: int) -> None:
    """Fractions of a millisecond are cut off; 0.251 s is a C float below 251 ms."""
    assert delay_milliseconds(seconds) == milliseconds
    table = FaultTable(messages_to_delay={MessageType.PYTHON_CALL: seconds})
    assert table.delaying == ({"PYTHON_CALL": milliseconds} if milliseconds else {})


def test_a_table_is_one_value_however_it_is_written() -> None:
    """Order, repetition, names for types, sets and generators make no difference."""
    accept, delete = MessageType.RREF_CHILD_ACCEPT, MessageType.RREF_USER_DELETE
    late = {MessageType.PYTHON_CALL: 1.0, delete: 2.0}
    one = FaultTable((accept, delete), 2, late)
    ways: list[Any] = [
        [delete, accept],
        ["RREF_USER_DELETE", accept, accept],
        {delete, accept},
        (m for m in (delete, accept)),
    ]
    for way in ways:
        other = FaultTable(way, 2, dict(reversed(late.items())))
        assert other == one
        assert hash(other) == hash(one)
        assert repr(other) == repr(one)


@pytest.mark.parametrize("value", EVERYTHING)
def test_copies_are_equal(value: FaultTable | FaultPlan) -> None:
    """What is pickled, copied or deeply copied is equal, hashes alike and prints alike."""
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(value, protocol))
        assert (again, hash(again), repr(again)) == (value, hash(value), repr(value))
    for again in (copy.copy(value), copy.deepcopy(value)):
        assert (again, hash(again), repr(again)) == (value, hash(value), repr(value))


@pytest.mark.parametrize("value", EVERYTHING)
def test_the_repr_rebuilds_the_value(value: FaultTable | FaultPlan) -> None:
    """The repr of a table or plan is Python that makes it again."""
    assert eval(repr(value), NAMES) == value


@pytest.mark.parametrize("value", EVERYTHING)
def test_hypothesis_prints_the_repr(value: FaultTable | FaultPlan) -> None:
    """A falsifying example shows the same Python as the repr."""
    assert pretty(value) == repr(value)


def test_a_rank_given_as_an_enumeration_still_prints_as_python() -> None:
    """A rank from a user's IntEnum is kept as the int it is."""
    plan = FaultPlan(by_rank={Rank.OWNER: TABLES[1]})
    assert eval(repr(plan), NAMES) == plan


def test_the_repr_leaves_out_what_is_default() -> None:
    """A table or plan prints only what it was given, in torch's words."""
    assert repr(FaultTable()) == "FaultTable()"
    assert repr(FaultPlan()) == "FaultPlan()"
    assert repr(FaultPlan(by_rank={2: TABLES[2]})) == (
        "FaultPlan(by_rank={2: FaultTable(messages_to_fail=('RREF_USER_DELETE',), "
        "num_fail_sends=5)})"
    )
    assert repr(FaultTable(messages_to_delay={MessageType.PYTHON_CALL: 1})) == (
        "FaultTable(messages_to_delay={'PYTHON_CALL': 1.0})"
    )


@pytest.mark.parametrize("values", [TABLES, PLANS])
def test_values_are_distinct_and_ordered(values: list[Any]) -> None:
    """Different values are unequal, and sorting them gives one order from any start."""
    assert len(set(values)) == len(values)
    ordered = sorted(values)
    backwards = values[::-1]
    assert sorted(backwards) == ordered
    for before, after in itertools.pairwise(ordered):
        assert before < after
        assert after > before
        assert not after < before


def test_tables_that_differ_in_a_delay_compare_with_every_operator() -> None:
    """`<=` and `>=` work where `<` and `>` do."""
    less = FaultTable(messages_to_delay={MessageType.PYTHON_CALL: 1.0})
    more = FaultTable(messages_to_delay={MessageType.PYTHON_CALL: 2.0})
    assert less <= more
    assert more >= less


def test_a_table_is_no_plan() -> None:
    """A table never equals the plan that gives it to every rank."""
    plan: object = FaultPlan(default=TABLES[1])
    assert plan != TABLES[1]


@pytest.mark.parametrize("value", EVERYTHING)
def test_values_never_change(value: FaultTable | FaultPlan) -> None:
    """No attribute can be set, added or deleted, and the mappings take no items."""
    held: Any = value
    field = "num_fail_sends" if isinstance(value, FaultTable) else "default"
    with pytest.raises(AttributeError):
        setattr(held, field, 1)
    with pytest.raises(AttributeError):
        delattr(held, field)
    # Python 3.11's frozen, slotted dataclasses raise TypeError for a name that is no field.
    with pytest.raises((AttributeError, TypeError)):
        held.another = 1
    mapping = held.messages_to_delay if isinstance(value, FaultTable) else held.by_rank
    with pytest.raises(TypeError):
        mapping["PYTHON_CALL"] = 1.0


def test_a_table_keeps_nothing_of_the_callers() -> None:
    """Changing the dict and list that a table was made from does not change the table."""
    kinds, late = [MessageType.RREF_USER_DELETE], {MessageType.PYTHON_CALL: 1.0}
    table = FaultTable(tuple(kinds), 1, late)
    plan_ranks = {1: table}
    plan = FaultPlan(by_rank=plan_ranks)
    late[MessageType.SCRIPT_CALL] = 2.0
    plan_ranks[0] = table
    assert table.messages_to_delay == {"PYTHON_CALL": 1.0}
    assert list(plan.by_rank) == [1]


@pytest.mark.parametrize("plan", PLANS)
def test_the_faults_of_a_plan_make_it_again(plan: FaultPlan) -> None:
    """Put into an empty plan one by one, the faults of a plan are the faults of the new one."""
    made = FaultPlan()
    for fault in plan.faults(4):
        made = fault.put_into(made)
    assert made.faults(4) == plan.faults(4)
    assert made.faulty_ranks(4) == plan.faulty_ranks(4)


@pytest.mark.parametrize("plan", PLANS)
def test_simpler_plans_have_fewer_or_smaller_faults(plan: FaultPlan) -> None:
    """Each plan to try instead has one fault less, or one that holds a message up for less long.

    All types that fail at a rank have one count, so one that fails less often takes others along.
    """
    faults = plan.faults(4)
    for simpler in plan.simpler(4):
        rest = simpler.faults(4)
        assert {fault.name for fault in rest} <= {fault.name for fault in faults}
        assert len(rest) == len(faults) - 1 or (
            len(rest) == len(faults)
            and sum(f.seconds for f in rest) < sum(f.seconds for f in faults)
        )
    assert len(list(plan.simpler(4))) >= len(faults)


@pytest.mark.parametrize(
    ("fault", "simpler"),
    [
        (SendFailure(0, MessageType.PYTHON_CALL, 5), [1, 2, 4]),
        (SendFailure(0, MessageType.PYTHON_CALL, 2), [1]),
        (SendFailure(0, MessageType.PYTHON_CALL, 1), []),
        (SendDelay(0, MessageType.PYTHON_CALL, 2.0), [0.001, 1.0, 1.999]),
        (SendDelay(0, MessageType.PYTHON_CALL, 0.001), []),
    ],
)
def test_a_fault_knows_simpler_ones(
    fault: SendFailure | SendDelay, simpler: list[int] | list[float]
) -> None:
    """Fewer failures and shorter delays, the simplest first, and never none at all."""
    sizes = [f.num_fail_sends if isinstance(f, SendFailure) else f.delay for f in fault.simpler()]
    assert sizes == simpler


@pytest.mark.parametrize(
    "odd",
    [
        lambda: SendFailure(-1, MessageType.PYTHON_CALL, 1),
        lambda: SendFailure(0, "CALL", 1),  # type: ignore[arg-type]
        lambda: SendFailure(0, MessageType.PYTHON_CALL, 1.5),  # type: ignore[arg-type]
        lambda: SendDelay(0, MessageType.PYTHON_CALL, math.inf),
    ],
)
def test_a_fault_is_checked_when_it_is_made(odd: Callable[[], object]) -> None:
    """A fault alone refuses what a table refuses."""
    with pytest.raises(UsageError):
        odd()


def test_what_retries_without_a_counter_waits_for() -> None:
    """A context's cleanup waits 1, 1, 1.5 s and so on unseen; nothing else does."""
    cleanup = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
    assert SendFailure(0, cleanup, 3).unseen_waits == (1.0, 1.0, 1.5)
    assert len(SendFailure(0, cleanup, 42).unseen_waits) == 20
    assert SendFailure(0, MessageType.RREF_USER_DELETE, 3).unseen_waits == ()
    assert SendDelay(0, cleanup, 3.0).unseen_waits == ()


def test_joined_tables_wait_at_least_as_long_as_each() -> None:
    """Types of both fail as often as under the two in turn, and the longer delay applies."""
    one = FaultTable(["PYTHON_CALL"], 2, {"PYTHON_CALL": 0.5})
    two = FaultTable(["RREF_USER_DELETE"], 2**31 - 1, {"PYTHON_CALL": 0.25, "SCRIPT_CALL": 1.0})
    both = FaultTable(
        ["PYTHON_CALL", "RREF_USER_DELETE"], 2**31 - 1, {"PYTHON_CALL": 0.5, "SCRIPT_CALL": 1.0}
    )
    assert one.joined(two) == two.joined(one) == both
    unused = FaultTable(["SCRIPT_CALL"], 0)
    assert unused.joined(one) == one
    plan = FaultPlan(one, {1: FaultTable()}).joined(FaultPlan(by_rank={2: two}))
    assert [plan.table(rank) for rank in range(3)] == [one, FaultTable(), both]
