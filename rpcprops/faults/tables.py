"""The input of torch's agent as data: a fault table for a rank, and a fault plan for a world.

Nothing here imports torch. A table is checked when it is made, because torch's agent accepts
values that then hang a cluster (an infinite delay) and reports others only when it is built, in
another process. All times are virtual seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rpcprops._frozen import FrozenMap
from rpcprops._given import argument, counted, items, shown
from rpcprops.errors import UsageError
from rpcprops.faults._fault import MAX_RANKS, Fault
from rpcprops.faults._sends import (
    MAX_FAIL_SENDS,
    SendDelay,
    SendFailure,
    checked_delay,
    delay_milliseconds,
    fail_count,
)
from rpcprops.faults.message_types import (
    RETRYABLE_MESSAGE_TYPES,
    MessageType,
    message_type,
    retry_wait,
)

#: More items than there are names: an endless iterable is abandoned there.
_MAX_NAMES = 100_000

#: The delays of torch's own fixture when a test gives none (virtual seconds).
DEFAULT_MESSAGES_TO_DELAY: Mapping[MessageType, float] = FrozenMap(
    {MessageType.PYTHON_CALL: 1.5, MessageType.SCRIPT_CALL: 1.5}
)


def _message_types(value: object) -> tuple[MessageType, ...]:
    must_be = "a collection of message types, such as ('RREF_USER_DELETE',)"
    given = items("messages_to_fail", value, _MAX_NAMES, must_be)
    return tuple(sorted({message_type(item) for item in given}))


def _delays(value: object) -> FrozenMap[MessageType, float]:
    if not isinstance(value, Mapping):
        msg = (
            f"{argument('messages_to_delay', value)} must map message types to "
            f"seconds, such as {{'PYTHON_CALL': 1.5}}."
        )
        raise UsageError(msg)
    return FrozenMap(
        {
            message_type(key): checked_delay(delay, f"messages_to_delay[{shown(key)}]")
            for key, delay in value.items()
        }
    )


@dataclass(frozen=True, slots=True, order=True, repr=False, init=False)
class FaultTable:
    """Which messages a rank fails to send, how often, and which it sends late.

    The count works as in the agent: each distinct payload of a listed type fails `num_fail_sends`
    times on its sender, then passes. A fork request and the later delete of the same fork have the
    same payload, so they share one count.

    Args:
        messages_to_fail: types whose sends fail.
        num_fail_sends: how many sends of each payload fail.
        messages_to_delay: virtual seconds by which sends of a type are delayed in their sender
            (whole milliseconds; the agent drops the rest).

    Raises:
        UsageError: a type is unknown, the count is no int32, or a delay is not in 0 to 3600 s.
    """

    messages_to_fail: tuple[MessageType, ...] = ()
    num_fail_sends: int = 0
    messages_to_delay: Mapping[MessageType, float] = field(
        default_factory=FrozenMap[MessageType, float]
    )

    def __init__(
        self,
        messages_to_fail: Iterable[MessageType | str] = (),
        num_fail_sends: int = 0,
        messages_to_delay: Mapping[MessageType, float] | Mapping[str, float] | None = None,
    ) -> None:
        delays = FrozenMap[MessageType, float]() if messages_to_delay is None else messages_to_delay
        object.__setattr__(self, "messages_to_fail", messages_to_fail)
        object.__setattr__(self, "num_fail_sends", num_fail_sends)
        object.__setattr__(self, "messages_to_delay", delays)
        self.__post_init__()

    def __post_init__(self) -> None:
        # Separate from __init__, because decoding from JSON calls only this.
        object.__setattr__(self, "messages_to_fail", _message_types(self.messages_to_fail))
        object.__setattr__(self, "num_fail_sends", fail_count(self.num_fail_sends))
        object.__setattr__(self, "messages_to_delay", _delays(self.messages_to_delay))

    def __repr__(self) -> str:
        parts: list[str] = []
        if self.messages_to_fail:
            names = tuple(str(m) for m in self.messages_to_fail)
            parts.append(f"messages_to_fail={names!r}")
        if self.num_fail_sends:
            parts.append(f"num_fail_sends={self.num_fail_sends!r}")
        if self.messages_to_delay:
            delays = {str(m): d for m, d in self.messages_to_delay.items()}
            parts.append(f"messages_to_delay={delays!r}")
        return f"FaultTable({', '.join(parts)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """The text that Hypothesis (and IPython) print."""
        printer.text(repr(self))

    @property
    def failing(self) -> tuple[MessageType, ...]:
        """The types that fail at least once (none when `num_fail_sends` is 0)."""
        return self.messages_to_fail if self.num_fail_sends else ()

    @property
    def delaying(self) -> Mapping[MessageType, int]:
        """The types that are delayed, each with its whole milliseconds (virtual)."""
        held = {m: delay_milliseconds(d) for m, d in self.messages_to_delay.items()}
        return FrozenMap({m: ms for m, ms in held.items() if ms})

    @property
    def is_empty(self) -> bool:
        """Whether a rank with this table behaves as one without a table."""
        return not self.failing and not self.delaying

    def is_survivable(self, message: MessageType | str) -> bool:
        """Whether `message` still arrives under this table: it fails no more than it is retried."""
        kind = message_type(message)
        return kind not in self.failing or self.num_fail_sends <= kind.max_retries

    @property
    def is_within_budget(self) -> bool:
        """Whether every failing type still arrives, so that nothing a program sees may change."""
        return all(self.is_survivable(m) for m in self.failing)

    def faults(self, rank: int) -> tuple[Fault, ...]:
        """The faults of this table at `rank`: the types that fail, then those that are late."""
        late = self.messages_to_delay
        return (
            *(SendFailure(rank, message, self.num_fail_sends) for message in self.failing),
            *(SendDelay(rank, message, late[message]) for message in self.delaying),
        )

    def joined(self, other: FaultTable) -> FaultTable:
        """A table under which each message waits at least as long as under the two together."""
        delays = dict(self.messages_to_delay)
        for message, delay in other.messages_to_delay.items():
            delays[message] = max(delay, delays.get(message, 0.0))
        return FaultTable(
            {*self.failing, *other.failing},
            min(self.num_fail_sends + other.num_fail_sends, MAX_FAIL_SENDS),
            delays,
        )

    def retry_seconds(self, message: MessageType | str) -> float:
        """Virtual seconds of retry waits before such a message arrives or is given up."""
        kind = message_type(message)
        if kind not in self.failing:
            return 0.0
        return retry_wait(min(self.num_fail_sends, kind.max_retries))


def retryable_tables() -> tuple[FaultTable, ...]:
    """The 76 tables without delays that torch must survive: none, and 15 subsets times 5 counts."""
    subsets = [
        subset
        for size in range(1, len(RETRYABLE_MESSAGE_TYPES) + 1)
        for subset in itertools.combinations(RETRYABLE_MESSAGE_TYPES, size)
    ]
    failing = [FaultTable(subset, count) for count in range(1, 6) for subset in subsets]
    return (FaultTable(), *failing)


@dataclass(frozen=True, slots=True, order=True, repr=False)
class FaultPlan:
    """A table for each rank: that of `by_rank` if it names the rank, else `default`.

    Args:
        others: faults that torch's agent does not make, so that they are in no table.

    Raises:
        UsageError: a rank is no int from 0 up, a table is no :class:`FaultTable`, or one of
            `others` is no :class:`Fault` or belongs in a table.
    """

    default: FaultTable = FaultTable()
    by_rank: Mapping[int, FaultTable] = field(default_factory=FrozenMap[int, FaultTable])
    others: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        by_rank: Any = self.by_rank
        if not isinstance(by_rank, Mapping):
            msg = (
                f"by_rank={shown(by_rank)} must map ranks to fault tables, such as "
                f"{{1: FaultTable()}}."
            )
            raise UsageError(msg)
        for rank in by_rank:
            if isinstance(rank, bool) or not isinstance(rank, int):
                msg = (
                    f"by_rank has the key {shown(rank)} (type {type(rank).__name__}); a rank "
                    "is an int."
                )
                raise UsageError(msg)
            if rank < 0:
                msg = f"by_rank has the key {shown(rank)}; ranks count from 0."
                raise UsageError(msg)
        named = [(f"by_rank[{shown(rank)}]", table) for rank, table in by_rank.items()]
        for where, table in [("default", self.default), *named]:
            if not isinstance(table, FaultTable):
                msg = f"{argument(where, table)} must be a FaultTable."
                raise UsageError(msg)
        object.__setattr__(self, "by_rank", FrozenMap({int(r): t for r, t in by_rank.items()}))
        object.__setattr__(self, "others", _others(self.others))

    def __repr__(self) -> str:
        parts: list[str] = []
        if self.default != FaultTable():
            parts.append(f"default={self.default!r}")
        if self.by_rank:
            parts.append(f"by_rank={self.by_rank!r}")
        if self.others:
            parts.append(f"others={self.others!r}")
        return f"FaultPlan({', '.join(parts)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """The text that Hypothesis (and IPython) print."""
        printer.text(repr(self))

    @staticmethod
    def of(faults: FaultTable | FaultPlan | None) -> FaultPlan:
        """`faults` as a plan: a table applies to every rank, None means no faults.

        Raises:
            UsageError: it is none of these.
        """
        given: Any = faults
        if given is None:
            return FaultPlan()
        if isinstance(given, FaultTable):
            return FaultPlan(default=given)
        if isinstance(given, FaultPlan):
            return given
        msg = (
            f"{argument('faults', given)} must be a FaultTable (for every "
            f"rank), a FaultPlan, or None."
        )
        raise UsageError(msg)

    def table(self, rank: int) -> FaultTable:
        """The table of `rank`.

        Raises:
            UsageError: `rank` is no int.
        """
        given: object = rank
        if not isinstance(given, int):
            msg = f"{argument('rank', rank)} must be an int."
            raise UsageError(msg)
        return self.by_rank.get(rank, self.default)

    def check(self, world_size: int) -> None:
        """Raises:
        UsageError: a rank of the plan lies outside a world of `world_size` ranks.
        """
        counted("world_size", world_size, MAX_RANKS)
        for rank in (*self.by_rank, *(rank for fault in self.others for rank in fault.ranks)):
            if rank >= world_size:
                where = "by_rank" if rank in self.by_rank else "others"
                msg = (
                    f"the plan names rank {rank}, but a world of {world_size} has ranks 0 to "
                    f"{world_size - 1}; raise world_size or take the rank out of {where}."
                )
                raise UsageError(msg)

    def with_table(self, rank: int, table: FaultTable) -> FaultPlan:
        """This plan with another table for `rank`.

        Raises:
            UsageError: `rank` is no int from 0 up, or `table` is no :class:`FaultTable`.
        """
        self.table(rank)  # raises if it is no int
        return replace(self, by_rank={**self.by_rank, rank: table})

    def joined(self, other: FaultPlan) -> FaultPlan:
        """The plan that joins the two tables of each rank, and has the others of both."""
        ranks = {*self.by_rank, *other.by_rank}
        return FaultPlan(
            self.default.joined(other.default),
            {rank: self.table(rank).joined(other.table(rank)) for rank in ranks},
            (*self.others, *other.others),
        )

    def faults_at(self, rank: int) -> tuple[Fault, ...]:
        """The faults of `rank`: those of its table, then others."""
        others = [fault for fault in self.others if fault.rank == rank]
        return (*self.table(rank).faults(rank), *others)

    def faults(self, world_size: int) -> tuple[Fault, ...]:
        """The faults of a world of that size, rank by rank.

        Raises:
            UsageError: `world_size` is no int from 0 up.
        """
        ranks = range(counted("world_size", world_size, MAX_RANKS))
        return tuple(fault for rank in ranks for fault in self.faults_at(rank))

    def faulty_ranks(self, world_size: int) -> tuple[int, ...]:
        """The ranks that have a fault."""
        return tuple(dict.fromkeys(fault.rank for fault in self.faults(world_size)))

    def is_within_budget(self, world_size: int) -> bool:
        """Whether torch survives every fault: a program sees no change."""
        return all(fault.is_survivable for fault in self.faults(world_size))

    def fault_names(self, world_size: int) -> tuple[str, ...]:
        """The faults by name: ``1:RREF_USER_DELETE`` fails at rank 1, ``1:delay:…`` comes late."""
        return tuple(fault.name for fault in self.faults(world_size))

    def named(self, names: Iterable[str], world_size: int) -> tuple[Fault, ...]:
        """The faults of those names (see :meth:`fault_names`), as far as this plan has them.

        Raises:
            UsageError: `names` is no collection, or `world_size` no int from 0 up.
        """
        faults = self.faults(world_size)
        listed = items("names", names, _MAX_NAMES, "a collection of names")
        wanted = {name for name in listed if isinstance(name, str)}
        return tuple(fault for fault in faults if fault.name in wanted)

    def without(self, names: Iterable[str], world_size: int) -> FaultPlan:
        """This plan without the faults of those names (see :meth:`named`).

        Raises:
            UsageError: `names` is no collection, or `world_size` no int from 0 up.
        """
        plan = self
        for fault in self.named(names, world_size):
            plan = fault.taken_from(plan)
        return plan

    def simpler(self, world_size: int) -> Iterator[FaultPlan]:
        """Plans to try instead: without each fault, then with each replaced by a simpler one."""
        faults = self.faults(world_size)
        for fault in faults:
            yield fault.taken_from(self)
        for fault in faults:
            for other in fault.simpler():
                yield other.put_into(fault.taken_from(self))


def _others(value: object) -> tuple[Fault, ...]:
    found = items("others", value, _MAX_NAMES, "a collection of faults")
    for fault in found:
        if not isinstance(fault, Fault):
            msg = f"others holds {shown(fault)} (type {type(fault).__name__}), which is no Fault."
            raise UsageError(msg)
        if fault.in_table:
            msg = f"others holds {shown(fault)}, which is of a table: use its put_into(plan)."
            raise UsageError(msg)
    return tuple(sorted(set(found)))
