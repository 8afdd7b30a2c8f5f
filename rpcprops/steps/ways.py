"""Steps that call in the other ways that torch has, and that use futures and RRefs by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType
from rpcprops.outcomes import UNLIMITED_SLACK, Violation
from rpcprops.steps.arguments import (
    FLAVOURS,
    PAIRS,
    check_arguments,
    check_raises,
    check_seconds,
    sum_of,
)
from rpcprops.steps.base import (
    CLEARLY_IN_TIME,
    Flavour,
    OwnerOf,
    Sort,
    Step,
    StepFails,
    Value,
    Way,
    call_message,
    waits_nowhere,
)
from rpcprops.steps.rrefs import OfHandle, ask_type

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import ErrorClass, StepPrediction
    from rpcprops.oracle.rrefs import Handle
    from rpcprops.programs.scope import HandleInfo, Scope
    from rpcprops.strategies.drawing import StepDrawer

Named = Literal["name", "id", "info", "myself", "no name", "no id", "no type"]
Form = Literal[
    "then",
    "chain",
    "late",
    "callback",
    "then raises",
    "callback raises",
    "wait twice",
    "own result",
    "own exception",
    "set twice",
]
What = Literal[
    "owner_name",
    "owner",
    "is_owner",
    "confirmed_by_owner",
    "str",
    "local_value",
    "pickle",
    "deepcopy",
    "backward",
    "type_hint",
]

#: What torch raises for a target that names no rank. ``torch/distributed/rpc/api.py``:
#: _to_worker_info; ``tensorpipe_agent.cpp``: TensorPipeAgent::getWorkerInfo, by TORCH_CHECK.
_UNKNOWN: Mapping[str, str] = {
    "no name": "RuntimeError",
    "no id": "RuntimeError",
    "no type": "ValueError",
}
_TARGETS: tuple[Named, ...] = ("name", "id", "info", "myself", *_UNKNOWN)  # type: ignore[arg-type]

#: What each way to use a future shows, whatever becomes of the call.
#: ``torch/csrc/jit/python/pybind_utils.h``: PythonFutureWrapper::then, add_done_callback;
#: ``torch/futures/__init__.py``: Future.then, wait, value, set_result, set_exception.
_SEEN: Mapping[Form, list[float]] = {
    "then": [1.0, 1.0],
    "chain": [1.0, 2.0, 3.0],
    "late": [1.0, 1.0],
    "callback": [1.0],
    "then raises": [1.0],
    "callback raises": [1.0],
    "wait twice": [1.0],
    "own result": [0.0, 2.0, 1.0],
    "own exception": [1.0, 1.0],
    "set twice": [1.0, 1.0],
}

#: The ways to use a future, simplest first.
FORMS: tuple[Form, ...] = tuple(_SEEN)

#: What torch refuses an RRef, by TORCH_CHECK. ``torch/csrc/distributed/rpc/init.cpp``:
#: ``__getstate__`` of PyRRef; ``py_rref.cpp``: PyRRef::localValue, PyRRef::backward,
#: tryInferTypeWithTypeHint.
_REFUSED = frozenset({"local_value", "backward", "pickle", "deepcopy", "type_hint"})
#: These only a user's RRef must refuse; an owner's may have the value.
OF_USERS: tuple[What, ...] = ("local_value", "backward")
#: This a user's RRef answers too, but perhaps not at once: see :class:`Ask`.
CONFIRMED: What = "confirmed_by_owner"
#: What can be asked of every RRef.
ANYWHERE: tuple[What, ...] = (
    "owner_name",
    "owner",
    "is_owner",
    "str",
    "pickle",
    "deepcopy",
    "type_hint",
)
_MOST_CALLS = 4
#: Virtual seconds: a default timeout that nothing meets; and a function that outlasts a short one.
_LONG = 36000.0
_SLEEPS = 12.0


@dataclass(frozen=True, slots=True, repr=False)
class Reach(Step):
    """A call of `to`, which is named in one of the ways that torch documents for ``to``.

    `named` is its name, its id, its ``WorkerInfo``, or (only where `to` is `at`) what
    ``get_worker_info()`` gives. With "no name", "no id" and "no type" no rank is meant, and the
    value is the class of the error. With ``how="remote"`` the RRef is fetched and dropped. A Python
    function sleeps for `seconds` (virtual); `timeout` is that of ``rpc_sync`` or ``rpc_async``.
    """

    op: ClassVar[str] = "reach"
    waits_at = waits_nowhere
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 50
    makes: ClassVar[Mapping[str, Sort]] = {}
    at: int
    to: int
    named: Named = "name"
    how: Literal["sync", "async", "remote"] = "sync"
    left: Value = (1.0,)
    right: Value = (2.0,)
    flavour: Flavour = "python"
    timeout: float | None = None
    seconds: float = 0.0

    def enter(self, scope: Scope) -> None:
        check_arguments(scope, self.at, self.left, self.right, self.flavour)
        check_seconds(self.seconds, self.flavour)
        if self.timeout is not None and self.how == "remote":
            msg = "a timeout of how='remote' is not modelled here; use Remote."
            raise UsageError(msg)
        if self.named == "myself" and self.to != self.at:
            msg = f"named='myself' needs to={shown(self.at)}, the rank itself, not {self.to!r}."
            raise UsageError(msg)

    def predict(self, model: Model, call: str) -> StepPrediction:
        if self.named in _UNKNOWN:
            return model.shows([_UNKNOWN[self.named]])
        python = self.flavour == "python"
        total = sum_of(self.left, self.right)
        if self.how != "remote":
            message = call_message(typed=not python)
            model.call(self.at, self.to, message, call if python else self._typed_payload)
            if python:
                model.calls[self.to][call] += 1
            late, slack = model.times.timed(self.at, message, self.timeout, self.seconds)
            if late and python:
                model.abandoned_calls[self.to].add(call)
            return model.shows(None if late == "timeout" else total, late, slack)
        handle, _ = model.remote(self.at, self.to, typed=not python)
        handle.rref.value = total
        if python and not handle.broken:
            model.calls[self.to][call] += 1
        try:
            return model.shows(model.value(handle, self.at))
        finally:
            model.drop(handle)

    @property
    def _typed_payload(self) -> str:
        """As that of Call: a TorchScript call carries its function and its tensors' places only."""
        return f"{self.flavour} {False}"

    @property
    def lasts(self) -> float:
        return 0.0 if self.named in _UNKNOWN else self.seconds

    @property
    def alike(self) -> tuple[str, ...]:
        return () if self.flavour == "python" else (self._typed_payload,)

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None, sends: bool = False) -> Reach:
        at = drawer.rank() if at is None else at
        to = drawer.peer(at)
        named = drawer.pick(_TARGETS[:3] if sends else _TARGETS)
        how: Any = drawer.pick(("sync", "async") if sends else ("sync", "async", "remote"))
        # Typed calls of two threads could be alike.
        flavour = drawer.pick(FLAVOURS[:1] if sends or drawer.in_threads else FLAVOURS)
        left, right = drawer.pick(PAIRS)
        given = (at, at if named == "myself" else to, named, how, left, right, flavour)
        if how == "remote" or named in _UNKNOWN:
            return cls(*given)
        python = flavour == "python"
        message = call_message(typed=not python)
        timed = drawer.timing(at, message, slow=python, slow_late=drawer.settles)
        return cls(*given, *timed)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        return _python_calls(cls, drawer, rank, message)


