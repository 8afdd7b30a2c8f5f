"""The interface of a fault: everything that other code asks of a fault, whatever its kind.

A new kind of fault is a frozen dataclass that derives from :class:`Fault`. A plan carries it in
``FaultPlan.others``, and :func:`register` lets it travel as JSON.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeVar

from rpcprops._given import argument
from rpcprops.errors import UsageError

if TYPE_CHECKING:
    from rpcprops.faults.message_types import MessageType
    from rpcprops.faults.tables import FaultPlan
    from rpcprops.outcomes import Outcome, RankOutcome

#: More ranks than any world has, so that a loop over a world's ranks ends.
MAX_RANKS = 1024


class PredictedSend(Protocol):
    """A message that a program must send, as the message model predicts it.

    Attributes:
        failures: how often sending it fails.
        delivered: whether it finally arrives.
        lost: how many of its tries are lost on their way, of which the sender knows nothing.
    """

    @property
    def rank(self) -> int: ...
    @property
    def message(self) -> MessageType: ...
    @property
    def failures(self) -> int: ...
    @property
    def delivered(self) -> bool: ...
    @property
    def lost(self) -> int: ...


class Predicted(Protocol):
    """What a program must do, as the message model predicts it.

    Attributes:
        steps: one for each leaf of the program, in order.
        sends: every message of the ten types, in order, up to the last settle.
        last_sends: the messages of the graceful shutdown.
    """

    @property
    def steps(self) -> Sequence[Any]: ...
    @property
    def sends(self) -> Sequence[PredictedSend]: ...
    @property
    def last_sends(self) -> Sequence[PredictedSend]: ...


@functools.total_ordering
class Fault(abc.ABC):
    """One disturbance at one rank. Subclasses are frozen dataclasses; their repr rebuilds them.

    Attributes:
        kind: its name in fault names, reports and JSON. It never changes: files contain it.
        in_table: whether torch's agent makes it itself, from the fault table of the rank.
        is_predicted: whether the oracle predicts what a program shows under it. If not, it refuses
            to; what ranks hold and how they exit is judged all the same.
        rank: the rank at which it acts.
        ranks: every rank that it names.
        targets: the message types whose sends it acts on, so that strategies can aim at them; empty
            if it acts on something else.
        blocks_sender: whether everything that its rank sends waits while it delays one message.
        unseen_waits: the waits that it causes and that no counter of a rank shows, so that settling
            must wait for each of them.
        sign: where an outcome does not count by message type, the count that shows it. Faults of
            one kind and one sign at a rank share that count, and the prediction tells them apart;
            None: it shares no count.
        shows_in: if nothing counts it, what else shows that it fired: the error that a step raises,
            or the virtual seconds that the steps of its rank took.
    """

    __slots__ = ()

    kind: ClassVar[str]
    in_table: ClassVar[bool] = False
    blocks_sender: ClassVar[bool] = False
    is_predicted: ClassVar[bool] = True
    rank: int

    def __lt__(self, other: Fault) -> bool:
        return (self.name, repr(self)) < (other.name, repr(other))

    @property
    @abc.abstractmethod
    def what(self) -> str:
        """What it acts on, in a word that distinguishes it from others of its kind at its rank."""

    @property
    def name(self) -> str:
        """Its name, as ``--without-fault`` takes it. :meth:`FaultPlan.named` finds it by that."""
        return f"{self.rank}:{self.kind}:{self.what}"

    @property
    def ranks(self) -> tuple[int, ...]:
        return (self.rank,)

    @property
    def targets(self) -> tuple[MessageType, ...]:
        return ()

    # What it may do.

    @property
    @abc.abstractmethod
    def is_survivable(self) -> bool:
        """Whether torch promises that a program sees no change."""

    @abc.abstractmethod
    def strikes(self, sends: Sequence[PredictedSend]) -> Sequence[int]:
        """How often it acts on each of these messages of a world, in order."""

    def eligible(self, predicted: Predicted) -> int:
        """How often it can act altogether. A fault that acts on steps looks at the steps."""
        return sum(self.strikes(predicted.sends))

    @property
    @abc.abstractmethod
    def seconds(self) -> float:
        """Virtual seconds by which it delays one message or step, at most."""

    def waits(self, times: int) -> float:
        """Virtual seconds by which it delays a message on which it acts `times` times."""
        return self.seconds * times

    @property
    def unseen_waits(self) -> tuple[float, ...]:
        return ()

    # What it did.

    def is_counted_alone(self, rank: RankOutcome) -> bool:
        """Whether its rank's outcome has a count for it alone, whatever its `sign`."""
        return False

    @property
    def sign(self) -> int | None:
        return None

    @property
    def shows_in(self) -> Literal["", "errors", "seconds"]:
        return ""

    @abc.abstractmethod
    def seen(self, rank: RankOutcome) -> int | None:
        """How often its rank's outcome shows it, or else its sign; None if nothing counts it."""

    def recorded(self, plan: FaultPlan, outcome: Outcome, part: int = 0) -> int | None:
        """How often the record of all messages shows it, in a run under that plan.

        None where nobody kept such a record, or it says nothing of this kind of fault.

        Args:
            part: 0 for a fault of the cluster's plan, n for one of the n-th plan that was armed for
                a part of the run. Only faults of tables can be.
        """
        return None

    # Where it is.

    def put_into(self, plan: FaultPlan) -> FaultPlan:
        """The plan plus this fault."""
        return replace(plan, others=(*plan.others, self))

    def taken_from(self, plan: FaultPlan) -> FaultPlan:
        """The plan minus this fault, which it contains."""
        return replace(plan, others=tuple(other for other in plan.others if other != self))

    @abc.abstractmethod
    def enter_rank(self) -> None:
        """Called in its rank before the rank joins the world; arms a fault that is in no table."""

    @abc.abstractmethod
    def simpler(self) -> Iterator[Self]:
        """Simpler faults of its kind that may be enough, simplest first."""


F = TypeVar("F", bound=Fault)
_CLASSES: dict[str, type[Fault]] = {}


def register(cls: type[F]) -> type[F]:
    """A class decorator: plans with faults of this class can be read from JSON, by its `kind`.

    Raises:
        UsageError: it is not a subclass of Fault, or another class has the same `kind`.
    """
    given: object = cls
    if not isinstance(given, type) or not issubclass(given, Fault):
        msg = f"{argument('cls', given)} must be a class that derives from Fault."
        raise UsageError(msg)
    known = _CLASSES.setdefault(cls.kind, cls)
    if known is not cls:
        msg = f"kind={cls.kind!r} of {cls.__name__} is the word of {known.__name__}; change it."
        raise UsageError(msg)
    return cls


def fault_class(kind: object) -> type[Fault] | None:
    """The registered class of that kind."""
    return _CLASSES.get(kind) if isinstance(kind, str) else None


def fewer(count: int) -> list[int]:
    """Smaller counts to try instead of `count`, from 1 up."""
    return sorted(n for n in {1, count // 2, count - 1} if 0 < n < count)
