"""What a program must do under a plan: values, messages, counters and calls, before anything runs.

The model follows the RRef protocol of torch's ``rref_context.cpp`` and the context cleanup of
``autograd/context/container.cpp``:

* Sending an RRef as an argument (or returning one) *forks* it. From the owner the fork is known at
  once. From a user, the receiver tells the owner (RREF_FORK_REQUEST) and then the sender
  (RREF_CHILD_ACCEPT); a receiver that is the owner only tells the sender.
* Dropping a user's fork sends RREF_USER_DELETE. It carries the same payload as that fork's
  RREF_FORK_REQUEST, and the agent counts failures by payload, so the two share one count.
* A user keeps its fork until every child that it sent is accepted. A child whose message was lost
  is never accepted, so the fork stays, whatever the program drops: that is the documented leak.
* Whoever releases a context sends CLEANUP_AUTOGRAD_CONTEXT_REQ to every rank that it exchanged
  messages with inside it; a rank that receives one while it has the context does the same.
* Inside a context every call travels as FORWARD_AUTOGRAD_REQ, which cannot be failed or delayed.
* The first call through an RRef (``rref.rpc_sync()``) asks its owner for the type of the value.
* A rank runs what it is asked for once the owners have answered the fork requests of the RRefs
  among its arguments. What these wait for counts against the timeout of the caller.
* torch marks an RRef whose creation timed out when the timeout comes, in a thread of its own. Until
  then a use of the RRef may raise nothing, as the documentation of ``rpc.remote`` warns
  (``rref_impl.cpp``: ``UserRRef::toHere`` looks at ``getTimedOut()`` once, at its start). So each
  such use has two outcomes, and a program with such uses has several predictions
  (:attr:`Prediction.alternatives`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, MessageType, SendDelay, delay_milliseconds, retry_wait
from rpcprops.oracle._gradients import run_context
from rpcprops.outcomes import UNLIMITED_SLACK, Counters
from rpcprops.programs import (
    Bump,
    Call,
    Chain,
    Context,
    Count,
    Drop,
    Fetch,
    Leaf,
    Local,
    Module,
    Nest,
    Optimize,
    Own,
    Pause,
    Program,
    Refused,
    Remote,
    Settle,
    Share,
    Through,
    Wait,
)

#: Virtual seconds by which a timeout must clear what the faults make its call wait for, before the
#: outcome is certain either way. Where it is shorter, that wait alone decides; where it is longer,
#: the answer must also come back in time.
CLEARLY_LATE = 0.25
CLEARLY_IN_TIME = 60.0

#: How a step ends: "" with its value; by torch's timeout; by an injected failure of a message that
#: torch does not retry; by what a function raised; because the RRef that it uses was never created;
#: because the handle that it uses never came; or in a way that cannot be known.
ErrorClass = Literal["", "timeout", "injected", "remote", "creation", "missing", "unknown"]

_CLEANUP = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ


@dataclass(frozen=True, slots=True)
class Send:
    """One message of the ten types.

    Attributes:
        payload: a name that two messages share exactly when their payload bytes are equal.
        failures: how often sending it fails.
        delivered: whether it is sent in the end.
    """

    rank: int
    message: MessageType
    payload: str
    failures: int = 0
    delivered: bool = True


@dataclass(frozen=True, slots=True)
class StepPrediction:
    """What a step must show.

    Attributes:
        value: what it yields, None when it yields nothing.
        error: the class of error that it must raise.
        slack: virtual seconds between the step's timeout and what faults make its answer wait for.
        counters: what each rank holds once it has settled after this step.
        failures: how many sends that are tried again have failed at each rank by then.
        calls: how often each named call has run at each rank by then.
    """

    value: Any = None
    error: ErrorClass = ""
    slack: float = UNLIMITED_SLACK
    counters: tuple[Counters, ...] = ()
    failures: tuple[int, ...] = ()
    calls: tuple[Mapping[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a run must show.

    Attributes:
        steps: one for each of the program's `leaves`.
        calls: how often each named call runs, by rank.
        given_up: the named calls, by rank, that shutdown may drop: their callers no longer wait
            for them, and nothing settles after them.
        sends: every message of the ten types, in order, up to the last settle.
        retried: how many sends that are tried again have failed by then, by rank.
        last_sends: the deletes that a graceful shutdown sends for what is still held.
        counters: what each rank holds at the end, once settled.
        graceful: whether shutdown can be graceful: its own calls are PYTHON_CALLs, so it is not
            where these fail.
        leaking: ranks whose graceful shutdown must report a leak, because a message that would
            have drained them was lost.
        hurried: ranks that may leave before their last deletes are through: they wait for a child
            to be accepted first, 100 virtual seconds, or the owner has nothing to be deleted.
        perhaps_leaking: ranks that may report one: such deletes come as late as their
            owners give up.
        keeping: ranks that may say that they could not release a context somewhere: their cleanup
            was lost, or a shutdown that came at once has given it up.
        hazards: names of known findings (docs/findings.md) that this program meets under this plan.
        certain: whether every failure and delay is predicted; a timeout near its delay, or cleanup
            that is lost to some peers only, makes it uncertain.
        waiting: ranks that hold a fork whose child will never be accepted; their shutdown waits for
            it, 100 virtual seconds.
        has_failed_function: whether a function that remote() started raises.
        unmarked_uses: how many uses of an RRef raise nothing although its creation times out, for
            torch has not marked it yet.
        contexts_left: how many contexts each rank may still hold after a graceful shutdown: those
            whose cleanup was lost, and those whose cleanup was still being tried again.
        alternatives: what else the run may show, where torch may mark a creation that timed out
            before its RRef is used or after. See :func:`rpcprops.oracle.chosen`.
    """

    steps: tuple[StepPrediction, ...]
    sends: tuple[Send, ...]
    calls: tuple[Mapping[str, int], ...]
    counters: tuple[Counters, ...]
    retried: tuple[int, ...]
    last_sends: tuple[Send, ...] = ()
    graceful: bool = True
    given_up: tuple[frozenset[str], ...] = ()
    leaking: frozenset[int] = frozenset()
    hurried: frozenset[int] = frozenset()
    perhaps_leaking: frozenset[int] = frozenset()
    keeping: frozenset[int] = frozenset()
    hazards: frozenset[str] = frozenset()
    certain: bool = True
    waiting: frozenset[int] = frozenset()
    has_failed_function: bool = False
    unmarked_uses: int = 0
    contexts_left: tuple[range, ...] = ()
    alternatives: tuple[Prediction, ...] = ()

    def failures(self) -> tuple[Mapping[MessageType, int], ...]:
        """How many sends fail, by rank and type, up to the last settle."""
        return _by_rank(self.sends, len(self.counters))

    def last_failures(self) -> tuple[Mapping[MessageType, int], ...]:
        """How many sends fail in the graceful shutdown, by rank and type."""
        return _by_rank(self.last_sends, len(self.counters))

    def failed_sends(self) -> tuple[range, ...]:
        """How many sends that are tried again may fail in all, by rank.

        Until the last settle they are known, and so are the last deletes of a graceful shutdown
        unless the rank is in a hurry: then it may not come to them, and may lose every try of each
        to an owner that has left.
        """
        found: list[range] = []
        for rank, settled in enumerate(self.retried):
            leaving = [send for send in self.last_sends if send.rank == rank]
            least = most = settled + sum(send.failures for send in leaving)
            if rank in self.hurried:
                least = settled
                most = settled + sum(send.message.max_retries + 1 for send in leaving)
            found.append(range(least, most + 1))
        return tuple(found)

    def delays(self, plan: FaultPlan) -> tuple[Mapping[MessageType, int], ...]:
        """How many sends must be held up, by rank and type, up to the last settle."""
        found: list[Counter[MessageType]] = [Counter() for _ in self.counters]
        for fault in plan.faults(len(self.counters)):
            if isinstance(fault, SendDelay) and (times := fault.could_strike(self)):
                found[fault.rank][fault.message] = times
        return tuple(found)

    def fault_seconds(self, plan: FaultPlan) -> float:
        """Virtual seconds that all retries and delays take, one after the other."""
        total = 0.0
        faults = plan.faults(len(self.counters))
        for struck in zip(*(fault.strikes(self.sends) for fault in faults), strict=True):
            for fault, times in zip(faults, struck, strict=True):
                total += fault.waits(times)
        return total