def _python_calls(cls: Any, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
    """The way to draw a step of that class that makes `rank` send a PYTHON_CALL."""
    if message is not MessageType.PYTHON_CALL:
        return []
    return [(cls.op, lambda: cls.draw(drawer, at=rank, sends=True))]


#: What gives a future, or a value: see :class:`After`.
Of = Literal["call", "proxy", "script", "builtin"]
_KINDS_OF: tuple[Of, ...] = get_args(Of)
_FLAVOUR_OF: Mapping[Of, Flavour] = {
    "call": "python",
    "proxy": "python",
    "script": "script",
    "builtin": "builtin",
}


def _typed_payload(of: Of, raises: bool) -> str:
    """As that of Call: a TorchScript call carries its function and its tensors' places only."""
    return f"{_FLAVOUR_OF[of]} {raises}"


def _drawn_kinds(drawer: StepDrawer) -> list[Of]:
    """Of what a future may be; typed calls of two threads could be alike."""
    able = [of for of in _KINDS_OF if _FLAVOUR_OF[of] == "python" or not drawer.in_threads]
    return [of for of in able if of != "proxy" or drawer.may_make_rrefs]


def _timing(
    drawer: StepDrawer, at: int, of: str, targets: Sequence[int], *, by_future: bool = True
) -> tuple[float | None, float]:
    """A timeout, and how long the function sleeps, of calls of that kind.

    Args:
        by_future: whether ``rpc_async`` makes them.
    """
    python = of not in ("script", "builtin")
    late = slow_late = True
    if of in ("proxy", "mixed"):
        late = not (by_future and drawer.facts.has_bug("failed-async-proxy"))
        accept = [MessageType.RREF_CHILD_ACCEPT]
        slow_late = not any(drawer.may_fail(to, accept) for to in targets)
        # The question for the type may be lost, and then the default timeout has nothing to end.
        slow_late &= not drawer.may_fail(at, [MessageType.PYTHON_CALL])
    message = call_message(typed=not python)
    slow_late = slow_late and drawer.settles
    return drawer.timing(at, message, late=late, slow=python, slow_late=slow_late)


def _call_of(
    model: Model,
    step: After | Gather,
    ranks: tuple[int, int],
    of: Of,
    call: str,
    limits: tuple[float | None, float],
    *,
    raises: bool,
) -> float:
    """Make a call of that kind from one rank to another one; the slack of its timeout.

    Args:
        limits: its timeout, and how long its function sleeps.

    Raises:
        StepFails: how its future fails.
    """
    at, to = ranks
    typed = _FLAVOUR_OF[of] != "python"
    late: ErrorClass = ""
    slack = UNLIMITED_SLACK
    if of == "proxy":
        late, slack = _call_by_proxy(model, step, ranks, call, limits)
    else:
        message = call_message(typed=typed)
        model.call(at, to, message, _typed_payload(of, raises) if typed else call)
        if typed:
            late, slack = model.times.timed(at, message, *limits)
        else:
            model.calls[to][call] += 1
            late, slack = model.gives_up(at, to, call, *limits)
    if raises and typed:
        model.answers.error(at, to, MessageType.SCRIPT_CALL)
    if late or raises:
        raise StepFails(late or "remote", slack)
    return slack


def _call_by_proxy(
    model: Model,
    step: After | Gather,
    ranks: tuple[int, int],
    call: str,
    limits: tuple[float | None, float],
) -> tuple[ErrorClass, float]:
    """Make an object at a rank, and call a method through its RRef (rref_proxy.py: _invoke_rpc).

    The future holds the error of the call, as it does that of the question for the type. A proxy
    that has a timeout has been used before without one, so only the call itself may time out.

    Returns: as :meth:`Times.timed`.
    """
    at, to = ranks
    timeout, seconds = limits
    # The default timeout is also that of the creation.
    model.times.check_in_time(step, model.times.delay(at, MessageType.PYTHON_REMOTE_CALL))
    handle, _ = model.remote(at, to, typed=False)
    try:
        model.creations.use(handle)
        ask_type(model, handle, at, "", UNLIMITED_SLACK)
        handle.rref.made = True
        if timeout is not None:
            model.ask(at, to, MessageType.PYTHON_CALL, handle)
        model.ask(at, to, MessageType.PYTHON_CALL, handle)
        model.calls[to][call] += 1
        limit = model.times.limit(timeout)
        if limit is None:
            return "", UNLIMITED_SLACK
        # The owner accepts the RRef in the thread that answers, or in another.
        accept = model.times.delay(to, MessageType.RREF_CHILD_ACCEPT) if at != to else 0.0
        late, slack = model.gives_up(at, to, call, timeout, seconds, accept)
        by_future = isinstance(step, After) or step.how != "threads"
        if by_future and model.times.delay(at, MessageType.PYTHON_CALL) >= limit:
            # It may end while it is sent: see Through.
            model.findings.meets_in_proxy(handle, at)
        return late, slack
    finally:
        model.drop(handle)


@dataclass(frozen=True, slots=True, repr=False)
class After(Step):
    """A future of a call, which is used by `form`: callbacks, waits, futures of one's own.

    `of` says what gives it: ``rpc_async`` of a Python function ("call"), of a TorchScript function
    ("script") or of ``torch.add`` ("builtin"), or a method by ``rref.rpc_async()`` of a new RRef
    ("proxy"), which has been used before if there is a `timeout`. The value is that of the call,
    and then what the callbacks saw (see ``in_rank/ways.py``). With `raises` the function raises; it
    sleeps for `seconds` (virtual) before it ends. If the call fails, its error must come, and the
    callbacks must have run all the same. torch promises no order of two callbacks of one future,
    except in a chain, and none is predicted.
    """

    op: ClassVar[str] = "after"
    in_thread: ClassVar[bool] = True
    after_rejoin: ClassVar[bool] = True
    order: ClassVar[float | None] = 51
    makes: ClassVar[Mapping[str, Sort]] = {}
    at: int
    to: int
    form: Form = "then"
    left: Value = (1.0,)
    right: Value = (2.0,)
    raises: bool = False
    timeout: float | None = None
    seconds: float = 0.0
    of: Of = "call"

    def enter(self, scope: Scope) -> None:
        check_arguments(scope, self.at, self.left, self.right)
        check_seconds(self.seconds, _FLAVOUR_OF[self.of])
        if self.raises:
            check_raises(_FLAVOUR_OF[self.of], ("python", "script"))

    @property
    def lasts(self) -> float:
        return self.seconds

    @property
    def alike(self) -> tuple[str, ...]:
        return () if _FLAVOUR_OF[self.of] == "python" else (_typed_payload(self.of, self.raises),)

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """The method of a proxy asks for its object."""
        return (self.to,) if self.of == "proxy" else ()

    def predict(self, model: Model, call: str) -> StepPrediction:
        # A send that fails is an error of the future (testing/faulty_tensorpipe_agent.cpp:
        # FaultyTensorPipeAgent::send), so the callbacks run. A timeout is one too
        # (tensorpipe_agent.cpp: pollTimeoutRpcs).
        limits = (self.timeout, self.seconds)
        ranks = (self.at, self.to)
        slack = _call_of(model, self, ranks, self.of, call, limits, raises=self.raises)
        return model.shows([*sum_of(self.left, self.right), *_SEEN[self.form]], slack=slack)

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None, sends: bool = False) -> After:
        at = drawer.rank() if at is None else at
        to = drawer.peer(at)
        form = drawer.pick(FORMS)
        left, right = drawer.pick(PAIRS)
        able = ["call"] if sends else _drawn_kinds(drawer)
        given: Any = itertools.product((False, False, True), able)
        raises, of = drawer.pick([one for one in given if one != (True, "builtin")])
        return cls(at, to, form, left, right, raises, *_timing(drawer, at, of, (to,)), of)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        return _python_calls(cls, drawer, rank, message)


