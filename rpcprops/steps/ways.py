"""Steps that call in the other ways that torch has, and that use futures and RRefs by hand."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

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
from rpcprops.steps.timeouts import (
    ENDS_AT_ONCE,
    LONGEST,
    NEVER_COMES,
    TOO_LONG,
    TOO_SHORT,
    is_too_long,
    is_too_short,
    says_at_once,
)

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import ErrorClass, StepPrediction
    from rpcprops.oracle.rrefs import Handle
    from rpcprops.programs.scope import HandleInfo, Scope
    from rpcprops.strategies.drawing import StepDrawer
    from rpcprops.torch_facts import TorchFacts

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
    "exception twice",
    "exception late",
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
    "exception twice": [1.0, 1.0],
    "exception late": [1.0, 1.0],
}
#: A refused exception makes torch raise another error in place of the value.
_KEPT = "refused-exception-kept"
_LATE_FORM: Form = "exception late"
_SEEN_KEPT = [1.0, -1.0]

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

    The timeout may also be one of which torch makes another one (``steps/timeouts.py``). The
    documentation of both says of it: "If the RPC does not complete in this amount of time, an
    exception indicating it has timed out will be raised", and excepts 0 alone. So one that is too
    long for torch must not come here, and one of less than a millisecond must.
    """

    op: ClassVar[str] = "reach"
    any_timeout: ClassVar[bool] = True
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
            ends = _counts_otherwise(model, self, self.timeout, late, total)
            if ends or (late and python):
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
        odd = _odd_timings(drawer, python=python)
        timed = drawer.pick((*(None,) * (2 * len(odd)), *odd))
        if timed is None:
            return cls(*given, *drawer.timing(at, message, slow=python, slow_late=drawer.settles))
        drawer.slow_functions += timed[1] > 0
        return cls(*given, *timed)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        return _python_calls(cls, drawer, rank, message)


def _counts_otherwise(
    model: Model, step: Step, timeout: float | None, late: ErrorClass, value: Any
) -> bool:
    """Note the finding if torch makes another timeout of the timeout of a call.

    Returns: whether this torch ends the call before its function.
    """
    if is_too_short(timeout) and late == "timeout":
        says = re.escape(f"got the value {value!r}")
        model.findings.meets_here(NEVER_COMES, step.at, f"{says}$")
    if not is_too_long(timeout):
        return False
    model.findings.meets_here(ENDS_AT_ONCE, step.at, says_at_once())
    return model.facts.has_bug(ENDS_AT_ONCE)


