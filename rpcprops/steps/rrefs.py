"""Steps that make, share, use and drop RRefs.

Each `predict` tells the model what torch's ``rref_context.cpp`` and ``rref_impl.cpp`` do. The
functions named here are in those files unless another file is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType
from rpcprops.outcomes import Counters
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
    AGAIN,
    CLEARLY_IN_TIME,
    CLEARLY_LATE,
    STEP_TYPES,
    Argument,
    Flavour,
    OwnerOf,
    Step,
    StepFails,
    Value,
    Way,
    fetch_message,
    remote_message,
    waits_nowhere,
)

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import ErrorClass, StepPrediction
    from rpcprops.oracle.rrefs import Handle
    from rpcprops.programs.scope import HandleInfo, Scope
    from rpcprops.strategies.drawing import StepDrawer

#: Options of a remote: its flavour, and whether its function raises.
_REMOTES: tuple[dict[str, Any], ...] = (
    {},
    {"flavour": "builtin"},
    {"flavour": "script"},
    {"raises": True},
)
#: What a remote of a TorchScript function may have more, seldom.
_MORE: tuple[dict[str, int], ...] = (
    *({},) * 9,
    {"beside": 1},
    {"beside": 7},
    {"megabytes": 1},
)
_OWNED: tuple[Value, ...] = ((1.0,), (0.0,), (-2.0,), (1.0, 2.0), (3.0, 0.0, -1.0))
_ADDENDS = (1.0, 0.0, -2.0, 3.0)
#: The largest value that a remote makes.
_MOST_MEGABYTES = 16
#: The most RRefs that a remote makes besides the one that it keeps.
_MOST_BESIDE = 200


class OfHandle(Step):
    """A step at the rank of a handle, which it uses."""

    __slots__ = ()

    comes_first: ClassVar[bool] = False
    goes_on: ClassVar[int] = 1
    handle: str

    def enter(self, scope: Scope) -> None:
        scope.alive(self.at, self.handle)

    @classmethod
    def usable(cls, drawer: StepDrawer) -> list[str]:
        """The handles that a step of this kind may use now."""
        return drawer.handles()

    @classmethod
    def using(cls, drawer: StepDrawer, name: str, handle: HandleInfo) -> Step:
        """A step of this kind that uses this handle."""
        return cls(handle.home, name)  # type: ignore[call-arg]  # without other fields

    @classmethod
    def may_come(cls, drawer: StepDrawer) -> bool:
        return bool(cls.usable(drawer))

    @classmethod
    def draw(cls, drawer: StepDrawer, *, names: Sequence[str] = (), **aim: Any) -> Step | None:
        names = names or cls.usable(drawer)
        if not names:
            return None
        name = drawer.recall(names)
        return cls.using(drawer, name, drawer.scope.handles[name], **aim)

    @classmethod
    def goes_on_with(cls, drawer: StepDrawer, names: Set[str]) -> bool:
        return not names.isdisjoint(cls.usable(drawer))

    @classmethod
    def instead(cls, drawer: StepDrawer) -> Step | None:
        return _maker(drawer)


def _maker(drawer: StepDrawer) -> Step | None:
    """A step that makes a handle; None if none is drawn."""
    makers = (Remote, Own, Nest)
    return next((maker.draw(drawer) for maker in makers if maker.op in drawer.on), None)


@dataclass(frozen=True, slots=True, repr=False)
class Remote(Step):
    """``rpc.remote``: `to` computes ``left + right`` and owns it; `at` gets the handle `out`.

    `flavour` says what runs there: a Python function, the builtin ``torch.add``, or a TorchScript
    function. A handle as `right` is fetched at `to` (Python only). With `raises` the function
    raises (Python only); the error shows when the handle is used. `timeout` is the creation's. A
    Python function sleeps for `seconds` (virtual) before it returns, so the handle exists long
    before its value. The value of a TorchScript function may lie in a storage of some `megabytes`,
    which its owner takes a while to free. `beside` is how many more such RRefs are made: `at` keeps
    them until it drops `out`, and uses them for nothing.
    """

    op: ClassVar[str] = "remote"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 0
    at: int
    to: int
    out: str
    left: Value = (1.0,)
    right: Argument = (2.0,)
    flavour: Flavour = "python"
    raises: bool = False
    timeout: float | None = None
    seconds: float = 0.0
    megabytes: int = 0
    beside: int = 0

    def enter(self, scope: Scope) -> None:
        check_arguments(scope, self.at, self.left, self.right, self.flavour)
        check_seconds(self.seconds, self.flavour)
        _check_whole("megabytes", self.megabytes, _MOST_MEGABYTES, self.flavour)
        _check_whole("beside", self.beside, _MOST_BESIDE, self.flavour)
        if self.raises:
            check_raises(self.flavour, ("python",))
        typed = self.flavour != "python"
        scope.new_handle(self.out, self.at, self.to, typed=typed, size=len(self.left))

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """The function fetches its argument if that is an RRef."""
        return (self.to,) if isinstance(self.right, str) else ()

    def predict(self, model: Model, call: str) -> StepPrediction:
        typed = self.flavour != "python"
        argument = model.argument(self.right)
        made = argument is None or argument.rref.made
        beside = [model.remote(self.at, self.to, typed=typed)[0] for _ in range(self.beside)]
        since = len(model.sends)
        handle, there = model.remote(self.at, self.to, typed=typed, argument=argument)
        handle.beside = tuple(beside)
        model.handles[self.out] = handle
        if handle.broken or handle.rref.absent:
            return model.shows()
        if not typed:
            model.calls[self.to][call] += 1
        rref = handle.rref
        if self.raises:
            # The owner stores the error instead of the value (OwnerRRef::setError).
            rref.error = "remote"
            if there:
                model.drop(there)
        else:
            if argument is not None:
                model.readers.add(argument.rref, rref)
            try:
                rref.fetches = there is not None and there.rref.owner != self.to
                rref.value = model.compute(self.to, self.left, self.right, there)
            except StepFails as failed:
                rref.error = failed.error
        # The owner gets the RRef only once its function has returned (request_callback_impl.cpp:
        # RequestCallbackImpl::processPythonRemoteCall, which then calls assignOwnerRRef).
        surely, perhaps = model.times.callee_waits(self.to, since)
        surely += self.seconds
        perhaps += argument.rref.takes if argument else 0.0
        rref.takes = surely + perhaps
        model.starts(rref, self.seconds)
        if argument is not None and (argument.rref.slow or argument.rref.fetches):
            # The function still waits for its argument.
            argument.rref.made = made
        slack = self._time(model, call, handle, surely, perhaps)
        return model.shows(slack=slack)

    def _time(
        self, model: Model, call: str, handle: Handle, surely: float, perhaps: float
    ) -> float:
        """Predict whether the creation times out, and with which slack.

        torch marks the RRef when the timeout comes (callback::confirmPendingUser hands the
        error to RRef::handleError). Until then, uses of the RRef raise nothing.
        """
        message = remote_message(typed=self.flavour != "python")
        late, slack = model.times.timed(self.at, message, self.timeout, surely, perhaps)
        if self.beside and (late or model.own_fate not in ("", "fail")):
            msg = (
                f"{self!r}: some of its creations end by their timeout, and what becomes of those "
                f"beside {self.out!r} is not modelled; let beside be 0."
            )
            raise UsageError(msg)
        if late == "unknown":
            least = model.times.delay(self.at, message) + surely
            msg = (
                f"{self!r}: under this plan nobody can tell whether its creation times out, for it "
                f"takes {least:g} to {least + perhaps:g} s (virtual); let the timeout be "
                f"{CLEARLY_IN_TIME:g} s above that, {CLEARLY_LATE:g} s below, or None."
            )
            raise UsageError(msg)
        if late:
            limit = model.times.limit(self.timeout) or 0.0
            creation_ends_late(model, handle, slack, limit)
            model.abandoned_calls[self.to].add(call)
            held_up = model.times.delay(self.at, message) - limit
            if held_up >= CLEARLY_LATE:
                # remote() returns after its own delay, and the timeout came before that.
                handle.marked_before = min(slack, held_up)
                model.creations.mark(handle)
        return slack

    @property
    def lasts(self) -> float:
        return self.seconds

    @classmethod
    def draw(
        cls,
        drawer: StepDrawer,
        *,
        at: int | None = None,
        to: Sequence[int] = (),
        flavours: Sequence[Flavour] = FLAVOURS,
    ) -> Remote:
        at = drawer.rank() if at is None else at
        target = drawer.pick(to or drawer.peers[at])
        form = drawer.pick([x for x in _REMOTES if x.get("flavour", "python") in flavours])
        flavour: Flavour = form.get("flavour", "python")
        left, right = draw_arguments(drawer, at, flavour, target)
        message = remote_message(typed=flavour != "python")
        late = may_time_out(drawer, at, target)
        slow_late = late and drawer.has_plan
        slow = flavour == "python"
        waits = drawer.announces(right, target)
        timeout, seconds = drawer.timing(
            at, message, late=late, slow=slow, slow_late=slow_late, waits=waits
        )
        drawer.may_hold_errors |= "raises" in form
        if flavour == "script" and timeout is None and isinstance(right, tuple):
            form = {**form, **drawer.pick(_MORE if drawer.may_make_more else _MORE[:1])}
        out = drawer.name("handle")
        drawer.waiting += isinstance(right, str)
        takes = drawer.delay_milliseconds(at, message) / 1000 + seconds + waits
        if drawer.limit(timeout) < takes:
            drawer.note_late_creation(out, at)
        return cls(at, target, out, left, right, timeout=timeout, seconds=seconds, **form)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        if message.name.endswith("_FETCH_CALL"):
            # The function fetches its argument.
            typed = message is fetch_message(typed=True)
            names = drawer.shareable(lambda h: h.typed == typed and rank not in (h.owner, h.home))
            homes = {drawer.scope.handles[name].home for name in names}
            draw = partial(cls.draw, drawer, to=(rank,), flavours=FLAVOURS[:1])
            return [(cls.op, partial(draw, at=home)) for home in sorted(homes)]
        if message not in (MessageType.PYTHON_REMOTE_CALL, MessageType.SCRIPT_REMOTE_CALL):
            return []
        flavours = _flavours_of(message)
        return [(cls.op, lambda: cls.draw(drawer, at=rank, flavours=flavours))]

    @classmethod
    def to_another(
        cls, drawer: StepDrawer, rank: int, flavours: Sequence[Flavour] = FLAVOURS
    ) -> Way:
        """A way to draw a remote by which `rank` gets a handle to a value of another rank."""
        others = drawer.others[rank]
        return (cls.op, lambda: cls.draw(drawer, at=rank, to=others, flavours=flavours))

    def leads_to(self, drawer: StepDrawer) -> tuple[str, int]:
        # A timeout can end a fetch of what takes minutes to make; that of the next step alone.
        waits = drawer.late_for(self.out) is not None
        return ("fetch", 3 * AGAIN) if waits else Step.leads_to(self, drawer)

    def drawn(self, drawer: StepDrawer) -> None:
        drawer.unseen.add(self.out)
        if isinstance(self.right, str):
            drawer.sent.add(self.out)
            drawer.note_read(self.right)
            if self.raises:
                drawer.note_deleted(self.right)
        if self.seconds and self.at != self.to:
            drawer.making.add(self.out)
        if self.seconds > drawer.limit(None):
            drawer.lasting.add(self.out)


def creation_ends_late(model: Model, handle: Handle, slack: float, limit: float) -> None:
    """The creation of a handle's RRef times out after `limit`, and torch has yet to mark the RRef.

    Args:
        slack: virtual seconds by which the timeout comes before the answer.
    """
    handle.timed_out = True
    handle.unmarked = True
    handle.marked_before = slack
    if handle.fork:
        return
    # Whether the message or the function is late: torch forgets the RRef when the timeout comes
    # (callback::finishCreatingOwnerRRef), and the function then ends.
    model.findings.meets("late-remote-to-self")
    if model.facts.has_bug("late-remote-to-self"):
        handle.rref.takes = min(handle.rref.takes, limit)


def may_time_out(drawer: StepDrawer, at: int, to: int) -> bool:
    """Whether a creation of `at` at `to` may time out without meeting a finding of this torch."""
    has_bug = drawer.facts.has_bug
    if at == to and has_bug("late-remote-to-self"):
        return False
    # Without a settle, shutdown drops the handle while the creation may still be on its way.
    early = ("timed-out-remote-dropped", "shutdown-overtakes-creation")
    if not drawer.settles and any(map(has_bug, early)):
        return False
    remote = (MessageType.PYTHON_REMOTE_CALL, MessageType.SCRIPT_REMOTE_CALL)
    is_second = at in drawer.failed_at or drawer.may_fail(at, remote)
    return not (is_second and has_bug("second-failed-remote"))


def _flavours_of(message: MessageType) -> tuple[Flavour, ...]:
    return FLAVOURS[:1] if message.name.startswith("PYTHON") else TYPED


def _check_whole(name: str, value: int, most: int, flavour: Flavour) -> None:
    """Raises:
    UsageError: it is too large, or only a TorchScript function can have it.
    """
    if not 0 <= value <= most:
        msg = f"{name}={shown(value)} must lie in 0 to {most}."
        raise UsageError(msg)
    if value and flavour != "script":
        msg = f"{name}={shown(value)} needs flavour 'script', not {shown(flavour)}."
        raise UsageError(msg)


@dataclass(frozen=True, slots=True, repr=False)
class Own(Step):
    """``RRef(value)``: `at` owns the value itself and keeps the handle `out`."""

    op: ClassVar[str] = "own"
    waits_at = waits_nowhere
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 3
    at: int
    out: str
    value: Value = (1.0,)

    def enter(self, scope: Scope) -> None:
        scope.new_handle(self.out, self.at, self.at, typed=True, size=len(self.value))

    def predict(self, model: Model, call: str) -> StepPrediction:
        # torch infers the type of the value (py_rref.cpp: tryInferTypeWithTypeHint), so torch does
        # not treat this RRef as a Python object.
        handle = model.owned(self.at, self.value, typed=True)
        model.handles[self.out] = handle
        return model.shows()

    def leads_to(self, drawer: StepDrawer) -> tuple[str, int]:
        # No message says anything of it before it is sent.
        return Share.op, 2 * AGAIN

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Own:
        return cls(drawer.rank(), drawer.name("handle"), drawer.pick(_OWNED))


@dataclass(frozen=True, slots=True, repr=False)
class Share(OfHandle):
    """Send a handle of `at` as an argument to `to`, which keeps it under the name `out`.

    `inside` puts it into a list or a dict. After a share with a `timeout` the handle may arrive
    after the step has ended, so a settle must come before its first use, or a :class:`Pause` that
    waits for the handle. Then the RRef is used while its share is still under way. The function
    that keeps the handle sleeps for `seconds` (virtual) before it answers.
    """

    op: ClassVar[str] = "share"
    waits_at = waits_nowhere
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 2
    often: ClassVar[int] = 1
    goes_on: ClassVar[int] = 2
    at: int
    handle: str
    to: int
    out: str
    inside: Literal["", "list", "dict"] = ""
    timeout: float | None = None
    seconds: float = 0.0

    def enter(self, scope: Scope) -> None:
        check_seconds(self.seconds)
        shared = scope.alive(self.at, self.handle)
        scope.take_name(self.out)
        late = self.timeout is not None
        scope.handles[self.out] = replace(shared, home=self.to, late=late)

    def predict(self, model: Model, call: str) -> StepPrediction:
        # The RRef is forked while the message is written (RRefContext::prepareChildFork). The fork
        # is announced while it is read (RRefContext::notifyOwnerAndParentOfFork).
        handle = model.handle(self.handle)
        since = len(model.sends)
        received = model.call(self.at, self.to, MessageType.PYTHON_CALL, call, handle)
        model.calls[self.to][call] += 1
        if received:
            model.handles[self.out] = received
        surely, perhaps = model.times.callee_waits(self.to, since)
        surely += self.seconds
        limits = (self.timeout, surely, perhaps)
        late, slack = model.times.timed(self.at, MessageType.PYTHON_CALL, *limits)
        arrives = surely - self.seconds + perhaps
        arrives += model.times.delay(self.at, MessageType.PYTHON_CALL)
        model.comes(self.out, arrives, late=bool(late))
        if late:
            model.abandoned_calls[self.to].add(call)
            if self.timeout is None:
                self._must_arrive(model, arrives)
        return model.shows(error=late, slack=slack)

    def _must_arrive(self, model: Model, takes: float) -> None:
        """Check that the handle has arrived when the default timeout comes.

        A program may use it from then on: only where a step names a timeout, a settle comes first.
        """
        if takes + CLEARLY_IN_TIME > (model.times.limit(None) or 0.0):
            msg = (
                f"{self!r}: its handle may arrive after the default timeout has come; give it a "
                f"timeout, so that a Settle must come before the first use."
            )
            raise UsageError(msg)

    @property
    def lasts(self) -> float:
        return self.seconds

    def leads_to(self, drawer: StepDrawer) -> tuple[str, int]:
        shared = drawer.scope.handles[self.out]
        if shared.late and self.out in drawer.coming:
            return "pause", 6 * AGAIN
        by_owner = shared.owner == self.at
        if by_owner and not drawer.facts.has_bug("unconfirmed-user"):
            # After a settle the new handle may be asked whether it is confirmed.
            return "settle", 3 * AGAIN
        return Step.leads_to(self, drawer)

    @classmethod
    def usable(cls, drawer: StepDrawer) -> list[str]:
        return [*drawer.shareable(), *drawer.doubtful()]

    @classmethod
    def using(
        cls, drawer: StepDrawer, name: str, handle: HandleInfo, *, to: int | None = None
    ) -> Share:
        to = drawer.receiver(name) if to is None else to
        inside: Any = drawer.pick(("", "", "list", "dict"))
        message, waits = MessageType.PYTHON_CALL, drawer.announces(name, to)
        timed = drawer.timing(handle.home, message, slow_late=drawer.settles, waits=waits)
        return cls(handle.home, name, to, drawer.name("handle"), inside, *timed)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        others = drawer.others[rank]
        match message:
            case MessageType.PYTHON_CALL:
                here = drawer.shareable(lambda h: h.home == rank)
                return [(cls.op, lambda: cls.draw(drawer, names=here))] if here else []
            case MessageType.RREF_CHILD_ACCEPT if others:
                users = drawer.handles(lambda h: h.home != h.owner)
            case MessageType.RREF_FORK_REQUEST if others:
                users = drawer.handles(lambda h: h.home != h.owner != rank)
            case _:
                return []
        users = [name for name in users if drawer.may_go(name, rank)]
        if not users:
            return [Remote.to_another(drawer, rank)]
        return [(cls.op, lambda: cls.draw(drawer, names=users, to=rank))]

    def drawn(self, drawer: StepDrawer) -> None:
        _note_arrival(drawer, self.out, self.at)
        if self.timeout is not None and self.handle not in drawer.uncreated | drawer.uncertain:
            drawer.note_coming(self.out, self.at)
        for names in (drawer.making, drawer.thinned, drawer.early, drawer.uncertain, drawer.read):
            if self.handle in names:
                names.add(self.out)
        if self.handle in drawer.uncreated:
            drawer.note_uncertain(self.handle)
            drawer.uncertain.add(self.out)
        if drawer.is_early(self.out):
            drawer.early |= drawer.same_rref(self.out)


def _note_arrival(drawer: StepDrawer, name: str, sender: int) -> None:
    """Note that a handle came from `sender`, perhaps to its owner before the value is made."""
    arrived = drawer.scope.handles[name]
    is_back = arrived.home == arrived.owner != sender
    if is_back and drawer.facts.has_bug("early-owner-fork"):
        drawer.unmade.add(name)


#: The finding that a fetch at the owner knows no timeout.
_IGNORED = "owner-ignores-timeout"


@dataclass(frozen=True, slots=True, repr=False)
class Fetch(OfHandle):
    """``to_here``: copy the value of a handle to the rank that has the handle."""

    op: ClassVar[str] = "fetch"
    waits_at = waits_nowhere
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 1
    often: ClassVar[int] = 1
    at: int
    handle: str
    timeout: float | None = None

    def predict(self, model: Model, call: str) -> StepPrediction:
        # UserRRef::toHere; at the owner OwnerRRef::getValue, which sends nothing.
        handle = model.handle(self.handle)
        rref = handle.rref
        if self.at == rref.owner:
            return self._predict_here(model, handle)
        message = fetch_message(typed=rref.typed)
        # The owner answers once the value is made (request_callback_no_python.cpp:
        # RequestCallbackNoPython::retrieveOwnerRRef). It is made while the request is delayed, too.
        surely = max(0.0, model.still_takes(rref) - model.times.delay(self.at, message))
        perhaps = max(0.0, rref.takes - surely)
        late, slack = model.times.timed(self.at, message, self.timeout, surely, perhaps)
        made, slow = rref.made, rref.slow
        if late and model.times.delay(self.at, message) >= (model.times.limit(self.timeout) or 0.0):
            # It is sent when it has timed out, so that a delete may overtake it at the owner.
            model.fetched_late(rref, surely=False)
        try:
            value = model.value(handle, self.at)
            if not late:
                model.has_value(handle)
                rref.takes = 0.0
                rref.slow = False
        except StepFails as failed:
            if late and failed.error == "remote":
                raise StepFails(late, slack) from None
            raise
        finally:
            if late and slow:
                rref.made = made
        return model.shows(None if late == "timeout" else value, late, slack)

    def _predict_here(self, model: Model, handle: Handle) -> StepPrediction:
        """At the owner, where nothing is sent.

        The docstring of ``to_here`` promises an exception after `timeout`, or after the default
        timeout, and excepts no rank.
        """
        rref = handle.rref
        limit = model.times.limit(self.timeout)
        over = 0.0 if limit is None else model.still_takes(rref) - limit
        late = over >= CLEARLY_LATE
        if late and not model.facts.has_bug(_IGNORED):
            return model.shows(error="timeout", slack=over)
        value = model.value(handle, self.at)
        rref.slow = rref.fetches = False
        rref.takes = 0.0
        if not late:
            return model.shows(value)
        # py_rref.cpp: PyRRef::toHere does at the owner what localValue does, without the timeout.
        model.findings.meets_here(_IGNORED, self.at, r"^expected torch's timeout, got the value ")
        return model.shows(error="timeout", slack=over)

    def leads_to(self, drawer: StepDrawer) -> tuple[str, int]:
        if self.handle in drawer.given_up and not drawer.facts.has_bug("fetch-after-delete"):
            # Its delete may come before the request of this fetch.
            return "drop", AGAIN
        return Step.leads_to(self, drawer)

    @classmethod
    def usable(cls, drawer: StepDrawer) -> list[str]:
        names = drawer.handles()
        if drawer.facts.has_bug(_IGNORED):
            handles = drawer.scope.handles
            here = {name for name in drawer.lasting if name in handles}
            names = [x for x in names if x not in here or handles[x].home != handles[x].owner]
        return [*names, *drawer.unsure()]

    @classmethod
    def using(cls, drawer: StepDrawer, name: str, handle: HandleInfo) -> Fetch:
        message = fetch_message(typed=handle.typed)
        if name in drawer.lasting or name in drawer.uncreated:
            return cls(handle.home, name, drawer.timeout(handle.home, message, late=False))
        is_user = handle.home != handle.owner
        late = None
        if is_user or not drawer.facts.has_bug(_IGNORED):
            late = drawer.late_for(name)
        timeout = drawer.timeout(handle.home, message, late=is_user, also=late)
        return cls(handle.home, name, timeout)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        if not message.name.endswith("_FETCH_CALL") or not drawer.others[rank]:
            return []
        typed = message is fetch_message(typed=True)
        users = drawer.handles(lambda h: h.home == rank != h.owner and h.typed == typed)
        if not users:
            return [Remote.to_another(drawer, rank, _flavours_of(message))]
        # Often where it may time out: what it leaves behind shows in what comes next.
        times = 3 if drawer.delay_milliseconds(rank, message) >= 500 else 1
        return [(cls.op, lambda: cls.draw(drawer, names=users))] * times

    def drawn(self, drawer: StepDrawer) -> None:
        handle = drawer.scope.handles[self.handle]
        message = fetch_message(typed=handle.typed)
        if self.at != handle.owner and drawer.ends(self.at, message, self.timeout):
            drawer.given_up |= drawer.same_rref(self.handle)
        if self.handle in drawer.uncreated:
            # The value comes only if torch has not marked the RRef by then. It has if the message
            # itself was late.
            drawer.note_uncertain(self.handle)
            creation = remote_message(typed=handle.typed)
            if self.timeout is None and not drawer.delay_milliseconds(self.at, creation):
                drawer.waited |= drawer.same_rref(self.handle)
            return
        lasts = self.handle in drawer.lasting
        if (self.timeout is None and not lasts) or self.handle not in drawer.making:
            _note_value(drawer, self.handle)


def _note_value(drawer: StepDrawer, name: str) -> None:
    """Note that a rank has seen the value of a handle, so it has been made."""
    if name in drawer.uncertain:
        # Perhaps the handle has never come.
        drawer.waited |= drawer.same_rref(name)
        return
    drawer.early -= drawer.same_rref(name)
    drawer.unmade.discard(name)
    drawer.unseen.discard(name)
    drawer.making -= drawer.same_rref(name)


@dataclass(frozen=True, slots=True, repr=False)
class Local(OfHandle):
    """``local_value``: the value of a handle at the rank that owns it."""

    op: ClassVar[str] = "local"
    waits_at = waits_nowhere
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 5
    at: int
    handle: str

    def enter(self, scope: Scope) -> None:
        owner = scope.alive(self.at, self.handle).owner
        if owner != self.at:
            msg = (
                f"handle {shown(self.handle)} is owned by rank {owner}; only its owner has the "
                f"local value. Use Fetch here."
            )
            raise UsageError(msg)

    def predict(self, model: Model, call: str) -> StepPrediction:
        handle = model.handle(self.handle)
        value = model.value(handle, self.at)
        handle.rref.slow = False
        return model.shows(value)

    @classmethod
    def usable(cls, drawer: StepDrawer) -> list[str]:
        return drawer.handles(lambda h: h.home == h.owner)

    @classmethod
    def instead(cls, drawer: StepDrawer) -> Step | None:
        return Own.draw(drawer) if Own.op in drawer.on else OfHandle.instead(drawer)

    def drawn(self, drawer: StepDrawer) -> None:
        _note_value(drawer, self.handle)


@dataclass(frozen=True, slots=True, repr=False)
class Through(OfHandle):
    """A method through an RRef: ``rref.rpc_sync().add(addend)``, ``rpc_async`` or ``remote``.

    `how` says which one; "remote" makes the handle `out` at `at`. The first such call asks the
    owner for the type of the value. `timeout` applies to each of the messages. The addend takes
    `seconds` (virtual) to be unpickled at the owner.
    """

    op: ClassVar[str] = "through"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 8
    goes_on: ClassVar[int] = 3
    at: int
    handle: str
    how: Literal["sync", "async", "remote"] = "sync"
    addend: float = 1.0
    out: str = ""
    timeout: float | None = None
    seconds: float = 0.0

    def enter(self, scope: Scope) -> None:
        check_seconds(self.seconds)
        if self.out and self.seconds:
            msg = "seconds of how='remote' are not modelled; use how='sync' or 'async'."
            raise UsageError(msg)
        handle = scope.alive(self.at, self.handle)
        if (self.how == "remote") != bool(self.out):
            msg = (
                f"how={shown(self.how)} and out={shown(self.out)}: how='remote' needs a name, "
                "others none."
            )
            raise UsageError(msg)
        if self.out and self.timeout is not None:
            msg = "a timeout of how='remote' is not modelled; use how='sync' or 'async'."
            raise UsageError(msg)
        if self.out:
            scope.new_handle(self.out, self.at, handle.owner, typed=False, size=handle.size)

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """The owner's function asks for the value of the handle, which may still be made."""
        return (owner_of(self.handle),)

    def predict(self, model: Model, call: str) -> StepPrediction:
        # torch/distributed/rpc/rref_proxy.py: _invoke_rpc asks for the type first, and then calls
        # _local_invoke on the owner, with the RRef among its arguments.
        handle = model.handle(self.handle)
        rref = handle.rref
        # An error that the RRef keeps instead of its type is raised before anything is looked at
        # (py_rref.cpp: PyRRef::getRRefType).
        if handle.type_error in (None, "", "timeout"):
            if handle.unmarked:
                # Its error is the same whether torch has marked the RRef by now or not; what it
                # sends is not.
                model.certain = False
            model.creations.use(handle)
        accept = model.times.delay(rref.owner, MessageType.RREF_CHILD_ACCEPT)
        perhaps = rref.takes + (accept if self.at != rref.owner else 0.0)
        late, slack = self._asks_in_time(model, handle, perhaps)
        self._ask_type(model, handle, late, slack)
        total = [x + self.addend for x in rref.value]
        if self.how == "remote":
            made, there = model.remote(self.at, rref.owner, typed=False, argument=handle)
            made.rref.value = total
            made.rref.takes = perhaps
            model.handles[self.out] = made
            model.readers.add(rref, made.rref)
            if there:
                model.drop(there)
        else:
            model.ask(self.at, rref.owner, MessageType.PYTHON_CALL, handle)
            if not late:
                # The owner reads the arguments before it calls (request_callback_no_python.cpp:
                # RequestCallbackNoPython::processMessage).
                taken = (self.timeout, self.seconds, perhaps)
                late, slack = model.times.timed(self.at, MessageType.PYTHON_CALL, *taken)
        if late:
            if self.how == "async" and handle.fork and self._ends_while_sent(model):
                model.findings.meets_in_proxy(handle, self.at)
            raise StepFails(late, slack)
        if rref.unclear:
            raise StepFails(error="unknown")
        return model.shows(None if self.how == "remote" else total)

    def _asks_in_time(
        self, model: Model, handle: Handle, perhaps: float
    ) -> tuple[ErrorClass, float]:
        """Whether the timeout comes before the call, and the slack: :meth:`Times.timed`."""
        message = MessageType.PYTHON_CALL
        late, slack = model.times.timed(self.at, message, self.timeout, perhaps=perhaps)
        called = model.times.timed(self.at, message, self.timeout, self.seconds, perhaps)[0]
        if late != "unknown" or called != "timeout":
            return late, slack
        if handle.type_error is None and self.at != handle.rref.owner:
            # Either the question for the type or the call ends by the timeout; nobody can tell.
            model.certain = False
            if self.how == "async" and handle.fork:
                model.findings.meets_in_proxy(handle, self.at)
        return "", slack

    @property
    def lasts(self) -> float:
        return self.seconds

    def _ends_while_sent(self, model: Model) -> bool:
        """Whether the timeout comes while the agent delays the call, in the thread that sends it.

        ``faulty_tensorpipe_agent.cpp``: ``FaultyTensorPipeAgent::pipeWrite``. Then the future of
        the call has failed before ``rref_proxy.py``: ``_wrap_rref_type_cont`` gives it a callback,
        which runs at once. It puts the error into another future, and the traceback of the error
        has its own frame, the one below that, and so the RRef.
        """
        limit = model.times.limit(self.timeout)
        return limit is not None and model.times.delay(self.at, MessageType.PYTHON_CALL) >= limit

    def _ask_type(self, model: Model, handle: Handle, late: ErrorClass, slack: float) -> None:
        if handle.type_error == "timeout":
            # torch raises the old timeout here and does not ask again, though it should. So the
            # owner gets no RRef with the question, and sends no accept.
            model.findings.meets("timed-out-type-query")
            asks = (self.at, handle.rref.owner, MessageType.PYTHON_CALL)
            model.findings.sends_otherwise("timed-out-type-query", *asks)
            accepts = (handle.rref.owner, self.at, MessageType.RREF_CHILD_ACCEPT)
            model.findings.sends_otherwise("timed-out-type-query", *accepts)
        asked = handle.type_error
        try:
            if asked in (None, "timeout"):
                ask_type(model, handle, self.at, late, slack)
                if handle.unmarked:
                    # The value was made after the creation had timed out, so the call cannot carry
                    # the RRef any more (RRefContext::prepareChildFork).
                    model.creations.mark(handle)
                    model.creations.told += 1
                    raise StepFails(error="creation", slack=handle.marked_before)
            elif asked:
                raise StepFails(asked)
        except StepFails as failed:
            # A message that cannot be sent raises before a future exists.
            if self.how == "async" and handle.fork and (asked or failed.error != "injected"):
                model.findings.meets_in_proxy(handle, self.at)
            raise

    @classmethod
    def usable(cls, drawer: StepDrawer) -> list[str]:
        return [*drawer.callable_through(), *drawer.doubtful(calls=True)]

    @classmethod
    def _has_asked(cls, drawer: StepDrawer, name: str) -> bool:
        """Whether an earlier call has asked for the type, so that only the call may time out."""
        return any(isinstance(step, cls) and step.handle == name for step in drawer.steps)

    @classmethod
    def using(cls, drawer: StepDrawer, name: str, handle: HandleInfo) -> Through:
        may_fail = drawer.may_hold_errors and drawer.facts.has_bug("failed-async-proxy")
        forms = ["sync"] if may_fail else ["sync", "async"]
        may_make = drawer.may_wait() and name not in drawer.uncreated
        form: Any = drawer.pick([*forms, "remote"] if may_make else forms)
        addend = drawer.pick(_ADDENDS)
        out = drawer.name("handle") if form == "remote" else ""
        drawer.waiting += form == "remote"
        message = MessageType.PYTHON_CALL
        if form == "remote":
            return cls(handle.home, name, form, addend, out)
        # A value that is still being made is waited for as well, and nobody knows how long.
        known = name not in drawer.making and name not in drawer.uncreated
        timed = drawer.timing(
            handle.home,
            message,
            late=not drawer.facts.has_bug("timed-out-type-query"),
            slow=known,
            slow_late=known and drawer.settles and cls._has_asked(drawer, name),
        )
        return cls(handle.home, name, form, addend, out, *timed)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        if message is not MessageType.PYTHON_CALL:
            return []
        handles = drawer.scope.handles
        names = [name for name in cls.usable(drawer) if handles[name].home == rank]
        # Often, because the first call through an RRef leaves something behind, also if it fails.
        times = 6 if drawer.delay_milliseconds(rank, message) >= 500 else 2
        if names:
            return [(cls.op, lambda: cls.draw(drawer, names=names))] * times
        method: Any = STEP_TYPES["method"]
        return [(method.op, lambda: method.draw(drawer, through=True, at=rank))] * times

    @classmethod
    def instead(cls, drawer: StepDrawer) -> Step | None:
        # A call through an RRef that it makes itself. So where the call is what matters, the step
        # that made the handle can be left out.
        method: Any = STEP_TYPES["method"]
        if method.op in drawer.on and drawer.fits(method):
            found: Step = method.draw(drawer, through=True)
            return found
        return _maker(drawer)

    def drawn(self, drawer: StepDrawer) -> None:
        if self.how == "remote":
            drawer.note_read(self.handle)
            drawer.unseen.add(self.out)
        if self.handle in drawer.uncreated:
            drawer.note_uncertain(self.handle)
        elif self.timeout is None and not drawer.may_fail(self.at, [MessageType.PYTHON_CALL]):
            _note_value(drawer, self.handle)


