"""What a program must do under a plan: values, messages, counters and calls, before anything runs.

The model follows the RRef protocol of torch's ``rref_context.cpp`` and the context cleanup of
``autograd/context/container.cpp``:

* Sending an RRef as an argument (or returning one) *forks* it. From the owner the fork is known at
  once. From a user, the receiver tells the owner (RREF_FORK_REQUEST) and then the sender
  (RREF_CHILD_ACCEPT); a receiver that is the owner only tells the sender.
* Dropping a user's fork sends RREF_USER_DELETE. It carries the same payload as that fork's
  RREF_FORK_REQUEST, and the agent counts failures by payload, so the two share one count.
* Whoever releases a context sends CLEANUP_AUTOGRAD_CONTEXT_REQ to every rank that it exchanged
  messages with inside it; a rank that receives one while it has the context does the same.
* Inside a context every call travels as FORWARD_AUTOGRAD_REQ, which cannot be failed or delayed.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, MessageType, delay_milliseconds
from rpcprops.oracle._gradients import run_context
from rpcprops.outcomes import UNLIMITED_SLACK, Counters
from rpcprops.programs import (
    Bump,
    Call,
    Context,
    Drop,
    Fetch,
    Nest,
    Own,
    Program,
    Refused,
    Remote,
    Settle,
    Share,
    Step,
)

#: Virtual seconds by which a timeout must clear a delay before the outcome is certain either way.
#: Below the timeout the delay alone decides; above it the answer must also come back in time.
CLEARLY_LATE = 0.25
CLEARLY_IN_TIME = 60.0


@dataclass(frozen=True, slots=True)
class Send:
    """One message of the ten types, as it is sent when nothing fails.

    Attributes:
        payload: a name that two messages share exactly when their payload bytes are equal.
    """

    rank: int
    message: MessageType
    payload: str


@dataclass(frozen=True, slots=True)
class StepPrediction:
    """What a step must show.

    Attributes:
        value: what it yields, None when it yields nothing.
        error: the class of error that it must raise: "" none, "timeout", or "unknown" when either
            may happen.
        slack: virtual seconds between the step's timeout and the delay of its message.
        counters: what each rank holds once it has settled after this step.
    """

    value: Any = None
    error: str = ""
    slack: float = UNLIMITED_SLACK
    counters: tuple[Counters, ...] = ()


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a run must show.

    Attributes:
        calls: how often each named call runs, by rank.
        sends: every message of the ten types, in order.
        counters: what each rank holds at the end, once settled.
    """

    steps: tuple[StepPrediction, ...]
    sends: tuple[Send, ...]
    calls: tuple[Mapping[str, int], ...]
    counters: tuple[Counters, ...]

    def failures(self, plan: FaultPlan) -> tuple[Mapping[MessageType, int], ...]:
        """How many sends must fail, by rank and type, under `plan` (within its retry budget).

        Each payload fails `num_fail_sends` times on its sender, whichever type comes first.
        """
        return tuple(
            Counter({m: n for m, n in by_type.items() if n}) for by_type in self._failures(plan)
        )

    def _failures(self, plan: FaultPlan) -> list[Counter[MessageType]]:
        found: list[Counter[MessageType]] = [Counter() for _ in self.counters]
        spent: set[tuple[int, str]] = set()
        for send in self.sends:
            table = plan.table(send.rank)
            if send.message not in table.failing or (send.rank, send.payload) in spent:
                continue
            spent.add((send.rank, send.payload))
            found[send.rank][send.message] += table.num_fail_sends
        return found

    def delays(self, plan: FaultPlan) -> tuple[Mapping[MessageType, int], ...]:
        """How many sends must be held up, by rank and type."""
        found: list[Counter[MessageType]] = [Counter() for _ in self.counters]
        for send in self.sends:
            if send.message in plan.table(send.rank).delaying:
                found[send.rank][send.message] += 1
        return tuple(found)


@dataclass(slots=True)
class _RRef:
    owner: int
    value: list[float]
    typed: bool
    forks: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Handle:
    rref: _RRef
    fork: str  # empty where the handle is the owner's own