def _odd_timings(drawer: StepDrawer, *, python: bool = True) -> list[tuple[float, float]]:
    """Timeouts at the ends of what torch can count, and how long the called function sleeps.

    What comes of one that is too short is certain only where the function sleeps. A function may go
    on after the call has ended, so that a settle has to follow.

    Args:
        python: whether the function is one of Python, which may sleep.
    """
    found = [(LONGEST, 0.0)]
    if drawer.has_few_threads or not drawer.settles:
        return found
    sleeps = python and drawer.may_end_late() and drawer.may_take(_SLEEPS)
    if not drawer.facts.has_bug(ENDS_AT_ONCE):
        found += itertools.product(TOO_LONG, (0.0, _SLEEPS) if sleeps else (0.0,))
    if sleeps and not drawer.facts.has_bug(NEVER_COMES):
        found += [(timeout, _SLEEPS) for timeout in TOO_SHORT] * 3
    return found


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
        total = sum_of(self.left, self.right)
        if self.form == _LATE_FORM:
            # If the call fails, the step shows only what the callbacks saw.
            shown_kept = (f"got {[*total, *_SEEN_KEPT]!r}", f"got the value {_SEEN_KEPT!r}")
            says = "|".join(map(re.escape, shown_kept))
            model.findings.meets_here(_KEPT, self.at, f"({says})$")
        slack = _call_of(model, self, ranks, self.of, call, limits, raises=self.raises)
        return model.shows([*total, *_SEEN[self.form]], slack=slack)

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None, sends: bool = False) -> After:
        at = drawer.rank() if at is None else at
        to = drawer.peer(at)
        keeps = drawer.facts.has_bug(_KEPT)
        form = drawer.pick([one for one in FORMS if not (keeps and one == _LATE_FORM)])
        left, right = drawer.pick(PAIRS)
        able = ["call"] if sends else _drawn_kinds(drawer)
        if form == _LATE_FORM:
            # What a proxy meets besides would be seen only by what the callbacks saw.
            able = [of for of in able if of != "proxy"]
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

    With ``how="done"`` the step waits for the future of ``collect_all``, and then asks each future
    whether it is done. The documentation says that the combined future "is completed when all of
    the sub-futures are completed", so each must be. Then it waits for each in its order, and shows
    what the others show, or else which were done. A function that breaks does not sleep, and no
    call has a timeout then.
    """

    op: ClassVar[str] = "gather"
    in_thread: ClassVar[bool] = True
    after_rejoin: ClassVar[bool] = True
    order: ClassVar[float | None] = 52
    makes: ClassVar[Mapping[str, Sort]] = {}
    at: int
    targets: tuple[int, ...]
    how: Literal["wait_all", "collect_all", "threads", "done"] = "wait_all"
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
        if self.how == "done" and self.breaks is not None and self.timeout is not None:
            msg = f"timeout={shown(self.timeout)} with how='done' and breaks=... is not modelled."
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
            sleeps = _FLAVOUR_OF[of] == "python" and not (breaks and self.how == "done")
            limits = (self.timeout, self.seconds if sleeps else 0.0)
            ranks = (self.at, target)
            try:
                one = _call_of(model, self, ranks, of, name, limits, raises=breaks)
                slack = min(slack, one)
                values.append(sum_of([x + number for x in self.left], self.right))
            except StepFails as failed:
                failures.append(failed)
        if not failures:
            return model.shows(values, slack=slack)
        if self.how == "done":
            says = r"got the value \[([01]\.0, )*0\.0(, [01]\.0)*\]$"
            model.findings.meets_here(_ENDS_EARLY, self.at, says)
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
        forms: Any = itertools.product(("wait_all", "collect_all", "threads", "done"), able)
        how, of = drawer.pick([*forms])
        left, right = drawer.pick(PAIRS)
        breaks = drawer.pick((None, None, *(range(len(targets)) if of == "call" else ())))
        if how == "done":
            return cls._drawn_done(drawer, (at, tuple(targets), left, right), of, breaks)
        timed = _timing(drawer, at, of, targets, by_future=how != "threads")
        drawer.slow_functions += (len(targets) - 1) * (timed[1] > 0)
        return cls(at, tuple(targets), how, left, right, breaks, *timed, of)

    @classmethod
    def _drawn_done(
        cls,
        drawer: StepDrawer,
        given: tuple[int, tuple[int, ...], Value, Value],
        of: Any,
        breaks: int | None,
    ) -> Gather:
        """One that asks which futures are done; its calls fail only where torch tells that right.

        What is late is drawn by the other ways.
        """
        at, targets, left, right = given
        early = drawer.facts.has_bug(_ENDS_EARLY)
        times = len(targets) if of in ("call", "proxy", "mixed") else 0
        _, seconds = drawer.with_sleep((None,), times)
        drawer.slow_functions += times * (seconds > 0)
        how: Any = "collect_all" if early and _may_lose(drawer, at) else "done"
        if of == "call":
            breaks = None if early and how == "done" else drawer.pick((breaks, 0, 1))
        return cls(at, targets, how, left, right, breaks, None, seconds, of)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        return _python_calls(cls, drawer, rank, message)


#: The finding about the future of all of them.
_ENDS_EARLY = "collect-all-ends-early"
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

    def texts_behind(self, value: Any) -> tuple[str, ...]:
        return ("not_picklable",) if self.what == "pickle" else ()

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


#: What is called of an object, and how: see :class:`Method`.
MethodForm: TypeAlias = Literal[
    "args",
    "kwargs",
    "missing",
    "call",
    "property",
    "static",
    "keyword timeout",
    "keyword rref",
    "keyword rpc_api",
    "keyword func_name",
    "named rref",
    "named rpc_api",
    "named rpc_timeout",
    "attribute",
    "getattr",
]
_TAKES_KEYWORDS = "proxy-takes-keywords"
_HIDES_METHODS = "proxy-hides-methods"
_ASKS_CLASS = "proxy-asks-class"
#: The finding that a form meets.
_MEETS: Mapping[str, str] = {
    "keyword": _TAKES_KEYWORDS,
    "named": _HIDES_METHODS,
    "attribute": _ASKS_CLASS,
    "getattr": _ASKS_CLASS,
}


@dataclass(frozen=True, slots=True, repr=False)
class Method(Step):
    """A method of an object at `to`, called twice through its RRef; the object is then dropped.

    `how` is ``rref.rpc_sync()``, ``rref.rpc_async()`` or ``rref.remote()``. torch says that
    ``rref.rpc_sync().f(*args, **kwargs)`` is the same as a call at the owner of
    ``getattr(rref.local_value(), "f")(*args, **kwargs)`` (docstrings of RRef.rpc_sync, rpc_async
    and remote: ``torch/csrc/distributed/rpc/init.cpp``), so that all these forms must work:

    * "args", "kwargs": a method of the class, and what it is given.
    * "call", "property", "static": ``__call__``, a property that is a function, a static method.
      All of these, torch finds in the class.
    * "keyword NAME": a keyword that has the name of a parameter of torch's own function
      (``rref_proxy.py``: _invoke_rpc).
    * "named NAME": a method that has the name of an attribute of torch's proxy (RRefProxy).
    * "attribute", "getattr": a function that is an attribute of the object, or comes from the
      ``__getattr__`` of its class, as the submodules of a module do.

    "missing" names a method that neither class nor object has, and the value is the class of the
    error: torch looks at the class (_invoke_rpc) before it sends the call. The first call of the
    method sleeps for `seconds` (virtual). `timeout` is that of ``rpc_sync`` or ``rpc_async``, and
    applies to each message.
    """

    op: ClassVar[str] = "method"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 54
    makes: ClassVar[Mapping[str, Sort]] = {}
    at: int
    to: int
    how: Literal["sync", "async", "remote"] = "sync"
    form: MethodForm = "args"
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
        self._meet(model, handle)
        try:
            model.creations.use(handle)
            self._ask_type(model, handle)
            # The owner answers once it has the value.
            handle.rref.made = True
            if self.form == "missing":
                if self.how == "async":
                    model.findings.meets_in_proxy(handle, self.at)
                return model.shows(["AttributeError"])
            step = 6.0 if self.form == "kwargs" or self.form.startswith("keyword") else 2.0
            totals = [self.start + step, self.start + step + step]
            if self.form == "static":
                totals = [6.0, 6.0]
            for total, seconds in zip(totals, (self.seconds, 0.0), strict=True):
                self._call(model, handle, total, seconds)
            return model.shows(totals)
        finally:
            model.drop(handle)

    @property
    def finding(self) -> str:
        """The finding that its form meets; empty for none."""
        return _MEETS.get(self.form.partition(" ")[0], "")

    def _meet(self, model: Model, handle: Handle) -> None:
        """Note the finding that it meets.

        torch refuses a keyword, and calls what is no method, before it sends anything, whatever has
        become of the value (``rref_proxy.py``: RRefProxy.__getattr__; ``py_rref.cpp``:
        PyRRef::createRRefProxy). It asks for the class by a message, as for any call.
        """
        if not self.finding:
            return
        name = self.form.partition(" ")[2]
        says = "got AttributeError: type object 'Tally' has no attribute '(own|late)_add'$"
        if self.finding == _TAKES_KEYWORDS:
            says = f"got TypeError: {re.escape(model.facts.texts.proxy_keyword)}'{name}'$"
        elif name == "rpc_api":
            # It is rpc_sync, rpc_async or remote itself, and is given the arguments of the method.
            says = r"got TypeError: (rpc_sync|rpc_async|remote)\(\) (got|missing) "
        elif self.finding == _HIDES_METHODS:
            says = "got TypeError: '.*' object is not callable$"
        model.findings.meets_here(self.finding, self.at, says)
        if self.finding == _ASKS_CLASS and self.how == "async" and model.facts.has_bug(_ASKS_CLASS):
            # The error is put into the future, as of a method that is missing.
            model.findings.meets_in_proxy(handle, self.at)

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
        form = drawer.pick(forms[::-1] if through else [*forms, *_other_forms(drawer.facts)])
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


def _other_forms(facts: TorchFacts) -> list[MethodForm]:
    """The further forms that this torch does right."""
    forms: tuple[MethodForm, ...] = get_args(MethodForm)
    findings = [(form, _MEETS.get(form.partition(" ")[0])) for form in forms[3:]]
    return [form for form, finding in findings if finding is None or not facts.has_bug(finding)]


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

    With "sync" and "async" the default may also be one of which torch makes another one: see
    :class:`Reach`. ``_set_rpc_timeout`` says of it: "If an RPC is not completed within this time,
    an exception indicating it has timed out will be raised".
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
        if self._is_odd and self.how not in ("sync", "async"):
            msg = (
                f"seconds={shown(self.seconds)} with how={shown(self.how)} must be {LONGEST:g} at "
                f"the most and a millisecond at the least, for torch counts milliseconds in an int."
            )
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
        is_short = self.seconds < longest + CLEARLY_IN_TIME
        if (is_short or self._is_odd) and not model.rests:
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
        total = sum_of(self.left, self.right)
        limit = None if self.endless else self.seconds
        if _counts_otherwise(model, self, limit, late, total) or late:
            model.abandoned_calls[self.to].add(call)
            if late == "timeout":
                raise StepFails(late, slack)
        return model.shows(total, late, slack)

    @property
    def _is_odd(self) -> bool:
        """Whether torch makes another timeout of the default."""
        return is_too_long(self.seconds) or is_too_short(self.seconds)

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
        if rests and how in ("sync", "async") and not sleeps:
            odd = _odd_timings(drawer)
            seconds, sleeps = drawer.pick((*((seconds, sleeps),) * len(odd), *odd))
            drawer.slow_functions += sleeps > 0
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