def ask_type(model: Model, handle: Handle, at: int, late: ErrorClass, slack: float) -> None:
    """The first call through a handle asks the owner for the type of the value.

    The RRef keeps the answer, or the error (``py_rref.cpp``: PyRRef::getRRefType).
    """
    handle.type_error = ""
    try:
        if at != handle.rref.owner:
            model.ask(at, handle.rref.owner, MessageType.PYTHON_CALL, handle)
            if late:
                raise StepFails(late, slack)
        # The owner answers once its function has returned, or raised (rref_proxy.py: _invoke_rpc
        # waits for that; api.py: _rref_typeof_on_owner asks for the local value).
        handle.rref.is_made()
        if handle.rref.error:
            raise StepFails(handle.rref.error)
    except StepFails as failed:
        handle.type_error = failed.error
        raise


@dataclass(frozen=True, slots=True, repr=False)
class Bump(OfHandle):
    """Add one to a handle's tensor in place, by a TorchScript function on its owner.

    Not idempotent: the next fetch shows it if a call ran twice. TorchScript must know the type of
    the handle's value, so a handle made by a Python function's ``remote`` cannot be bumped.
    `timeout` is that of the call. A TorchScript function cannot note that it ran, so after a bump
    that timed out no value of the RRef is predicted any more. While a function that an earlier step
    has started may still read the value, a bump is refused: wait for that function first.
    """

    op: ClassVar[str] = "bump"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 9
    at: int
    handle: str
    timeout: float | None = None

    def enter(self, scope: Scope) -> None:
        if not scope.alive(self.at, self.handle).typed:
            msg = (
                f"handle {shown(self.handle)} was made by a Python function, so TorchScript "
                f"does not know its type; make it with flavour='builtin' or 'script'."
            )
            raise UsageError(msg)

    @property
    def changed(self) -> tuple[str, ...]:
        return (self.handle,)

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """The owner's function asks for the value of the handle, which may still be made."""
        return (owner_of(self.handle),)

    def predict(self, model: Model, call: str) -> StepPrediction:
        handle = model.handle(self.handle)
        rref = handle.rref
        model.readers.check_none(rref)
        since = len(model.sends)
        model.ask(self.at, rref.owner, MessageType.SCRIPT_CALL, handle)
        surely, perhaps = model.times.callee_waits(rref.owner, since)
        late, slack = model.times.timed(
            self.at, MessageType.SCRIPT_CALL, self.timeout, surely, perhaps + rref.takes
        )
        rref.value = [x + 1.0 for x in rref.value]
        if late:
            rref.unclear = True
            return model.shows(error=late, slack=slack)
        rref.made = True
        if rref.unclear:
            raise StepFails(error="unknown")
        return model.shows(list(rref.value))

    @classmethod
    def usable(cls, drawer: StepDrawer) -> list[str]:
        return _bumpable(drawer)

    @classmethod
    def using(cls, drawer: StepDrawer, name: str, handle: HandleInfo) -> Bump:
        late = drawer.settles
        return cls(
            handle.home, name, drawer.timeout(handle.home, MessageType.SCRIPT_CALL, late=late)
        )

    def drawn(self, drawer: StepDrawer) -> None:
        if drawer.ends(self.at, MessageType.SCRIPT_CALL, self.timeout):
            drawer.unclear |= drawer.same_rref(self.handle)

    @classmethod
    def instead(cls, drawer: StepDrawer) -> Step | None:
        if Remote.op in drawer.on:
            return Remote.draw(drawer, flavours=TYPED)
        return OfHandle.instead(drawer)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        match message:
            case MessageType.SCRIPT_CALL:
                names = _bumpable(drawer, lambda h: h.home == rank)
            case MessageType.RREF_CHILD_ACCEPT if drawer.others[rank]:
                names = _bumpable(drawer, lambda h: h.owner == rank != h.home)
            case _:
                return []
        return [(cls.op, lambda: cls.draw(drawer, names=names))] if names else []