class _Model:
    def __init__(self, program: Program, plan: FaultPlan) -> None:
        self.program = program
        self.plan = plan
        self.handles: dict[str, _Handle] = {}
        self.rrefs: list[_RRef] = []
        self.forks = 0
        self.sends: list[Send] = []
        self.calls: list[Counter[str]] = [Counter() for _ in range(program.world_size)]

    def predict(self) -> Prediction:
        steps = tuple(self.step(index, step) for index, step in enumerate(self.program.steps))
        return Prediction(
            steps, tuple(self.sends), tuple(dict(calls) for calls in self.calls), self.counters()
        )

    def counters(self) -> tuple[Counters, ...]:
        """An owner keeps a value in its table exactly while some fork of it is alive."""
        held = [(0, 0)] * self.program.world_size
        for rref in self.rrefs:
            if rref.forks:
                owners, forks = held[rref.owner]
                held[rref.owner] = (owners + 1, forks + len(rref.forks))
        return tuple(Counters(owners=owners, forks=forks) for owners, forks in held)

    # The protocol.

    def send(self, rank: int, message: MessageType, payload: str = "") -> None:
        self.sends.append(Send(rank, message, payload or f"unique{len(self.sends)}"))

    def new_fork(self, rref: _RRef) -> str:
        self.forks += 1
        fork = f"fork{self.forks}"
        rref.forks.add(fork)
        return fork

    def transfer(self, handle: _Handle, sender: int, receiver: int) -> _Handle:
        """Send a handle in a message; what the receiver holds then."""
        rref = handle.rref
        if receiver == rref.owner:
            if sender != rref.owner:
                self.send(receiver, MessageType.RREF_CHILD_ACCEPT)
            return _Handle(rref, "")
        fork = self.new_fork(rref)
        if sender != rref.owner:
            self.send(receiver, MessageType.RREF_FORK_REQUEST, fork)
            self.send(receiver, MessageType.RREF_CHILD_ACCEPT)
        return _Handle(rref, fork)

    def drop(self, handle: _Handle, rank: int) -> None:
        if handle.fork:
            handle.rref.forks.discard(handle.fork)
            self.send(rank, MessageType.RREF_USER_DELETE, handle.fork)

    def remote(self, at: int, to: int, value: list[float], *, typed: bool) -> _Handle:
        self.send(at, MessageType.SCRIPT_REMOTE_CALL if typed else MessageType.PYTHON_REMOTE_CALL)
        rref = _RRef(to, value, typed)
        self.rrefs.append(rref)
        return _Handle(rref, self.new_fork(rref) if at != to else "")

    def fetch(self, handle: _Handle, at: int) -> list[float]:
        if at != handle.rref.owner:
            script = handle.rref.typed
            self.send(
                at,
                MessageType.SCRIPT_RREF_FETCH_CALL
                if script
                else MessageType.PYTHON_RREF_FETCH_CALL,
            )
        return list(handle.rref.value)

    def add(self, at: int, to: int, step: Remote | Call) -> list[float]:
        """The sum that `to` computes from the arguments that `at` sends."""
        if not isinstance(step.right, str):
            return _sum(step.left, step.right)
        there = self.transfer(self.handles[step.right], at, to)
        total = _sum(step.left, self.fetch(there, to))
        self.drop(there, to)
        return total

    # The steps.

    def step(self, index: int, step: Step) -> StepPrediction:
        call = f"step{index}"
        value: Any = None
        error, slack = "", UNLIMITED_SLACK
        match step:
            case Remote():
                typed = step.flavour != "python"
                if not typed:
                    self.calls[step.to][call] += 1
                handle = self.remote(step.at, step.to, [], typed=typed)
                handle.rref.value = self.add(step.at, step.to, step)
                self.handles[step.out] = handle
            case Own():
                # torch infers the type of the value, so this RRef is no Python object to it.
                rref = _RRef(step.at, list(step.value), typed=True)
                self.rrefs.append(rref)
                self.handles[step.out] = _Handle(rref, "")
            case Share():
                self.calls[step.to][call] += 1
                self.send(step.at, MessageType.PYTHON_CALL)
                self.handles[step.out] = self.transfer(self.handles[step.handle], step.at, step.to)
            case Fetch():
                value = self.fetch(self.handles[step.handle], step.at)
            case Call():
                value, error, slack = self.call(call, step)
            case Bump():
                handle = self.handles[step.handle]
                self.send(step.at, MessageType.SCRIPT_CALL)
                self.drop(self.transfer(handle, step.at, handle.rref.owner), handle.rref.owner)
                handle.rref.value = [x + 1.0 for x in handle.rref.value]
                value = list(handle.rref.value)
            case Nest():
                self.nest(call, step)
            case Drop():
                self.drop(self.handles.pop(step.handle), step.at)
            case Context():
                value = self.context(call, step)
            case Refused():
                value = {"refused": True}
            case Settle():
                return StepPrediction(counters=self.counters())
        return StepPrediction(value, error, slack)

    def call(self, call: str, step: Call) -> tuple[Any, str, float]:
        python = step.flavour == "python"
        message = MessageType.PYTHON_CALL if python else MessageType.SCRIPT_CALL
        self.send(step.at, message)
        if python:
            self.calls[step.to][call] += 1
        value = self.add(step.at, step.to, step)
        if step.timeout is None:
            return value, "", UNLIMITED_SLACK
        delay = self.plan.table(step.at).messages_to_delay.get(message, 0.0)
        slack = step.timeout - delay_milliseconds(delay) / 1000
        if slack <= -CLEARLY_LATE:
            return None, "timeout", -slack
        return value, "" if slack >= CLEARLY_IN_TIME else "unknown", abs(slack)

    def nest(self, call: str, step: Nest) -> None:
        self.calls[step.via][call] += 1
        self.send(step.at, MessageType.PYTHON_CALL)
        typed = step.flavour != "python"
        if not typed:
            self.calls[step.to][f"{call}/nested"] += 1
        there = self.remote(step.via, step.to, _sum(step.left, step.right), typed=typed)
        self.handles[step.out] = self.transfer(there, step.via, step.at)
        self.drop(there, step.via)

    def context(self, call: str, step: Context) -> dict[str, Any]:
        for rank in step.path:
            self.calls[rank][call] += 1
        if step.rrefs:
            hops = step.path[:1] if step.nested else step.path
            for to in hops:
                if to != step.at:
                    # Created and fetched as FORWARD_AUTOGRAD_REQ; only its delete is in the open.
                    self.forks += 1
                    self.send(step.at, MessageType.RREF_USER_DELETE, f"fork{self.forks}")
        for rank, peers in sorted(_acquaintances(step).items()):
            for _ in peers:
                payload = f"context {step.name}"
                self.send(rank, MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ, payload)
        return run_context(step)


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


@functools.lru_cache(maxsize=512)
def predict(program: Program, plan: FaultPlan) -> Prediction:
    """What `program` must do under `plan`.

    Raises:
        UsageError: the plan names a rank outside the world, or fails messages beyond their retry
            budget (what then happens is not modelled).
    """
    plan.check(program.world_size)
    if not plan.is_within_budget(program.world_size):
        msg = (
            f"{plan!r} fails messages more often than torch retries them; the oracle predicts "
            f"programs under survivable plans only."
        )
        raise UsageError(msg)
    return _Model(program, plan).predict()