def _by_rank(sends: Sequence[Send], size: int) -> tuple[Mapping[MessageType, int], ...]:
    found: list[Counter[MessageType]] = [Counter() for _ in range(size)]
    for send in sends:
        if send.failures:
            found[send.rank][send.message] += send.failures
    return tuple(found)


class _Raises(Exception):
    """Ends a step with an error of that class."""

    def __init__(self, error: ErrorClass, slack: float = UNLIMITED_SLACK) -> None:
        super().__init__(error)
        self.error: ErrorClass = error
        self.slack = slack


@dataclass(slots=True)
class _RRef:
    """A value at its owner.

    Attributes:
        forks: the users' forks that the owner knows, also those that nobody will ever delete.
        error: how using the value fails: "remote" where the function that makes it raised.
        made: whether its creation has reached the owner for certain.
        takes: virtual seconds for which faults may still hold up the function that makes it.
        fetches: whether that function fetches an RRef that it was sent from another rank.
    """

    owner: int
    value: list[float]
    typed: bool
    forks: set[str] = field(default_factory=set)
    error: ErrorClass = ""
    made: bool = True
    takes: float = 0.0
    fetches: bool = False


@dataclass(slots=True)
class _Handle:
    """An RRef object at a rank.

    Attributes:
        fork: empty where the handle is the owner's own.
        broken: set where ``remote`` failed, as its user knows.
        timed_out: whether the creation went out late, so that a delete may overtake it.
        unmarked: whether the creation times out, and torch may not have marked the RRef yet.
        unaccepted: whether a child that it sent will never be accepted.
        type_error: None before the type was asked for, then "" or how asking failed.
    """

    rref: _RRef
    rank: int
    fork: str = ""
    broken: ErrorClass = ""
    timed_out: bool = False
    unmarked: bool = False
    unaccepted: bool = False
    type_error: ErrorClass | None = None

    @property
    def lost(self) -> bool:
        """Whether its creation was lost, so that its owner will never have the RRef."""
        return bool(self.broken) and not self.timed_out


