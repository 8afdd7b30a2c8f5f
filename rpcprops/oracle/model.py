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
  asks :meth:`Model.timed` says what that timeout does to its own message. For all else the model
  must know that it does not come; otherwise it refuses the program.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rpcprops.errors import UsageError
from rpcprops.faults import (
    FaultPlan,
    MessageFault,
    MessageType,
    WireMessageType,
    delay_milliseconds,
    retry_wait,
)
from rpcprops.oracle._absent import Absent
from rpcprops.oracle._answers import Answers
from rpcprops.oracle._contexts import ContextMessages
from rpcprops.oracle._exhausted import Exhausted
from rpcprops.oracle._groups import Group
from rpcprops.oracle._hasty import SinceRest, may_race
from rpcprops.oracle._kept import Kept
from rpcprops.oracle._messages import (
    UNHEARD,
    Disturbances,
    Fate,
    leaf_timeout,
    refused,
    timeout_may_come,
)
from rpcprops.oracle._spoiled import Sign, Spoiled
from rpcprops.oracle._waited import Waited
from rpcprops.oracle.prediction import ErrorClass, Met, Prediction, Send, StepPrediction
from rpcprops.oracle.ranks import OWNER_WAITS
from rpcprops.outcomes import UNLIMITED_SLACK, Counters
from rpcprops.programs import Program
from rpcprops.programs.threads import ENOUGH_THREADS, Threads, needed_threads, threads_of
from rpcprops.steps import Argument, Leaf, StepFails
from rpcprops.steps.arguments import sum_of
from rpcprops.steps.base import (
    BETWEEN_STEPS,
    CLEARLY_IN_TIME,
    CLEARLY_LATE,
    fetch_message,
    remote_message,
)
from rpcprops.steps.run_out import RunOut
from rpcprops.torch_facts import UNKNOWN, TorchFacts

_CLEANUP = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
_NEEDS_THREAD = "timeout-needs-thread"


@dataclass(slots=True)
class RRef:
    """A value at its owner.

    Attributes:
        forks: the users' forks that the owner knows, including those that nobody will ever delete.
        error: how using the value fails: "remote" if the function that makes it raised.
        made: whether its creation has certainly reached the owner.
        takes: virtual seconds by which faults may still delay the function that makes it.
        fetches: whether that function fetches an RRef that another rank sent to it.
        slow: whether that function sleeps, and perhaps still does.
        first: the fork of the user that created it, which the owner learns of when the function
            has returned.
        early: whether the owner got a handle of it before that.
        absent: whether its creation was lost, so that the owner never has it.
        thinned: whether a fork of another user was deleted before that.
        unclear: whether nobody can tell whether a change of its value has been made.
        unsendable: whether its owner answers a fetch with an EXCEPTION.
    """

    owner: int
    value: list[float]
    typed: bool
    forks: set[str] = field(default_factory=set)
    error: ErrorClass = ""
    made: bool = True
    takes: float = 0.0
    fetches: bool = False
    slow: bool = False
    first: str = ""
    early: bool = False
    absent: bool = False
    thinned: bool = False
    unclear: bool = False
    unsendable: bool = False

    def is_made(self) -> None:
        """Note that somebody has waited for its value, or for the error of its function."""
        self.made = True
        self.slow = False
        self.takes = 0.0


_RACES = "shutdown-races-delete"


