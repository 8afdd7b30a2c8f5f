"""The oracle's prediction of a run, as data: what each step shows, and every message sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from rpcprops.faults import FaultPlan, MessageType, SendDelay, WireMessageType
from rpcprops.outcomes import UNLIMITED_SLACK, Counters

#: How a step ends: "" with its value; by torch's timeout; by an injected failure of a message that
#: torch does not retry; by an exception of a function; because the RRef that it uses was never
#: created; because the step that makes its handle failed; or in a way that cannot be known.
ErrorClass = Literal["", "timeout", "injected", "remote", "creation", "missing", "unknown"]

#: Sender, receiver and type of messages.
WireKind: TypeAlias = tuple[int, int, WireMessageType]


@dataclass(frozen=True, slots=True)
class Met:
    """A known finding that a program meets, and what it can cause there.

    Attributes:
        finding: its name (docs/findings.md).
        rank: the only rank where it shows; None if it may show anywhere.
        step: the only step where it shows, or with no `rank` the first one; None if that is no
            step but the end of the run, or any step.
        says: a regular expression for what the violation says of it.
        breaks: the promises that it breaks there, where `says` tells it exactly; empty if they are
            those of the finding.
        lasts: whether a death or a hang may come in a later step, too.
    """

    finding: str
    rank: int | None = None
    step: int | None = None
    says: str = ""
    breaks: tuple[str, ...] = ()
    lasts: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """One message of the ten types.

    Attributes:
        payload: a name that two messages share exactly when their payload bytes are equal.
        failures: how often sending it fails.
        delivered: whether it is sent in the end.
        to: the rank that it is sent to.
        lost: how many of its tries are lost on their way.
    """

    rank: int
    message: MessageType
    payload: str
    failures: int = 0
    delivered: bool = True
    to: int | None = None
    lost: int = 0


@dataclass(frozen=True, slots=True)
class StepPrediction:
    """What a step must show.

    Attributes:
        value: the value that it returns, None if it returns none.
        error: the class of error that it must raise.
        slack: virtual seconds between the step's timeout and the time at which faults let it end.
        counters: what each rank holds once it has settled after this step.
        failures: how many failed sends of retried messages each rank has had by then.
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
        abandoned_calls: the named calls, by rank, that shutdown may drop: their callers no longer
            wait for them, and no settle comes after them.
        sends: every message of the ten types, in order, up to the last settle.
        retried: how many failed sends of retried messages there were by then, by rank.
        last_sends: the deletes that a graceful shutdown sends for what is still held.
        counters: what each rank holds at the end, once settled.
        graceful: whether the ranks shut down as the program says. The own calls of a graceful
            shutdown are PYTHON_CALLs, so it cannot be where these fail.
        leaking: ranks whose shutdown must report a leak, because a message that would have released
            what they hold was lost, or, in one that waits for nobody, was never sent.
        may_exit_early: ranks that may exit before their last deletes have arrived, as they first
            wait 100 virtual seconds for a child to be accepted, or the owner has nothing to delete.
        may_leak: ranks whose graceful shutdown may report a leak, because such deletes arrive at
            about the time at which their owners give up, or when an owner that has no RRef to wait
            for has left.
        may_warn_unreleased_context: ranks that may log that they could not release a context at
            another rank: their cleanup was lost, or an immediate shutdown has given it up.
        met: the known findings (docs/findings.md) that this program meets under this plan.
        certain: whether every failure and delay is predicted. A timeout near its delay, or cleanup
            that is lost to only some peers, makes it uncertain.
        waiting: ranks that hold a fork whose child will never be accepted; their shutdown waits
            100 virtual seconds for that.
        has_failed_function: whether a function that remote() started raises.
        unmarked_uses: how many uses of an RRef raise nothing although its creation times out,
            because torch has not marked it yet.
        contexts_left: how many contexts each rank may still hold after a graceful shutdown: those
            whose cleanup was lost, and those whose cleanup was still being retried.
        told: in a dynamic group, how often each rank calls another one to join or to leave, by the
            two; None without such a group.
        has_failed_creation: whether the creation of an RRef fails, as its rank gets to know.
        stuck: the numbers of steps that a known finding keeps from ending, unless they have a
            timeout. What they must show is predicted as of all others: this only says for how long
            it is worth waiting for them.
        wire_sends: how many calls and gradients are sent inside contexts (FORWARD_AUTOGRAD_REQ and
            BACKWARD_AUTOGRAD_REQ), how many calls inside profilers (RUN_WITH_PROFILING_REQ), and
            how many passes users ask owners to run (RREF_BACKWARD_REQ), by sender, receiver and
            type.
        wire_more: those of which there may be more, as nobody can tell how many there are.
        tries_in_vain: ranks, and the messages that they try to send to a rank that is gone, nobody
            can tell how often.
        errors: how many requests are answered by an EXCEPTION, if they are answered, by sender,
            receiver and type. All others are answered by the answer of their type.
        more_errors: those of which there may be more.
        graded: how many calls in contexts are answered with a tensor that requires a gradient, if
            they are answered, by sender and receiver.
        more_graded: those of which there may be more or fewer.
        most_left: the most that each rank may hold besides contexts where the ranks shut down at
            once while something is under way; empty otherwise.
        may_lack: how many of the messages in `sends` and `wire_sends` may lack then.
        alternatives: the other predictions, if torch may mark an RRef whose creation timed out
            either before it is used or after. See :func:`rpcprops.oracle.chosen`.
    """

    steps: tuple[StepPrediction, ...]
    sends: tuple[Send, ...]
    calls: tuple[Mapping[str, int], ...]
    counters: tuple[Counters, ...]
    retried: tuple[int, ...]
    last_sends: tuple[Send, ...] = ()
    graceful: bool = True
    abandoned_calls: tuple[frozenset[str], ...] = ()
    leaking: frozenset[int] = frozenset()
    may_exit_early: frozenset[int] = frozenset()
    may_leak: frozenset[int] = frozenset()
    may_warn_unreleased_context: frozenset[int] = frozenset()
    met: frozenset[Met] = frozenset()
    certain: bool = True
    waiting: frozenset[int] = frozenset()
    has_failed_function: bool = False
    unmarked_uses: int = 0
    contexts_left: tuple[range, ...] = ()
    told: Mapping[tuple[int, int], int] | None = None
    has_failed_creation: bool = False
    stuck: frozenset[int] = frozenset()
    wire_sends: Mapping[WireKind, int] = field(default_factory=dict)
    wire_more: frozenset[WireKind] = frozenset()
    tries_in_vain: frozenset[tuple[int, MessageType]] = frozenset()
    errors: Mapping[WireKind, int] = field(default_factory=dict)
    more_errors: frozenset[WireKind] = frozenset()
    graded: Mapping[tuple[int, int], int] = field(default_factory=dict)
    more_graded: frozenset[tuple[int, int]] = frozenset()
    most_left: tuple[Counters, ...] = ()
    may_lack: Mapping[WireKind, int] = field(default_factory=dict)
    alternatives: tuple[Prediction, ...] = ()

    @property
    def known_bugs(self) -> frozenset[str]:
        """The names of the findings in `met`."""
        return frozenset(one.finding for one in self.met)

    def failures(self) -> tuple[Mapping[MessageType, int], ...]:
        """How many sends fail, by rank and type, up to the last settle."""
        return _by_rank(self.sends, len(self.counters))

    def last_failures(self) -> tuple[Mapping[MessageType, int], ...]:
        """How many sends fail in the graceful shutdown, by rank and type."""
        return _by_rank(self.last_sends, len(self.counters))

    def failed_sends(self) -> tuple[range, ...]:
        """How many failed sends of retried messages there may be altogether, by rank.

        Until the last settle the number is known. So is that of the last deletes of a graceful
        shutdown, unless the rank may exit early: then it may not send them at all, or every try of
        each may fail because the owner has left. Each try to send something to a rank that is gone
        fails as well.
        """
        found: list[range] = []
        for rank, settled in enumerate(self.retried):
            leaving = [send for send in self.last_sends if send.rank == rank]
            least = most = settled + sum(send.failures for send in leaving)
            if rank in self.may_exit_early:
                least = settled
                most = settled + sum(send.message.max_retries + 1 for send in leaving)
            most += sum(
                message.max_retries + 1 for one, message in self.tries_in_vain if one == rank
            )
            found.append(range(least, most + 1))
        return tuple(found)

    def delays(self, plan: FaultPlan) -> tuple[Mapping[MessageType, int], ...]:
        """How many sends must be delayed, by rank and type, up to the last settle."""
        found: list[Counter[MessageType]] = [Counter() for _ in self.counters]
        for fault in plan.faults(len(self.counters)):
            if isinstance(fault, SendDelay) and (times := fault.eligible(self)):
                found[fault.rank][fault.message] = times
        return tuple(found)

    def fault_seconds(self, plan: FaultPlan) -> float:
        """Virtual seconds that all retries and delays take, added up."""
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