class Model:
    """Predicts a program step by step.

    Args:
        choices: for each use, in order, of an RRef that torch may not have marked as timed out yet:
            whether it has. Those beyond are taken as not marked.
    """

    def __init__(self, world_size: int, plan: FaultPlan, choices: Sequence[bool] = ()) -> None:
        self.choices = choices
        #: How many such uses there were; and the handles that the current step has used so.
        self.unmarked_uses = 0
        self._used_now: list[_Handle] = []
        self.world_size = world_size
        self.plan = plan
        self.handles: dict[str, _Handle] = {}
        self.futures: dict[str, StepPrediction] = {}
        self.rrefs: list[_RRef] = []
        #: User handles that are held, or that wait for a child to be accepted.
        self.users: list[_Handle] = []
        self.kept: list[set[str]] = [set() for _ in range(world_size)]
        self.keeping: set[int] = set()
        #: Ranks in which the creation of an RRef has failed before.
        self.broke_one: set[int] = set()
        self.counts = [0] * world_size
        self.forks = 0
        self.sends: list[Send] = []
        #: How many of them were over when the last settle ended.
        self.settled = 0
        self.failed: Counter[tuple[int, str]] = Counter()
        self.calls: list[Counter[str]] = [Counter() for _ in range(world_size)]
        #: Calls that have timed out since the last settle.
        self.given_up: list[set[str]] = [set() for _ in range(world_size)]
        #: Deletes since then that failed at first, of RRefs that their owner may not have yet.
        self.early_deletes: list[_RRef] = []
        #: For each context whose cleanup may still be under way, the ranks that may hold it.
        self.late_contexts: list[set[int]] = []
        self.hazards: set[str] = set()
        self.certain = True
        self.steps: list[StepPrediction] = []

    def add(self, step: Leaf) -> StepPrediction:
        """What the next step must show."""
        index = len(self.steps)
        self._used_now.clear()
        if isinstance(step, Settle):
            for handle in self.handles.values():
                self._mark(handle)
                handle.timed_out = False
            for rref in self.rrefs:
                rref.made = True
                rref.takes = 0.0
            self.settled = len(self.sends)
            self.given_up = [set() for _ in self.given_up]
            self.early_deletes.clear()
            self.late_contexts.clear()
            predicted = StepPrediction(
                counters=self.counters(), failures=self.retried(), calls=self.called()
            )
        else:
            try:
                predicted = self._step(f"step{index}", step)
            except _Raises as raised:
                predicted = StepPrediction(None, raised.error, raised.slack)
        if predicted.error == "unknown":
            self.certain = False
        self.steps.append(predicted)
        return predicted

    def prediction(self, *, settles: bool = True) -> Prediction:
        """What the steps so far must have shown, and a graceful shutdown now would.

        Without `settles` the shutdown comes at once.
        """
        for handle in self.handles.values():
            self._mark(handle)
        # Graceful shutdown does not wait for cleanup that is being tried again.
        late = [] if settles else self.sends[self.settled :]
        abandoned = {send.rank for send in late if send.message is _CLEANUP and send.failures}
        counters = self.counters()
        graceful = not any(
            MessageType.PYTHON_CALL in self.plan.table(rank).failing
            for rank in range(self.world_size)
        )
        sends = tuple(self.sends)
        waiting = {user.rank for user in self.users if user.unaccepted}
        last, leaking, perhaps = self._shutdown(waiting) if graceful else ((), set(), set())
        hazards = set(self.hazards)
        if graceful and not settles and self._overtakes(last):
            hazards.add("shutdown-overtakes-creation")
        if graceful and not settles and any(r.fetches and not r.made for r in self.rrefs):
            hazards.add("shutdown-deletes-argument")
        dropped = self.given_up if graceful and not settles else [set[str]() for _ in self.calls]
        return Prediction(
            tuple(self.steps),
            sends,
            self.called(),
            counters,
            self.retried(),
            last,
            graceful,
            tuple(map(frozenset, dropped)),
            frozenset(leaking),
            frozenset(waiting | {user.rank for user in self.users if user.broken}),
            frozenset(perhaps),
            frozenset(self.keeping | abandoned),
            frozenset(hazards),
            self.certain,
            frozenset(waiting),
            any(rref.error for rref in self.rrefs),
            self.unmarked_uses - sum(self.choices[: self.unmarked_uses]),
            self._contexts_left(settles=settles),
        )

    def _contexts_left(self, *, settles: bool) -> tuple[range, ...]:
        """How many contexts each rank may hold after a graceful shutdown, which waits for no retry.

        ``TensorPipeAgent::join`` waits for ``clientActiveCalls_``, which counts no message that is
        only waiting to be sent again (``rpc_agent.cpp``: ``RpcAgent::rpcRetryCallback``).
        """
        found: list[range] = []
        for rank, kept in enumerate(self.kept):
            late = 0 if settles else sum(rank in ranks for ranks in self.late_contexts)
            found.append(range(len(kept), len(kept) + late + 1))
        return tuple(found)

    def _overtakes(self, last: Sequence[Send]) -> bool:
        """Whether a delete is tried again after owners may have seen that they own nothing."""
        again = {send.payload for send in last if send.failures}
        early = [user.rref for user in self.users if user.fork in again and not user.lost]
        return any(not rref.made for rref in (*early, *self.early_deletes))

    def counters(self) -> tuple[Counters, ...]:
        """An owner keeps a value in its table exactly while some fork of it is alive."""
        held = [(0, 0)] * self.world_size
        for rref in self.rrefs:
            if rref.forks:
                owners, forks = held[rref.owner]
                held[rref.owner] = (owners + 1, forks + len(rref.forks))
        return tuple(
            Counters(owners=owners, forks=forks, contexts=len(contexts))
            for (owners, forks), contexts in zip(held, self.kept, strict=True)
        )

    def retried(self) -> tuple[int, ...]:
        """How many sends that are tried again have failed so far, by rank."""
        found = [0] * self.world_size
        for send in self.sends:
            if send.message.is_retryable:
                found[send.rank] += send.failures
        return tuple(found)

    def called(self) -> tuple[Mapping[str, int], ...]:
        """How often each named call has run so far, by rank."""
        return tuple(dict(calls) for calls in self.calls)

    def _shutdown(self, waiting: set[int]) -> tuple[tuple[Send, ...], set[int], set[int]]:
        """Users delete what they still hold; what stays at an owner then is reported there."""
        before, failed = len(self.sends), self.failed.copy()
        gone: set[str] = set()
        perhaps: set[int] = set()
        for user in self.users:
            if self._send(user.rank, MessageType.RREF_USER_DELETE, user.fork):
                gone.add(user.fork)
            if user.rank in waiting:
                perhaps.add(user.rref.owner)
        leaking = {rref.owner for rref in self.rrefs if rref.forks - gone}
        last = tuple(self.sends[before:])
        del self.sends[before:]
        self.failed = failed
        return last, leaking, perhaps - leaking

    # Messages.

    def _send(self, rank: int, message: MessageType, payload: str = "") -> bool:
        """Send one message; whether it is delivered."""
        payload = payload or f"unique{len(self.sends)}"
        table = self.plan.table(rank)
        failures, delivered = 0, True
        if message in table.failing:
            left = table.num_fail_sends - self.failed[rank, payload]
            failures = min(left, message.max_retries + 1)
            delivered = failures <= message.max_retries
            self.failed[rank, payload] += failures
        self.sends.append(Send(rank, message, payload, failures, delivered))
        return delivered

    def _call(
        self,
        at: int,
        to: int,
        message: MessageType,
        payload: str = "",
        handle: _Handle | None = None,
    ) -> _Handle | None:
        """A call with a handle among its arguments, or none; what `to` receives for it."""
        if handle is not None:
            self._use(handle)
        if handle is not None and not handle.rref.made and at == to == handle.rref.owner:
            self.hazards.add("early-owner-fork")
        fork = self._prepare(handle, at) if handle else ""
        if not self._send(at, message, payload):
            if not message.endswith("_REMOTE_CALL"):
                # Whether the payload can be read depends on its bytes, down to its length.
                self.hazards.add("readable-injected-error")
            if handle:
                self._lose(handle, at)
            raise _Raises(error="injected")
        return self._receive(handle, at, to, fork) if handle else None

    def _prepare(self, handle: _Handle, sender: int) -> str:
        """Fork a handle while the message that carries it is written."""
        self.forks += 1
        fork = f"fork{self.forks}"
        if sender == handle.rref.owner:
            handle.rref.forks.add(fork)
        return fork

    def _lose(self, handle: _Handle, sender: int) -> None:
        """The message that carries a fork was not sent; an owner has counted the fork already."""
        if sender != handle.rref.owner:
            handle.unaccepted = True

    def _receive(self, handle: _Handle, sender: int, receiver: int, fork: str) -> _Handle:
        rref = handle.rref
        if receiver == rref.owner:
            rref.forks.discard(fork)
            if sender != rref.owner:
                self._accept(handle, receiver)
            return _Handle(rref, receiver)
        if sender != rref.owner:
            if not self._send(receiver, MessageType.RREF_FORK_REQUEST, fork):
                self.hazards.add("fork-request-given-up")
            rref.forks.add(fork)
            self._accept(handle, receiver)
        return self._new_user(_Handle(rref, receiver, fork))

    def _accept(self, parent: _Handle, receiver: int) -> None:
        if not self._send(receiver, MessageType.RREF_CHILD_ACCEPT):
            parent.unaccepted = True

    def _new_user(self, handle: _Handle) -> _Handle:
        self.users.append(handle)
        return handle

    def _drop(self, handle: _Handle) -> None:
        self._mark(handle)
        if not handle.fork or handle.unaccepted:
            return
        self.users = [user for user in self.users if user is not handle]
        if handle.timed_out:
            self.hazards.add("timed-out-remote-dropped")
        if self._send(handle.rank, MessageType.RREF_USER_DELETE, handle.fork):
            handle.rref.forks.discard(handle.fork)
        if self.sends[-1].failures and not handle.lost:
            self.early_deletes.append(handle.rref)

    def _new_rref(self, owner: int, value: Sequence[float], *, typed: bool) -> _RRef:
        rref = _RRef(owner, list(value), typed)
        self.rrefs.append(rref)
        return rref

    def _created(self, at: int, rref: _RRef) -> _Handle:
        """The handle of `at` to an RRef that a ``remote`` of it makes at another rank, or there."""
        if rref.owner == at:
            return _Handle(rref, at)
        self.forks += 1
        fork = f"fork{self.forks}"
        rref.forks.add(fork)
        rref.made = False
        return self._new_user(_Handle(rref, at, fork))

    def _remote(
        self, at: int, to: int, *, typed: bool, argument: _Handle | None = None
    ) -> tuple[_Handle, _Handle | None]:
        """``rpc.remote``: the handle that `at` gets, and what `to` receives for the argument."""
        message = _remote_message(typed=typed)
        if argument is not None:
            self._use(argument)
        handle = self._created(at, self._new_rref(to, [], typed=typed))
        try:
            received = self._call(at, to, message, handle=argument)
        except _Raises:
            self._break(handle, "creation")
            handle.rref.forks.clear()
            return handle, None
        return handle, received

    def _use(self, handle: _Handle) -> None:
        """A rank uses a handle: raises what that raises where its creation failed."""
        if handle.unmarked and not any(used is handle for used in self._used_now):
            self._used_now.append(handle)
            marked = self.choices[self.unmarked_uses : self.unmarked_uses + 1]
            self.unmarked_uses += 1
            if any(marked):
                self._mark(handle)
        if handle.broken:
            raise _Raises(error=handle.broken)

    def _mark(self, handle: _Handle) -> None:
        """torch has marked the RRef as timed out, where its creation does time out."""
        if handle.unmarked:
            handle.unmarked = False
            self._break(handle, "creation")

    def _break(self, handle: _Handle, how: ErrorClass) -> None:
        """The creation of a handle's RRef failed, as far as its rank knows."""
        handle.broken = how
        if handle.rank in self.broke_one:
            self.hazards.add("second-failed-remote")
        self.broke_one.add(handle.rank)

    def _value(self, handle: _Handle, at: int) -> list[float]:
        """``to_here``, or ``local_value`` at the owner."""
        self._use(handle)
        rref = handle.rref
        if at != rref.owner:
            message = _fetch_message(typed=rref.typed)
            if not self._send(at, message, f"fetch {self.rrefs.index(rref)}"):
                self.hazards.add("readable-injected-error")
                raise _Raises(error="injected")
        rref.made = True
        if rref.error:
            raise _Raises(error=rref.error)
        return list(rref.value)

    def _compute(self, at: int, left: Sequence[float], right: Any, there: _Handle | None) -> Any:
        """What a called function computes at `at`, of a value or of the handle it was sent."""
        if there is None:
            return _sum(left, right)
        try:
            return _sum(left, self._value(there, at))
        except _Raises as raised:
            raise _Raises(error="remote" if raised.error != "unknown" else "unknown") from None
        finally:
            self._drop(there)

    def _delay(self, rank: int, message: MessageType) -> float:
        """Virtual seconds for which a message of `rank` is held up."""
        delay = self.plan.table(rank).messages_to_delay.get(message, 0.0)
        return delay_milliseconds(delay) / 1000

    def _callee_waits(self, at: int, since: int) -> tuple[float, float]:
        """Virtual seconds that a call waits for at `at`, by the messages sent there `since` then.

        Returns: those that it waits for certainly, and those that it may wait for besides: accepts
        and deletes are sent by the thread that answers, or by another.
        """
        surely = perhaps = 0.0
        for send in self.sends[since:]:
            if send.rank != at:
                continue
            delay = self._delay(at, send.message) if send.delivered else 0.0
            if send.message is MessageType.RREF_FORK_REQUEST:
                surely += retry_wait(min(send.failures, send.message.max_retries)) + delay
            elif send.message.endswith("_FETCH_CALL"):
                surely += delay
            elif send.message.startswith("RREF_"):
                perhaps += delay
        return surely, perhaps

    def _timed(
        self,
        at: int,
        message: MessageType,
        timeout: float | None,
        surely: float = 0.0,
        perhaps: float = 0.0,
    ) -> tuple[ErrorClass, float]:
        """Whether a message of `at` misses its timeout: "", "timeout" or "unknown"; the slack.

        Its answer waits `surely` besides the message's own delay, and `perhaps` longer.
        """
        if timeout is None:
            return "", UNLIMITED_SLACK
        slack = timeout - self._delay(at, message) - surely
        if slack <= -CLEARLY_LATE:
            return "timeout", -slack
        slack -= perhaps
        return "" if slack >= CLEARLY_IN_TIME else "unknown", abs(slack)

    # The steps.

    def _handle(self, name: str) -> _Handle:
        if name not in self.handles:
            raise _Raises(error="missing")
        return self.handles[name]

    def _argument(self, argument: Any) -> _Handle | None:
        return self._handle(argument) if isinstance(argument, str) else None

    def _step(self, call: str, step: Leaf) -> StepPrediction:
        value: Any = None
        match step:
            case Remote():
                return self._make(call, step)
            case Own():
                # torch infers the type of the value, so this RRef is no Python object to it.
                rref = self._new_rref(step.at, step.value, typed=True)
                self.handles[step.out] = _Handle(rref, step.at)
            case Share():
                return self._share(call, step)
            case Fetch():
                return self._fetch(step)
            case Local():
                value = self._value(self._handle(step.handle), step.at)
            case Call():
                predicted = self._ask(call, step)
                if step.wait != "later":
                    return predicted
                self.futures[step.out] = predicted
            case Wait():
                if step.future not in self.futures:
                    raise _Raises(error="missing")
                return self.futures.pop(step.future)
            case Count():
                self._call(step.at, step.to, MessageType.PYTHON_CALL, call)
                self.calls[step.to][call] += 1
                self.counts[step.to] += 1
                value = self.counts[step.to]
            case Chain():
                self._call(step.at, step.to, MessageType.PYTHON_CALL, call)
                self.calls[step.to][call] += 1
                self._call(step.to, step.then, MessageType.PYTHON_CALL, f"{call}/then")
                self.calls[step.then][f"{call}/then"] += 1
                value = _sum(step.left, step.right)
            case Through():
                value = self._through(step)
            case Bump():
                handle = self._handle(step.handle)
                owner = handle.rref.owner
                there = self._call(step.at, owner, MessageType.SCRIPT_CALL, handle=handle)
                if there:
                    self._drop(there)
                handle.rref.made = True
                handle.rref.value = [x + 1.0 for x in handle.rref.value]
                value = list(handle.rref.value)
            case Nest():
                self._nest(call, step)
            case Drop():
                self._drop(self._handle(step.handle))
                del self.handles[step.handle]
            case Context():
                value = self._context(call, step)
            case Optimize():
                value = self._optimize(call, step)
            case Module():
                value = self._module(step)
            case Refused():
                value = {"refused": step.context not in self.kept[step.at]}
            case Pause() | Settle():
                pass
        return StepPrediction(value)

    def _make(self, call: str, step: Remote) -> StepPrediction:
        typed = step.flavour != "python"
        argument = self._argument(step.right)
        since = len(self.sends)
        handle, there = self._remote(step.at, step.to, typed=typed, argument=argument)
        self.handles[step.out] = handle
        if handle.broken:
            return StepPrediction()
        if not typed:
            self.calls[step.to][call] += 1
        rref = handle.rref
        if step.raises:
            rref.error = "remote"
            if there:
                self._drop(there)
        else:
            try:
                rref.fetches = there is not None and there.rref.owner != step.to
                rref.value = self._compute(step.to, step.left, step.right, there)
            except _Raises as raised:
                rref.error = raised.error
        message = _remote_message(typed=typed)
        surely, perhaps = self._callee_waits(step.to, since)
        perhaps += argument.rref.takes if argument else 0.0
        rref.takes = surely + perhaps
        late, slack = self._timed(step.at, message, step.timeout, surely, perhaps)
        if late == "unknown":
            least = self._delay(step.at, message) + surely
            msg = (
                f"{step!r}: under this plan nobody can tell whether its creation times out, for it "
                f"takes {least:g} to {least + perhaps:g} s (virtual); let the timeout be "
                f"{CLEARLY_IN_TIME:g} s above that, {CLEARLY_LATE:g} s below, or None."
            )
            raise UsageError(msg)
        if late:
            handle.timed_out = True
            handle.unmarked = True
            self.given_up[step.to].add(call)
            held_up = self._delay(step.at, message) - (step.timeout or 0.0)
            if held_up >= CLEARLY_LATE:
                # remote() returns after its own delay, and the timeout came before that.
                self._mark(handle)
                if step.at == step.to:
                    self.hazards.add("late-remote-to-self")
        return StepPrediction(slack=slack)

    def _share(self, call: str, step: Share) -> StepPrediction:
        handle = self._handle(step.handle)
        since = len(self.sends)
        received = self._call(step.at, step.to, MessageType.PYTHON_CALL, call, handle)
        self.calls[step.to][call] += 1
        if received:
            self.handles[step.out] = received
        waits = self._callee_waits(step.to, since)
        late, slack = self._timed(step.at, MessageType.PYTHON_CALL, step.timeout, *waits)
        if late:
            self.given_up[step.to].add(call)
        return StepPrediction(error=late, slack=slack)

    def _fetch(self, step: Fetch) -> StepPrediction:
        handle = self._handle(step.handle)
        if step.at == handle.rref.owner:
            return StepPrediction(self._value(handle, step.at))
        rref = handle.rref
        message = _fetch_message(typed=rref.typed)
        late, slack = self._timed(step.at, message, step.timeout, perhaps=rref.takes)
        try:
            value = self._value(handle, step.at)
            if not late:
                # The value is made after the creation's timeout, if that came at all.
                self._mark(handle)
                rref.takes = 0.0
        except _Raises as raised:
            if late and raised.error == "remote":
                raise _Raises(late, slack) from None
            raise
        return StepPrediction(None if late == "timeout" else value, late, slack)

    def _ask(self, call: str, step: Call) -> StepPrediction:
        """A call, and how its future ends; raises only what keeps the call from being made."""
        python = step.flavour == "python"
        message = MessageType.PYTHON_CALL if python else MessageType.SCRIPT_CALL
        argument = self._argument(step.right)
        if argument is not None:
            self._use(argument)
        # A TorchScript call holds its function and its tensors' places, not what is in them.
        payload = call if python else f"{step.flavour} {step.raises}"
        since = len(self.sends)

        def timed() -> tuple[ErrorClass, float]:
            surely, perhaps = self._callee_waits(step.to, since)
            perhaps += argument.rref.takes if argument else 0.0
            late, slack = self._timed(step.at, message, step.timeout, surely, perhaps)
            if late and python:
                self.given_up[step.to].add(call)
            return late, slack

        try:
            there = self._call(step.at, step.to, message, payload, argument)
            if python:
                self.calls[step.to][call] += 1
            if step.raises:
                if there:
                    self._drop(there)
                raise _Raises(error="remote")
            value = self._compute(step.to, step.left, step.right, there)
        except _Raises as raised:
            late, slack = timed()
            error = raised.error if raised.error == "injected" or not late else late
            return StepPrediction(error=error, slack=slack)
        late, slack = timed()
        return StepPrediction(None if late == "timeout" else value, late, slack)

    def _through(self, step: Through) -> list[float] | None:
        handle = self._handle(step.handle)
        rref = handle.rref
        self._use(handle)
        accept = self._delay(rref.owner, MessageType.RREF_CHILD_ACCEPT)
        perhaps = rref.takes + (accept if step.at != rref.owner else 0.0)
        late, slack = self._timed(step.at, MessageType.PYTHON_CALL, step.timeout, perhaps=perhaps)
        if handle.type_error == "timeout":
            # torch raises the old timeout here, and asks no more; it should ask again.
            self.hazards.add("timed-out-type-query")
        asked = handle.type_error
        try:
            if asked in (None, "timeout"):
                self._ask_type(handle, step.at, late, slack)
            elif asked:
                raise _Raises(error=asked)
        except _Raises as raised:
            # A message that cannot be sent raises before there is a future.
            if step.how == "async" and handle.fork and (asked or raised.error != "injected"):
                self.hazards.add("failed-async-proxy")
            raise
        total = [x + step.addend for x in rref.value]
        if step.how == "remote":
            made, there = self._remote(step.at, rref.owner, typed=False, argument=handle)
            made.rref.value = total
            made.rref.takes = perhaps
            self.handles[step.out] = made
        else:
            there = self._call(step.at, rref.owner, MessageType.PYTHON_CALL, handle=handle)
        if there:
            self._drop(there)
        if late:
            raise _Raises(late, slack)
        return None if step.how == "remote" else total

    def _ask_type(self, handle: _Handle, at: int, late: ErrorClass, slack: float) -> None:
        """The first call through a handle asks the owner for the type of the value."""
        handle.type_error = ""
        try:
            if at != handle.rref.owner:
                there = self._call(at, handle.rref.owner, MessageType.PYTHON_CALL, handle=handle)
                if there:
                    self._drop(there)
                if late:
                    raise _Raises(late, slack)
            if handle.rref.error:
                raise _Raises(error=handle.rref.error)
        except _Raises as raised:
            handle.type_error = raised.error
            raise

    def _nest(self, call: str, step: Nest) -> None:
        self._call(step.at, step.via, MessageType.PYTHON_CALL, call)
        self.calls[step.via][call] += 1
        typed = step.flavour != "python"
        there, _ = self._remote(step.via, step.to, typed=typed)
        if there.broken:
            self._drop(there)
            raise _Raises(error="creation")
        if not typed:
            self.calls[step.to][f"{call}/nested"] += 1
        there.rref.value = _sum(step.left, step.right)
        fork = self._prepare(there, step.via)
        self.handles[step.out] = self._receive(there, step.via, step.at, fork)
        self._drop(there)

    def _context(self, call: str, step: Context) -> dict[str, Any]:
        for rank in step.path:
            self.calls[rank][call] += 1
        if step.rrefs:
            for to in step.path[:1] if step.nested else step.path:
                # Created and fetched as FORWARD_AUTOGRAD_REQ; only its delete is in the open.
                handle = self._created(step.at, self._new_rref(to, [], typed=False))
                handle.rref.made = True
                self._drop(handle)
        if step.breaks is not None and len({step.at, *step.path}) <= len(step.path):
            self.hazards.add("failed-backward-revisits-rank")
        self._release(step.name, step.at, _acquaintances(step))
        return run_context(step)

    def _release(self, name: str, at: int, known: Mapping[int, set[int]]) -> None:
        """A context ends at `at`; every rank that cleanup reaches passes it on."""
        reached = {at}
        at_once = {at}
        queue = [at]
        while queue:
            rank = queue.pop(0)
            if not known.get(rank):
                continue
            before = len(self.sends)
            if not self._clean(rank, sorted(known[rank]), f"context {name}"):
                self.keeping.add(rank)
                continue
            if rank in at_once and not any(send.failures for send in self.sends[before:]):
                at_once |= known[rank]
            for peer in sorted(known[rank] - reached):
                reached.add(peer)
                queue.append(peer)
        for rank in known:
            if rank not in reached:
                self.kept[rank].add(name)
        self.late_contexts.append(reached - at_once)

    def _clean(self, rank: int, peers: Sequence[int], payload: str) -> bool:
        """One cleanup to each peer; they have one payload, so they share the failures.

        Whether all are delivered; where only some are, nothing after is certain.
        """
        table = self.plan.table(rank)
        left = table.num_fail_sends if _CLEANUP in table.failing else 0
        tries = _CLEANUP.max_retries + 1
        each, more = divmod(left, len(peers))
        for number, _ in enumerate(peers):
            failures = min(tries, each + (number < more))
            self.sends.append(Send(rank, _CLEANUP, payload, failures, failures < tries))
        if each < tries <= each + bool(more):
            self.certain = False
        return each + bool(more) < tries

    def _optimize(self, call: str, step: Optimize) -> list[list[float]]:
        made: list[_Handle] = []
        try:
            for owner in step.owners:
                handle, _ = self._remote(step.at, owner, typed=False)
                made.append(handle)
                if not handle.broken:
                    handle.rref.value = list(step.value)
                    self.calls[owner][call] += 1
            parameters = tuple(made)
            optimizers = self._new_optimizers(step, parameters, made)
            for optimizer in optimizers:
                # The step runs inside the context, so only the handle that it carries shows.
                owner = optimizer.rref.owner
                fork = self._prepare(optimizer, step.at)
                self._drop(self._receive(optimizer, step.at, owner, fork))
            known: dict[int, set[int]] = {step.at: set(step.owners)}
            for owner in step.owners:
                known.setdefault(owner, set()).add(step.at)
            self._release(step.name, step.at, known)
            for parameter in parameters:
                parameter.rref.value = [0.5 * x for x in step.value]
            return [self._value(parameter, step.at) for parameter in parameters]
        finally:
            for handle in made:
                self._drop(handle)

    def _new_optimizers(
        self, step: Optimize, parameters: Sequence[_Handle], made: list[_Handle]
    ) -> list[_Handle]:
        """The constructor asks all owners, and then raises if one has failed."""
        found: list[_Handle] = []
        failed: _Raises | None = None
        for parameter in parameters:
            owner = parameter.rref.owner
            if parameter.broken:
                raise _Raises(error=parameter.broken)
            try:
                there = self._call(step.at, owner, MessageType.PYTHON_CALL, handle=parameter)
            except _Raises as raised:
                failed = raised
                continue
            if there:
                self._drop(there)
            local = _Handle(self._new_rref(owner, [], typed=False), owner)
            fork = self._prepare(local, owner)
            optimizer = self._receive(local, owner, step.at, fork)
            made.append(optimizer)
            found.append(optimizer)
        if failed:
            raise failed
        return found

    def _module(self, step: Module) -> list[float]:
        handle, _ = self._remote(step.at, step.to, typed=False)
        try:
            there = self._call(step.at, step.to, MessageType.PYTHON_CALL, handle=handle)
            if there:
                self._drop(there)
            handle.rref.made = True
            return [2.0 * x + 1.0 for x in step.value]
        finally:
            self._drop(handle)