@dataclass(frozen=True, slots=True, repr=False)
class Gather(Step):
    """Several calls at once: call i asks ``targets[i]`` for ``left + i + right``.

    `of` says of what they are, as in :class:`After`; "mixed" takes one kind after the other. Of
    mixed calls, typed ones and those through RRefs, none `breaks`, and no message may be lost:
    nobody could tell which of several errors comes first. Where some of them time out, the error of
    all of them is the timeout.

    `how` says what gathers them: ``torch.futures.wait_all``, ``torch.futures.collect_all``, or a
    thread for each, which calls ``rpc_sync``. The function of call number `breaks` raises, which is
    the error of the step: what a function raises is the error of its future
    (``python_functions.cpp``: toPyJitFuture), and that of all of them together
    (``ivalue.cpp``: collectAll). The other calls run all the same. Each call has this `timeout`,
    and each function sleeps for `seconds` (virtual) before it ends.
    """

    op: ClassVar[str] = "gather"
    in_thread: ClassVar[bool] = True
    after_rejoin: ClassVar[bool] = True
    order: ClassVar[float | None] = 52
    makes: ClassVar[Mapping[str, Sort]] = {}
    at: int
    targets: tuple[int, ...]
    how: Literal["wait_all", "collect_all", "threads"] = "wait_all"
    left: Value = (1.0,)
    right: Value = (2.0,)
    breaks: int | None = None
    timeout: float | None = None
    seconds: float = 0.0
    of: Literal["call", "proxy", "script", "builtin", "mixed"] = "call"

    def enter(self, scope: Scope) -> None:
        python = self.of in ("call", "proxy", "mixed")
        check_seconds(self.seconds, "python" if python else "script")
        if self.of != "call" and self.breaks is not None:
            msg = f"of={shown(self.of)}: a function that breaks needs of='call'."
            raise UsageError(msg)
        if not isinstance(self.targets, tuple) or not 1 < len(self.targets) <= _MOST_CALLS:
            msg = f"targets={shown(self.targets)} must be a tuple of 2 to {_MOST_CALLS} ranks."
            raise UsageError(msg)
        for target in self.targets:
            scope.check_rank("targets", target)
        check_arguments(scope, self.at, self.left, self.right)
        if self.breaks is not None and self.breaks not in range(len(self.targets)):
            msg = f"breaks={shown(self.breaks)} is the number of no call of {shown(self.targets)}."
            raise UsageError(msg)

    @property
    def raises_there(self) -> bool:
        return self.breaks is not None

    @property
    def lasts(self) -> float:
        return self.seconds

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """The method of each proxy asks for its object."""
        return [target for target, of in self.calls if of == "proxy"]

    def predict(self, model: Model, call: str) -> StepPrediction:
        values: list[Any] = []
        failures: list[StepFails] = []
        slack = UNLIMITED_SLACK
        for number, (target, of) in enumerate(self.calls):
            name, breaks = f"{call}/{number}", number == self.breaks
            limits = (self.timeout, self.seconds if _FLAVOUR_OF[of] == "python" else 0.0)
            ranks = (self.at, target)
            try:
                one = _call_of(model, self, ranks, of, name, limits, raises=breaks)
                slack = min(slack, one)
                values.append(sum_of([x + number for x in self.left], self.right))
            except StepFails as failed:
                failures.append(failed)
        if not failures:
            return model.shows(values, slack=slack)
        if self.of == "call":
            # One table fails all these calls or none: each has a payload of its own. All of them
            # end at their timeouts, or none.
            raise failures[0]
        errors = {one.error for one in failures}
        if not errors <= {"timeout", "unknown"}:
            msg = (
                f"{self!r}: under this plan some of these calls are lost, and nobody can tell "
                f"which of several errors comes first; use of='call', or another plan."
            )
            raise UsageError(msg)
        if "timeout" not in errors:
            raise failures[0]
        # Whatever becomes of the rest, one that surely times out makes all of them time out
        # (ivalue.cpp: collectAll), and no other error can come.
        raise max((one for one in failures if one.error == "timeout"), key=lambda one: one.slack)

    @property
    def calls(self) -> list[tuple[int, Of]]:
        """The rank that each call asks, and of what kind it is."""
        return [
            (target, _MIXED[number % len(_MIXED)] if self.of == "mixed" else self.of)
            for number, target in enumerate(self.targets)
        ]

    @property
    def alike(self) -> tuple[str, ...]:
        typed = [of for _, of in self.calls if _FLAVOUR_OF[of] != "python"]
        return tuple(_typed_payload(of, raises=False) for of in typed)

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None, sends: bool = False) -> Gather:
        at = drawer.rank() if at is None else at
        targets = [drawer.peer(at), drawer.peer(at)]
        more = drawer.pick((None, *drawer.peers[at]))
        if more is not None:
            targets.append(more)
        able: list[Any] = ["call"] if sends or _may_lose(drawer, at) else _drawn_kinds(drawer)
        if len(able) == len(_KINDS_OF):
            able += ["mixed"] * 2
        forms: Any = itertools.product(("wait_all", "collect_all", "threads"), able)
        how, of = drawer.pick([*forms])
        left, right = drawer.pick(PAIRS)
        breaks = drawer.pick((None, None, *(range(len(targets)) if of == "call" else ())))
        timed = _timing(drawer, at, of, targets, by_future=how != "threads")
        drawer.slow_functions += (len(targets) - 1) * (timed[1] > 0)
        return cls(at, tuple(targets), how, left, right, breaks, *timed, of)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        return _python_calls(cls, drawer, rank, message)