@dataclass(slots=True)
class Handle:
    """An RRef object at a rank.

    Attributes:
        fork: empty if the handle is the owner's own.
        broken: the error of a use, if ``remote`` failed and its user knows that.
        timed_out: whether the creation was sent late, so that a delete may arrive before it.
        unmarked: whether the creation times out, and torch may not have marked the RRef yet.
        marked_before: virtual seconds by which that timeout comes before the value is made.
        unaccepted: whether a child that it sent will never be accepted.
        of_owner: whether the owner itself sent it.
        confirmed: whether the owner certainly knows of it, and its rank of that.
        type_error: None before the type was asked for, then "" or the class of the error.
        second: whether a creation of its rank had failed before its own did.
        unanswered: whether its creation was, and only the answer to that is lost.
        beside: handles without a name, which are dropped with it.
    """

    rref: RRef
    rank: int
    fork: str = ""
    broken: ErrorClass = ""
    timed_out: bool = False
    unmarked: bool = False
    marked_before: float = UNLIMITED_SLACK
    unaccepted: bool = False
    of_owner: bool = False
    confirmed: bool = False
    type_error: ErrorClass | None = None
    second: bool = False
    unanswered: bool = False
    beside: tuple[Handle, ...] = ()

    @property
    def lost(self) -> bool:
        """Whether its creation was lost, so that its owner never gets the RRef."""
        return bool(self.broken) and not self.timed_out


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
    """

    #: What the step before this one has started, and what this one starts: an RRef, and how many
    #: virtual seconds its function sleeps.
    _just_started: tuple[RRef, float] | None = None
    _starts_now: tuple[RRef, float] | None = None
    #: Whether the present step has said what its timeout does to its message.
    _is_timed = False
    #: Whether the ranks shut RPC down at once while something may be under way.
    ends_hastily = False
    #: What becomes of the message that was sent last.
    _last_fate: Fate = ""

    def __init__(
        self,
        world_size: int,
        plan: FaultPlan,
        choices: Sequence[bool] = (),
        facts: TorchFacts = UNKNOWN,
        rpc_timeout: float | None = None,
        threads: Threads | None = None,
    ) -> None:
        self.facts = facts
        self.rpc_timeout = rpc_timeout
        self.threads = threads
        self.choices = choices
        #: The number of such uses so far; and the handles that the current step has so used.
        self.unmarked_uses = 0
        #: How many of them raise that error all the same.
        self.told = 0
        self._used_now: list[Handle] = []
        self.world_size = world_size
        self.plan = plan
        #: The faults of single messages.
        self.disturbed = Disturbances(plan)
        #: The step that is being added, how many messages came before it, and what becomes of the
        #: message by which its rank asks for something.
        self._step: Leaf | None = None
        self._before = 0
        self._fate: Fate = ""
        #: Handles whose creation comes after its timeout: they are used only after a settle.
        self._unsure: list[Handle] = []
        #: RRefs for which a fetch comes only after its sender has given it up, until a settle, by
        #: the number of the step that sends it.
        self._fetched_late: dict[int, tuple[RRef, bool]] = {}
        #: RRefs whose value a function reads for which no step has waited, until a settle; each
        #: with the RRef whose value the function makes, or the name of its future.
        self._read: list[tuple[RRef, RRef | str]] = []
        #: Handles whose creation fails, in functions that answer with them when nobody waits.
        self._answered_late: list[Handle] = []
        #: Handles that arrive only then, or while a step waits for them.
        self._arrives_late: list[Handle] = []
        #: Ranks that may shut down before their last deletes have arrived: only the answer of one
        #: is lost, or its owner never got the RRef.
        self._leaves_early: set[int] = set()
        #: Holds of a creation until the delete of its own fork: the fork by the fault.
        self._own_deletes: dict[MessageFault, str] = {}
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
        #: Ranks in which the creation of an RRef has failed before.
        self.broke_one: set[int] = set()
        self.stuck: set[int] = set()
        #: The present value of each rank's counter.
        self.counts = [0] * world_size
        #: Ranks to which a call that counts may still be under way.
        self.counted_late: set[int] = set()
        #: Calls since the last settle for which nobody waits, and whose functions fetch an RRef of
        #: another rank: the name of the call and its future, and the ranks of caller and callee.
        self.fetching: dict[tuple[str, str], tuple[int, int]] = {}
        self.forks = 0
        self.sends: list[Send] = []
        #: How many of them had ended at the last settle.
        self.settled = 0
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
        #: The known findings (docs/findings.md) that the program has met.
        self.met: set[Met] = set()
        #: What ranks keep for ever because of them.
        self.kept = Kept()
        #: Whether, after the last settle, an answer with an RRef may come too late, or a function
        #: make an RRef whose caller has given up.
        self.unread = False
        self.certain = True
        self.steps: list[StepPrediction] = []

    def add(self, step: Leaf) -> StepPrediction:
        """Add the next step; what it must show."""
        self._used_now.clear()
        self._just_started, self._starts_now = self._starts_now, None
        self._is_timed = False
        self._step, self._fate = step, ""
        self.disturbed.leaf, self.disturbed.slack = len(self.steps), UNLIMITED_SLACK
        before = self._before = len(self.sends)
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
        self._check_default(step, before, takes)
        self.exhausted.note(step)
        self.met.update(self.spoiled.ends(step, len(self.steps)))
        self.leaves.append(step)
        self.steps.append(predicted)
        return predicted

    def _struck(self, step: Leaf, predicted: StepPrediction) -> StepPrediction:
        """What a step shows whose own message is lost, or its answer, or comes twice."""
        call = f"step{len(self.steps)}"
        if self._fate == "twice" and step.op != "nest" and self.calls[getattr(step, "to", 0)][call]:
            self.calls[getattr(step, "to", 0)][call] += 1
        if self._fate not in UNHEARD:
            return predicted
        limit = self.limit(leaf_timeout(step)) or 0.0
        if self._fate == "late" or (self._fate != "lost" and limit < CLEARLY_IN_TIME):
            # Its function may still have to run when the step has ended.
            self.counted_late |= {*step.counted_at}
            if call in self.calls[getattr(step, "to", 0)]:
                self.abandoned_calls[getattr(step, "to", 0)].add(call)
            if step.op == "bump":
                # When it changes the value is not known.
                self.handle(step.used[0]).rref.unclear = True
        handle = self.handles.get(getattr(step, "out", ""))
        if step.op == "share" and handle is not None and self._fate == "late":
            self._arrives_late.append(handle)
        if step.op != "remote" or handle is None:
            return self.shows(error="timeout")
        handle.unmarked = True
        handle.unanswered = self._fate == "unanswered"
        if self._fate == "late":
            self._unsure.append(handle)
        # A delete that is sent before the creation comes is for nothing that its owner knows.
        handle.timed_out = self._fate == "late"
        return predicted

    def _check_default(self, step: Leaf, before: int, takes: float) -> None:
        """Check that the default timeout comes for no message about which the step says nothing.

        Args:
            before: how many messages there were before the step.
            takes: how long the values of its handles may still take.

        Raises:
            UsageError: it may come.
        """
        if self.rpc_timeout is None or len(self.sends) == before:
            return
        own, *others = self.sends[before:]
        longest = max((self._lasts(send) for send in others), default=0.0)
        if self._is_timed:
            nested = [s for s in others if (s.rank, s.message) != (own.rank, own.message)]
            if not nested:
                return
            waits = max((self._lasts(send) for send in nested), default=0.0)
            if any(send.message.endswith("_FETCH_CALL") for send in nested):
                waits += takes
        else:
            # One may wait for all of those that are not only announcements.
            asked = [s for s in (own, *others) if self._holds_up(s)]
            # A delete is answered at once, whatever still runs for its value
            # (request_callback_no_python.cpp: RequestCallbackNoPython::processRRefUserDelete).
            runs = step.lasts + takes if own.delivered and asked else 0.0
            waits = max(sum(map(self._lasts, asked)) + runs, longest)
        self.must_be_in_time(step, waits)

    @property
    def own_fate(self) -> Fate:
        """What becomes of the message by which the rank of this step asks for something."""
        return self._fate

    def creation_unknown(self, handle: Handle) -> None:
        """A function has created an RRef; what becomes of that is lost, or the answer to it is.

        Where the function has used the RRef before torch marks it, it does not notice.

        Raises:
            UsageError: that is not predicted.
        """
        if self._last_fate not in UNHEARD:
            return
        if handle.rref.absent and not handle.fork:
            why = f"{self._step!r} waits at its owner for a value that was never made"
            raise refused(self.disturbed.faults[0], why)
        handle.unmarked = True
        handle.unanswered = self._last_fate == "unanswered"

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
        late = any(send.message.is_retryable for send in self.sends[self.settled :])
        return not (late or any(self.abandoned_calls)) and all(rref.made for rref in self.rrefs)

    def must_be_in_time(self, step: Leaf, waits: float) -> None:
        """Check that the default timeout does not come where a step waits so long (virtual s).

        Raises:
            UsageError: it may come.
        """
        waits += self.disturbed.seconds + self.queues()
        if self.rpc_timeout is not None and waits + CLEARLY_IN_TIME > self.rpc_timeout:
            msg = (
                f"{step!r}: under this plan some of its messages may take {waits:g} s (virtual), "
                f"which the default rpc_timeout={self.rpc_timeout:g} may end, and what then comes "
                f"is not modelled; let it be {CLEARLY_IN_TIME:g} s above that, or None."
            )
            raise UsageError(msg)

    def _lasts(self, send: Send) -> float:
        """Virtual seconds that a message takes by the faults of the plan."""
        waits = retry_wait(min(send.failures, send.message.max_retries))
        return (waits if self._holds_up(send) else 0.0) + self.delay(send.rank, send.message)

    @staticmethod
    def _holds_up(send: Send) -> bool:
        """Whether something waits for its answer: nothing does for deletes and the like."""
        return not send.message.is_retryable or send.message is MessageType.RREF_FORK_REQUEST

    def shows(
        self, value: Any = None, error: ErrorClass = "", slack: float = UNLIMITED_SLACK
    ) -> StepPrediction:
        """What a step must show: see :class:`StepPrediction`."""
        return StepPrediction(value, error, slack)

    def meets(self, finding: str) -> None:
        """Note that the program meets a known finding (docs/findings.md), if this torch has it.

        It may show in any step, at any rank.
        """
        if self.facts.has_bug(finding):
            self.met.add(Met(finding))

    def meets_here(
        self,
        finding: str,
        rank: int,
        says: str = "",
        *,
        breaks: tuple[str, ...] = (),
        lasts: bool = False,
    ) -> None:
        """The same for a finding that shows at `rank` alone: in this step, or with `lasts` later.

        `says` is a regular expression for the message of the violation, `breaks` the promises that
        it breaks, if not all of the finding. What comes later is a death or a hang.
        """
        if self.facts.has_bug(finding):
            self.met.add(Met(finding, rank, len(self.steps), says, breaks, lasts=lasts))

    def meets_at_shutdown(self, finding: str) -> None:
        """The same for a finding by which any rank may hang when it shuts down, and only then."""
        if self.facts.has_bug(finding):
            ranks = range(self.world_size)
            says = r"\(phase shutdown,"
            self.met |= {Met(finding, rank, None, says, ("RankHung",)) for rank in ranks}

    def _meets_deleted_arguments(self) -> None:
        """Note which functions may fetch what the shutdown has deleted, which is not answered."""
        finding = "shutdown-deletes-argument"
        making = [r for r in self.rrefs if r.fetches and not (self.known_made(r) and r.first)]
        ranks = {r.owner for r in making} | {to for _, to in self.fetching.values()}
        if not ranks or not self.facts.has_bug(finding):
            return
        self.meets_at_shutdown(finding)
        if self.rpc_timeout is None:
            return
        # The default timeout ends the fetch, so the function raises, and too late: its rank and its
        # caller have waited in vain for the RRef that it makes.
        texts = self.facts.texts
        raised = "|".join(map(re.escape, (texts.timeout, texts.owners_waited)))
        kept = "|".join(map(re.escape, (*texts.leaks, " still holds 1 owner, ")))
        for rank in ranks:
            self.met.add(Met(finding, rank, None, raised, ("ErrorInLog",)))
            self.met.add(Met(finding, rank, None, kept, ("RRefLeak",)))
        callers = {user.rank for user in self.users if any(user.rref is r for r in making)}
        for caller in callers | {at for at, _ in self.fetching.values()}:
            waited = re.escape(texts.users_waited)
            self.met.add(Met(finding, caller, None, waited, ("ErrorInLog",)))
        if self.facts.has_bug("late-remote-to-self"):
            # The timeout of such a creation has come before that of the fetch.
            late = re.escape(texts.assertion)
            self.met |= {
                Met("late-remote-to-self", r.owner, None, late, ("ErrorInLog",))
                for r in making
                if not r.first
            }

    def frees_context(self, rank: int, *, keeps: bool = True) -> None:
        """A gradient of this step that `rank` has sent fails when its context has been freed.

        The callback of its future then locks a mutex in that memory (``context.cpp``:
        ``DistAutogradContext::addOutstandingRpc``). That ends the process. Or it raises, and then
        the call is never counted as ended, so that the shutdown waits for it
        (``tensorpipe_agent.cpp``: ``TensorPipeAgent::markFutureWithError``, ``join``).

        Args:
            keeps: False where another finding keeps calls anyway, of any number.
        """
        finding = "freed-context-used"
        self.meets_here(finding, rank, r"killed by SIG(ABRT|SEGV|BUS)", lasts=True)
        if keeps:
            self.keeps_perhaps(finding, rank, Counters(client_calls=1))
            self.meets_at_shutdown(finding)

    def meets_in_proxy(self, handle: Handle, rank: int) -> None:
        """Note that an asynchronous call of `rank` through a handle has failed.

        The frame of that call keeps the RRef (failed-async-proxy), until a shutdown deletes it.
        """
        self.meets("failed-async-proxy")
        if handle.fork:
            self.kept.in_frames.add((rank, handle.rref.owner))

    def never_ends(self, finding: str) -> None:
        """The same for a finding that keeps this step from ending: see :attr:`Prediction.stuck`."""
        if self.facts.has_bug(finding):
            self.stuck.add(len(self.steps))

    def keeps(self, finding: str, rank: int, held: Counters) -> None:
        """The same for a finding by which `rank` keeps something for ever."""
        if self.facts.has_bug(finding):
            self.kept.add(finding, rank, held)

    def keeps_perhaps(self, finding: str, rank: int, held: Counters) -> None:
        """The same where `rank` keeps it in some runs only."""
        if self.facts.has_bug(finding):
            self.kept.add_perhaps(finding, rank, held)

    def keeps_user(self, finding: str, rank: int, owner: int) -> None:
        """The same for a user RRef of `rank`, which only its shutdown deletes."""
        if not self.facts.has_bug(finding):
            return
        self.kept.add_user(finding, rank, owner)
        self.sends_otherwise(finding, rank, owner, MessageType.RREF_USER_DELETE)

    def sends_otherwise(
        self, finding: str, rank: int, to: int, message: MessageType | WireMessageType
    ) -> None:
        """The same for a finding by which `rank` sends more or fewer such messages to `to`."""
        if not self.facts.has_bug(finding):
            return
        says = rf"^the record shows \d+ {message} from rank {rank} to rank {to}, "
        self.met.add(Met(finding, rank, None, says, ("MessagesDiffer",)))
        if message in self.plan.table(rank).failing and MessageType(message).is_retryable:
            says = r" failed \d+ sends, the message"
            self.met.add(Met(finding, rank, None, says, ("FaultsDiffer",)))

    def runs_less(self, finding: str, rank: int, call: str, times: int) -> None:
        """The same for a finding by which a function at `rank` may run up to `times` less often."""
        if self.facts.has_bug(finding):
            promised = self.calls[rank][call]
            fewer = "|".join(map(str, range(promised - times, promised)))
            says = rf"^{re.escape(call)} ran ({fewer}) times "
            self.met.add(Met(finding, rank, None, says, ("NotRunOnce",)))

    def _meets_kept_at_end(self, *, settles: bool, graceful: bool, at_once: bool) -> None:
        """Note what the ranks that keep something hold at the end of the run.

        Args:
            graceful: whether the ranks shut down at all.
            at_once: whether that deletes no RRefs.
        """
        self.met |= set(self.kept.found(self.counters(), self.met, None, settles=settles))
        if graceful and not at_once and self.gathers_apart:
            self.meets_at_shutdown("gathering-count-kept")
        for rank, owner in self.kept.in_frames if at_once or not graceful else ():
            message = MessageType.RREF_USER_DELETE
            self.sends_otherwise("failed-async-proxy", rank, owner, message)
        if graceful:

            def owners_of(rank: int) -> set[int]:
                return {user.rref.owner for user in self.users if user.rank == rank}

            self.met |= set(self.kept.waits(self.facts.texts, owners_of))
            deletes = MessageType.RREF_USER_DELETE
            users = Counter(user.rank for user in self.users)
            self.met |= {
                one
                for rank in range(self.world_size)
                if deletes in self.plan.table(rank).failing
                for one in self.kept.late_deletes(rank, users[rank])
            }

    def settle(self) -> StepPrediction:
        """Let all ranks come to rest; what each rank then holds."""
        for handle in self.handles.values():
            self.mark(handle)
            handle.confirmed = not handle.broken and handle.fork in handle.rref.forks
            handle.timed_out = False
        for rref in self.rrefs:
            rref.made = True
            rref.takes = 0.0
            rref.fetches = False
            rref.slow = False
        self.met |= set(self.kept.found(self.counters(), self.met, len(self.steps), settles=True))
        self.unread = False
        self.settled = len(self.sends)
        self.disturbed.rest()
        self._fetched_late.clear()
        self._read.clear()
        self._answered_late.clear()
        self._arrives_late.clear()
        self._coming.clear()
        self.abandoned_calls = [set() for _ in self.abandoned_calls]
        self.busy.clear()
        self.counted_late.clear()
        self.fetching.clear()
        self.early_deletes.clear()
        self._leaves_early.clear()
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

    def prediction(
        self, *, settles: bool = True, at_once: bool = False, forgets: bool = False
    ) -> Prediction:
        """What the steps so far must have shown, and what a shutdown now must show.

        Without `settles` the shutdown comes straight after the last step. It is graceful, or waits
        for nobody if it is `at_once`; then an owner `forgets` RRefs that are left, or raises.
        """
        for handle in self.handles.values():
            self.mark(handle)
        if self.group.inits and not all(rref.made for rref in self.rrefs):
            msg = (
                "the members of a dynamic group end while a value is being made that nobody has "
                "fetched; put a Fetch after each Remote."
            )
            raise UsageError(msg)
        if self.unread and not settles and not at_once:
            msg = (
                "a step ends by its timeout, and the program may end before its answer; put a "
                "Settle() after it, or let the program settle."
            )
            raise UsageError(msg)
        if not settles and not at_once:
            self._check_made_in_time()
        # Graceful shutdown does not wait for a cleanup that is being retried.
        late = [] if settles else self.sends[self.settled :]
        abandoned = {send.rank for send in late if send.message is _CLEANUP and send.failures}
        counters = self.counters()
        # api.py: shutdown(graceful=False) makes no calls.
        graceful = at_once or not any(
            MessageType.PYTHON_CALL in self.plan.table(rank).failing
            for rank in range(self.world_size)
        )
        graceful = graceful and self.disturbed.is_shutdown_safe
        self.exhausted.check_end(settles=settles)
        graceful = graceful and not self.exhausted
        sends = tuple(self.sends)
        waiting = {user.rank for user in self.users if user.unaccepted}
        certain = self.certain
        if at_once:
            last, leaking, perhaps = self._end_at_once(settles=settles)
            waiting = set()
        else:
            last, leaking, perhaps = self._shutdown(waiting) if graceful else ((), set(), set())
        broken = {user.rank for user in self.users if user.broken}
        early = waiting if at_once else waiting | self._leaves_early | broken
        if graceful and not settles and not at_once:
            self._meets_overtaken(last)
        self._meets_kept_at_end(settles=settles, graceful=graceful, at_once=at_once)
        self._check_own_deletes(last)
        is_certain, self.certain = self.certain, certain
        dropped = (
            self.abandoned_calls if graceful and not settles else [set[str]() for _ in self.calls]
        )
        found = Prediction(
            steps=tuple(self.steps),
            sends=sends,
            calls=self.called(),
            counters=counters,
            retried=self.retried(),
            last_sends=last,
            graceful=graceful,
            abandoned_calls=tuple(map(frozenset, dropped)),
            leaking=frozenset(leaking),
            may_exit_early=frozenset(early),
            may_leak=frozenset(perhaps),
            may_warn_unreleased_context=frozenset(self.may_warn_unreleased_context | abandoned),
            met=frozenset(self.met),
            certain=is_certain,
            waiting=frozenset(waiting),
            has_failed_function=any(rref.error for rref in self.rrefs),
            unmarked_uses=self.unmarked_uses - sum(self.choices[: self.unmarked_uses]) - self.told,
            contexts_left=self._contexts_left(settles=settles),
            told=self.group.told if self.group.inits else None,
            has_failed_creation=bool(self.broke_one),
            stuck=frozenset(self.stuck),
            wire_sends=dict(+self.in_contexts.sent),
            wire_more=frozenset(self.in_contexts.more),
            tries_in_vain=frozenset(self.absent.tries_in_vain),
            errors=dict(+self.answers.errors),
            more_errors=frozenset(self.answers.more),
            graded=dict(+self.in_contexts.graded),
            more_graded=frozenset(self.in_contexts.more_graded),
        )
        return self._cut_off(found, forgets=forgets) if at_once and not settles else found

    def _cut_off(self, found: Prediction, *, forgets: bool) -> Prediction:
        """The same where the ranks shut down at once, while something may be under way."""
        since = self.since_rest
        waited = Waited.by(self.leaves, self.steps)
        abandoned = self.abandoned_calls
        cleaning = found.may_warn_unreleased_context | since.cleaning
        most = since.most_left(self.rrefs, self.sends, found.counters)
        lacking = since.may_lack(self.sends, self.in_contexts.sent, waited, abandoned)
        for rank in may_race(most, lacking):
            self._meets_race(rank, forgets=forgets)
        return replace(
            found,
            met=frozenset(self.met),
            abandoned_calls=since.may_not_run(self.called(), waited, abandoned),
            may_warn_unreleased_context=cleaning,
            contexts_left=since.contexts_left(self.leaked_contexts),
            most_left=most,
            may_lack=lacking,
        )

    def _meets_race(self, rank: int, *, forgets: bool) -> None:
        """Note that a rank may serve requests for its RRefs while its shutdown forgets them.

        It may read freed memory. If it `forgets` them in spite of a leak, a request that has made
        one, or waited for one, no longer finds it (``rref_context.cpp``: RRefContext::getOwnerRRef
        asserts then that it is there).
        """
        says = r"in its shutdown: killed by SIG(SEGV|ABRT)"
        if forgets:
            says += f"|{re.escape(self.facts.texts.owner_expected)}"
        if self.facts.has_bug(_RACES):
            self.met.add(Met(_RACES, rank, None, says))

    def _meets_overtaken(self, last: Sequence[Send]) -> None:
        """Note the findings of a graceful shutdown that comes straight after the last step."""
        if self._overtakes(last):
            self.meets("shutdown-overtakes-creation")
        if any(u.timed_out and not u.rref.made for u in self.users):
            # The shutdown deletes what is still held, as a drop would (rref_context.cpp:
            # RRefContext::delAllUsersAndUnforkedOwners).
            self.meets("timed-out-remote-dropped")
        if self._waits_for_its_own():
            # The shutdown forgets an owner of which it knows no fork, and so the value that comes
            # then is another one's (RRefContext::delAllUsersAndUnforkedOwners).
            self.meets("early-owner-fork")
        self._meets_deleted_arguments()

    def _check_made_in_time(self) -> None:
        """Check that no value is made for longer than a graceful shutdown waits.

        ``rref_context.cpp``: ``RRefContext::delAllUsersAndUnforkedOwners`` gives up then, and says
        that users were not confirmed: their owner confirms them once it has made the value. Or it
        says that owners are pending: a rank holds an RRef that it creates at itself as one of its
        own forks until then (``RRefContext::addSelfAsFork``).

        Raises:
            UsageError: one may be.
        """
        making = (rref for rref in self.rrefs if not (self.known_made(rref) and rref.first))
        longest = max((rref.takes for rref in making), default=0.0)
        if longest + CLEARLY_IN_TIME / 2 > OWNER_WAITS:
            msg = (
                f"a value may take {longest:g} s (virtual) to make, and a shutdown waits for "
                f"{OWNER_WAITS:g} s; put a Fetch or a Settle() after its Remote, or let the "
                f"program settle."
            )
            raise UsageError(msg)

    def _contexts_left(self, *, settles: bool) -> tuple[range, ...]:
        """How many contexts each rank may hold after a graceful shutdown, which waits for no retry.

        ``TensorPipeAgent::join`` waits for ``clientActiveCalls_``, which does not count a message
        that only waits to be sent again (``rpc_agent.cpp``: ``RpcAgent::rpcRetryCallback``).
        """
        found: list[range] = []
        for rank, leaked in enumerate(self.leaked_contexts):
            late = 0 if settles else sum(rank in ranks for ranks in self.late_contexts)
            found.append(range(len(leaked), len(leaked) + late + 1))
        return tuple(found)

    def _overtakes(self, last: Sequence[Send]) -> bool:
        """Whether a delete is retried after owners may have seen that they own nothing."""
        again = {send.payload for send in last if send.failures}
        early = [user.rref for user in self.users if user.fork in again and not user.lost]
        return any(not rref.made for rref in (*early, *self.early_deletes))

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

    def _shutdown(self, waiting: set[int]) -> tuple[tuple[Send, ...], set[int], set[int]]:
        """Users delete what they still hold; what an owner then still has is reported there."""
        before, failed, counts = len(self.sends), self.failed.copy(), [*self.disturbed.counts]
        self._step = self.disturbed.leaf = None
        gone: set[str] = set()
        perhaps: set[int] = set()
        for user in self.users:
            if self.send(user.rank, MessageType.RREF_USER_DELETE, user.fork, user.rref.owner):
                gone.add(user.fork)
            if user.rank in waiting:
                perhaps.add(user.rref.owner)
        leaking = {rref.owner for rref in self.rrefs if rref.forks - gone}
        last = tuple(self.sends[before:])
        del self.sends[before:]
        self.failed, self.disturbed.counts = failed, counts
        return last, leaking, perhaps - leaking

    def _end_at_once(self, *, settles: bool) -> tuple[tuple[Send, ...], set[int], set[int]]:
        """Nobody deletes anything, so an owner still knows each fork that it knew.

        ``rref_context.cpp``: ``RRefContext::destroyInstance`` reports them by ``checkRRefLeaks``.
        """
        if settles:
            return (), {rref.owner for rref in self.rrefs if rref.forks}, set()
        return (), *self.since_rest.leaks(self.rrefs)

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
                f"{self._step!r} uses an RRef before it has come; put a Settle() before, or a "
                f"Pause that waits for it"
            )
            raise refused(self.disturbed.beyond[0], why)
        return handle

    def comes(self, name: str, seconds: float, *, late: bool) -> None:
        """A handle comes within so many virtual seconds, perhaps when its sender has given up.

        Args:
            late: whether the step ends by its timeout.
        """
        if not late and self._fate != "late":
            return
        seconds += self.disturbed.seconds + self.queues()
        if self._fate == "late":
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
        self.exhausted.check_send(self._step, rank, to)
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
        step = self._step
        is_own = len(self.sends) == self._before and rank == getattr(step, "at", None)
        named = leaf_timeout(step) if step and is_own and not message.is_retryable else None
        while True:
            limit = self.limit(named)
            fate = self.disturbed.fate(rank, to, message, limit)
            if fate and step is not None:
                self.disturbed.check_struck(step, message, fate, is_own=is_own, limit=limit)
            if not message.is_retryable:
                self._fate = fate if is_own else self._fate
                self._last_fate = fate
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
                    self._leaves_early.add(rank)
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
                self._leaves_early.add(rank)
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
            self.use(handle)
        if handle is not None and not handle.rref.made and at == to == handle.rref.owner:
            self.meets("early-owner-fork")
        fork = self._prepare(handle, at) if handle else ""
        if not self.send(at, message, payload, to):
            if self._last_fate != "lost" and not message.endswith("_REMOTE_CALL"):
                # Whether the payload can be read depends on its bytes, even on their number.
                self.meets("readable-injected-error")
            if handle:
                self._lose(handle, at)
            raise StepFails(error="timeout" if self._last_fate == "lost" else "injected")
        return self._receive(handle, at, to, fork) if handle else None

    def forward(self, at: int, to: int) -> Literal["", "lost", "late", "injected", "timeout"]:
        """A call inside a context.

        Returns: "" if all is well; "lost" or "injected" if it does not arrive, and its caller gets
        the timeout or the injected failure; "late" if it arrives only after that timeout;
        "timeout" if its answer does not arrive in time.
        """
        message = WireMessageType.FORWARD_AUTOGRAD_REQ
        fate = self.disturbed.fate(at, to, message, self.rpc_timeout)
        if fate == "fail":
            self.meets("readable-injected-error")
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
        fate = self.disturbed.fate(at, to, message, self.rpc_timeout, WireMessageType.REMOTE_RET)
        self._last_fate = fate
        if fate and (at == to or fate == "late"):
            why = f"{self._step!r} creates an RRef of its own rank, or too late"
            raise refused(self.disturbed.faults[0], why)
        if fate in ("fail", "lost"):
            handle.rref.forks.clear()
        if fate == "fail":
            self._break(handle, "creation")
        handle.rref.absent = fate == "lost"
        self.creation_unknown(handle)
        return handle

    def fetches_inside(self, at: int, handle: Handle) -> Literal["", "lost", "injected", "timeout"]:
        """``to_here`` of such an RRef, in that context; what becomes of it, as of :meth:`forward`.

        Raises:
            StepFails: torch knows that its creation failed.
            UsageError: it is not predicted what becomes of it.
        """
        self.use(handle)
        owner = handle.rref.owner
        if handle.rref.absent:
            message = WireMessageType.FORWARD_AUTOGRAD_REQ
            self.disturbed.check_never_answered(owner, at, message)
        ended = self.forward(at, owner) if at != owner else ""
        if ended == "late":
            raise refused(self.disturbed.faults[0], f"{self._step!r} fetches an RRef too late")
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
        fate = self.disturbed.fate(at, to, message, self.rpc_timeout)
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
            why = f"{self._step!r} sends an RRef to its owner, which does not have it"
            raise refused(self.disturbed.faults[0], why)
        if self.rejoined and sender != rref.owner:
            self._sends_after_reinit(handle, sender, receiver)
        if receiver == rref.owner:
            rref.early |= rref.slow and not rref.made
            if rref.early and rref.thinned and not rref.made:
                # That delete may come only now, when the owner has the RRef and knows no fork.
                self.meets("early-owner-fork")
            rref.forks.discard(fork)
            if sender != rref.owner:
                self._accept(handle, receiver)
            return Handle(rref, receiver)
        if sender != rref.owner:
            if not self.send(receiver, MessageType.RREF_FORK_REQUEST, fork, rref.owner):
                self.meets("fork-request-given-up")
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
        self.meets(finding)
        owner = handle.rref.owner
        is_request = receiver != owner
        message = MessageType.RREF_FORK_REQUEST if is_request else MessageType.RREF_CHILD_ACCEPT
        table = self.plan.table(receiver)
        if not (self.facts.has_bug(finding) and message in table.failing and table.num_fail_sends):
            return
        self.sends_otherwise(finding, receiver, owner if is_request else sender, message)
        tries = rf"^the record shows \d+ {message} from rank {receiver} with all tries, "
        self.met.add(Met(finding, receiver, None, tries, ("MessagesDiffer",)))
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

    @functools.cached_property
    def absent(self) -> Absent:
        """What the ranks remember of those that have left before them."""
        return Absent()

    @property
    def only_deletes_wait(self) -> bool:
        """Whether all that may be under way is deletes that torch tries again, and none is late.

        A graceful shutdown waits for these: an owner for its users to delete all that they hold
        (``rref_context.cpp``: ``RRefContext::delAllUsersAndUnforkedOwners``), and each rank for its
        calls and those of the others (``tensorpipe_agent.cpp``: ``TensorPipeAgent::join``).
        """
        late = self.sends[self.settled :]
        return (
            self.certain
            and all(send.delivered and send.message is not _CLEANUP for send in late)
            and not any(self.delay(send.rank, send.message) for send in late)
            and all(self.known_made(rref) for rref in self.rrefs)
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
                f"{self._step!r}: rank {rank} tries in vain to clean up at rank {to}, nobody can "
                f"tell how often; take {_CLEANUP} out of its table."
            )
            raise UsageError(msg)
        self.sends.append(Send(rank, _CLEANUP, f"gone{len(self.sends)}", to=to))
        self.absent.tries_in_vain.add((rank, _CLEANUP))
        self.may_warn_unreleased_context.add(rank)

    def _new_user(self, handle: Handle) -> Handle:
        if self.rejoined:
            self.meets("rref-lifetime-after-reinit")
        self.since_rest.users[handle.rank] += 1
        self.users.append(handle)
        return handle

    def drop(self, handle: Handle) -> None:
        """A rank drops a handle; a user's fork is deleted once its children are accepted.

        ``rref_impl.cpp``: ``UserRRef::tryDel``; ``rref_context.cpp``: ``RRefContext::delUser``.
        """
        self.mark(handle)
        if not handle.fork or handle.unaccepted:
            return
        self.users = [user for user in self.users if user is not handle]
        rref = handle.rref
        if handle.timed_out and not rref.made:
            self.meets("timed-out-remote-dropped")
        if self.send(handle.rank, MessageType.RREF_USER_DELETE, handle.fork, rref.owner):
            rref.forks.discard(handle.fork)
        for one, surely in self._fetched_late.values():
            if one is rref and not rref.forks:
                # The owner forgets the RRef, and waits for it when the fetch comes
                # (rref_context.cpp: RRefContext::getOwnerRRef).
                held = Counters(server_calls=1, server_async_calls=1)
                keeps = self.keeps if surely else self.keeps_perhaps
                keeps("fetch-after-delete", rref.owner, held)
        # The creator's own delete waits until the owner has answered the creation.
        thins = handle.fork != rref.first and not rref.made
        rref.thinned |= thins
        if thins and rref.early and rref.forks <= {rref.first}:
            # The owner knows of no fork now, so it forgets the RRef that it got a handle of
            # (rref_context.cpp: RRefContext::delForkOfOwner).
            self.meets("early-owner-fork")
        if self.sends[-1].failures and handle.lost:
            # A shutdown waits until owners have no RRef left (rref_context.cpp:
            # RRefContext::delAllUsersAndUnforkedOwners), and for no message that is to be sent
            # again (tensorpipe_agent.cpp: TensorPipeAgent::join).
            self._leaves_early.add(handle.rank)
        elif self.sends[-1].failures:
            self.early_deletes.append(handle.rref)

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
            self.use(argument)
        handle = self.created(at, to, typed=typed)
        try:
            received = self.call(at, to, message, handle=argument)
        except StepFails:
            handle.rref.forks.clear()
            if self._last_fate == "lost":
                handle.rref.absent = True
            else:
                self._break(handle, "creation")
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
        self.broke_one.add(rank)
        if not self.facts.has_bug(finding):
            return
        self.asks_for_nothing(finding, handle)
        self.meets_at_shutdown(finding)
        self.keeps_perhaps(finding, rank, Counters(client_calls=1))
        if not handle.fork:
            self.keeps(finding, rank, Counters(owners=1, forks=1))
            return
        self.keeps(finding, rank, Counters(pending_users=1))
        self.sends_otherwise(finding, rank, rref.owner, MessageType.RREF_USER_DELETE)

    def asks_for_nothing(self, finding: str, handle: Handle) -> None:
        """In this step a rank uses an RRef that is never made, and a finding keeps that from it.

        So it gets no error. A user asks the owner, which serves such a request for ever if it comes
        (``rref_context.cpp``: ``RRefContext::getOwnerRRef``).
        """
        if not self.facts.has_bug(finding):
            return
        says, owner = "had to be refused by .*, and came with ", handle.rref.owner
        self.met.add(Met(finding, handle.rank, len(self.steps), says, ("MissingError",)))
        if handle.fork:
            self.keeps_perhaps(finding, owner, Counters(server_calls=1, server_async_calls=1))
            fetch = MessageType.PYTHON_RREF_FETCH_CALL
            self.sends_otherwise(finding, handle.rank, owner, fetch)

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

    def use(self, handle: Handle) -> None:
        """A rank uses a handle, which may fail.

        Raises:
            StepFails: its creation failed, and torch knows that.
        """
        if handle.unmarked and any(handle is one for one in self._unsure):
            why = f"{self._step!r} uses an RRef before torch has marked it; put a Settle() before"
            raise refused(self.disturbed.faults[0], why)
        if handle.unmarked and handle.rref.absent and handle.rank == handle.rref.owner:
            why = (
                f"{self._step!r} waits at its owner for a value that was never made, and "
                f"OwnerRRef::getValue (rref_impl.cpp) has no timeout"
            )
            raise refused(self.disturbed.faults[0], why)
        if handle.unmarked and not any(used is handle for used in self._used_now):
            self._used_now.append(handle)
            marked = self.choices[self.unmarked_uses : self.unmarked_uses + 1]
            self.unmarked_uses += 1
            if any(marked):
                self.mark(handle)
        if handle.broken:
            if handle.second:
                # It is never marked: whoever uses it waits for its creation.
                self.never_ends("second-failed-remote")
            # Before a settle, torch knows of a timeout only once one of its threads has handled it.
            raise StepFails(
                handle.broken, handle.marked_before if handle.timed_out else UNLIMITED_SLACK
            )

    def mark(self, handle: Handle) -> None:
        """torch has marked the RRef as timed out, if its creation does time out.

        ``rref_impl.cpp``: ``RRef::handleError``.
        """
        if handle.unmarked:
            handle.unmarked = False
            self._break(handle, "creation")

    def has_value(self, handle: Handle) -> None:
        """A step has got the value of an RRef.

        If the creation timed out because of what the value waits for, torch has marked it by then.
        Where its answer is lost, the timeout comes later than the value.
        """
        if not handle.unanswered:
            self.mark(handle)

    def _break(self, handle: Handle, how: ErrorClass) -> None:
        """Note that the creation of a handle's RRef failed, as far as its rank knows."""
        handle.broken = how
        handle.second = handle.rank in self.broke_one
        if handle.second:
            self._check_abandoned(handle.rank)
            self.meets("second-failed-remote")
            for late in [one for one in self._answered_late if one.rank == handle.rank]:
                # The function sleeps first, so it may well be its creation that fails second.
                self._keeps_unmarked(late)
        self.broke_one.add(handle.rank)

    @functools.cached_property
    def since_rest(self) -> SinceRest:
        """What may be under way since the last settle."""
        return SinceRest()

    @functools.cached_property
    def leaves(self) -> list[Leaf]:
        """The steps so far."""
        return []

    @functools.cached_property
    def spoiled(self) -> Spoiled:
        """The handles and futures that a finding has spoiled."""
        return Spoiled()

    @functools.cached_property
    def exhausted(self) -> Exhausted:
        """The ranks that have run out of threads."""
        return Exhausted()

    @functools.cached_property
    def _coming(self) -> dict[str, float]:
        """Handles that come when their sender has given up, by name, until a settle.

        For each the virtual seconds after which it has surely come, from the start of its step.
        """
        return {}

    @functools.cached_property
    def served_in_vain(self) -> Counter[int]:
        """How many fetches each rank serves for ever, of RRefs that it never gets."""
        return Counter()

    @functools.cached_property
    def _abandoned(self) -> set[int]:
        """Ranks whose function uses an RRef whose creation fails, when nobody waits for that."""
        return set()

    def abandons_creation(self, rank: int, *, second: bool) -> None:
        """A function of `rank` for which nobody waits uses an RRef whose creation fails.

        Args:
            second: whether a creation of the rank had failed before.

        Raises:
            UsageError: the creation may be the second one that fails.
        """
        self._abandoned.add(rank)
        if second:
            self._check_abandoned(rank)

    def _check_abandoned(self, rank: int) -> None:
        """Check that a function does not wait for ever for an RRef that torch takes for good.

        Raises:
            UsageError: it may.
        """
        finding = "second-failed-remote"
        if rank in self._abandoned and self.facts.has_bug(finding):
            msg = (
                f"two creations of rank {rank} fail, one in a function that nobody waits for any "
                f"more, so nobody can tell which is the second ({finding}), and whether the "
                f"function waits for ever; give its step no timeout, or another form."
            )
            raise UsageError(msg)

    def answers_late(self, handle: Handle) -> None:
        """A function answers with an RRef whose creation failed, when nobody waits for that.

        A torch that does not know that the creation has failed sends the RRef. The answer is late,
        and so the fork in it stays (``rref_context.cpp``: ``RRefContext::prepareChildFork``).
        """
        if handle.second:
            self._keeps_unmarked(handle)
        else:
            self._answered_late.append(handle)

    def _keeps_unmarked(self, handle: Handle) -> None:
        finding = "second-failed-remote"
        if handle.fork:
            self.keeps_user(finding, handle.rank, handle.rref.owner)
        else:
            self.keeps_perhaps(finding, handle.rank, Counters(owners=1, forks=1))

    def value(self, handle: Handle, at: int) -> list[float]:
        """The value by ``to_here``, or by ``local_value`` at the owner.

        ``rref_impl.cpp``: ``UserRRef::toHere``, ``OwnerRRef::getValue``.

        Raises:
            StepFails: there is no value, or the request for it fails.
        """
        self.use(handle)
        rref = handle.rref
        if at != rref.owner:
            message = fetch_message(typed=rref.typed)
            if not self.send(at, message, f"fetch {self.rrefs.index(rref)}", rref.owner):
                if self._last_fate == "lost":
                    raise StepFails(error="timeout")
                self.meets("readable-injected-error")
                raise StepFails(error="injected")
            if rref.absent:
                self._fetches_in_vain(at, rref)
            if self._fate == "late" and len(self.sends) == self._before + 1:
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
        step, fault = self._step, self.disturbed.faults[0]
        message = fetch_message(typed=rref.typed)
        if step is None or step.op != "fetch":
            why = (
                f"a function of {step!r} fetches an RRef that was never created; its timeout and "
                f"that of its caller come at almost the same time"
            )
            raise refused(fault, why)
        if not self.limit(leaf_timeout(step)):
            why = f"{step!r} waits for ever for an RRef that was never created; give it a timeout"
            raise refused(fault, why)
        self.disturbed.check_never_answered(rref.owner, at, message)
        self.served_in_vain[rref.owner] += 2 if self._fate == "twice" else 1
        raise StepFails(error="timeout")

    def reads(self, rref: RRef, by: RRef | str) -> None:
        """A function reads a value, and its caller goes on; it makes an RRef, or ends a future."""
        self._read.append((rref, by))

    def has_read(self, future: str) -> None:
        """A step has waited for that future."""
        for rref in [read for read, by in self._read if by == future]:
            rref.is_made()
        self._read = [one for one in self._read if one[1] != future]

    def known_made(self, rref: RRef) -> bool:
        """Whether a step has waited for a value, or for another one that was made of it."""
        if rref.made:
            return True
        others = [by for read, by in self._read if read is rref and not isinstance(by, str)]
        return any(map(self.known_made, others))

    def _waits_for_its_own(self) -> bool:
        """Whether a function may still wait for an RRef of its own rank, got before its value."""
        return any(
            not isinstance(by, str)
            and by.owner == read.owner
            and not self.known_made(by)
            and not self.known_made(read)
            for read, by in self._read
        )

    def check_unread(self, rref: RRef) -> None:
        """Check that no function may still read the value of an RRef, which this step changes.

        An owner handles each request in another thread (``tensorpipe_agent.cpp``:
        ``TensorPipeAgent::respond``), so nobody knows which comes first.

        Raises:
            UsageError: one may.
        """
        if any(read is rref and (isinstance(by, str) or not by.made) for read, by in self._read):
            msg = (
                f"{self._step!r}: a function that an earlier step has started may still read the "
                "value that it changes; put a Settle() before it, or a Fetch or a Wait of what "
                "that step makes."
            )
            raise UsageError(msg)

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

    def delay(self, rank: int, message: MessageType) -> float:
        """Virtual seconds by which the plan delays such a message of `rank`."""
        delay = self.plan.table(rank).messages_to_delay.get(message, 0.0)
        return delay_milliseconds(delay) / 1000

    def callee_waits(self, at: int, since: int) -> tuple[float, float]:
        """Virtual seconds that a call waits at `at` for the messages that were sent there `since`.

        Returns: the time that it certainly waits, and the time that it may wait on top: accepts and
        deletes are sent by the thread that answers, or by another.
        """
        surely = perhaps = 0.0
        for send in self.sends[since:]:
            if send.rank != at:
                continue
            delay = self.delay(at, send.message) if send.delivered else 0.0
            if send.message is MessageType.RREF_FORK_REQUEST:
                surely += retry_wait(min(send.failures, send.message.max_retries)) + delay
            elif send.message.endswith("_FETCH_CALL"):
                surely += delay
            elif send.message.startswith("RREF_"):
                perhaps += delay
        return surely, perhaps

    def timed(
        self,
        at: int,
        message: MessageType,
        timeout: float | None,
        surely: float = 0.0,
        perhaps: float = 0.0,
    ) -> tuple[ErrorClass, float]:
        """Whether a message of `at` misses its timeout: "", "timeout" or "unknown"; the slack.

        Besides the message's delay, its answer waits for `surely`, and for up to `perhaps` more.
        Without a timeout the program's applies.
        """
        self._is_timed = True
        timeout = self.limit(timeout)
        if timeout is None:
            return "", UNLIMITED_SLACK
        slack = timeout - self.delay(at, message) - surely
        if self.disturbed and self._step is not None:
            if self._is_held_by_itself(at, message, timeout):
                return "timeout", UNLIMITED_SLACK
            if self._fate in UNHEARD:
                # The timeout comes, whatever else may be late: see _struck.
                return "", UNLIMITED_SLACK
            late = timeout - slack + perhaps + self.disturbed.seconds
            # Where the timeout comes first anyhow, what is late only makes that clearer.
            may_come = slack > -CLEARLY_LATE and late + CLEARLY_IN_TIME > timeout
            if self.disturbed.seconds and may_come:
                raise timeout_may_come(self._step, late)
        if slack <= -CLEARLY_LATE:
            return ("timeout" if self._has_thread(at) else "unknown"), -slack
        slack -= perhaps + self.queues()
        return "" if slack >= CLEARLY_IN_TIME else "unknown", abs(slack)

    @property
    def threads_of_ranks(self) -> int:
        """How many threads the agent of each rank has."""
        return ENOUGH_THREADS if self.threads is None else self.threads.number

    def _has_thread(self, rank: int) -> bool:
        """Whether a thread of `rank` is surely free to hand a timeout over.

        ``tensorpipe_agent.cpp``: ``TensorPipeAgent::markFutureWithError``.
        """
        threads = self.threads
        if threads is None or not threads.are_few:
            return True
        busy = threads.sleeping.get(rank, 0)
        return not self._delays and threads.left(len(self.steps), rank) > busy

    def queues(self) -> float:
        """Virtual seconds that a message may wait for a free thread, if there are few.

        A thread is busy while a function sleeps, and while a message that it sends is delayed.
        """
        threads = self.threads
        if threads is None or not threads.are_few:
            return 0.0
        if not self._delays:
            return threads.lasts
        # What runs at the same time is not known yet.
        others = threads.beside[len(self.steps)] * _MOST_OF_A_STEP
        delays = sum(self.delay(send.rank, send.message) for send in self.sends[self.settled :])
        return threads.lasts + delays + others * max(self._delays)

    @functools.cached_property
    def in_contexts(self) -> ContextMessages:
        """The calls and gradients inside contexts so far."""
        return ContextMessages()

    @functools.cached_property
    def answers(self) -> Answers:
        """The requests so far that are answered by an EXCEPTION."""
        return Answers()

    @functools.cached_property
    def _delays(self) -> tuple[float, ...]:
        """The delays of the plan, in virtual seconds."""
        faults = (f for rank in range(self.world_size) for f in self.plan.faults_at(rank))
        return tuple(fault.seconds for fault in faults if fault.blocks_sender and fault.seconds)

    def _is_held_by_itself(self, at: int, message: MessageType, timeout: float) -> bool:
        """Whether the creation that was just sent is held until the delete of its own fork.

        A user deletes its fork only once its creation has ended (``rref_context.cpp``:
        ``RRefContext::addPendingUser``, ``confirmPendingUser``). So the two wait for each other,
        and the creation ends by its timeout.
        """
        if not message.endswith("_REMOTE_CALL"):
            return False
        sent = [send for send in self.sends if (send.rank, send.message) == (at, message)]
        rref = self.rrefs[-1]
        for fault in self.disturbed.late:
            until = fault.until
            to_it = (None, rref.owner)
            if (
                until is not None
                and (fault.rank, str(fault.message), fault.which, fault.n)
                == (at, str(message), "nth", len(sent))
                and (until.rank, str(until.message)) == (at, str(MessageType.RREF_USER_DELETE))
                and fault.to is None
                and until.to in to_it
                and rref.first
                and fault.delay >= timeout + CLEARLY_LATE
            ):
                self._own_deletes[fault] = rref.first
                return True
        return False

    def _check_own_deletes(self, last: Sequence[Send]) -> None:
        """Check that such a hold does wait for that delete, and not for another one.

        Raises:
            UsageError: it does not.
        """
        for fault, fork in self._own_deletes.items():
            until = fault.until
            assert until is not None
            tries = [
                send.payload
                for send in (*self.sends, *last)
                for _ in range(send.failures + send.delivered)
                if (send.rank, str(send.message)) == (until.rank, str(until.message))
                and until.to in (None, send.to)
            ]
            if tries[until.n - 1 : until.n] != [fork]:
                why = "nobody can tell how long it is held"
                raise refused(fault, why)

    def gives_up(
        self,
        at: int,
        to: int,
        call: str,
        timeout: float | None,
        surely: float = 0.0,
        perhaps: float = 0.0,
    ) -> tuple[ErrorClass, float]:
        """:meth:`timed` for a call of a Python function at `to`, which runs all the same.

        `call` is the name under which the function notes that it ran, "" if it does not.
        """
        late, slack = self.timed(at, MessageType.PYTHON_CALL, timeout, surely, perhaps)
        if late and call:
            self.abandoned_calls[to].add(call)
        return late, slack

    def check_gives_up(self, step: Leaf) -> None:
        """Check that a call of this step in a context, whose function is slow, ends by its timeout.

        No table delays such a message.

        Raises:
            UsageError: nobody can tell, or what else the step shows.
        """
        why = ""
        if self.threads_of_ranks < ENOUGH_THREADS:
            why = (
                f"a timeout needs a free thread (TensorPipeAgent::markFutureWithError), and "
                f"num_worker_threads={self.threads_of_ranks}; let it be None"
            )
        elif self.disturbed:
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
        self._is_timed = True
        held = {rank: Counters(server_calls=s, client_calls=c) for rank, (s, c) in out.held.items()}
        if not self.facts.has_bug(_NEEDS_THREAD):
            msg = (
                f"{step!r}: what its calls leave is modelled for a torch with {_NEEDS_THREAD}, and "
                f"for no other; give the program more threads."
            )
            raise UsageError(msg)
        if self.rpc_timeout is None:
            self.exhausted.add({*path}, held)
            return
        self.exhausted.add({*path}, {})
        for rank in sorted(out.stuck):
            self.keeps(_NEEDS_THREAD, rank, held[rank])

    def check_alone(self, step: Leaf, ranks: Sequence[int]) -> None:
        """Check that nothing but these calls takes threads of the ranks, or ends one of them.

        Raises:
            UsageError: something may.
        """
        threads = self.threads
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

    def limit(self, timeout: float | None) -> float | None:
        """The timeout of a message for which a step names `timeout`; None if nothing ends it."""
        return self.rpc_timeout if timeout is None else timeout

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


