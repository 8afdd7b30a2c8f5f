"""The faults that can be injected, as data: message types, a table for a rank, a plan for a world.

Nothing here imports torch. A table is checked when it is made, because torch's agent accepts
values that then hang a cluster (an infinite delay) and reports others only when it is built, in
another process. All times are virtual seconds.

Sources: the ten names are ``FaultyTensorPipeAgent::messageStringToType``, the retry budgets
``RpcRetryOptions`` (5 retries, backoff 1.5) and ``kNumCleanupContextRetries`` (20) in torch's C++.
"""

from __future__ import annotations

import enum
import itertools
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rpcprops._frozen import FrozenMap
from rpcprops._given import argument, items, shown
from rpcprops.errors import UsageError

#: The longest delay, in virtual seconds, that a table accepts.
MAX_DELAY = 3600.0
_MAX_INT32 = 2**31 - 1
#: Above any world: what a loop over its ranks still ends for.
MAX_RANKS = 1024
_MAX_RETRIES = 1000
#: Above all that there are: where an iterable without an end is let go.
_MAX_NAMES = 100_000


class MessageType(enum.StrEnum):
    """The ten message types that torch's faulty agent can fail or delay, by torch's own names."""

    CLEANUP_AUTOGRAD_CONTEXT_REQ = "CLEANUP_AUTOGRAD_CONTEXT_REQ"
    RREF_CHILD_ACCEPT = "RREF_CHILD_ACCEPT"
    RREF_FORK_REQUEST = "RREF_FORK_REQUEST"
    RREF_USER_DELETE = "RREF_USER_DELETE"
    PYTHON_CALL = "PYTHON_CALL"
    PYTHON_REMOTE_CALL = "PYTHON_REMOTE_CALL"
    PYTHON_RREF_FETCH_CALL = "PYTHON_RREF_FETCH_CALL"
    SCRIPT_CALL = "SCRIPT_CALL"
    SCRIPT_REMOTE_CALL = "SCRIPT_REMOTE_CALL"
    SCRIPT_RREF_FETCH_CALL = "SCRIPT_RREF_FETCH_CALL"

    def __repr__(self) -> str:
        return f"MessageType.{self.name}"

    @property
    def max_retries(self) -> int:
        """How many times torch sends again after a failed send (0: it never does)."""
        if self is MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ:
            return 20
        return 5 if self.name.startswith("RREF_") else 0

    @property
    def is_retryable(self) -> bool:
        """Whether torch sends this type again when a send fails."""
        return self.max_retries > 0


#: The four types that torch retries; failing them at most ``max_retries`` times changes nothing.
RETRYABLE_MESSAGE_TYPES: tuple[MessageType, ...] = tuple(m for m in MessageType if m.is_retryable)

#: What torch's own fixture delays when a test does not say (virtual seconds).
DEFAULT_MESSAGES_TO_DELAY: Mapping[MessageType, float] = FrozenMap(
    {MessageType.PYTHON_CALL: 1.5, MessageType.SCRIPT_CALL: 1.5}
)


def retry_wait(failures: int) -> float:
    """Virtual seconds that torch waits in all before the send after `failures` failed ones.

    The waits are 1, 1, 1.5, 2.25, 3.375, … s: ``computeNewRpcRetryTime`` uses the count before it
    is raised, so the first two are equal.

    Raises:
        UsageError: `failures` is no int from 0 to 1000 (torch retries 20 times at most).
    """
    _counted("failures", failures, _MAX_RETRIES)
    return sum(1.5 ** max(0, n - 1) for n in range(failures))


def delay_milliseconds(delay: float) -> int:
    """What the agent makes of a delay: the seconds as a C float, times 1000, cut to whole ms.

    Raises:
        UsageError: it is no number in 0 to :data:`MAX_DELAY`.
    """
    delay = checked_delay(delay, "delay")
    as_float: float = struct.unpack("f", struct.pack("f", delay))[0]
    product: float = struct.unpack("f", struct.pack("f", as_float * 1000.0))[0]
    return int(product)