#: The kinds of the calls of a mixed Gather, in their order.
_MIXED: tuple[Of, ...] = ("call", "builtin", "proxy", "script")


def _may_lose(drawer: StepDrawer, at: int) -> bool:
    """Whether the plan may fail what calls of any kind send."""
    return drawer.may_fail(at, [message for message in MessageType if not message.is_retryable])


@dataclass(frozen=True, slots=True, repr=False)
class Ask(OfHandle):
    """What a handle knows without a message, or must refuse (the value is the class of the error).

    "local_value" and "backward" are refused to a user's handle only. Of "confirmed_by_owner" the
    documentation says that it is true at an owner, and at a user once the owner knows of that user.
    It names no time, so a user's handle must give True only if a settle has come after it.
    """

    op: ClassVar[str] = "ask"
    waits_at = waits_nowhere
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 53
    goes_on: ClassVar[int] = 2
    makes: ClassVar[Mapping[str, Sort]] = {}
    at: int
    handle: str
    what: What = "owner_name"

    def enter(self, scope: Scope) -> None:
        owner = scope.alive(self.at, self.handle).owner
        if self.what in OF_USERS and owner == self.at:
            msg = f"what={shown(self.what)} needs a user's handle; {self.handle!r} is none."
            raise UsageError(msg)

    def predict(self, model: Model, call: str) -> StepPrediction:
        # py_rref.cpp: PyRRef::owner, ownerName, isOwner, confirmedByOwner, str.
        handle = model.handle(self.handle)
        owner = handle.rref.owner
        mine = owner == self.at
        if self.what in _REFUSED:
            return model.shows(["RuntimeError"])
        if self.what == CONFIRMED and not mine:
            if not handle.confirmed:
                return model.shows()
            if handle.of_owner:
                says = r"expected \[True\], got \[False\]$"
                model.findings.meets_here("unconfirmed-user", self.at, says)
        known: dict[str, list[Any]] = {
            "owner": [owner, model.group.name_of(owner)],
            "owner_name": [model.group.name_of(owner)],
            "is_owner": [mine],
            CONFIRMED: [True],
            "str": ["OwnerRRef" if mine else "UserRRef"],
        }
        return model.shows(known[self.what])

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        if expected is None and seen in ([True], [False]):
            return []
        return Step.judge(self, expected, seen)

    @classmethod
    def usable(cls, drawer: StepDrawer) -> list[str]:
        return drawer.unconfirmed() or OfHandle.usable(drawer)

    @classmethod
    def using(cls, drawer: StepDrawer, name: str, handle: HandleInfo) -> Ask:
        further = (CONFIRMED,) if handle.home == handle.owner else OF_USERS
        if handle.home != handle.owner and not drawer.facts.has_bug("unconfirmed-user"):
            # What torch once got wrong comes more often where it has been mended.
            further = (*OF_USERS, *(CONFIRMED,) * (24 if name in drawer.unconfirmed() else 8))
        what: Any = drawer.pick((*ANYWHERE, *further))
        return cls(handle.home, name, what)


