"""Steps that call a function on another rank, and wait for its answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType
from rpcprops.steps.arguments import (
    FLAVOURS,
    PAIRS,
    TYPED,
    check_arguments,
    check_raises,
    check_seconds,
    draw_arguments,
    sum_of,
)
from rpcprops.steps.base import (
    Argument,
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

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import ErrorClass, StepPrediction
    from rpcprops.oracle.rrefs import Handle
    from rpcprops.programs.scope import Scope
    from rpcprops.strategies.drawing import StepDrawer

#: Options of a call: how the caller waits, and whether the function raises.
_CALLS: tuple[dict[str, Any], ...] = tuple(
    {**wait, **raises}
    for raises in ({}, {"raises": True})
    for wait in ({}, {"wait": "async"}, {"wait": "later"})
)
_QUIET_CALLS = _CALLS[:3]
_LATER_CALLS = _CALLS[2::3]
#: A function of Python that holds the GIL; the simplest call comes before it.
_SPINNING: dict[str, Any] = {"spins": True}


@dataclass(frozen=True, slots=True, repr=False)
class Call(Step):
    """``rpc_sync`` (or ``rpc_async`` and ``wait``): `to` computes ``left + right`` for `at`.

    With ``wait="later"`` the future is kept under the name `out` for a :class:`Wait`. With `raises`
    the function raises (Python and TorchScript). `timeout` is the call's RPC timeout in virtual
    seconds; with None the cluster's applies, which is far longer than any run. A Python function
    sleeps for `seconds` (virtual) before it answers. With `spins` it first holds the GIL for some
    10 ms of real time, and no other Python runs in its rank meanwhile.
    """

    op: ClassVar[str] = "call"
    after_rejoin: ClassVar[bool] = True
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 6
    aim_order: ClassVar[int] = 0
    makes: ClassVar[Mapping[str, Sort]] = {"out": "future"}
    at: int
    to: int
    left: Value = (1.0,)
    right: Argument = (2.0,)
    flavour: Flavour = "python"
    wait: Literal["sync", "async", "later"] = "sync"
    timeout: float | None = None
    out: str = ""
    raises: bool = False
    seconds: float = 0.0
    spins: bool = False

    def enter(self, scope: Scope) -> None:
        check_arguments(scope, self.at, self.left, self.right, self.flavour)
        check_seconds(self.seconds, self.flavour)
        if self.raises:
            check_raises(self.flavour, ("python", "script"))
        if self.spins and (self.flavour != "python" or self.raises):
            msg = "spins=True needs flavour 'python', and no raises=True."
            raise UsageError(msg)
        if (self.wait == "later") != bool(self.out):
            msg = (
                f"wait={shown(self.wait)} and out={shown(self.out)}: wait='later' needs a name, "
                "others none."
            )
            raise UsageError(msg)
        if self.out:
            scope.take_name(self.out)
            scope.futures[self.out] = self.at

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """The function fetches its argument if that is an RRef."""
        return (self.to,) if isinstance(self.right, str) else ()

    def predict(self, model: Model, call: str) -> StepPrediction:
        predicted = self._future(model, call)
        if self.wait != "later":
            return predicted
        model.futures[self.out] = predicted
        argument = model.argument(self.right)
        if argument is not None and not predicted.error:
            model.readers.add(argument.rref, self.out)
        return model.shows()

    def _future(self, model: Model, call: str) -> StepPrediction:
        """How its future ends; raises only an error that prevents the call from being made.

        The callee answers once the RRefs among the arguments are confirmed
        (``request_callback_no_python.cpp``: RequestCallbackNoPython::processMessage, which waits
        for RRefContext::waitForThreadLocalPendingRRefs).
        """
        python = self.flavour == "python"
        message = call_message(typed=not python)
        argument = model.argument(self.right)
        made = argument is None or argument.rref.made
        if argument is not None:
            model.creations.use(argument)
        payload = call if python else self._typed_payload
        since = len(model.sends)

        def timed() -> tuple[ErrorClass, float]:
            surely, perhaps = model.times.callee_waits(self.to, since)
            surely += self.seconds
            perhaps += argument.rref.takes if argument else 0.0
            late, slack = model.times.timed(self.at, message, self.timeout, surely, perhaps)
            if late and python:
                model.abandoned_calls[self.to].add(call)
            return late, slack

        try:
            there = model.call(self.at, self.to, message, payload, argument)
            if python:
                model.calls[self.to][call] += 1
            if self.raises:
                self._raise(model, there)
            self._begin(model, call, argument)
            value = model.compute(self.to, self.left, self.right, there)
        except StepFails as failed:
            late, slack = timed()
            self._end(model, call, late)
            error = failed.error if failed.error == "injected" or not late else late
            return model.shows(error=error, slack=slack)
        late, slack = timed()
        self._end(model, call, late)
        takes = argument is not None and (argument.rref.slow or argument.rref.fetches)
        if argument is not None and takes and (late or self.wait == "later"):
            # The call still waits for the value.
            argument.rref.made = made
        elif argument is not None:
            model.has_value(argument)
        return model.shows(None if late == "timeout" else value, late, slack)

    def _raise(self, model: Model, there: Handle | None) -> None:
        """Raises:
        StepFails: its function raises. What Python raises is the value of the answer.
        """
        if self.flavour != "python":
            model.answers.error(self.at, self.to, call_message(typed=True))
        if there:
            model.drop(there)
        raise StepFails(error="remote")

    def _begin(self, model: Model, call: str, argument: Handle | None) -> None:
        """Its function fetches its argument, if another rank owns that."""
        if argument is not None and argument.rref.owner != self.to:
            model.fetching[call, self.out] = (self.at, self.to)

    def _end(self, model: Model, call: str, late: ErrorClass) -> None:
        """Its caller has waited for its function, unless that was too late, or nobody waits."""
        if not late and self.wait != "later":
            model.fetching.pop((call, self.out), None)

    @property
    def lasts(self) -> float:
        return self.seconds

    @property
    def alike(self) -> tuple[str, ...]:
        return () if self.flavour == "python" else (self._typed_payload,)

    @property
    def _typed_payload(self) -> str:
        """A TorchScript call carries its function and its tensors' places, not their contents."""
        return f"{self.flavour} {self.raises}"

    @classmethod
    def draw(
        cls,
        drawer: StepDrawer,
        *,
        at: int | None = None,
        flavours: Sequence[Flavour] = FLAVOURS,
        later: bool = False,
    ) -> Call:
        at = drawer.rank() if at is None else at
        to = drawer.peer(at)
        if drawer.in_threads:
            # Typed calls of two threads could be alike.
            flavours = FLAVOURS[:1]
        flavour = drawer.pick(flavours)
        forms = [x for x in _LATER_CALLS if later] or [*_CALLS, _SPINNING]
        form = drawer.pick([x for x in forms if _fits(flavour, x)])
        left, right = draw_arguments(drawer, at, flavour, to, drawer.doubtful_there(at, to))
        message = call_message(typed=flavour != "python")
        slow = flavour == "python"
        waits = drawer.announces(right, to)
        timeout, seconds = drawer.timing(
            at, message, slow=slow, slow_late=drawer.settles, waits=waits
        )
        out = drawer.name("future") if form.get("wait") == "later" else ""
        timed: dict[str, Any] = {"timeout": timeout, "seconds": seconds}
        return cls(at, to, left, right, flavour, out=out, **timed, **form)

    def drawn(self, drawer: StepDrawer) -> None:
        if isinstance(self.right, str):
            if self.raises:
                drawer.note_deleted(self.right)
            elif drawer.scope.handles[self.right].owner != self.to:
                message = MessageType.PYTHON_CALL
                takes = self.seconds + drawer.announces(self.right, self.to)
                ends = drawer.ends(self.at, message, self.timeout, takes)
                drawer.note_fetching(self.out, ends=ends)
            drawer.note_uncertain(self.right)
            if self.wait == "later":
                drawer.note_read(self.right)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        match message:
            case MessageType.PYTHON_CALL:
                flavours = FLAVOURS[:1]
            case MessageType.SCRIPT_CALL if not drawer.in_threads:
                flavours = TYPED
            case _:
                return []
        return [(cls.op, lambda: cls.draw(drawer, at=rank, flavours=flavours))]