#: More messages than a step sends.
_MOST_OF_A_STEP = 100
#: The most outcomes of a program that differ by when torch marks creations that time out.
_MOST_ALTERNATIVES = 64


@functools.lru_cache(maxsize=512)
def predict(program: Program, plan: FaultPlan, facts: TorchFacts = UNKNOWN) -> Prediction:
    """What `program` must do under `plan`, within the retry budget or beyond it.

    Args:
        program: what the ranks do.
        plan: the faults that they meet.
        facts: what is known of the torch that runs it: which findings the program may meet. By
            default it may meet every finding.

    Raises:
        UsageError: the plan names a rank outside the world, or the ranks have too few threads for
            the program, or it has a creation that may or may not time out, or too many uses of an
            RRef whose creation times out; or the plan has a fault under which nothing is predicted.
    """
    plan.check(program.world_size)
    Disturbances(plan, program).check(program)
    unpredicted = [fault.name for fault in plan.others if not fault.is_predicted]
    if unpredicted:
        msg = (
            f"the oracle does not predict what a program shows under {', '.join(unpredicted)}; "
            f"take it out of the plan's others, or run functions of your own under it with "
            f"rpc_cluster, which judges what ranks hold and how they exit."
        )
        raise UsageError(msg)
    _check_threads(program)
    _check_end(program, plan)
    first, *others = _alternatives(program, plan, facts)
    return replace(first, alternatives=tuple(others))