@dataclass(frozen=True, slots=True, repr=False)
class Method(Step):
    """A method of an object at `to`, called twice through its RRef; the object is then dropped.

    `how` is ``rref.rpc_sync()``, ``rref.rpc_async()`` or ``rref.remote()``. `form` says how the
    arguments travel; "missing" names a method that the class lacks, and the value is the class of
    the error: torch looks at the class (rref_proxy.py: _invoke_rpc) before it sends the call.
    The first call of the method sleeps for `seconds` (virtual). `timeout` is that of ``rpc_sync``
    or ``rpc_async``, and applies to each message.
    """

    op: ClassVar[str] = "method"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 54
    makes: ClassVar[Mapping[str, Sort]] = {}
    at: int
    to: int
    how: Literal["sync", "async", "remote"] = "sync"
    form: Literal["args", "kwargs", "missing"] = "args"
    start: float = 1.0
    timeout: float | None = None
    seconds: float = 0.0

    def enter(self, scope: Scope) -> None:
        check_seconds(self.seconds)
        if self.timeout is not None and self.how == "remote":
            msg = "a timeout of how='remote' is not modelled here; use Remote."
            raise UsageError(msg)

    @property
    def lasts(self) -> float:
        return 0.0 if self.form == "missing" else self.seconds

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """One function after the other asks at `to` for a value that was made there."""
        return (self.to,)

    def predict(self, model: Model, call: str) -> StepPrediction:
        handle, _ = model.remote(self.at, self.to, typed=False)
        if not handle.broken:
            model.calls[self.to][call] += 1
        try:
            model.creations.use(handle)
            self._ask_type(model, handle)
            # The owner answers once it has the value.
            handle.rref.made = True
            if self.form == "missing":
                if self.how == "async":
                    model.findings.meets_in_proxy(handle, self.at)
                return model.shows(["AttributeError"])
            step = 6.0 if self.form == "kwargs" else 2.0
            totals = [self.start + step, self.start + step + step]
            for total, seconds in zip(totals, (self.seconds, 0.0), strict=True):
                self._call(model, handle, total, seconds)
            return model.shows(totals)
        finally:
            model.drop(handle)

    def _ask_type(self, model: Model, handle: Handle) -> None:
        late, slack = self._timed(model, 0.0)
        if late == "unknown" and self._timed(model, self.seconds)[0] == "timeout":
            # Either this question or the call ends by the timeout; nobody can tell which.
            model.certain = False
            late = ""
            if self.how == "async" and handle.fork:
                model.findings.meets_in_proxy(handle, self.at)
        try:
            ask_type(model, handle, self.at, late, slack)
        except StepFails as failed:
            # A message that cannot be sent raises before a future exists.
            if self.how == "async" and handle.fork and failed.error != "injected":
                model.findings.meets_in_proxy(handle, self.at)
            raise

    def _timed(self, model: Model, seconds: float) -> tuple[ErrorClass, float]:
        """Whether a call through the RRef misses the timeout, and the slack."""
        if self.how == "remote":
            return "", UNLIMITED_SLACK
        # The owner accepts the RRef in the thread that answers, or in another.
        far = self.at != self.to
        accept = model.times.delay(self.to, MessageType.RREF_CHILD_ACCEPT) if far else 0.0
        return model.times.timed(self.at, MessageType.PYTHON_CALL, self.timeout, seconds, accept)

    def _call(self, model: Model, handle: Handle, total: float, seconds: float) -> None:
        if self.how != "remote":
            model.ask(self.at, self.to, MessageType.PYTHON_CALL, handle)
            late, slack = self._timed(model, seconds)
            if late:
                raise StepFails(late, slack)
            return
        made, there = model.remote(self.at, self.to, typed=False, argument=handle)
        try:
            if there:
                model.drop(there)
            made.rref.value = [total]
            model.value(made, self.at)
        finally:
            model.drop(made)

    @classmethod
    def draw(cls, drawer: StepDrawer, *, through: bool = False, at: int | None = None) -> Method:
        """A step of this kind; with `through` by the numbers of a Through.

        A Through that cannot come needs a handle. That may be one of a value which could not be
        made, so the simplest step in place of it fails too.
        """
        drawn = drawer.rank()
        at = drawn if at is None else at
        to = drawer.peers[at][0] if through else drawer.peer(at)
        how: Any = drawer.pick(("sync", "async", "remote"))
        bad = how == "async" and drawer.facts.has_bug("failed-async-proxy")
        forms: list[Any] = ["args", "kwargs"] if bad else ["args", "kwargs", "missing"]
        form = drawer.pick(forms[::-1] if through else forms)
        start = 1.0 if through else drawer.pick((1.0, 0.0, -3.0))
        accepts = not drawer.may_fail(to, [MessageType.RREF_CHILD_ACCEPT])
        timed = drawer.timing(
            at,
            MessageType.PYTHON_CALL,
            # The question for the type may then fail.
            late=how != "remote" and not bad,
            slow=form != "missing",
            slow_late=how != "remote" and not bad and drawer.settles and accepts,
        )
        return cls(at, to, how, form, start, None if how == "remote" else timed[0], timed[1])