def _fits(flavour: Flavour, form: Mapping[str, Any]) -> bool:
    """Whether a function of that flavour can be called in that way."""
    return form in _QUIET_CALLS or flavour == "python" or ("raises" in form and flavour == "script")


@dataclass(frozen=True, slots=True, repr=False)
class Wait(Step):
    """Wait for the future of a :class:`Call` made with ``wait="later"``."""

    op: ClassVar[str] = "wait"
    waits_at = waits_nowhere
    after_rejoin: ClassVar[bool] = True
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 7
    often: ClassVar[int] = 1  # because a wait seldom finds a future
    comes_first: ClassVar[bool] = False
    at: int
    future: str

    def enter(self, scope: Scope) -> None:
        if self.future in scope.waited:
            msg = f"the future {shown(self.future)} was waited for before; wait once."
            raise UsageError(msg)
        if self.future not in scope.futures:
            msg = f"there is no future {shown(self.future)} before this step; make it first."
            raise UsageError(msg)
        if scope.futures[self.future] != self.at:
            msg = (
                f"the future {shown(self.future)} is at rank {scope.futures[self.future]}, not "
                f"{self.at}."
            )
            raise UsageError(msg)
        del scope.futures[self.future]
        scope.waited.add(self.future)

    def predict(self, model: Model, call: str) -> StepPrediction:
        if self.future not in model.futures:
            raise StepFails(error="missing")
        predicted = model.futures.pop(self.future)
        model.readers.end(self.future)
        if predicted.error not in ("timeout", "unknown"):
            model.fetching = {
                one: ranks for one, ranks in model.fetching.items() if one[1] != self.future
            }
        return predicted

    @classmethod
    def may_come(cls, drawer: StepDrawer) -> bool:
        return bool(drawer.futures())

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Wait | None:
        futures = drawer.futures()
        if not futures:
            return None
        future = drawer.recall(futures)
        return cls(drawer.scope.futures[future], future)

    @classmethod
    def instead(cls, drawer: StepDrawer) -> Step | None:
        return Call.draw(drawer, later=True) if Call.op in drawer.on else None