def _bumpable(drawer: StepDrawer, fits: Callable[[HandleInfo], bool] = lambda _: True) -> list[str]:
    return drawer.changeable(lambda h: h.typed and fits(h))


@dataclass(frozen=True, slots=True, repr=False)
class Nest(Step):
    """`at` calls `via`, which calls ``rpc.remote`` on `to` and returns the handle to `at`.

    `via` sleeps for `seconds` (virtual) first. `timeout` is that of the call. If it comes before
    the answer, `at` gets no handle, and a settle must follow before the program ends.
    """

    op: ClassVar[str] = "nest"
    waits_at = waits_nowhere
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 11
    at: int
    via: int
    to: int
    out: str
    left: Value = (1.0,)
    right: Value = (2.0,)
    flavour: Flavour = "python"
    timeout: float | None = None
    seconds: float = 0.0

    def enter(self, scope: Scope) -> None:
        check_arguments(scope, self.at, self.left, self.right, self.flavour)
        check_seconds(self.seconds)
        typed = self.flavour != "python"
        scope.new_handle(self.out, self.at, self.to, typed=typed, size=len(self.left))

    def predict(self, model: Model, call: str) -> StepPrediction:
        model.call(self.at, self.via, MessageType.PYTHON_CALL, call)
        if model.own_fate == "twice":
            # Each copy makes an RRef, and one of the two answers is dropped
            # (tensorpipe_agent.cpp: TensorPipeAgent::markFutureAsComplete).
            self._answers_in_vain(model, call)
        model.calls[self.via][call] += 1
        typed = self.flavour != "python"
        there, _ = model.remote(self.via, self.to, typed=typed)
        is_made = not (there.broken or there.rref.absent)
        if is_made and not typed:
            model.calls[self.to][f"{call}/nested"] += 1
        late, slack = self._time(model, remote_message(typed=typed))
        if late:
            model.abandoned_calls[self.via].add(call)
        if self._is_broken(model, there):
            # What the function returns cannot be sent (rref_context.cpp: prepareChildFork).
            model.answers.error(self.at, self.via, MessageType.PYTHON_CALL)
            model.drop(there)
            if late:
                model.creations.answers_late(there)
            raise StepFails(late or "creation", slack)
        if late:
            model.abandoned_calls[self.to].add(f"{call}/nested")
            self._unread(model, there)
            raise StepFails(late, slack)
        there.rref.value = sum_of(self.left, self.right)
        if model.own_fate == "unanswered":
            model.loses_answer(there, self.via)
        else:
            # The answer carries a fork, as an argument would (RRefContext::prepareChildFork).
            model.handles[self.out] = model.give(there, self.via, self.at)
        model.drop(there)
        return model.shows()

    def _is_broken(self, model: Model, there: Handle) -> bool:
        """Whether the creation has failed by the time when the function returns its RRef."""
        if there.broken:
            return True
        model.creation_unknown(there)
        try:
            model.creations.use(there)
        except StepFails:
            return True
        return False

    def _answers_in_vain(self, model: Model, call: str) -> None:
        """Its function runs, and nobody reads the answer: the fork in that stays."""
        model.calls[self.via][call] += 1
        typed = self.flavour != "python"
        there, _ = model.remote(self.via, self.to, typed=typed)
        if there.broken or there.rref.absent or there.unmarked:
            return
        if not typed:
            model.calls[self.to][f"{call}/nested"] += 1
        model.loses_answer(there, self.via)
        model.drop(there)

    def _unread(self, model: Model, there: Handle) -> None:
        """Nobody reads the answer, so nobody uses the RRef any more, and its owner must delete it.

        Torch's agent ends the call once, by its timeout, and drops an answer that comes later
        (``tensorpipe_agent.cpp``: TensorPipeAgent::markFutureAsComplete). So the fork in it, which
        RRefContext::prepareChildFork has noted, is never announced. An owner has counted it. A user
        keeps its own fork until the other one is confirmed (RRefContext::delPendingChild).
        """
        model.drop(there)
        # How often a torch that deletes the RRef sends what for that is its own affair.
        model.certain = False
        model.unread = True
        if there.fork not in there.rref.forks:
            model.findings.keeps("late-answer-keeps-rref", self.to, Counters(owners=1, forks=1))
        if there.fork:
            model.findings.keeps_user("late-answer-keeps-rref", self.via, self.to)

    @property
    def lasts(self) -> float:
        return self.seconds

    def _time(self, model: Model, message: MessageType) -> tuple[ErrorClass, float]:
        """Whether the call times out, surely or not at all, and with which slack."""
        waits = self.seconds + model.times.delay(self.via, message)
        late, slack = model.times.timed(self.at, MessageType.PYTHON_CALL, self.timeout, waits)
        if late == "unknown":
            least = waits + model.times.delay(self.at, MessageType.PYTHON_CALL)
            msg = (
                f"{self!r}: under this plan nobody can tell whether its handle comes before the "
                f"timeout, for it takes {least:g} s (virtual); let the timeout be "
                f"{CLEARLY_IN_TIME:g} s above that, {CLEARLY_LATE:g} s below, or None."
            )
            raise UsageError(msg)
        return late, slack

    @classmethod
    def draw(
        cls,
        drawer: StepDrawer,
        *,
        at: Sequence[int] = (),
        via: Sequence[int] = (),
        to: Callable[[int], bool] = lambda _: True,
        flavours: Sequence[Flavour] = FLAVOURS,
    ) -> Nest:
        caller = drawer.pick(at or drawer.ranks)
        middle = drawer.pick(via or drawer.peers[caller])
        target = drawer.pick([rank for rank in drawer.peers[middle] if to(rank)])
        flavour = drawer.pick(flavours)
        out = drawer.name("handle")
        pair = drawer.pick(PAIRS)
        late = drawer.may_end_late() and not drawer.facts.has_bug("late-answer-keeps-rref")
        timed = drawer.timing(caller, MessageType.PYTHON_CALL, late=late, slow_late=late)
        return cls(caller, middle, target, out, *pair, flavour, *timed)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        others = drawer.others[rank]
        aim: dict[str, Any]
        match message:
            case MessageType.PYTHON_CALL:
                aim = {"at": (rank,)}
            case MessageType.PYTHON_REMOTE_CALL | MessageType.SCRIPT_REMOTE_CALL:
                aim = {"via": (rank,), "flavours": _flavours_of(message)}
            case MessageType.RREF_FORK_REQUEST if len(others) > 1:
                # The returned handle is a user's, received from a user.
                aim = {"at": (rank,), "via": others[:1], "to": others[1:].__contains__}
            case MessageType.RREF_USER_DELETE if others:
                aim = {"via": (rank,), "to": others.__contains__}
            case _:
                return []
        return [(cls.op, lambda: cls.draw(drawer, **aim))]

    def drawn(self, drawer: StepDrawer) -> None:
        if drawer.ends(self.at, MessageType.PYTHON_CALL, self.timeout, self.seconds):
            drawer.note_unread(self.out)
            return
        _note_arrival(drawer, self.out, self.via)
        drawer.unseen.add(self.out)


