"""The two kinds of fault of torch's agent: a message whose send fails, and one sent late."""

from __future__ import annotations

import abc
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from rpcprops._given import argument, counted, shown
from rpcprops.errors import UsageError
from rpcprops.faults._fault import MAX_RANKS, Fault, PredictedSend, fewer
from rpcprops.faults.message_types import MessageType, message_type, retry_wait

if TYPE_CHECKING:
    from rpcprops.faults._fault import Predicted
    from rpcprops.faults.tables import FaultPlan
    from rpcprops.outcomes import Outcome, RankOutcome, SentMessage

#: The longest delay, in virtual seconds, that a table accepts.
MAX_DELAY = 3600.0
#: The largest `num_fail_sends`: torch keeps it as int32.
MAX_FAIL_SENDS = 2**31 - 1


def delay_milliseconds(delay: float) -> int:
    """The delay as the agent stores it: the seconds as a C float, times 1000, cut to whole ms.

    Raises:
        UsageError: it is no number from 0 to :data:`MAX_DELAY`.
    """
    delay = checked_delay(delay, "delay")
    as_float: float = struct.unpack("f", struct.pack("f", delay))[0]
    product: float = struct.unpack("f", struct.pack("f", as_float * 1000.0))[0]
    return int(product)


def checked_delay(value: object, name: str, *, may_be_zero: bool = True) -> float:
    """`value` as a delay in virtual seconds.

    Args:
        may_be_zero: whether the caller takes 0, too; the message says so.

    Raises:
        UsageError: it is no number from 0 to :data:`MAX_DELAY`. torch's agent accepts an infinite
            delay and then never sends.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        msg = f"{argument(name, value)} must be seconds as an int or float."
        raise UsageError(msg)
    # Compare before the conversion: an int may be too large for a float. NaN fails both.
    if not 0 <= value <= MAX_DELAY:
        least = "from 0 to" if may_be_zero else "above 0 and up to"
        msg = f"{argument(name, value)} must be a finite number of seconds {least} {MAX_DELAY:g}."
        raise UsageError(msg)
    return float(value) + 0.0  # makes 0.0 of -0.0, which is equal but prints differently


def fail_count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{argument('num_fail_sends', value)} must be an int."
        raise UsageError(msg)
    if not 0 <= value <= MAX_FAIL_SENDS:
        msg = (
            f"num_fail_sends={shown(value)} must lie in 0 to {MAX_FAIL_SENDS} (torch keeps it as "
            "int32); "
            f"0 fails nothing, 1 to 5 is within the retry budget of every retryable type."
        )
        raise UsageError(msg)
    return int(value)


class _SendFault(Fault):
    """A fault of one message type at one rank: it is in the fault table of that rank."""

    __slots__ = ()

    in_table: ClassVar[bool] = True
    message: MessageType

    @property
    def what(self) -> str:
        """The message type."""
        return self.message

    @property
    def targets(self) -> tuple[MessageType, ...]:
        """The message type."""
        return (self.message,)

    @abc.abstractmethod
    def _counts(self, rank: RankOutcome) -> Mapping[str, int] | None:
        """What its rank counts of faults of its kind, by message type."""

    def is_counted_alone(self, rank: RankOutcome) -> bool:
        """Where the preload library counted by type."""
        return self._counts(rank) is not None

    @abc.abstractmethod
    def _acted_on(self, sent: SentMessage) -> bool:
        """Whether a table did to a message of its rank and type what it does."""

    def recorded(self, plan: FaultPlan, outcome: Outcome, part: int = 0) -> int | None:
        """On how many messages it acted, by the record of all messages, if that is whole."""
        acted = [sent for sent in outcome.messages if sent.failed_by_table or sent.delayed_by_table]
        if not outcome.is_recorded or any(sent.table_part is None for sent in acted):
            return None
        return sum(
            self._acted_on(sent)
            for sent in acted
            if (sent.sender, sent.type, sent.table_part) == (self.rank, self.message, part)
        )

    def enter_rank(self) -> None:
        """Nothing to do: the options of the agent are made from the table."""

    def _check(self) -> None:
        object.__setattr__(self, "rank", counted("rank", self.rank, MAX_RANKS))
        object.__setattr__(self, "message", message_type(self.message))


@dataclass(frozen=True, slots=True)
class SendFailure(_SendFault):
    """Sends of a type fail: each distinct payload fails `num_fail_sends` times, then passes.

    In one table all types that fail have the same count.

    Raises:
        UsageError: as :class:`FaultTable` does.
    """

    kind: ClassVar[str] = "failure"

    rank: int
    message: MessageType
    num_fail_sends: int

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "num_fail_sends", fail_count(self.num_fail_sends))

    @property
    def name(self) -> str:
        """Rank and type, without the kind: existing files and command lines use such names."""
        return f"{self.rank}:{self.message}"

    @property
    def is_survivable(self) -> bool:
        """Whether torch retries often enough."""
        return self.num_fail_sends <= self.message.max_retries

    def strikes(self, sends: Sequence[PredictedSend]) -> Sequence[int]:
        """As the model predicts; it counts by payload, as the agent does."""
        return [
            send.failures if send.rank == self.rank and send.message is self.message else 0
            for send in sends
        ]

    def eligible(self, predicted: Predicted) -> int:
        """Includes the graceful shutdown, because the log shows failures there too."""
        return sum(self.strikes([*predicted.sends, *predicted.last_sends]))

    @property
    def seconds(self) -> float:
        """The waits up to the last try."""
        return self.waits(self.num_fail_sends)

    def waits(self, times: int) -> float:
        """The waits of torch between its tries."""
        return retry_wait(min(times, self.message.max_retries))

    @property
    def unseen_waits(self) -> tuple[float, ...]:
        """The waits of a context's cleanup, which has no counter."""
        if self.message is not MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ:
            return ()
        tries = min(self.num_fail_sends, self.message.max_retries)
        return tuple(retry_wait(n + 1) - retry_wait(n) for n in range(tries))

    @property
    def sign(self) -> int | None:
        """One sign for all types that are retried: torch's line in the log names no type."""
        return 0 if self.message.is_retryable else None

    @property
    def shows_in(self) -> Literal["", "errors", "seconds"]:
        """If a message is never retried, its failure shows at its caller."""
        return "errors"

    def _counts(self, rank: RankOutcome) -> Mapping[str, int] | None:
        by_type = rank.failed_by_type
        if by_type is None:
            return None
        # A rank that died did not say what failed after its last look; its log does.
        retried = sum(by_type.get(m, 0) for m in MessageType if m.is_retryable)
        has_died = bool(rank.signal or rank.exit_code)
        return None if has_died and retried < rank.failed_sends else by_type

    def seen(self, rank: RankOutcome) -> int | None:
        """By type, or the number of lines that torch logs for failed sends that it will retry."""
        by_type = self._counts(rank)
        if by_type is not None:
            return by_type.get(self.message, 0)
        return rank.failed_sends if self.message.is_retryable else None

    def _acted_on(self, sent: SentMessage) -> bool:
        return sent.failed_by_table

    def put_into(self, plan: FaultPlan) -> FaultPlan:
        """Put it into the table of its rank; all types that fail there get its count."""
        table = plan.table(self.rank)
        failing = (*table.failing, self.message)
        return plan.with_table(
            self.rank,
            replace(table, messages_to_fail=failing, num_fail_sends=self.num_fail_sends),
        )

    def taken_from(self, plan: FaultPlan) -> FaultPlan:
        """The plan in which its type does not fail at its rank."""
        table = plan.table(self.rank)
        rest = tuple(m for m in table.messages_to_fail if m is not self.message)
        return plan.with_table(self.rank, replace(table, messages_to_fail=rest))

    def simpler(self) -> Iterator[Self]:
        """Fewer failures."""
        for count in fewer(self.num_fail_sends):
            yield replace(self, num_fail_sends=count)