def _remote_message(*, typed: bool) -> MessageType:
    return MessageType.SCRIPT_REMOTE_CALL if typed else MessageType.PYTHON_REMOTE_CALL


def _fetch_message(*, typed: bool) -> MessageType:
    return MessageType.SCRIPT_RREF_FETCH_CALL if typed else MessageType.PYTHON_RREF_FETCH_CALL


def _acquaintances(step: Context) -> dict[int, set[int]]:
    """The ranks that each rank of a context exchanged messages with inside it."""
    known: dict[int, set[int]] = {}
    caller = step.at
    for rank in step.path:
        known.setdefault(caller, set()).add(rank)
        known.setdefault(rank, set()).add(caller)
        if step.nested:
            caller = rank
    return known


def _sum(left: Any, right: Any) -> list[float]:
    return [a + b for a, b in zip(left, right, strict=True)]


#: How many outcomes a program may have at most, by when torch marks creations that time out.
_MOST_ALTERNATIVES = 64


@functools.lru_cache(maxsize=512)
def predict(program: Program, plan: FaultPlan) -> Prediction:
    """What `program` must do under `plan`, within the retry budget or beyond it.

    Raises:
        UsageError: the plan names a rank outside the world, or the program has a creation of which
            nobody can tell whether it times out, or too many uses of one that does.
    """
    plan.check(program.world_size)
    first, *others = _alternatives(program, plan)
    return replace(first, alternatives=tuple(others))


def _alternatives(program: Program, plan: FaultPlan) -> list[Prediction]:
    """All that the program may show: in the first no RRef was marked before it was used."""
    found: list[Prediction] = []
    waiting: list[tuple[bool, ...]] = [()]
    while waiting:
        choices = waiting.pop(0)
        model = Model(program.world_size, plan, choices)
        for step in program.leaves:
            model.add(step)
        found.append(model.prediction(settles=program.settles))
        later = range(len(choices), model.unmarked_uses)
        waiting += [(*choices, *[False] * (use - len(choices)), True) for use in later]
        if len(found) + len(waiting) > _MOST_ALTERNATIVES:
            msg = (
                f"the program uses RRefs whose creation times out in more than "
                f"{_MOST_ALTERNATIVES} ways before torch must have marked them; put a Settle() "
                f"between such a remote() and its uses."
            )
            raise UsageError(msg)
    return found