#: What is under another default: see :class:`Default`.
Under = Literal["sync", "async", "remote", "fetch", "proxy"]
_UNDER: tuple[Under, ...] = get_args(Under)


@dataclass(frozen=True, slots=True, repr=False)
class Default(Step):
    """A call under another default timeout of `at`, which the step then puts back.

    `seconds` (virtual) is set by ``rpc._set_rpc_timeout``, which the documentation of ``rpc_sync``,
    ``rpc_async`` and ``remote`` names. With `endless` the call has ``timeout=0``: it never times
    out. The function sleeps for `sleeps` (virtual). The default is that of all that the rank sends,
    so nothing that torch sends by itself may be under way before a short one, and no branch can
    hold it.

    `how` says what is sent under it. Each message has the default of the moment at which it is sent
    (``tensorpipe_agent.cpp``: TensorPipeAgent::send takes RpcAgent::getRpcTimeout there):

    * "sync": ``rpc_sync``.
    * "async": ``rpc_async``. The default is put back before its future is waited for.
    * "remote": ``rpc.remote``. The default is put back before the value is fetched, and the
      creation must be in time, because Remote shows what one leaves that is not.
    * "fetch": ``to_here`` of an RRef that was made before.
    * "proxy": two calls through an RRef that was made before. The first asks for its type.
    """

    op: ClassVar[str] = "default"
    after_rejoin: ClassVar[bool] = True
    order: ClassVar[float | None] = 54.5
    in_branch: ClassVar[bool] = False
    makes: ClassVar[Mapping[str, Sort]] = {}
    at: int
    to: int
    seconds: float = _LONG
    endless: bool = False
    left: Value = (1.0,)
    right: Value = (2.0,)
    sleeps: float = 0.0
    how: Under = "sync"

    def enter(self, scope: Scope) -> None:
        check_arguments(scope, self.at, self.left, self.right)
        check_seconds(self.sleeps)
        if not isinstance(self.seconds, int | float) or not 0 < self.seconds < float("inf"):
            msg = f"seconds={shown(self.seconds)} must be a positive, finite number (virtual)."
            raise UsageError(msg)
        if self.how == "fetch" and self.at == self.to:
            msg = f"to={shown(self.to)} must be another rank: an owner fetches without a message."
            raise UsageError(msg)

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """``rref.rpc_sync()`` asks for the type of the value, and then calls its method."""
        return (self.to,) if "proxy" in self.how else ()

    def predict(self, model: Model, call: str) -> StepPrediction:
        faults = (f for rank in range(model.world_size) for f in model.plan.faults_at(rank))
        longest = max((fault.seconds for fault in faults if fault.blocks_sender), default=0.0)
        if self.seconds < longest + CLEARLY_IN_TIME and not model.rests:
            msg = (
                f"{self!r}: the short default would be that of messages which are still on their "
                f"way; put a Settle() before it."
            )
            raise UsageError(msg)
        if self.how == "proxy":
            timed: dict[str, Any] = {"timeout": self._timeout, "seconds": self.sleeps}
            return Method(self.at, self.to, start=self.left[0], **timed).predict(model, call)
        if self.how in ("remote", "fetch"):
            return self._predict_rref(model, call)
        message = MessageType.PYTHON_CALL
        late, slack = model.times.timed(self.at, message, self._timeout, self.sleeps)
        model.call(self.at, self.to, message, call)
        model.calls[self.to][call] += 1
        if late:
            model.abandoned_calls[self.to].add(call)
            if late == "timeout":
                raise StepFails(late, slack)
        return model.shows(sum_of(self.left, self.right), late, slack)

    @property
    def _timeout(self) -> float:
        return math.inf if self.endless else self.seconds

    def _predict_rref(self, model: Model, call: str) -> StepPrediction:
        """An RRef is made and fetched: one of the two under the default of the step."""
        handle, _ = model.remote(self.at, self.to, typed=False)
        handle.rref.value = sum_of(self.left, self.right)
        handle.rref.takes = self.sleeps
        try:
            if not handle.broken:
                model.calls[self.to][call] += 1
            if self.how == "remote":
                self._must_be_made(model)
                return model.shows(model.value(handle, self.at))
            # Its function has slept since it was created, also while the request is delayed.
            message = MessageType.PYTHON_RREF_FETCH_CALL
            sleeps = max(0.0, self.sleeps - model.times.delay(self.at, message))
            late, slack = model.times.timed(self.at, message, self._timeout, sleeps)
            value = model.value(handle, self.at)
            if late:
                model.abandoned_calls[self.to].add(call)
                handle.rref.made = False
                model.unread = True
                if model.times.delay(self.at, message) >= self._timeout:
                    # It is sent when it has timed out, so that a delete may overtake it.
                    model.fetched_late(handle.rref, surely=False)
            return model.shows(None if late == "timeout" else value, late, slack)
        finally:
            model.drop(handle)

    def _must_be_made(self, model: Model) -> None:
        """Raises:
        UsageError: the creation may time out.
        """
        message = MessageType.PYTHON_REMOTE_CALL
        late, _ = model.times.timed(self.at, message, self._timeout, self.sleeps)
        if late:
            msg = f"{self!r}: under this plan its creation may time out; let seconds be longer."
            raise UsageError(msg)

    @property
    def lasts(self) -> float:
        return self.sleeps

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None, sends: bool = False) -> Default:
        at = drawer.rank() if at is None else at
        to = drawer.peer(at)
        rests = drawer.rests
        able = [how for how in _UNDER if cls._may_be(drawer, at, to, how)]
        how, endless = drawer.pick(
            [(one, end) for end in (False, False, True) for one in (able[:2] if sends else able)]
        )
        # What a creation leaves that comes late, or a fetch, is drawn by other steps.
        message = MessageType.PYTHON_CALL
        late = rests and drawer.settles and how in ("sync", "async")
        seconds = drawer.timeout(at, message, late=late)
        pair = drawer.pick(PAIRS)
        may_sleep = rests and drawer.may_end_late() and how != "remote"
        sleeps = drawer.pick((0.0, _SLEEPS)) if may_sleep else 0.0
        if sleeps:
            drawer.slow_functions += 1
            seconds = sleeps / 4
        return cls(at, to, _LONG if seconds is None else seconds, endless, *pair, sleeps, how)

    @staticmethod
    def _may_be(drawer: StepDrawer, at: int, to: int, how: Under) -> bool:
        """Whether a step of this kind may do that under a default timeout."""
        if how in ("sync", "async"):
            return True
        if not drawer.may_make_rrefs or (how == "fetch" and at == to):
            return False
        # The answer to the first message of a proxy, or to a fetch, must not be late by itself.
        late = (
            (at, MessageType.PYTHON_CALL),
            (at, MessageType.PYTHON_RREF_FETCH_CALL),
            (to, MessageType.RREF_CHILD_ACCEPT),
        )
        return not any(drawer.delay_milliseconds(rank, message) for rank, message in late)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        if message is not MessageType.PYTHON_CALL:
            return []
        return [(cls.op, lambda: cls.draw(drawer, at=rank, sends=True))]