def _check_threads(program: Program) -> None:
    """Raises:
    UsageError: all threads of a rank may wait for what only another one of them could bring.
    """
    number = program.num_worker_threads
    if number is None:
        return
    timed = program.rpc_timeout is not None
    needed = needed_threads(
        program.world_size, program.steps, timed=timed, also_patient=False, runs_out_at=number
    )
    if number >= needed:
        return
    msg = (
        f"num_worker_threads={number}: all threads of a rank may come to wait for each other, and "
        f"then nothing ends, not even by a timeout (TensorPipeAgent::markFutureWithError); give "
        f"the program {needed}, or None, or put a Settle() after steps whose functions go on."
    )
    raise UsageError(msg)


def _check_end(program: Program, plan: FaultPlan) -> None:
    """Raises:
    UsageError: a call of the shutdown itself may miss its timeout.
    """
    timeout = program.end.timeout
    if timeout is None:
        return
    call, delete = (
        max(plan.table(rank).messages_to_delay.get(one, 0.0) for rank in range(program.world_size))
        for one in (MessageType.PYTHON_CALL, MessageType.RREF_USER_DELETE)
    )
    if not program.end.is_in_time(call, delete, len(program.leaves)):
        msg = (
            f"the plan delays PYTHON_CALL by {call:g} s and RREF_USER_DELETE by {delete:g} s. With "
            f"a timeout of shutdown that is reached ({timeout:g} s), a rank whose call misses it "
            f"raises, while the others wait for it, and owners give up what is deleted late; let "
            f"the delays be shorter, or give the program another end."
        )
        raise UsageError(msg)


def _alternatives(program: Program, plan: FaultPlan, facts: TorchFacts) -> list[Prediction]:
    """All predictions for the program; in the first, no RRef was marked before it was used."""
    found: list[Prediction] = []
    threads = threads_of(program)
    waiting: list[tuple[bool, ...]] = [()]
    while waiting:
        choices = waiting.pop(0)
        model = Model(program.world_size, plan, choices, facts, program.rpc_timeout, threads)
        model.disturbed = Disturbances(plan, program)
        model.ends_hastily = program.ends_hastily
        for step in program.leaves:
            model.add(step)
        model.disturbed.check_branches(program)
        model.disturbed.check_running_on(program)
        model.disturbed.check_retries(model.sends)
        at_once = program.end.how == "at once"
        forgets = program.end.ignores_leaks
        found.append(model.prediction(settles=program.settles, at_once=at_once, forgets=forgets))
        model.disturbed.check_shutdown(found[-1], settles=program.settles)
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
