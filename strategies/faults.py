"""Strategies for faults: message types, delays, a table for a rank, a plan for a world.

Nothing here runs anything. Every delay is in virtual seconds. By default the drawn faults are
survivable: torch retries each failing message often enough for it to arrive. Every table and plan
has only one form, so two faults with the same effect are equal.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from hypothesis import strategies as st

from rpcprops._frozen import FrozenMap
from rpcprops._given import argument, shown
from rpcprops.errors import UsageError
from rpcprops.faults import (
    MAX_RANKS,
    RETRYABLE_MESSAGE_TYPES,
    FaultPlan,
    FaultTable,
    MessageFault,
    MessageType,
    checked_delay,
    retry_wait,
)
from rpcprops.strategies import hints
from rpcprops.strategies._checks import distinct_types, whole_number
from rpcprops.strategies._weighted import Weighted
from rpcprops.strategies.messages import with_message_faults

K = TypeVar("K")
V = TypeVar("V")

_MAX_INT32 = 2**31 - 1
# The retries of all retryable types except one, and a delay far below a cluster's RPC timeout.
_MAX_FAIL_SENDS = 5
_MAX_DELAY = 2.0


def message_types(
    *, among: Iterable[MessageType | str] = tuple(MessageType)
) -> st.SearchStrategy[MessageType]:
    """One of the message types that torch's agent can fail or delay.

    Shrinks to the first of `among`.

    Args:
        among: the types, or their names, to draw from.

    Raises:
        UsageError: `among` is empty, no collection, or contains something that is no message type.
    """
    kinds = distinct_types(among, "among")
    if not kinds:
        msg = (
            f"{argument('among', among)} holds no message type; name at least one, or leave it out."
        )
        raise UsageError(msg)
    return st.sampled_from(kinds)


def retryable_subsets(
    *, messages: Iterable[MessageType | str] = RETRYABLE_MESSAGE_TYPES, min_size: int = 0
) -> st.SearchStrategy[tuple[MessageType, ...]]:
    """Distinct types that torch retries, sorted by name.

    Shrinks to fewer types, then to those that come first in `messages`.

    Args:
        messages: the retryable types, or their names, to draw from.
        min_size: the fewest types in a draw.

    Raises:
        UsageError: `messages` is no collection or holds a type that torch does not retry, or
            `min_size` is no int from 0 to the number of distinct types in `messages`.
    """
    kinds = distinct_types(messages, "messages")
    for kind in kinds:
        if not kind.is_retryable:
            msg = (
                f"{argument('messages', messages)} must hold retryable types only, and torch does "
                f"not send {kind} again; take it out, or fail it with fault_tables(messages=...)."
            )
            raise UsageError(msg)
    least = whole_number(
        min_size,
        "min_size",
        least=0,
        most=len(kinds),
        remedy="lower it, or name more types in messages",
    )
    return _subsets(kinds, least)


def fail_counts(
    *, max_fail_sends: int = _MAX_FAIL_SENDS, min_fail_sends: int = 0
) -> st.SearchStrategy[int]:
    """How many sends of each payload fail; by default within every retryable type's retries.

    Shrinks to `min_fail_sends`.

    Args:
        max_fail_sends: the most failures in a draw.
        min_fail_sends: the fewest failures in a draw.

    Raises:
        UsageError: a bound is no int from 0 to 2**31 - 1, or the minimum is above the maximum.
    """
    most = _fail_bound(max_fail_sends, "max_fail_sends")
    least = _fail_bound(min_fail_sends, "min_fail_sends")
    if least > most:
        msg = (
            f"{argument('min_fail_sends', min_fail_sends)} must not be above "
            f"max_fail_sends={max_fail_sends!r}; lower it, or raise max_fail_sends."
        )
        raise UsageError(msg)
    return st.integers(least, most)


def delays(*, max_delay: float = _MAX_DELAY, min_delay: float = 0.0) -> st.SearchStrategy[float]:
    """A delay in virtual seconds, in whole milliseconds as the agent keeps them.

    Shrinks to `min_delay` (rounded up to a whole millisecond).

    Args:
        max_delay: the longest delay, in virtual seconds.
        min_delay: the shortest delay, in virtual seconds.

    Raises:
        UsageError: a bound is no number of seconds from 0 to 3600, or there is no whole
            millisecond from the shortest to the longest.
    """
    longest = checked_delay(max_delay, "max_delay")
    shortest = checked_delay(min_delay, "min_delay")
    if shortest > longest:
        msg = (
            f"{argument('min_delay', min_delay)} must not be above max_delay={max_delay!r}; lower "
            f"it, or raise max_delay."
        )
        raise UsageError(msg)
    least, most = -_floor_ms(-shortest), _floor_ms(longest)
    if least > most:
        msg = (
            f"{argument('min_delay', min_delay)} must leave a whole millisecond up to "
            f"max_delay={max_delay!r}; lower it to {most / 1000!r}, or raise max_delay to "
            f"{least / 1000!r}."
        )
        raise UsageError(msg)
    return st.integers(least, most).map(lambda ms: ms / 1000)


def delay_tables(
    *,
    messages: Iterable[MessageType | str] = tuple(MessageType),
    max_delay: float = _MAX_DELAY,
    max_size: int | None = None,
) -> st.SearchStrategy[Mapping[MessageType, float]]:
    """Which types are sent late, and by how many virtual seconds (whole milliseconds, never 0).

    Shrinks to no types, then to those that come first in `messages` and to 0.001 s.

    Args:
        messages: the types, or their names, that may be late.
        max_delay: the longest delay, in virtual seconds; below 0.001 nothing is late.
        max_size: the most types that are late in a draw (None: all of `messages`).

    Raises:
        UsageError: `messages` is no collection or contains something that is no message type,
            `max_delay` is no number of seconds from 0 to 3600, or `max_size` is no int from 0 up.
    """
    kinds = distinct_types(messages, "messages")
    longest = _floor_ms(checked_delay(max_delay, "max_delay"))
    size = len(kinds)
    if max_size is not None:
        remedy = "give the most types that may be late at once, or None for all"
        size = min(size, whole_number(max_size, "max_size", least=0, remedy=remedy))
    return _delay_tables(kinds, longest, size)


def fault_tables(
    *,
    messages: Iterable[MessageType | str] = RETRYABLE_MESSAGE_TYPES,
    max_fail_sends: int = _MAX_FAIL_SENDS,
    max_delay: float = _MAX_DELAY,
) -> st.SearchStrategy[FaultTable]:
    """The faults of a rank: types that fail a number of times, and types that are late.

    By default the tables are survivable: only types that torch retries fail, and no more often
    than torch retries them. Wider arguments may draw tables under which a message never arrives;
    :attr:`FaultTable.is_within_budget` says so. A table that fails nothing has neither types nor
    a count, and no delay is 0 s.

    Shrinks to the empty table: to no delays, to fewer types that fail, and to fewer failures.

    Args:
        messages: the types, or their names, that may fail.
        max_fail_sends: the most failures of each payload; 0 fails nothing.
        max_delay: the longest delay, in virtual seconds, for any of the ten types; 0 draws no
            delays.

    Raises:
        UsageError: `messages` is no collection or contains something that is no message type,
            `max_fail_sends` is no int from 0 to 2**31 - 1, or `max_delay` is no number of seconds
            from 0 to 3600.
    """
    return _fault_tables(
        distinct_types(messages, "messages"),
        _fail_bound(max_fail_sends, "max_fail_sends"),
        _floor_ms(checked_delay(max_delay, "max_delay")),
    )


def fault_plans(
    *,
    world_size: int,
    tables: st.SearchStrategy[FaultTable] | None = None,
    max_faulty_ranks: int | None = None,
    message_faults: st.SearchStrategy[MessageFault] | None = None,
) -> st.SearchStrategy[FaultPlan]:
    """A fault table for each rank of a world: faults at no rank, one, a few, or the same at all.

    A plan under which all ranks share a table has it as its ``default``; any other plan names the
    faulty ranks, and only those, in ``by_rank``.

    Shrinks to ``FaultPlan()``: to fewer faulty ranks, to lower ranks, and to smaller tables.

    Args:
        world_size: how many ranks the plan is for.
        tables: what each faulty rank's table is drawn from (None: :func:`fault_tables`).
        max_faulty_ranks: the most ranks with a table in a draw (None: all).
        message_faults: what faults of single messages are drawn from, up to three in a plan, for a
            cluster with ``agent="wire"``: :func:`message_faults` (None: there are none).

    Raises:
        UsageError: `world_size` is no int from 1 to 1024, `tables` or `message_faults` is no
            strategy, or `max_faulty_ranks` is no int from 0 up. When drawn: `tables` drew something
            that is no :class:`FaultTable`, or `message_faults` no :class:`MessageFault`.
    """
    drawn = _plans(world_size, tables, max_faulty_ranks)
    return drawn if message_faults is None else with_message_faults(drawn, message_faults)


def _plans(
    world_size: object, tables: object, max_faulty_ranks: object
) -> st.SearchStrategy[FaultPlan]:
    remedy = "give the number of ranks, as rpc_cluster(world_size=...) gets it"
    size = whole_number(world_size, "world_size", least=1, most=MAX_RANKS, remedy=remedy)
    most = size
    if max_faulty_ranks is not None:
        remedy = "give the most ranks that may have faults at once, or None for all"
        most = min(size, whole_number(max_faulty_ranks, "max_faulty_ranks", least=0, remedy=remedy))
    if tables is None:
        # A chosen rank must be faulty: an empty table would waste the draw.
        drawn = _fault_tables(
            RETRYABLE_MESSAGE_TYPES, _MAX_FAIL_SENDS, _floor_ms(_MAX_DELAY), allow_empty=False
        )
        return _fault_plans(size, drawn, most)
    if not isinstance(tables, st.SearchStrategy):
        msg = (
            f"{argument('tables', tables)} must be a strategy that draws fault tables; write "
            f"fault_tables(...), or hypothesis.strategies.just(table) for one table of your own."
        )
        raise UsageError(msg)
    return _fault_plans(size, tables, most)


def _fail_bound(value: object, name: str) -> int:
    remedy = "1 to 5 is within the retries of every retryable type, 0 fails nothing"
    return whole_number(value, name, least=0, most=_MAX_INT32, remedy=remedy)


def _floor_ms(seconds: float) -> int:
    """The last whole millisecond up to `seconds`; ``seconds * 1000`` alone may be off by one."""
    nearest = round(seconds * 1000)
    return nearest - 1 if nearest / 1000 > seconds else nearest


#: Types that most programs send, and how much more often than the others they come where it is not
#: known what is sent. Of the retried types none comes more often: they depend on each other.
_USUAL = {
    MessageType.PYTHON_CALL: 6.0,
    MessageType.PYTHON_REMOTE_CALL: 3.0,
    MessageType.PYTHON_RREF_FETCH_CALL: 3.0,
}
#: Virtual milliseconds that torch waits in all for 1 to 5 failing sends.
_RETRY_WAITS = tuple(round(1000 * retry_wait(times)) for times in range(1, 6))


def _type_weights(kinds: tuple[MessageType, ...]) -> tuple[float, ...]:
    """How often each type is to come: those that are sent, else those that usually are."""
    sent = hints.sent_types()
    if sent.isdisjoint(kinds):
        return tuple(_USUAL.get(kind, 1.0) for kind in kinds)
    # Of a type that is not retried, a delay is the only fault that every program survives.
    return tuple((1.0 if kind.is_retryable else 3.0) * (kind in sent) for kind in kinds)


@functools.lru_cache(maxsize=1024)
def _keys(number: int, weights: tuple[float, ...] | None, stop: float) -> st.SearchStrategy[int]:
    """The place of a key, from 1 to `number`, or 0 with the probability `stop`."""
    # Cached, because making a strategy takes longer than drawing from it.
    each = weights or (1.0,) * number
    total = sum(each)
    shares = {place: (1 - stop) * weight / total for place, weight in enumerate(each, 1)}
    return Weighted(0, number, {0: stop, **shares})


def _some(
    draw: st.DrawFn,
    keys: Iterable[K],
    values: Callable[[K], st.SearchStrategy[V]] | None,
    *,
    least: int = 0,
    most: int | None = None,
    stop: float,
    weights: tuple[float, ...] | None = None,
) -> dict[K, Any]:
    """Distinct `keys`, each with a drawn value, from `least` of them to `most` (None: all).

    Where there are no `values`, each is None.

    Each draw takes a key, by weight, or ends with the probability `stop`. A key that was drawn
    before is passed over. Where there must be one more, the smallest draw is the first key left.

    Unique st.lists draw a key by its place among the remaining ones, so deleting one key changes
    the others: from "all four types" most predicates then shrink to three or four types, not to
    one. Here the draw of a key depends neither on the earlier keys nor on their number, and the
    end is drawn even if it is the only choice. So Hypothesis can delete any key with its value,
    and the rest stays as it was.
    """
    choices = tuple(keys)
    at_most = len(choices) if most is None else min(most, len(choices))
    found: dict[K, Any] = {}
    while len(found) < at_most:
        must = len(found) < least
        place = draw(_keys(len(choices), weights, 0.0 if must else stop))
        if not place and not must:
            return found
        key = choices[place - 1] if place else next(one for one in choices if one not in found)
        if key not in found:
            found[key] = None if values is None else draw(values(key))
    draw(_END)
    return found


#: Hypothesis does not record a choice of one.
_END = st.sampled_from((None, None))


class _Milliseconds(Weighted):
    """A delay. Hypothesis swaps draws of one class: the place of a key would be a short delay."""


@functools.lru_cache(maxsize=256)
def _delays(max_ms: int) -> st.SearchStrategy[int]:
    """Milliseconds from 1 to `max_ms`, spread over the scales that matter to programs.

    Four delays in ten are above half of the longest, because they must outlast a timeout. The
    others are of every smaller scale, because they must come before another message or after it,
    or as long as torch waits before it sends again.
    """
    weights: dict[int, float] = {}
    ends = (1, max_ms // 100, max_ms // 10, max_ms // 2, max_ms)
    for least, most, share in zip(ends, ends[1:], (0.1, 0.15, 0.25, 0.4), strict=False):
        for ms in _spread(max(1, least), max(1, most)):
            weights[ms] = weights.get(ms, 0.0) + share / _POINTS
    waits = [ms + after for ms in _RETRY_WAITS for after in (0, 250) if ms + after <= max_ms]
    for ms in waits:
        weights[ms] = weights.get(ms, 0.0) + 0.1 / len(waits)
    return _Milliseconds(1, max_ms, dict(sorted(weights.items())))


#: Each scale of delays is weighed at so many points.
_POINTS = 40


def _spread(least: int, most: int) -> list[int]:
    return [least + (most - least) * step // (_POINTS - 1) for step in range(_POINTS)]


def _subset(
    draw: st.DrawFn, kinds: tuple[MessageType, ...], min_size: int, stop: float | None = None
) -> tuple[MessageType, ...]:
    if stop is None:
        stop = 1 / (2 * len(kinds) + 1)
    weights = _type_weights(kinds)
    return tuple(sorted(_some(draw, kinds, None, least=min_size, stop=stop, weights=weights)))


def _late(
    draw: st.DrawFn, kinds: tuple[MessageType, ...], max_ms: int, max_size: int, stop: float
) -> FrozenMap[MessageType, float]:
    if not max_ms:
        return FrozenMap()
    weights = _type_weights(kinds)
    ms = _delays(max_ms)
    found = _some(draw, kinds, lambda _: ms, most=max_size, stop=stop, weights=weights)
    return FrozenMap({kind: late / 1000 for kind, late in found.items()})


@st.composite
def _subsets(
    draw: st.DrawFn, kinds: tuple[MessageType, ...], min_size: int
) -> tuple[MessageType, ...]:
    return _subset(draw, kinds, min_size)


@st.composite
def _delay_tables(
    draw: st.DrawFn, kinds: tuple[MessageType, ...], max_ms: int, max_size: int
) -> Mapping[MessageType, float]:
    return _late(draw, kinds, max_ms, max_size, stop=1 / 3)


@st.composite
def _fault_tables(
    draw: st.DrawFn,
    kinds: tuple[MessageType, ...],
    max_fail_sends: int,
    max_ms: int,
    *,
    allow_empty: bool = True,
) -> FaultTable:
    # Delays come first: of two tables that take equally many choices, Hypothesis keeps the one that
    # begins with less, and a failure is easier to read than a delay. More than half of the tables
    # have no delays, because each delay costs time in an example.
    types = tuple(MessageType)
    sent = hints.sent_types()
    only_late = bool(sent) and sent.isdisjoint(kinds)  # what is sent does not fail
    also_late = not sent <= frozenset(kinds)
    stop = 0.2 if only_late else 0.4 if also_late else 0.55
    late = _late(draw, types, max_ms, len(types), stop=stop)
    failing: tuple[MessageType, ...] = ()
    if max_fail_sends and kinds:
        least = 0 if late or allow_empty else 1
        failing = _subset(draw, kinds, least, stop=0.8 if only_late else None)
    count = draw(st.integers(1, max_fail_sends)) if failing else 0
    return FaultTable(failing, count, late)


class _Spread(enum.Enum):
    NOBODY = enum.auto()
    OWN_TABLES = enum.auto()
    ONE_TABLE = enum.auto()


# One plan in seven has no faults: such plans find little, but they show bugs that need no fault.
_SPREADS = (_Spread.NOBODY, *(_Spread.OWN_TABLES, _Spread.ONE_TABLE) * 3)


@st.composite
def _fault_plans(
    draw: st.DrawFn, world_size: int, tables: st.SearchStrategy[FaultTable], max_faulty_ranks: int
) -> FaultPlan:
    # Asked before the first draw, so that a hint is known to be of use even if no rank is faulty.
    senders = hints.types_by_rank(world_size)
    weights = tuple(map(float, senders)) if any(senders) else None
    spread = draw(st.sampled_from(_SPREADS)) if max_faulty_ranks else _Spread.NOBODY
    if spread is _Spread.NOBODY:
        return FaultPlan()
    ranks = range(world_size)
    if spread is _Spread.ONE_TABLE:
        # Fewer choices than a table for each rank, so smaller for Hypothesis: a failure that needs
        # one fault here and another there may end as one table with both, on both ranks.
        shared = st.just(draw(tables))
        stop = 1 / (4 * world_size + 1)
        drawn = _some(
            draw,
            ranks,
            lambda _: shared,
            least=1,
            most=max_faulty_ranks,
            stop=stop,
            weights=weights,
        )
    else:
        # Mostly one rank, because such a plan is the easiest to understand when it fails.
        drawn = _some(
            draw,
            ranks,
            lambda rank: _at_rank(rank, tables),
            least=1,
            most=max_faulty_ranks,
            stop=0.5,
            weights=weights,
        )
    for table in drawn.values():
        given: Any = table
        if not isinstance(given, FaultTable):
            msg = (
                f"{argument('tables', tables)} drew {shown(given)} (type "
                f"{type(given).__name__}); it must "
                f"draw FaultTable only."
            )
            raise UsageError(msg)
    by_rank = {rank: table for rank, table in drawn.items() if not table.is_empty}
    if len(by_rank) == world_size and len(set(by_rank.values())) == 1:
        return FaultPlan(default=by_rank[0])
    return FaultPlan(by_rank=by_rank)


@st.composite
def _at_rank(draw: st.DrawFn, rank: int, tables: st.SearchStrategy[FaultTable]) -> FaultTable:
    with hints.at_rank(rank):
        return draw(tables)