def _counted(name: str, value: object, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        msg = f"{argument(name, value)} must be an int from 0 to {most}."
        raise UsageError(msg)
    return value


def _ranks(world_size: object) -> range:
    return range(_counted("world_size", world_size, MAX_RANKS))


def message_type(value: object) -> MessageType:
    """The message type that `value` names.

    Raises:
        UsageError: it is no torch message type that can be failed or delayed.
    """
    if isinstance(value, str):
        try:
            return MessageType(value)
        except ValueError:
            pass
        hint = ""
        if value.upper() in MessageType.__members__:
            hint = f" Did you mean {value.upper()!r}? Names are in upper case."
        msg = (
            f"message type {shown(value)} cannot be failed or delayed by torch's agent.{hint} "
            f"It knows: {', '.join(MessageType)}."
        )
    else:
        msg = (
            f"a message type must be a rpcprops.MessageType or its name, "
            f"got {shown(value)} (type {type(value).__name__})."
        )
    raise UsageError(msg)


def _message_types(value: object) -> tuple[MessageType, ...]:
    must_be = "a collection of message types, such as ('RREF_USER_DELETE',)"
    given = items("messages_to_fail", value, _MAX_NAMES, must_be)
    return tuple(sorted({message_type(item) for item in given}))


def _fail_count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{argument('num_fail_sends', value)} must be an int."
        raise UsageError(msg)
    if not 0 <= value <= _MAX_INT32:
        msg = (
            f"num_fail_sends={shown(value)} must lie in 0 to {_MAX_INT32} (torch keeps it as "
            "int32); "
            f"0 fails nothing, 1 to 5 is within the retry budget of every retryable type."
        )
        raise UsageError(msg)
    return int(value)


def checked_delay(value: object, name: str) -> float:
    """`value` as a delay in virtual seconds.

    Raises:
        UsageError: it is no number in 0 to :data:`MAX_DELAY`. torch's agent accepts an infinite
            delay and then never sends.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        msg = f"{argument(name, value)} must be seconds as an int or float."
        raise UsageError(msg)
    # Compared before it is made a float: an int may be too large for one. NaN fails both.
    if not 0 <= value <= MAX_DELAY:
        msg = f"{argument(name, value)} must be a finite number of seconds from 0 to {MAX_DELAY:g}."
        raise UsageError(msg)
    return float(value) + 0.0  # makes 0.0 of -0.0, which is equal but prints otherwise


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

    The count is the agent's: each distinct payload of an armed type fails `num_fail_sends` times on
    its sender, then passes. A fork request and the later delete of the same fork have one payload,
    and so share one count.

    Args:
        messages_to_fail: types whose sends fail.
        num_fail_sends: how many sends of each payload fail.
        messages_to_delay: virtual seconds by which sends of a type are held up in their sender
            (whole milliseconds; the agent cuts the rest off).

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
        # Apart from __init__, because decoding from JSON calls this alone.
        object.__setattr__(self, "messages_to_fail", _message_types(self.messages_to_fail))
        object.__setattr__(self, "num_fail_sends", _fail_count(self.num_fail_sends))
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
        """What Hypothesis (and IPython) print."""
        printer.text(repr(self))

    @property
    def failing(self) -> tuple[MessageType, ...]:
        """The types that fail at least once (none when `num_fail_sends` is 0)."""
        return self.messages_to_fail if self.num_fail_sends else ()

    @property
    def delaying(self) -> Mapping[MessageType, int]:
        """The types that are held up, each with its whole milliseconds (virtual)."""
        held = {m: delay_milliseconds(d) for m, d in self.messages_to_delay.items()}
        return FrozenMap({m: ms for m, ms in held.items() if ms})

    @property
    def is_empty(self) -> bool:
        """Whether a rank with this table behaves as one without any."""
        return not self.failing and not self.delaying

    def is_survivable(self, message: MessageType | str) -> bool:
        """Whether `message` still arrives under this table: it fails no more than it is retried."""
        kind = message_type(message)
        return kind not in self.failing or self.num_fail_sends <= kind.max_retries

    @property
    def is_within_budget(self) -> bool:
        """Whether every failing type still arrives, so that nothing a program sees may change."""
        return all(self.is_survivable(m) for m in self.failing)

    def retry_seconds(self, message: MessageType | str) -> float:
        """Virtual seconds of retry waits before a message of this type arrives, or is given up."""
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
    """A table for each rank: `by_rank` where it names the rank, else `default`.

    Raises:
        UsageError: a rank is no int from 0 up, or a table is no :class:`FaultTable`.
    """

    default: FaultTable = FaultTable()
    by_rank: Mapping[int, FaultTable] = field(default_factory=FrozenMap[int, FaultTable])

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

    def __repr__(self) -> str:
        parts: list[str] = []
        if self.default != FaultTable():
            parts.append(f"default={self.default!r}")
        if self.by_rank:
            parts.append(f"by_rank={self.by_rank!r}")
        return f"FaultPlan({', '.join(parts)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis (and IPython) print."""
        printer.text(repr(self))

    @staticmethod
    def of(faults: FaultTable | FaultPlan | None) -> FaultPlan:
        """`faults` as a plan: a table afflicts every rank, None afflicts none.

        Raises:
            UsageError: it is neither.
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
            UsageError: it is no int.
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
        _counted("world_size", world_size, MAX_RANKS)
        for rank in self.by_rank:
            if rank >= world_size:
                msg = (
                    f"the plan afflicts rank {rank}, but a world of {world_size} has ranks 0 to "
                    f"{world_size - 1}; raise world_size or take the rank out of by_rank."
                )
                raise UsageError(msg)

    def afflicted(self, world_size: int) -> tuple[int, ...]:
        """The ranks whose table is not empty."""
        return tuple(r for r in _ranks(world_size) if not self.table(r).is_empty)

    def is_within_budget(self, world_size: int) -> bool:
        """Whether every rank's table is."""
        return all(self.table(r).is_within_budget for r in _ranks(world_size))

    def fault_names(self, world_size: int) -> tuple[str, ...]:
        """The faults by name: ``1:RREF_USER_DELETE`` fails at rank 1, ``1:delay:…`` comes late."""
        found: list[str] = []
        for rank in _ranks(world_size):
            table = self.table(rank)
            found += [f"{rank}:{message}" for message in table.failing]
            found += [f"{rank}:delay:{message}" for message in table.delaying]
        return tuple(found)

    def without(self, names: Iterable[str], world_size: int) -> FaultPlan:
        """This plan less the faults of those names (see :meth:`fault_names`), if it has them.

        Raises:
            UsageError: `names` is no collection, or `world_size` no int from 0 up.
        """
        ranks = _ranks(world_size)
        listed = items("names", names, _MAX_NAMES, "a collection of names")
        wanted = {name for name in listed if isinstance(name, str)}
        dropped = {name for name in self.fault_names(world_size) if name in wanted}
        tables: dict[int, FaultTable] = {}
        for rank in ranks:
            table = self.table(rank)
            tables[rank] = FaultTable(
                [m for m in table.messages_to_fail if f"{rank}:{m}" not in dropped],
                table.num_fail_sends,
                {
                    m: delay
                    for m, delay in table.messages_to_delay.items()
                    if f"{rank}:delay:{m}" not in dropped
                },
            )
        changed = {rank: table for rank, table in tables.items() if table != self.table(rank)}
        return FaultPlan(self.default, {**self.by_rank, **changed})