@dataclass(frozen=True, slots=True, repr=False)
class Count(Step):
    """Add one to a counter of `to`, and return the new count. Not idempotent.

    The function counts, and then sleeps for `seconds` (virtual). `timeout` is that of the call.
    After a count that timed out nobody knows when it is made, so until a settle no further count of
    that rank is predicted.
    """

    op: ClassVar[str] = "count"
    waits_at = waits_nowhere
    after_rejoin: ClassVar[bool] = True
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 10
    at: int
    to: int
    timeout: float | None = None
    seconds: float = 0.0

    def enter(self, scope: Scope) -> None:
        check_seconds(self.seconds)

    @property
    def lasts(self) -> float:
        return self.seconds

    @property
    def counted_at(self) -> tuple[int, ...]:
        return (self.to,)

    def predict(self, model: Model, call: str) -> StepPrediction:
        model.call(self.at, self.to, MessageType.PYTHON_CALL, call)
        model.calls[self.to][call] += 1
        model.counts[self.to] += 1
        late, slack = model.gives_up(self.at, self.to, call, self.timeout, self.seconds)
        if self.to in model.counted_late and not late:
            return model.shows(error="unknown")
        if late:
            model.counted_late.add(self.to)
        return model.shows(None if late == "timeout" else model.counts[self.to], late, slack)

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Count | None:
        able = [rank for rank in drawer.ranks if drawer.countable(rank)]
        if not able:
            return None
        at = drawer.pick(able)
        to = drawer.pick(drawer.countable(at))
        # Until a settle nobody counts where such a call ended late, so some rank must be left.
        late = 1 + len(drawer.counted_late) < len(drawer.ranks) and not drawer.in_parallel
        slow_late = late and drawer.settles
        timed = drawer.timing(at, MessageType.PYTHON_CALL, late=late, slow_late=slow_late)
        return cls(at, to, *timed)

    def drawn(self, drawer: StepDrawer) -> None:
        if drawer.ends(self.at, MessageType.PYTHON_CALL, self.timeout, self.seconds):
            drawer.counted_late.add(self.to)


@dataclass(frozen=True, slots=True, repr=False)
class Chain(Step):
    """Call an ``async_execution`` function at `to`, which calls `then` for ``left + right``.

    `timeout` is that of the first call. The function sleeps for `seconds` (virtual) before it calls
    `then`.
    """

    op: ClassVar[str] = "chain"
    waits_at = waits_nowhere
    after_rejoin: ClassVar[bool] = True
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 12
    at: int
    to: int
    then: int
    left: Value = (1.0,)
    right: Value = (2.0,)
    timeout: float | None = None
    seconds: float = 0.0

    def enter(self, scope: Scope) -> None:
        check_arguments(scope, self.at, self.left, self.right)
        check_seconds(self.seconds)

    @property
    def lasts(self) -> float:
        return self.seconds

    def predict(self, model: Model, call: str) -> StepPrediction:
        model.call(self.at, self.to, MessageType.PYTHON_CALL, call)
        model.calls[self.to][call] += 1
        failed: StepFails | None = None
        waits = self.seconds
        try:
            model.call(self.to, self.then, MessageType.PYTHON_CALL, f"{call}/then")
            model.calls[self.then][f"{call}/then"] += 1
            waits += model.times.delay(self.to, MessageType.PYTHON_CALL)
        except StepFails as failure:
            failed = failure
            # The future that the function has returned fails.
            model.answers.error(self.at, self.to, MessageType.PYTHON_CALL)
        late, slack = model.gives_up(self.at, self.to, call, self.timeout, waits)
        if late:
            model.abandoned_calls[self.then].add(f"{call}/then")
        if failed is not None and late != "timeout":
            raise failed
        value = None if late == "timeout" else sum_of(self.left, self.right)
        return model.shows(value, late, slack)

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Chain:
        at = drawer.rank()
        to = drawer.peer(at)
        then = drawer.peer(to)
        left, right = drawer.pick(PAIRS)
        timed = drawer.timing(at, MessageType.PYTHON_CALL, slow_late=drawer.settles)
        return cls(at, to, then, left, right, *timed)
