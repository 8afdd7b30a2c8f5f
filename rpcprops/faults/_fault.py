"""What a fault is: all that the rest of the project asks of one, whatever its kind.

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
    from rpcprops.outcomes import RankOutcome

#: Above any world: what a loop over its ranks still ends for.
MAX_RANKS = 1024


class PredictedSend(Protocol):
    """A message that a program must send, as the message model predicts it.

    Attributes:
        failures: how often sending it fails.
        delivered: whether it is sent in the end.
    """

    @property
    def rank(self) -> int: ...
    @property
    def message(self) -> MessageType: ...
    @property
    def failures(self) -> int: ...
    @property
    def delivered(self) -> bool: ...


class Predicted(Protocol):
    """What a program must do, as the message model predicts it.

    Attributes:
        steps: one for each leaf of the program, in order.
        sends: every message of the ten types, in order, up to the last settle.
        last_sends: those of the graceful shutdown.
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
        kind: its word in names, reports and JSON. It never changes: files hold it.
        in_table: whether torch's agent makes it itself, from the fault table of the rank.
        rank: where it strikes.
        targets: the message types whose sends it strikes, at which strategies then aim; none where
            it strikes something else.
        blocks_sender: whether all that its rank sends waits while it holds one message up.
        unseen_waits: those of the waits that it causes of which no counter of a rank tells, so that
            settling must wait for each.
        sign: which count of an outcome shows it. Faults of one kind and one sign at a rank are
            counted together, and told apart by the prediction; None: it is counted alone.
        shows_in: where nothing counts it, what else shows that it struck: the error that a step
            raises, or the virtual seconds that the steps of its rank took.
    """

    __slots__ = ()

    kind: ClassVar[str]
    in_table: ClassVar[bool] = False
    blocks_sender: ClassVar[bool] = False
    rank: int

    def __lt__(self, other: Fault) -> bool:
        return (self.name, repr(self)) < (other.name, repr(other))

    @property
    @abc.abstractmethod
    def what(self) -> str:
        """What it strikes, in a word: how it is told from others of its kind at its rank."""

    @property
    def name(self) -> str:
        """Its name, as ``--without-fault`` takes it. :meth:`FaultPlan.named` reads names."""
        return f"{self.rank}:{self.kind}:{self.what}"

    @property
    def targets(self) -> tuple[MessageType, ...]:
        return ()

    # What it may do.

    @property
    @abc.abstractmethod
    def is_survivable(self) -> bool:
        """Whether torch promises that nothing changes that a program sees."""

    @abc.abstractmethod
    def strikes(self, sends: Sequence[PredictedSend]) -> Sequence[int]:
        """How often it strikes each of these messages of a world, which are in order."""

    def eligible(self, predicted: Predicted) -> int:
        """How often it can strike in all. A fault that strikes a step looks at the steps."""
        return sum(self.strikes(predicted.sends))

    @property
    @abc.abstractmethod
    def seconds(self) -> float:
        """Virtual seconds by which it holds up what it strikes, at most."""

    def waits(self, times: int) -> float:
        """Virtual seconds by which it holds up a message that it strikes so often."""
        return self.seconds * times

    @property
    def unseen_waits(self) -> tuple[float, ...]:
        return ()

    # What it did.

    @property
    def sign(self) -> int | None:
        return None

    @property
    def shows_in(self) -> Literal["", "errors", "seconds"]:
        return ""

    @abc.abstractmethod
    def seen(self, rank: RankOutcome) -> int | None:
        """How often what its rank showed says that its sign was seen; None where nothing counts."""

    # Where it is.

    def put_into(self, plan: FaultPlan) -> FaultPlan:
        """The plan with this fault as well."""
        return replace(plan, others=(*plan.others, self))

    def taken_from(self, plan: FaultPlan) -> FaultPlan:
        """The plan without this fault, which it has."""
        return replace(plan, others=tuple(other for other in plan.others if other != self))

    @abc.abstractmethod
    def enter_rank(self) -> None:
        """Called in its rank before that joins the world: arms what the fault table does not."""

    @abc.abstractmethod
    def simpler(self) -> Iterator[Self]:
        """Faults of its kind that are easier to understand where they suffice, simplest first."""


F = TypeVar("F", bound=Fault)
_CLASSES: dict[str, type[Fault]] = {}


def register(cls: type[F]) -> type[F]:
    """A class decorator: plans with faults of this class can be read from JSON, by its `kind`.

    Raises:
        UsageError: it is no class of faults, or another class has that word.
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
    """The registered class of that word."""
    return _CLASSES.get(kind) if isinstance(kind, str) else None


def fewer(count: int) -> list[int]:
    """Smaller counts to try instead of `count`, from 1 up."""
    return sorted(n for n in {1, count // 2, count - 1} if 0 < n < count)
