"""The base class of all kinds of step: data, what may follow, effect, and how to draw it.

A kind of step is one class, in the module of its family. The class contains:

* its data: the fields of a dataclass, and the ClassVars below, which describe the kind;
* what may come before it and what it makes: :meth:`Step.enter`;
* its effect on torch: :meth:`Step.predict`, which tells the model what torch does for it;
* its check of a value that must do more than equal the predicted one: :meth:`Step.judge`;
* how it is drawn: :meth:`Step.draw`, and if needed :meth:`Step.may_come`,
  :meth:`Step.instead`, :meth:`Step.ways` and :meth:`Step.drawn`;
* the name of the function that runs it in a rank: :attr:`Step.runs`.

A class with an ``op`` of its own is registered when it is defined. Write ``@dataclass(
frozen=True, slots=True, repr=False)`` above it, and do not use ``super()`` without arguments in it:
``slots=True`` makes a second class, which ``super()`` does not know.

Nothing here imports torch, or code that walks programs: scope, model and drawer are arguments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import MISSING, Field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

from rpcprops.errors import HarnessError, UsageError
from rpcprops.faults import MessageType
from rpcprops.outcomes import UNLIMITED_SLACK, Violation

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import ErrorClass, StepPrediction
    from rpcprops.programs.scope import Scope
    from rpcprops.strategies.drawing import StepDrawer

#: How many times more often the kind of the step before is drawn where one goes on with an RRef.
AGAIN = 4

Value: TypeAlias = tuple[float, ...]
#: An argument of a call: a value, or the name of a handle that lives at the calling rank.
Argument: TypeAlias = Value | str
Flavour: TypeAlias = Literal["python", "builtin", "script"]
#: The sorts of thing that a step can make under a name.
Sort: TypeAlias = Literal["handle", "future", "context"]
#: A kind of step, by its ``op``, and a function that draws one.
Way: TypeAlias = "tuple[str, Callable[[], Step | None]]"

#: The owner of a handle, by the handle's name.
OwnerOf: TypeAlias = Callable[[str], int]

#: Virtual seconds by which a call's timeout must differ from the wait that faults cause; otherwise
#: the outcome is uncertain. For a shorter timeout, the wait alone decides; for a longer one, the
#: answer must also come back in time.
CLEARLY_LATE = 0.25
CLEARLY_IN_TIME = 60.0
#: Virtual seconds within which a step begins once the one before it has ended. Under a fast clock
#: that is far more than a busy machine needs; a slower run decides where it was not.
BETWEEN_STEPS = 30.0

#: The fields of a step that name ranks where its functions run.
_RUN_AT = ("to", "via", "then", "path", "targets")

#: Every kind of step, by its ``op``.
STEP_TYPES: dict[str, type[Step]] = {}


class StepFails(Exception):
    """Ends the prediction of a step: the step must raise an error of that class."""

    def __init__(self, error: ErrorClass, slack: float = UNLIMITED_SLACK) -> None:
        super().__init__(error)
        self.error: ErrorClass = error
        self.slack = slack


class Step:
    """A step of a program, at the rank `at`. A settle and a parallel step have no such rank.

    Fields with these names mean the same in every step, and are handled here for all steps: `at`,
    `to`, `via` and `then` are ranks; `timeout` is in virtual seconds, or None; `handle`, and a text
    as `right`, name handles that the step uses.
    """

    __slots__ = ()

    #: The kind's name in JSON, and in the arguments of strategies.
    op: ClassVar[str]
    #: "module:function": what runs it in a rank, called as ``function(call, world, **fields)``.
    #: "" if no rank runs it. By default the function is named like the ``op`` and is in the class's
    #: module, or for ours in ``rpcprops.steps.in_rank.<family>``, the family being its module.
    runs: ClassVar[str]
    #: Its place among the kinds that are drawn by default, roughly the simplest first. A kind that
    #: needs another one before it has a later place. None: drawn only if it is asked for.
    order: ClassVar[float | None] = None
    #: Its place, before `order`, among the steps that make a rank send one type of message.
    aim_order: ClassVar[int] = 1
    #: How many times more often than the rest it is drawn.
    often: ClassVar[int] = 0
    #: How often it is drawn among the steps that go on with an RRef: see :meth:`goes_on_with`.
    goes_on: ClassVar[int] = 0
    #: Whether it needs no earlier step, so that it can always come next.
    comes_first: ClassVar[bool] = True
    #: Whether it may stand in a branch of a parallel step.
    in_branch: ClassVar[bool] = True
    #: Whether it may stand in one of several branches at one rank, which run in threads of it. Its
    #: messages must differ from those of other steps there, except as :attr:`alike` says.
    in_thread: ClassVar[bool] = False
    #: Whether its threads wait no longer than the step says, so that a program may do without them.
    is_patient: ClassVar[bool] = False
    #: Whether it makes no RRef, so that it may be drawn after a step that initialises RPC again.
    after_rejoin: ClassVar[bool] = False
    #: Whether its timeout may also be one of which torch makes another (``steps/timeouts.py``).
    any_timeout: ClassVar[bool] = False
    #: Whether it may come at a rank that is no member of a program's dynamic group.
    outside_group: ClassVar[bool] = False
    #: Its fields that name what it makes ("" makes nothing), and the sort of that thing.
    makes: ClassVar[Mapping[str, Sort]] = {"out": "handle"}
    #: The documented effect (:data:`oracle.DOCUMENTED`) that it shows whenever it shows what it
    #: must; "" for none.
    documented: ClassVar[str] = ""
    #: The type of its value; an outcome with a value of another type belongs to another program.
    gives: ClassVar[type] = object

    at: int
    #: Every kind is a dataclass, which has these attributes.
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init_subclass__(cls) -> None:
        op = cls.__dict__.get("op")
        if op is None:
            return
        other = STEP_TYPES.get(op)
        # With slots, the dataclass decorator defines the class a second time.
        if other is not None and _place(other) != _place(cls):
            msg = f"the op {op!r} of {_place(cls)} is that of {_place(other)}; give it another."
            raise UsageError(msg)
        if "runs" not in cls.__dict__:
            package, _, family = cls.__module__.rpartition(".")
            is_ours = package == "rpcprops.steps"
            cls.runs = f"{f'{package}.in_rank.{family}' if is_ours else cls.__module__}:{op}"
        STEP_TYPES[op] = cls

    def __repr__(self) -> str:
        """The Python that makes it, without fields that have their defaults."""
        given: list[str] = []
        for item in fields(self):
            value = getattr(self, item.name)
            if item.default is MISSING or value != item.default:
                given.append(f"{item.name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        """Hypothesis prints an example by this, or else every attribute of a dataclass."""
        printer.text(repr(self))

    @property
    def at_once(self) -> tuple[tuple[Step, ...], ...]:
        """The branches that run at the same time, each in order; by default the step alone."""
        return ((self,),)

    @property
    def leaves(self) -> tuple[Step, ...]:
        """The steps that ranks run: this step, or the steps of its branches."""
        return tuple(itertools.chain(*self.at_once))

    # What may follow. Handles are given by name.

    def enter(self, scope: Scope) -> None:
        """Add to `scope` what the step makes. Ranks and timeout were checked before.

        Raises:
            UsageError: the step cannot come next; then nothing was added.
        """

    @property
    def made(self) -> tuple[tuple[Sort, str], ...]:
        """The things that it makes, by name."""
        return tuple(
            (sort, name) for item, sort in self.makes.items() if (name := getattr(self, item, ""))
        )

    @property
    def used(self) -> tuple[str, ...]:
        """The handles that it uses."""
        names = (getattr(self, "handle", None), getattr(self, "right", None))
        return tuple(name for name in names if isinstance(name, str))

    @property
    def changed(self) -> tuple[str, ...]:
        """The handles whose value it changes in place."""
        return ()

    @property
    def fetched_there(self) -> tuple[str, ...]:
        """The handles that are fetched by a function that it calls."""
        argument = getattr(self, "right", None)
        return (argument,) if isinstance(argument, str) else ()

    @property
    def alike(self) -> tuple[str, ...]:
        """Names for messages of its rank that other steps could send with the same payload.

        They share the failures of a plan, so only one of several threads may send them.
        """
        return ()

    @property
    def counted_at(self) -> tuple[int, ...]:
        """The ranks whose counters it uses."""
        return ()

    def renamed(self, new: Mapping[str, str]) -> Self:
        """The same step with its names replaced by those in `new`."""
        changed: dict[str, Any] = {
            item: new[name]
            for item in ("handle", "right", "future", *self.makes)
            if isinstance(name := getattr(self, item, None), str) and new.get(name, name) != name
        }
        return replace(self, **changed) if changed else self

    # Its effect.

    def predict(self, model: Model, call: str) -> StepPrediction:
        """Change `model` as torch changes for this step; `call` is the name of its call.

        Returns: what the step must show, as :meth:`Model.shows` makes it.

        Raises:
            StepFails: the step must raise an error.
        """
        msg = f"{type(self).__name__} does not say what it must show; define its predict()."
        raise HarnessError(msg)

    @property
    def lasts(self) -> float:
        """Virtual seconds that it takes without any fault."""
        return 0.0

    # The threads that it keeps busy: `rpcprops.programs.threads` says what takes one of a rank.

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int] | None:
        """The ranks where a thread may wait for it, named once for each that may wait at a time.

        A thread waits where a function that it runs waits: for a nested call, or for the value of
        an RRef. None: nobody has counted, so that it may need any number.
        """
        return None

    @property
    def sleeps_at(self) -> tuple[int, ...]:
        """The ranks where a thread sleeps for it if it :attr:`lasts`, one after the other."""
        return tuple(rank for name in _RUN_AT for rank in self._named_ranks(name))

    def runs_out(self, number: int) -> bool:
        """Whether it needs more threads of a rank than so many, and it predicts what follows."""
        return False

    def _named_ranks(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name, ())
        return (value,) if isinstance(value, int) else value

    @property
    def raises_there(self) -> bool:
        """Whether a function that a rank runs for it raises on purpose, as a log then shows."""
        return bool(getattr(self, "raises", False))

    @property
    def calls_gone(self) -> bool:
        """Whether a function that a rank runs for it calls a rank that is gone."""
        return False

    # What it showed.

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        """The violations in the value that it returned; the caller adds its rank and its place."""
        if seen == expected:
            return []
        return [Violation("WrongValue", f"expected {expected!r}, got {seen!r}")]

    def texts_behind(self, value: Any) -> tuple[str, ...]:
        """Torch's texts, by their names in ``torch_facts/_texts.py``, behind a predicted value.

        They are those of errors of which the value shows no more than the class.
        """
        return ()

    def context_ids(self, value: Any) -> Mapping[str, int]:
        """The ids, by name, of the contexts that it made; they are part of its value."""
        return {}

    # How it is drawn.

    @classmethod
    def may_come(cls, drawer: StepDrawer) -> bool:
        """Whether a step of this kind can come next."""
        return True

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Step | None:
        """A step of this kind that can come next; if there is none, None, with nothing drawn."""
        return None

    @classmethod
    def instead(cls, drawer: StepDrawer) -> Step | None:
        """If no such step can come next: a step that must come before one of this kind, or None."""
        return None

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        """Ways to draw a step of this kind that makes `rank` send such a message.

        If it needs a handle and there is none, it returns a way to draw a step that makes one.
        """
        return []

    @classmethod
    def goes_on_with(cls, drawer: StepDrawer, names: Set[str]) -> bool:
        """Whether a step of this kind can go on with one of these handles of one RRef."""
        return False

    def leads_to(self, drawer: StepDrawer) -> tuple[str, int]:
        """The kind that is drawn more often after it, and how many times as often as the rest.

        It is the step's own, if it uses a handle; "" stands for none.
        """
        return (self.op, AGAIN) if self.used else ("", 0)

    def drawn(self, drawer: StepDrawer) -> None:
        """Record in `drawer`, which has just taken this step, what later steps must respect."""


def waits_nowhere(step: Step, owner_of: OwnerOf) -> Iterable[int]:
    """No thread waits for the step. For `waits_at`."""
    return ()


#: A step of a program that is not inside another one: a step that a rank runs, or a settle.
Leaf: TypeAlias = Step


def _place(cls: type[Step]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def rank_name(rank: int, *, dash: bool = False) -> str:
    """The name of a rank in ``init_rpc``."""
    return f"worker{rank}-x" if dash else f"worker{rank}"


def call_message(*, typed: bool) -> MessageType:
    """The message of a call of a Python function, or of one that TorchScript knows (typed)."""
    return MessageType.SCRIPT_CALL if typed else MessageType.PYTHON_CALL


def remote_message(*, typed: bool) -> MessageType:
    """The message of such a ``remote``."""
    return MessageType.SCRIPT_REMOTE_CALL if typed else MessageType.PYTHON_REMOTE_CALL


def fetch_message(*, typed: bool) -> MessageType:
    """The message of a fetch of an RRef; typed if TorchScript knows the type of its value."""
    return MessageType.SCRIPT_RREF_FETCH_CALL if typed else MessageType.PYTHON_RREF_FETCH_CALL


def is_close(seen: object, expected: object) -> bool:
    """Whether two numbers, or lists of them, are equal but for rounding.

    For what sums and products give that may come in any order: they differ by roundings of float64.
    """
    if isinstance(expected, list):
        return (
            isinstance(seen, list | tuple)
            and len(seen) == len(expected)
            and all(map(is_close, seen, expected))
        )
    if isinstance(expected, float):
        return isinstance(seen, float) and math.isclose(seen, expected, rel_tol=1e-12)
    return seen == expected
