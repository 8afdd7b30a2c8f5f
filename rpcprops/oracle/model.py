"""Predicts what a program does under a plan: values, messages, counters and calls.

The model follows the RRef protocol of torch's ``rref_context.cpp`` and the context cleanup of
``autograd/context/container.cpp``:

* Sending an RRef as an argument (or returning one) *forks* it. If the sender is the owner, it knows
  the fork at once. If the sender is a user, the receiver tells the owner (RREF_FORK_REQUEST) and
  then the sender (RREF_CHILD_ACCEPT); a receiver that is the owner only tells the sender.
* Dropping a user's fork sends RREF_USER_DELETE. It carries the same payload as that fork's
  RREF_FORK_REQUEST. The agent counts failures by payload, so the two messages share one count.
* A user keeps its fork until every child that it sent is accepted. A child whose message was lost
  is never accepted, so the fork stays, whatever the program drops: that is the documented leak.
* A rank that releases a context sends CLEANUP_AUTOGRAD_CONTEXT_REQ to every rank with which it
  exchanged messages in it. A rank that receives one while it has the context does the same.
* Inside a context every call travels as FORWARD_AUTOGRAD_REQ, which a fault table cannot fail or
  delay. How many there are, and how many gradients, is counted apart (``oracle/_contexts.py``).
* The first call through an RRef (``rref.rpc_sync()``) asks its owner for the type of the value.
* A rank starts what it was asked to run once the owners have answered the fork requests of the
  RRefs among its arguments. What these requests wait for counts against the caller's timeout.
* When the creation of an RRef times out, torch marks the RRef in a thread of its own. Until then a
  use of the RRef may raise nothing, as the documentation of ``rpc.remote`` warns
  (``rref_impl.cpp``: ``UserRRef::toHere`` reads ``getTimedOut()`` once, at its start). So each
  such use has two outcomes, and a program with such uses has several predictions
  (:attr:`Prediction.alternatives`).
* The timeout of a program (``Program.rpc_timeout``) is the default of all that its ranks send
  (``tensorpipe_agent.cpp``: ``TensorPipeAgent::send`` takes ``RpcAgent::getRpcTimeout`` where the
  sender names none), gradients, retries and fetches inside called functions included. A step that
  asks :meth:`Times.timed` says what that timeout does to its own message. For all else the model
  must know that it does not come; otherwise it refuses the program.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, MessageType, WireMessageType
from rpcprops.oracle._absent import Absent
from rpcprops.oracle._answers import Answers
from rpcprops.oracle._contexts import ContextMessages
from rpcprops.oracle._creations import Creations
from rpcprops.oracle._exhausted import Exhausted
from rpcprops.oracle._groups import Group
from rpcprops.oracle._hasty import SinceRest
from rpcprops.oracle._messages import UNHEARD, Disturbances, Fate, leaf_timeout, refused
from rpcprops.oracle._met import FindingsMet
from rpcprops.oracle._now import Now
from rpcprops.oracle._own_deletes import OwnDeletes
from rpcprops.oracle._readers import Readers
from rpcprops.oracle._spoiled import Sign, Spoiled
from rpcprops.oracle._times import Times
from rpcprops.oracle.prediction import ErrorClass, Met, Send, StepPrediction
from rpcprops.oracle.ranks import OWNER_WAITS
from rpcprops.oracle.rrefs import Handle, RRef
from rpcprops.outcomes import UNLIMITED_SLACK, Counters
from rpcprops.programs.threads import ENOUGH_THREADS, Threads
from rpcprops.steps import Argument, Leaf, StepFails
from rpcprops.steps.arguments import sum_of
from rpcprops.steps.base import BETWEEN_STEPS, CLEARLY_IN_TIME, fetch_message, remote_message
from rpcprops.steps.run_out import RunOut
from rpcprops.torch_facts import UNKNOWN, TorchFacts

_CLEANUP = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
_NEEDS_THREAD = "timeout-needs-thread"


class Model:
    """Predicts a program step by step.

    It knows no kinds of step: each step says what torch does for it, by calling the methods that
    follow :meth:`add`, and by the state that the model keeps.

    Args:
        facts: what is known of the torch that runs it.
        choices: each use of an RRef whose creation timed out, in order: whether torch has marked
            the RRef by then. Uses beyond the last choice count as not marked.
        rpc_timeout: the default timeout, in virtual seconds; None if there is none.
        threads: the threads of the ranks; None if there are enough for every step.
        disturbed: the faults of single messages; by default those of the plan, for no program.

    Attributes:
        now: the step that is being added.
        findings: the known findings that the program has met.
        creations: what ranks know of creations that fail.
        readers: functions that read a value, and for which no step has waited.
        times: which timeout comes, and what must come before it.
    """

    #: What the step before this one has started, and what this one starts: an RRef, and how many
    #: virtual seconds its function sleeps.
    _just_started: tuple[RRef, float] | None = None
    _starts_now: tuple[RRef, float] | None = None
    #: Whether the ranks shut RPC down at once while something may be under way.
    ends_hastily = False

    def __init__(
        self,
        world_size: int,
        plan: FaultPlan,
        choices: Sequence[bool] = (),
        facts: TorchFacts = UNKNOWN,
        rpc_timeout: float | None = None,
        *,
        threads: Threads | None = None,
        disturbed: Disturbances | None = None,
    ) -> None:
        self.facts = facts
        self.world_size = world_size
        self.plan = plan
        self.disturbed = Disturbances(plan) if disturbed is None else disturbed
        self.now = Now()
        #: RRefs for which a fetch comes only after its sender has given it up, until a settle, by
        #: the number of the step that sends it.
        self._fetched_late: dict[int, tuple[RRef, bool]] = {}
        #: Handles that arrive only after a settle, or while a step waits for them.
        self._arrives_late: list[Handle] = []
        #: Ranks that may shut down before their last deletes have arrived: only the answer of one
        #: is lost, or its owner never got the RRef.
        self.leaves_early: set[int] = set()
        #: Owners that may leave before a delete is sent again: they have no RRef to wait for.
        self.owns_nothing: set[int] = set()
        #: Handles and futures by name. One whose step failed has no entry.
        self.handles: dict[str, Handle] = {}
        self.futures: dict[str, StepPrediction] = {}
        self.rrefs: list[RRef] = []
        #: Handles of users that are held, or that wait for a child to be accepted.
        self.users: list[Handle] = []
        #: The contexts that each rank never releases, by name.
        self.leaked_contexts: list[set[str]] = [set() for _ in range(world_size)]
        #: How many backward passes of each rank never end.
        self.endless_passes = [0] * world_size
        #: Contexts of steps that failed before they entered them.
        self.missing_contexts: set[str] = set()
        self.may_warn_unreleased_context: set[int] = set()
        #: The present value of each rank's counter.
        self.counts = [0] * world_size
        #: Ranks to which a call that counts may still be under way.
        self.counted_late: set[int] = set()
        #: Calls since the last settle for which nobody waits, and whose functions fetch an RRef of
        #: another rank: the name of the call and its future, and the ranks of caller and callee.
        self.fetching: dict[tuple[str, str], tuple[int, int]] = {}
        self.forks = 0
        self.sends: list[Send] = []
        self.failed: Counter[tuple[int, str]] = Counter()
        #: Ranks that have served a call which was made inside a profiler.
        self.profiled: set[int] = set()
        #: Whether the ranks have shut RPC down and initialised it again.
        self.rejoined = False
        #: The dynamic group of a program that founds one.
        self.group = Group()
        #: How often each named call has run so far, by rank.
        self.calls: list[Counter[str]] = [Counter() for _ in range(world_size)]
        #: Calls that have timed out since the last settle.
        self.abandoned_calls: list[set[str]] = [set() for _ in range(world_size)]
        #: How many threads of each rank such calls may keep busy, which wait for further ranks.
        self.busy: Counter[int] = Counter()
        #: Deletes since the last settle whose first send failed, of RRefs that may not exist yet.
        self.early_deletes: list[RRef] = []
        #: For each context whose cleanup may still be under way, the ranks that may hold it.
        self.late_contexts: list[set[int]] = []
        #: Whether, after the last settle, an answer with an RRef may come too late, or a function
        #: make an RRef whose caller has given up.
        self.unread = False
        self.certain = True
        self.steps: list[StepPrediction] = []
        #: What the ranks remember of those that have left before them.
        self.absent = Absent()
        #: What may be under way since the last settle.
        self.since_rest = SinceRest()
        #: The steps so far.
        self.leaves: list[Leaf] = []
        #: The ranks that have run out of threads.
        self.exhausted = Exhausted()
        #: Handles that come when their sender has given up, by name, until a settle. For each the
        #: virtual seconds after which it has surely come, from the start of its step.
        self._coming: dict[str, float] = {}
        #: The calls and gradients inside contexts so far.
        self.in_contexts = ContextMessages()
        #: The requests so far that are answered by an EXCEPTION.
        self.answers = Answers()
        #: The handles and futures that a finding has spoiled.
        self.spoiled = Spoiled()
        #: How many fetches each rank serves for ever, of RRefs that it never gets.
        self.served_in_vain: Counter[int] = Counter()
        self.findings = FindingsMet(facts, plan, world_size, self.now, self.calls)
        self.creations = Creations(choices, facts, self.disturbed, self.findings, self.now)
        self.readers = Readers(self.now)
        self.own_deletes = OwnDeletes(self.disturbed, self.sends, self.rrefs)
        self.times = Times(
            world_size,
            plan,
            self.disturbed,
            self.own_deletes,
            self.now,
            self.sends,
            rpc_timeout,
            threads,
        )

    def add(self, step: Leaf) -> StepPrediction:
        """Add the next step; what it must show."""
        self.creations.used_now.clear()
        self._just_started, self._starts_now = self._starts_now, None
        self.now.is_timed = False
        self.now.step, self.now.fate = step, ""
        self.disturbed.leaf, self.disturbed.slack = len(self.steps), UNLIMITED_SLACK
        before = self.now.before = len(self.sends)
        if self.ends_hastily:
            self.since_rest.begins(len(self.steps), before, self.in_contexts.sent)
        self.exhausted.check(step)
        self.spoiled.begins(step)
        held = [self.handles[name].rref for name in step.used if name in self.handles]
        takes = max((rref.takes for rref in held), default=0.0)
        try:
            predicted = step.predict(self, f"step{len(self.steps)}")
        except StepFails as failed:
            predicted = self.shows(error=failed.error, slack=failed.slack)
        predicted = self._struck(step, predicted)
        predicted = replace(predicted, slack=min(predicted.slack, self.disturbed.slack))
        if predicted.error == "unknown":
            self.certain = False
        self.times.check_default(step, before, takes)
        self.exhausted.note(step)
        self.findings.met.update(self.spoiled.ends(step, len(self.steps)))
        self.leaves.append(step)
        self.steps.append(predicted)
        self.now.number += 1
        return predicted

    def _struck(self, step: Leaf, predicted: StepPrediction) -> StepPrediction:
        """What a step shows whose own message is lost, or its answer, or comes twice."""
        call = f"step{len(self.steps)}"
        if (
            self.now.fate == "twice"
            and step.op != "nest"
            and self.calls[getattr(step, "to", 0)][call]
        ):
            self.calls[getattr(step, "to", 0)][call] += 1
            if self.ends_hastily:
                # One answer is enough for its caller, so the other copy may be cut off.
                self.abandoned_calls[getattr(step, "to", 0)].add(call)
        if self.now.fate not in UNHEARD:
            return predicted
        limit = self.times.limit(leaf_timeout(step)) or 0.0
        if self.now.fate == "late" or (self.now.fate != "lost" and limit < CLEARLY_IN_TIME):
            # Its function may still have to run when the step has ended.
            self.counted_late |= {*step.counted_at}
            if call in self.calls[getattr(step, "to", 0)]:
                self.abandoned_calls[getattr(step, "to", 0)].add(call)
            if step.op == "bump":
                # When it changes the value is not known.
                self.handle(step.used[0]).rref.unclear = True
        handle = self.handles.get(getattr(step, "out", ""))
        if step.op == "share" and handle is not None and self.now.fate == "late":
            self._arrives_late.append(handle)
        if step.op != "remote" or handle is None:
            return self.shows(error="timeout")
        handle.unmarked = True
        handle.unanswered = self.now.fate == "unanswered"
        if self.now.fate == "late":
            self.creations.unsure.append(handle)
        # A delete that is sent before the creation comes is for nothing that its owner knows.
        handle.timed_out = self.now.fate == "late"
        return predicted

    @property
    def own_fate(self) -> Fate:
        """What becomes of the message by which the rank of this step asks for something."""
        return self.now.fate

    def creation_unknown(self, handle: Handle) -> None:
        """A function has created an RRef; what becomes of that is lost, or the answer to it is.

        Where the function has used the RRef before torch marks it, it does not notice.

        Raises:
            UsageError: that is not predicted.
        """
        if self.now.last_fate not in UNHEARD:
            return
        if handle.rref.absent and not handle.fork:
            why = f"{self.now.step!r} waits at its owner for a value that was never made"
            raise refused(self.disturbed.faults[0], why)
        handle.unmarked = True
        handle.unanswered = self.now.last_fate == "unanswered"

    def loses_answer(self, handle: Handle, sender: int) -> None:
        """An answer that carries a handle is written, and nobody reads it: its fork stays."""
        self._prepare(handle, sender)
        self._lose(handle, sender)

    @property
    def rests(self) -> bool:
        """Whether torch sends nothing by itself any more, and no function that it runs does.

        What it sends by itself it tries again: forks, deletes, cleanups. A function may send for a
        value that is not made yet, or after its caller has given up.
        """
        late = any(send.message.is_retryable for send in self.sends[self.now.settled :])
        return not (late or any(self.abandoned_calls)) and all(rref.made for rref in self.rrefs)

    def shows(
        self, value: Any = None, error: ErrorClass = "", slack: float = UNLIMITED_SLACK
    ) -> StepPrediction:
        """What a step must show: see :class:`StepPrediction`."""
        return StepPrediction(value, error, slack)

    def settle(self) -> StepPrediction:
        """Let all ranks come to rest; what each rank then holds."""
        for handle in self.handles.values():
            self.creations.mark(handle)
            handle.confirmed = not handle.broken and handle.fork in handle.rref.forks
            handle.timed_out = False
        for rref in self.rrefs:
            rref.made = True
            rref.takes = 0.0
            rref.fetches = False
            rref.slow = False
        self.findings.end(self.counters(), len(self.steps), settles=True)
        self.unread = False
        self.now.settled = len(self.sends)
        self.disturbed.rest()
        self._fetched_late.clear()
        self.readers.reading.clear()
        self.creations.answered_late.clear()
        self._arrives_late.clear()
        self._coming.clear()
        self.abandoned_calls = [set() for _ in self.abandoned_calls]
        self.busy.clear()
        self.counted_late.clear()
        self.fetching.clear()
        self.early_deletes.clear()
        self.leaves_early.clear()
        self.owns_nothing.clear()
        self.late_contexts.clear()
        self.since_rest = SinceRest(
            sends=len(self.sends),
            calls=self.called(),
            forks=[frozenset(rref.forks) for rref in self.rrefs],
            contexts=[len(contexts) for contexts in self.leaked_contexts],
        )
        return StepPrediction(
            counters=self.counters(), failures=self.retried(), calls=self.called()
        )

    def counters(self) -> tuple[Counters, ...]:
        """What each rank holds; an owner keeps a value exactly while some fork of it is alive."""
        held = [(0, 0)] * self.world_size
        for rref in self.rrefs:
            if rref.forks:
                owners, forks = held[rref.owner]
                # A fork request is noted before the RRef comes, and also where it never does
                # (rref_context.cpp: RRefContext::addForkOfOwnerIfNotPresent).
                held[rref.owner] = (owners + (not rref.absent), forks + len(rref.forks))
        found = [
            Counters(owners=owners, forks=forks, contexts=len(contexts), backward_passes=passes)
            for (owners, forks), contexts, passes in zip(
                held, self.leaked_contexts, self.endless_passes, strict=True
            )
        ]
        calls = [self.exhausted.with_calls(rank, one) for rank, one in enumerate(found)]
        for rank, number in self.served_in_vain.items():
            served = number + calls[rank].server_calls
            calls[rank] = replace(calls[rank], server_calls=served, server_async_calls=number)
        return tuple(calls)

    def retried(self) -> tuple[int, ...]:
        """How many failed sends of retried messages there were so far, by rank."""
        found = [0] * self.world_size
        for send in self.sends:
            if send.message.is_retryable:
                found[send.rank] += send.failures
        return tuple(found)

    def called(self) -> tuple[Mapping[str, int], ...]:
        """How often each named call has run so far, by rank."""
        return tuple(dict(calls) for calls in self.calls)

    # What steps are made of.

    def handle(self, name: str) -> Handle:
        """The handle of that name.

        Raises:
            StepFails: the step that makes it failed.
        """
        if name not in self.handles:
            raise StepFails(error="missing")
        handle = self.handles[name]
        if any(handle is one for one in self._arrives_late):
            why = (
                f"{self.now.step!r} uses an RRef before it has come; put a Settle() before, or a "
                f"Pause that waits for it"
            )
            raise refused(self.disturbed.beyond[0], why)
        return handle

    def comes(self, name: str, seconds: float, *, late: bool) -> None:
        """A handle comes within so many virtual seconds, perhaps when its sender has given up.

        Args:
            late: whether the step ends by its timeout.
        """
        if not late and self.now.fate != "late":
            return
        seconds += self.disturbed.seconds + self.times.queues()
        if self.now.fate == "late":
            seconds += max(fault.delay for fault in self.disturbed.beyond)
        self._coming[name] = seconds

    def has_come(self, name: str) -> float:
        """A step waits until a handle has come; the virtual seconds that this may take.

        Raises:
            StepFails: it never comes.
        """
        if name not in self.handles:
            raise StepFails(error="missing")
        handle = self.handles[name]
        self._arrives_late = [one for one in self._arrives_late if one is not handle]
        return self._coming.pop(name, 0.0)

    def argument(self, argument: Argument) -> Handle | None:
        """The handle that an argument names; None if the argument is a value."""
        return self.handle(argument) if isinstance(argument, str) else None

    def send(
        self, rank: int, message: MessageType, payload: str = "", to: int | None = None
    ) -> bool:
        """Send one message to a rank; returns whether it is delivered.

        Messages with equal `payload` share the failures that the plan asks for. A message without
        one differs from all others.
        """
        self.exhausted.check_send(self.now.step, rank, to)
        payload = payload or f"unique{len(self.sends)}"
        table = self.plan.table(rank)
        failures, delivered = 0, True
        if message in table.failing:
            left = table.num_fail_sends - self.failed[rank, payload]
            failures = min(left, message.max_retries + 1)
            delivered = failures <= message.max_retries
            self.failed[rank, payload] += failures
        lost = 0
        if self.disturbed:
            struck, arrives, lost = self._strike(rank, message, to)
            failures, delivered = failures + struck, delivered and arrives
        self.sends.append(Send(rank, message, payload, failures, delivered, to, lost))
        return delivered

    def timed_out_once(self, rank: int, message: MessageType) -> None:
        """The last such message of `rank` is answered only when it is sent a second time.

        ``rpc_agent.cpp``: ``RpcAgent::rpcRetryCallback`` is told of the timeout of the first try as
        of any error. It logs that this try failed, and puts the message back to be tried again.
        """
        sent = [
            number
            for number, send in enumerate(self.sends)
            if (send.rank, send.message) == (rank, message)
        ]
        last = self.sends[sent[-1]]
        self.sends[sent[-1]] = replace(last, failures=last.failures + 1)

    def _strike(self, rank: int, message: MessageType, to: int | None) -> tuple[int, bool, int]:
        """What message faults do to a message.

        Returns: how many of its tries fail, whether it arrives, and how many tries are lost.
        """
        failures = lost = 0
        came_late = False
        step = self.now.step
        is_own = len(self.sends) == self.now.before and rank == getattr(step, "at", None)
        named = leaf_timeout(step) if step and is_own and not message.is_retryable else None
        while True:
            limit = self.times.limit(named)
            fate = self.disturbed.fate(rank, to, message, limit)
            if fate and step is not None:
                self.disturbed.check_struck(step, message, fate, is_own=is_own, limit=limit)
            if not message.is_retryable:
                self.now.fate = fate if is_own else self.now.fate
                self.now.last_fate = fate
                return int(fate == "fail"), fate not in ("fail", "lost"), int(fate == "lost")
            if fate == "unanswered":
                # torch says that it tries again, and then it is executed again. See docs/faults.md.
                self.certain = False
                if message is _CLEANUP:
                    # Those tries may go on until the shutdown (DistAutogradContainer::
                    # sendReleaseContextRpc, container.cpp).
                    self.may_warn_unreleased_context.add(rank)
                if step is None or not self.disturbed.settles:
                    # A shutdown does not wait while nothing but the next try is left.
                    self.leaves_early.add(rank)
                return failures, True, lost
            if fate not in ("fail", "lost", "late"):
                return failures, True, lost
            if step is None and lost and not came_late and fate != "fail":
                # RRefContext::delAllUsersAndUnforkedOwners (rref_context.cpp).
                why = (
                    f"two tries of a last delete take {2 * (limit or 0.0):g} s (virtual), and a "
                    f"shutdown gives up after {OWNER_WAITS:g} s"
                )
                raise refused(self.disturbed.faults[0], why)
            # What is late is sent again when its timeout has come, and executed twice in the end.
            if came_late and step is None:
                # An owner that has nothing left to delete may leave before the tries that follow.
                self.leaves_early.add(rank)
            came_late |= fate == "late"
            failures += 1
            lost += fate == "lost"

    def call(
        self,
        at: int,
        to: int,
        message: MessageType,
        payload: str = "",
        handle: Handle | None = None,
    ) -> Handle | None:
        """A call that may have a handle among its arguments; the handle that `to` receives.

        Raises:
            StepFails: the call fails for its caller.
        """
        if handle is not None:
            self.creations.use(handle)
        if handle is not None and not handle.rref.made and at == to == handle.rref.owner:
            self.findings.meets("early-owner-fork")
        fork = self._prepare(handle, at) if handle else ""
        if not self.send(at, message, payload, to):
            if self.now.last_fate != "lost" and not message.endswith("_REMOTE_CALL"):
                # Whether the payload can be read depends on its bytes, even on their number.
                self.findings.meets("readable-injected-error")
            if handle:
                self._lose(handle, at)
            raise StepFails(error="timeout" if self.now.last_fate == "lost" else "injected")
        return self._receive(handle, at, to, fork) if handle else None

    def forward(
        self, at: int, to: int, timeout: float | None = None
    ) -> Literal["", "lost", "late", "injected", "timeout"]:
        """A call inside a context, with that timeout or the program's.

        Returns: "" if all is well; "lost" or "injected" if it does not arrive, and its caller gets
        the timeout or the injected failure; "late" if it arrives only after that timeout;
        "timeout" if its answer does not arrive in time.
        """
        message = WireMessageType.FORWARD_AUTOGRAD_REQ
        limit = self.times.limit(timeout)
        fate = self.disturbed.fate(at, to, message, limit)
        if fate == "fail":
            self.findings.meets("readable-injected-error")
            return "injected"
        if fate in ("lost", "late"):
            return "lost" if fate == "lost" else "late"
        return "timeout" if fate == "unanswered" else ""

    def creates_inside(self, at: int, to: int) -> Handle:
        """``rpc.remote`` inside a context, of which it is certain that somebody acts on messages.

        Its answer holds no tensor, so it is plain (``autograd/utils.cpp``: getMessageWithAutograd).

        Raises:
            UsageError: it is not predicted what becomes of it.
        """
        handle = self.created(at, to, typed=False)
        handle.rref.made = True
        message = WireMessageType.FORWARD_AUTOGRAD_REQ
        fate = self.disturbed.fate(
            at, to, message, self.times.rpc_timeout, WireMessageType.REMOTE_RET
        )
        self.now.last_fate = fate
        if fate and (at == to or fate == "late"):
            why = f"{self.now.step!r} creates an RRef of its own rank, or too late"
            raise refused(self.disturbed.faults[0], why)
        if fate in ("fail", "lost"):
            handle.rref.forks.clear()
        if fate == "fail":
            self.creations.fails(handle, "creation")
        handle.rref.absent = fate == "lost"
        self.creation_unknown(handle)
        return handle

    def fetches_inside(
        self, at: int, handle: Handle, timeout: float | None
    ) -> Literal["", "lost", "injected", "timeout"]:
        """``to_here`` of such an RRef, in that context; what becomes of it, as of :meth:`forward`.

        Raises:
            StepFails: torch knows that its creation failed.
            UsageError: it is not predicted what becomes of it.
        """
        self.creations.use(handle)
        owner = handle.rref.owner
        if handle.rref.absent:
            message = WireMessageType.FORWARD_AUTOGRAD_REQ
            self.disturbed.check_never_answered(owner, at, message)
        ended = self.forward(at, owner, timeout) if at != owner else ""
        if ended == "late":
            raise refused(self.disturbed.faults[0], f"{self.now.step!r} fetches an RRef too late")
        if handle.rref.absent and not ended:
            # rref_context.cpp: RRefContext::getOwnerRRef, as in _fetches_in_vain.
            self.served_in_vain[owner] += 1
            return "lost"
        return ended

    def gradient(self, at: int, to: int) -> Literal["", "lost", "late", "injected", "timeout"]:
        """A gradient that travels back.

        Returns: "lost" if it is, "late" if it comes after its timeout, which is the same to all
        ranks, "injected" if its sender gets that failure, "timeout" if its answer is lost.
        """
        message = WireMessageType.BACKWARD_AUTOGRAD_REQ
        self.in_contexts.gradient(at, to)
        fate = self.disturbed.fate(at, to, message, self.times.rpc_timeout)
        if fate == "fail":
            return "injected"
        if fate in ("lost", "late"):
            # When a late one comes, the cleanup has ended the context at its receiver
            # (container.cpp: DistAutogradContainer::retrieveContext raises), or will.
            return "lost" if fate == "lost" else "late"
        return "timeout" if fate == "unanswered" else ""

    def ask(self, at: int, to: int, message: MessageType, handle: Handle, *more: Handle) -> None:
        """A call with handles among its arguments, of a function that drops them.

        Raises:
            StepFails: the call fails for its caller.
        """
        try:
            there = self.call(at, to, message, handle=handle)
        except StepFails:
            for one in more:
                self._prepare(one, at)
                self._lose(one, at)
            raise
        assert there is not None
        for received in (there, *(self.give(one, at, to) for one in more)):
            self.drop(received)

    def give(self, handle: Handle, sender: int, receiver: int) -> Handle:
        """Put a handle into a message that is not counted here; the handle that `receiver` gets."""
        return self._receive(handle, sender, receiver, self._prepare(handle, sender))

    def _prepare(self, handle: Handle, sender: int) -> str:
        """Fork a handle while the message that carries it is written; the name of the fork.

        ``rref_context.cpp``: ``RRefContext::prepareChildFork``.
        """
        self.forks += 1
        fork = f"fork{self.forks}"
        self.since_rest.sent.add(id(handle.rref))
        self.since_rest.forked[id(handle.rref)] += 1
        if sender == handle.rref.owner:
            handle.rref.forks.add(fork)
        return fork

    def _lose(self, handle: Handle, sender: int) -> None:
        """The message with a fork was not sent, but an owner has already counted the fork."""
        if sender != handle.rref.owner:
            handle.unaccepted = True

    def _receive(self, handle: Handle, sender: int, receiver: int, fork: str) -> Handle:
        """Announce a fork while the message that carries it is read; the handle of `receiver`.

        ``rref_context.cpp``: ``RRefContext::notifyOwnerAndParentOfFork``.
        """
        rref = handle.rref
        if rref.absent and receiver == rref.owner:
            # rref_context.cpp: RRefContext::getOrCreateOwnerRRef makes one there, without a value.
            why = f"{self.now.step!r} sends an RRef to its owner, which does not have it"
            raise refused(self.disturbed.faults[0], why)
        if self.rejoined and sender != rref.owner:
            self._sends_after_reinit(handle, sender, receiver)
        if receiver == rref.owner:
            rref.early |= rref.slow and not rref.made
            if rref.early and rref.thinned and not rref.made:
                # That delete may come only now, when the owner has the RRef and knows no fork.
                self.findings.meets("early-owner-fork")
            rref.forks.discard(fork)
            if sender != rref.owner:
                self._accept(handle, receiver)
            return Handle(rref, receiver)
        if sender != rref.owner:
            if not self.send(receiver, MessageType.RREF_FORK_REQUEST, fork, rref.owner):
                self.findings.meets("fork-request-given-up")
            rref.forks.add(fork)
            self._accept(handle, receiver)
        of_owner = sender == rref.owner
        return self._new_user(Handle(rref, receiver, fork, of_owner=of_owner))

    def _sends_after_reinit(self, handle: Handle, sender: int, receiver: int) -> None:
        """A rank has to announce a fork, or to accept it, by the agent of the first init.

        That agent refuses to send, and the receiver raises. But where the table of that rank fails
        the message, the agent does so first (``faulty_tensorpipe_agent.cpp``:
        ``FaultyTensorPipeAgent::send``), once, for an agent that has ended does not try again
        (``rpc_agent.cpp``: ``RpcAgent::rpcRetryCallback``). No message has the payload of an
        earlier one. Of a fork request, the receiver then raises the injected failure, readable or
        not (``RRefContext::handleException``); of an accept it does not
        (``RRefContext::handleExceptionSilent``), but the sender keeps the RRef for ever.
        """
        finding = "rref-sent-after-reinit"
        self.findings.meets(finding)
        if self.facts.has_bug(finding):
            # A function that waits for the refused message raises itself, and handles do not come.
            texts = (self.facts.texts.stopped, self.facts.texts.remote, "MissingHandleError")
            self.spoiled.now.add(Sign(finding, "|".join(map(re.escape, texts))))
        owner = handle.rref.owner
        is_request = receiver != owner
        message = MessageType.RREF_FORK_REQUEST if is_request else MessageType.RREF_CHILD_ACCEPT
        table = self.plan.table(receiver)
        if not (self.facts.has_bug(finding) and message in table.failing and table.num_fail_sends):
            return
        self.findings.sends_otherwise(finding, receiver, owner if is_request else sender, message)
        tries = rf"^the record shows \d+ {message} from rank {receiver} with all tries, "
        self.findings.met.add(Met(finding, receiver, None, tries, ("MessagesDiffer",)))
        if is_request:
            says = "|".join(
                map(re.escape, (self.facts.texts.injected, self.facts.texts.unreadable))
            )
            errors = ("UnexpectedError", "UnclearError")
            self.spoiled.now.add(Sign(finding, says, errors))

    def _is_never_made(self) -> None:
        """A creation is refused because of its argument, so its owner never has the RRef.

        Its user does not get to know that: the handler of such an error throws (``rref_impl.cpp``:
        ``RRef::handleError``). So who asks for the value waits until its timeout, or for ever
        (``rref_context.cpp``: ``RRefContext::getOwnerRRef``).
        """
        finding = "rref-sent-after-reinit"
        if self.facts.has_bug(finding):
            self.spoiled.now.add(Sign(finding, re.escape(self.facts.texts.timeout)))

    def _accept(self, parent: Handle, receiver: int) -> None:
        if not self.send(receiver, MessageType.RREF_CHILD_ACCEPT, to=parent.rank):
            parent.unaccepted = True

    def rejoin(self, gathering: Sequence[tuple[int, int]], *, profiled: bool = False) -> None:
        """All ranks, which are at rest, shut RPC down and initialise it again.

        A graceful shutdown sends its own calls (``api.py``: ``_all_gather``): each rank tells the
        one with the smallest name, which answers each. The faulty agent's init sends none. A new
        agent counts payloads from 0 (``faulty_tensorpipe_agent.h``: ``failMessageCountMap_``).

        Args:
            gathering: those calls, each as the rank that makes it and the one that it calls.
            profiled: whether they are made inside a profiler, and travel in another message.
        """
        for rank, to in gathering:
            if profiled:
                self.in_contexts.profiled(rank, to)
            else:
                self.send(rank, MessageType.PYTHON_CALL, to=to)
        self.absent.gatherings.update({rank for rank, _ in gathering})
        self.failed.clear()
        self.profiled.clear()
        self.rejoined = True

    @property
    def only_deletes_wait(self) -> bool:
        """Whether all that may be under way is deletes that torch tries again, and none is late.

        A graceful shutdown waits for these: an owner for its users to delete all that they hold
        (``rref_context.cpp``: ``RRefContext::delAllUsersAndUnforkedOwners``), and each rank for its
        calls and those of the others (``tensorpipe_agent.cpp``: ``TensorPipeAgent::join``).
        """
        late = self.sends[self.now.settled :]
        return (
            self.certain
            and all(send.delivered and send.message is not _CLEANUP for send in late)
            and not any(self.times.delay(send.rank, send.message) for send in late)
            and all(self.readers.known_made(rref) for rref in self.rrefs)
            and not (self.unread or self.late_contexts or self.counted_late or self.fetching)
            and not any(self.abandoned_calls)
        )

    @property
    def gathers_apart(self) -> bool:
        """Whether the ranks have begun to meet differently often: see :meth:`Absent.apart`."""
        return self.absent.apart(range(self.world_size))

    def gives_up_cleanup(self, rank: int, to: int) -> None:
        """A rank leaves a context in which it has called one that is gone.

        Its cleanup fails there, and is tried again (``RpcAgent::sendWithRetries``) until the agent
        of `rank` is shut down: how often depends on when that is.

        Raises:
            UsageError: the plan strikes cleanups, and nobody can tell how often.
        """
        table = self.plan.table(rank)
        if _CLEANUP in table.failing or _CLEANUP in table.delaying:
            msg = (
                f"{self.now.step!r}: rank {rank} tries in vain to clean up at rank {to}, nobody "
                f"can tell how often; take {_CLEANUP} out of its table."
            )
            raise UsageError(msg)
        self.sends.append(Send(rank, _CLEANUP, f"gone{len(self.sends)}", to=to))
        self.absent.tries_in_vain.add((rank, _CLEANUP))
        self.may_warn_unreleased_context.add(rank)

    def _new_user(self, handle: Handle) -> Handle:
        if self.rejoined:
            finding, owner = "rref-lifetime-after-reinit", handle.rref.owner
            self.findings.meets(finding)
            self.findings.sends_otherwise(finding, handle.rank, owner, MessageType.RREF_USER_DELETE)
        self.since_rest.users[handle.rank] += 1
        self.users.append(handle)
        return handle

    def drop(self, handle: Handle) -> None:
        """A rank drops a handle; a user's fork is deleted once its children are accepted.

        ``rref_impl.cpp``: ``UserRRef::tryDel``; ``rref_context.cpp``: ``RRefContext::delUser``.
        """
        self.creations.mark(handle)
        if not handle.fork or handle.unaccepted:
            return
        self.users = [user for user in self.users if user is not handle]
        rref = handle.rref
        if handle.timed_out and not rref.made:
            self.findings.meets("timed-out-remote-dropped")
        if self.send(handle.rank, MessageType.RREF_USER_DELETE, handle.fork, rref.owner):
            rref.forks.discard(handle.fork)
        for one, surely in self._fetched_late.values():
            if one is rref and not rref.forks:
                # The owner forgets the RRef, and waits for it when the fetch comes
                # (rref_context.cpp: RRefContext::getOwnerRRef).
                held = Counters(server_calls=1, server_async_calls=1)
                keeps = self.findings.keeps if surely else self.findings.keeps_perhaps
                keeps("fetch-after-delete", rref.owner, held)
        # The creator's own delete waits until the owner has answered the creation.
        thins = handle.fork != rref.first and not rref.made
        rref.thinned |= thins
        if thins and rref.early and rref.forks <= {rref.first}:
            # The owner knows of no fork now, so it forgets the RRef that it got a handle of
            # (rref_context.cpp: RRefContext::delForkOfOwner).
            self.findings.meets("early-owner-fork")
        if self.sends[-1].failures and (handle.lost or rref.absent):
            # A shutdown waits until owners have no RRef left (rref_context.cpp:
            # RRefContext::delAllUsersAndUnforkedOwners), and for no message that is to be sent
            # again (tensorpipe_agent.cpp: TensorPipeAgent::join).
            self.leaves_early.add(handle.rank)
        elif self.sends[-1].failures:
            self.early_deletes.append(handle.rref)
        if self.may_be_overtaken(handle):
            self.owns_nothing.add(rref.owner)

    def may_be_overtaken(self, handle: Handle) -> bool:
        """Whether an owner may leave before the delete that was just sent, and report that fork.

        A shutdown waits until owners have no RRef left (``rref_context.cpp``:
        ``RRefContext::delAllUsersAndUnforkedOwners``). Of one whose creation was lost the owner has
        nothing. But it knows of each fork that a user has told it of, and reports it as a leak
        (``RRefContext::checkRRefLeaks``). It waits for a delete that is under way, and for none
        that is to be sent again (``tensorpipe_agent.cpp``: ``TensorPipeAgent::join``).
        """
        sent = self.sends[-1]
        is_told = handle.rref.absent and handle.fork != handle.rref.first
        return is_told and bool(sent.failures or sent.lost)

    def never_deleted(self, handle: Handle) -> None:
        """A user's fork that it will never delete, since one of the two ranks has left alone."""
        self.users = [user for user in self.users if user is not handle]

    def created(self, at: int, owner: int, value: Sequence[float] = (), *, typed: bool) -> Handle:
        """The handle of `at` to a new RRef of `owner`, which may be `at` itself.

        Another rank's handle is a fork, which the owner counts once the creation arrives
        (``rref_context.cpp``: ``RRefContext::createUserRRef``, ``addForkOfOwner``).
        """
        rref = RRef(owner, list(value), typed)
        self.rrefs.append(rref)
        # Its owner counts a fork, its own one if it has created it by a call of itself
        # (rref_context.cpp: RRefContext::addForkOfOwner, addSelfAsFork).
        self.since_rest.forked[id(rref)] += 1
        if owner == at:
            return Handle(rref, at)
        self.forks += 1
        fork = f"fork{self.forks}"
        rref.forks.add(fork)
        rref.first = fork
        rref.made = False
        remotes = (MessageType.PYTHON_REMOTE_CALL, MessageType.SCRIPT_REMOTE_CALL)
        rref.slow = any(self.disturbed.may_be_late(at, message) for message in remotes)
        return self._new_user(Handle(rref, at, fork))

    def owned(self, at: int, value: Sequence[float] = (), *, typed: bool) -> Handle:
        """The handle of `at` to a new RRef of its own, which it makes with a value.

        ``rref_context.cpp``: ``RRefContext::createOwnerRRef``, which counts no owner and no fork.
        """
        handle = self.created(at, at, value, typed=typed)
        self.since_rest.plain.add(id(handle.rref))
        return handle

    def remote(
        self, at: int, to: int, *, typed: bool, argument: Handle | None = None
    ) -> tuple[Handle, Handle | None]:
        """``rpc.remote``: the handle that `at` gets, and what `to` receives for the argument."""
        message = remote_message(typed=typed)
        if argument is not None:
            self.creations.use(argument)
        handle = self.created(at, to, typed=typed)
        try:
            received = self.call(at, to, message, handle=argument)
        except StepFails:
            handle.rref.forks.clear()
            if self.now.last_fate == "lost":
                handle.rref.absent = True
            else:
                self.creations.fails(handle, "creation")
            return handle, None
        if self.rejoined and argument is not None and at != argument.rref.owner:
            self._is_never_made()
        return handle, received

    def unreadable(self, handle: Handle) -> None:
        """The owner cannot read the creation that was just sent, and answers with an error.

        So it never has the RRef, and its user knows that (``rref_context.cpp``:
        ``callback::confirmPendingUser``, ``callback::finishCreatingOwnerRRef``).

        Both hand the error to ``RRef::handleError`` (``rref_impl.cpp``), whose handler of it throws
        (unreadable-remote). So they never come to the line that takes the pending user back, or the
        owner's fork of itself, and ``TensorPipeAgent::markFutureWithError``
        (``tensorpipe_agent.cpp``) never counts the call as ended. The shutdown of all ranks waits
        for that call (``TensorPipeAgent::join``). Where the answer comes before the callback is
        added (``python_functions.cpp``: ``pyRemotePythonUdf``), ``rpc.remote`` throws that itself,
        and the call has ended.
        """
        finding = "unreadable-remote"
        rref, rank = handle.rref, handle.rank
        rref.forks.clear()
        handle.broken = "creation"
        # The table of handlers is static, and that of this error has captured nothing.
        self.creations.broke_one.add(rank)
        if not self.facts.has_bug(finding):
            return
        self.findings.asks_for_nothing(finding, handle)
        self.findings.meets_at_shutdown(finding)
        self.findings.keeps_perhaps(finding, rank, Counters(client_calls=1))
        if not handle.fork:
            self.findings.keeps(finding, rank, Counters(owners=1, forks=1))
            return
        self.findings.keeps(finding, rank, Counters(pending_users=1))
        self.findings.sends_otherwise(finding, rank, rref.owner, MessageType.RREF_USER_DELETE)

    def starts(self, rref: RRef, seconds: float) -> None:
        """This step has started the function that makes an RRef's value and sleeps so long."""
        if seconds:
            rref.slow = True
            self._starts_now = (rref, seconds)

    def still_takes(self, rref: RRef) -> float:
        """Virtual seconds that the value of an RRef certainly still takes when this step begins.

        It is known only for the step right after the one that started the function.
        """
        if self._just_started is None or self._just_started[0] is not rref:
            return 0.0
        return max(0.0, self._just_started[1] - BETWEEN_STEPS)

    def has_value(self, handle: Handle) -> None:
        """A step has got the value of an RRef.

        If the creation timed out because of what the value waits for, torch has marked it by then.
        Where its answer is lost, the timeout comes later than the value.
        """
        if not handle.unanswered:
            self.creations.mark(handle)

    def value(self, handle: Handle, at: int) -> list[float]:
        """The value by ``to_here``, or by ``local_value`` at the owner.

        ``rref_impl.cpp``: ``UserRRef::toHere``, ``OwnerRRef::getValue``.

        Raises:
            StepFails: there is no value, or the request for it fails.
        """
        self.creations.use(handle)
        rref = handle.rref
        if at != rref.owner:
            message = fetch_message(typed=rref.typed)
            if not self.send(at, message, f"fetch {self.rrefs.index(rref)}", rref.owner):
                if self.now.last_fate == "lost":
                    raise StepFails(error="timeout")
                self.findings.meets("readable-injected-error")
                raise StepFails(error="injected")
            if rref.absent:
                self._fetches_in_vain(at, rref)
            if self.now.fate == "late" and len(self.sends) == self.now.before + 1:
                # It is the step's own fetch. Whether the value is made then, nobody has seen.
                self.fetched_late(rref, surely=True)
                raise StepFails(error="timeout")
        rref.made = True
        if at != rref.owner and (rref.unsendable or (rref.error and rref.typed)):
            self.answers.error(at, rref.owner, fetch_message(typed=rref.typed))
        if rref.error:
            raise StepFails(rref.error)
        if rref.unclear:
            raise StepFails(error="unknown")
        return list(rref.value)

    def _fetches_in_vain(self, at: int, rref: RRef) -> None:
        """A fetch of an RRef whose creation was lost comes to its owner.

        ``rref_context.cpp``: ``RRefContext::getOwnerRRef`` takes it for one that is still to be
        made, and puts a future for it into ``pendingOwners_`` that nothing completes.

        Raises:
            StepFails: always, with the timeout.
            UsageError: it has no timeout, or is not predicted.
        """
        step, fault = self.now.step, self.disturbed.faults[0]
        message = fetch_message(typed=rref.typed)
        if step is None or step.op != "fetch":
            why = (
                f"a function of {step!r} fetches an RRef that was never created; its timeout and "
                f"that of its caller come at almost the same time"
            )
            raise refused(fault, why)
        if not self.times.limit(leaf_timeout(step)):
            why = f"{step!r} waits for ever for an RRef that was never created; give it a timeout"
            raise refused(fault, why)
        self.disturbed.check_never_answered(rref.owner, at, message)
        self.served_in_vain[rref.owner] += 2 if self.now.fate == "twice" else 1
        raise StepFails(error="timeout")

    def fetched_late(self, rref: RRef, *, surely: bool) -> None:
        """The step's fetch comes to the owner of an RRef only after its sender has given it up.

        Args:
            surely: whether it also comes after a delete that the sender sends next. What a table
                delays is sent before that, but the owner handles each message in another thread
                (``tensorpipe_agent.cpp``: ``TensorPipeAgent::respond``).
        """
        self._fetched_late[len(self.steps)] = (rref, surely)

    def compute(self, at: int, left: Sequence[float], right: Any, there: Handle | None) -> Any:
        """The result at `at` of a called function, for a value or for the handle it was sent."""
        if there is None:
            return sum_of(left, right)
        try:
            return sum_of(left, self.value(there, at))
        except StepFails as failed:
            raise StepFails(error="remote" if failed.error != "unknown" else "unknown") from None
        finally:
            self.drop(there)

    def gives_up(
        self,
        at: int,
        to: int,
        call: str,
        timeout: float | None,
        surely: float = 0.0,
        perhaps: float = 0.0,
    ) -> tuple[ErrorClass, float]:
        """:meth:`Times.timed` for a call of a Python function at `to`, which runs all the same.

        `call` is the name under which the function notes that it ran, "" if it does not.
        """
        late, slack = self.times.timed(at, MessageType.PYTHON_CALL, timeout, surely, perhaps)
        if late and call:
            self.abandoned_calls[to].add(call)
        return late, slack

    def check_gives_up(self, step: Leaf, *, may_be_late: bool = False) -> None:
        """Check that a call of this step in a context, whose function is slow, ends by its timeout.

        No table delays such a message.

        Args:
            may_be_late: whether the step says what comes where messages are disturbed.

        Raises:
            UsageError: nobody can tell, or what else the step shows.
        """
        why = ""
        if self.times.threads_of_ranks < ENOUGH_THREADS:
            why = (
                f"a timeout needs a free thread (TensorPipeAgent::markFutureWithError), and "
                f"num_worker_threads={self.times.threads_of_ranks}; let it be None"
            )
        elif self.disturbed and not may_be_late:
            why = "what that shows under faults of single messages is not predicted"
        if why:
            msg = f"{step!r}: a call of it ends by its timeout; {why}."
            raise UsageError(msg)

    def runs_out(self, step: Leaf, path: Sequence[int], out: RunOut) -> None:
        """Calls along a path run out of threads, so that some of them never end.

        Calls that the default timeout ends are only kept where the threads all wait.

        Raises:
            UsageError: nobody can tell what these calls then leave.
        """
        self.now.is_timed = True
        held = {rank: Counters(server_calls=s, client_calls=c) for rank, (s, c) in out.held.items()}
        if not self.facts.has_bug(_NEEDS_THREAD):
            msg = (
                f"{step!r}: what its calls leave is modelled for a torch with {_NEEDS_THREAD}, and "
                f"for no other; give the program more threads."
            )
            raise UsageError(msg)
        if self.times.rpc_timeout is None:
            self.exhausted.add({*path}, held)
            return
        self.exhausted.add({*path}, {})
        for rank in sorted(out.stuck):
            self.findings.keeps(_NEEDS_THREAD, rank, held[rank])

    def check_alone(self, step: Leaf, ranks: Sequence[int]) -> None:
        """Check that nothing but these calls takes threads of the ranks, or ends one of them.

        Raises:
            UsageError: something may.
        """
        threads = self.times.threads
        assert threads is not None
        number = len(self.steps)
        why = ""
        if not self.exhausted.at_rest or threads.beside[number] > 1:
            why = "other steps may take threads, too; put a Settle() before it, and no step beside"
        elif self.disturbed or self.group.inits:
            why = "that is not modelled under faults of single messages, nor in a group"
        elif any(MessageType.PYTHON_CALL in self.plan.table(rank).failing for rank in ranks):
            why = "the plan fails some of its calls"
        if why:
            msg = (
                f"{step!r} needs more than num_worker_threads={threads.number}, and {why} "
                f"(TensorPipeAgent::respond takes a thread for each request that comes)."
            )
            raise UsageError(msg)

    def release(self, name: str, at: int, known: Mapping[int, set[int]]) -> None:
        """A context ends at `at`; every rank that gets its cleanup passes it on.

        ``autograd/context/container.cpp``: ``DistAutogradContainer::releaseContext``,
        ``sendReleaseContextRpc``.

        Args:
            name: names the context.
            at: the rank that leaves it.
            known: for each rank in it, the ranks with which it has exchanged messages.
        """
        reached = {at}
        at_once = {at}
        queue = [at]
        while queue:
            rank = queue.pop(0)
            if not known.get(rank):
                continue
            before = len(self.sends)
            if not self._clean(rank, sorted(known[rank]), f"context {name}"):
                self.may_warn_unreleased_context.add(rank)
                continue
            if rank in at_once and not any(send.failures for send in self.sends[before:]):
                at_once |= known[rank]
            for peer in sorted(known[rank] - reached):
                reached.add(peer)
                queue.append(peer)
        for rank in known:
            if rank not in reached:
                self.leaked_contexts[rank].add(name)
        self.late_contexts.append(reached - at_once)
        self.since_rest.ended.append({at, *known, *itertools.chain(*known.values())})

    def _clean(self, rank: int, peers: Sequence[int], payload: str) -> bool:
        """Send one cleanup to each peer; they have one payload, so they share the failures.

        Returns whether all are delivered. Where only some are, nothing that follows is certain.
        """
        table = self.plan.table(rank)
        left = table.num_fail_sends if _CLEANUP in table.failing else 0
        tries = _CLEANUP.max_retries + 1
        each, more = divmod(left, len(peers))
        for number, peer in enumerate(peers):
            failures = min(tries, each + (number < more))
            delivered = failures < tries
            lost = 0
            if self.disturbed:
                struck, _, lost = self._strike(rank, _CLEANUP, peer)
                failures += struck
            self.sends.append(Send(rank, _CLEANUP, payload, failures, delivered, peer, lost))
        if each < tries <= each + bool(more):
            self.certain = False
        return each + bool(more) < tries