@dataclass(frozen=True, slots=True, repr=False)
class Drop(OfHandle):
    """Drop a handle, and what was made beside it, and collect garbage at its rank.

    `by` says how: by ``del``, at the end of a scope, or by a thread that drops one RRef after
    another, about one in a millisecond of real time, while the program goes on. Such a thread is
    never drawn: when it drops what is not known, and a shutdown or a fault that comes meanwhile
    finds more RRefs or fewer. It serves the case of shutdown-races-delete.
    """

    op: ClassVar[str] = "drop"
    waits_at = waits_nowhere
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 4
    often: ClassVar[int] = 1
    goes_on: ClassVar[int] = 3
    at: int
    handle: str
    by: Literal["del", "scope", "thread"] = "del"

    def enter(self, scope: Scope) -> None:
        scope.alive(self.at, self.handle)
        del scope.handles[self.handle]
        scope.gone.add(self.handle)

    def predict(self, model: Model, call: str) -> StepPrediction:
        # UserRRef::tryDel, once RRefContext::delPendingChild knows that all children are accepted.
        handle = model.handle(self.handle)
        for one in (handle, *handle.beside):
            model.drop(one)
        del model.handles[self.handle]
        return model.shows()

    def drawn(self, drawer: StepDrawer) -> None:
        drawer.note_deleted(self.handle)

    @classmethod
    def usable(cls, drawer: StepDrawer) -> list[str]:
        return drawer.droppable()

    @classmethod
    def using(cls, drawer: StepDrawer, name: str, handle: HandleInfo) -> Drop:
        return cls(handle.home, name, drawer.pick(("del", "scope")))

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        if message is not MessageType.RREF_USER_DELETE or not drawer.others[rank]:
            return []
        users = drawer.droppable(lambda h: h.home == rank != h.owner)
        if not users:
            return [Remote.to_another(drawer, rank)]
        return [(cls.op, lambda: cls.draw(drawer, names=users))]