@dataclass(frozen=True, slots=True)
class SendDelay(_SendFault):
    """Sends of a type are delayed in their sender, by `delay` virtual seconds.

    Raises:
        UsageError: as :class:`FaultTable` does.
    """

    kind: ClassVar[str] = "delay"
    blocks_sender: ClassVar[bool] = True

    rank: int
    message: MessageType
    delay: float

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "delay", checked_delay(self.delay, "delay"))

    @property
    def is_survivable(self) -> bool:
        """True: a message that is late still arrives."""
        return True

    def strikes(self, sends: Sequence[PredictedSend]) -> Sequence[int]:
        """Once for each message of its type that is finally sent, and each that is lost then.

        The agent waits before it writes; a send that fails does not come so far
        (``faulty_tensorpipe_agent.cpp``: ``FaultyTensorPipeAgent::pipeWrite``, ``send``).
        """
        return [
            (send.delivered + send.lost) * (send.rank == self.rank and send.message is self.message)
            for send in sends
        ]

    @property
    def seconds(self) -> float:
        """The delay in whole milliseconds, as the agent keeps it."""
        return self.sign / 1000

    @property
    def sign(self) -> int:
        """Its whole milliseconds: the clock library counts sleeps by their length."""
        return delay_milliseconds(self.delay)

    @property
    def shows_in(self) -> Literal["", "errors", "seconds"]:
        """Without the clock library, the time that steps took may show it."""
        return "seconds"

    def _counts(self, rank: RankOutcome) -> Mapping[str, int] | None:
        return rank.delayed_by_type

    def seen(self, rank: RankOutcome) -> int | None:
        """By type, or the count of the clock library for its length, if that was loaded."""
        by_type = self._counts(rank)
        if by_type is not None:
            return by_type.get(self.message, 0)
        held_up = rank.delayed_sends
        return None if held_up is None else held_up.get(self.sign, 0)

    def _acted_on(self, sent: SentMessage) -> bool:
        """Whether a table held it up, outside of a shutdown of which no delay is predicted."""
        return sent.delayed_by_table and "leaving" not in sent.marks

    def put_into(self, plan: FaultPlan) -> FaultPlan:
        """Put it into the table of its rank."""
        return self._with(plan, {self.message: self.delay})

    def taken_from(self, plan: FaultPlan) -> FaultPlan:
        """The plan in which its type is not late at its rank."""
        return self._with(plan, {})

    def _with(self, plan: FaultPlan, mine: dict[MessageType, float]) -> FaultPlan:
        table = plan.table(self.rank)
        rest = {m: delay for m, delay in table.messages_to_delay.items() if m is not self.message}
        return plan.with_table(self.rank, replace(table, messages_to_delay={**rest, **mine}))

    def simpler(self) -> Iterator[Self]:
        """Shorter delays."""
        for milliseconds in fewer(self.sign):
            yield replace(self, delay=milliseconds / 1000)
