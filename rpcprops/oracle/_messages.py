"""What faults of single messages do to a program, as far as that is predicted.

*Late messages* change nothing that torch promises: it assumes no order of messages between two
ranks (docs/source/rpc/rref.md, Assumptions), and waits for the answer of each request. What is
predicted without the fault must come, unless a wait of torch's is shorter than what is late:

* the timeout of a call (``tensorpipe_agent.cpp``: ``TensorPipeAgent::send``), or the program's;
* the 100 s for which a shutdown waits for accepts and deletes
  (``rref_context.cpp``: ``RRefContext::delAllUsersAndUnforkedOwners``).

Where one of these may end first, the program is refused, with these exceptions:

*Later than the timeout of the step that asks.* Once that timeout has come, the answer changes
nothing. ``TensorPipeAgent::pollTimeoutRpcs`` completes the future with the error, the response
finds its entry in ``pendingResponseMessage_`` and is dropped, as ``markFutureAsComplete`` looks at
``isComplete`` first (``tensorpipe_agent.cpp``). So a late answer is to the sender what a lost one
is. A late request is that as well, and is executed once when it comes; a program must settle before
that could matter.

* A late ``Share``, or a call with an RRef: ``RRefContext::prepareChildFork`` has noted the fork
  when the message was written, so the owner keeps the RRef until the fork is announced.
* A late fetch whose RRef is deleted meanwhile: the owner takes it for one that is still to be made,
  and waits (``RRefContext::getOwnerRRef``; the finding fetch-after-delete).
* A late creation whose fork is deleted meanwhile: ``RRefContext::delForkOfOwner`` ignores that
  delete (the finding timed-out-remote-dropped).
* A late call of a context comes after the cleanup, which the timeout has caused, and makes the
  context anew (``autograd/utils.cpp``: ``addRecvRpcBackward``; the finding context-after-cleanup).

*A late try of what torch tries again.* ``RpcAgent::rpcRetryCallback`` (``rpc_agent.cpp``) sends it
again when its timeout has come. That try is executed, and the late one after it, which must change
nothing: see below. The agent writes a copy of a message that it delays, so both tries are whole.

*A request that fails or is lost.* ``sendWithRetries`` sends the four retried types again after any
error, a timeout included (``rpc_agent.cpp``: ``RpcAgent::rpcRetryCallback``); that must change
nothing. Everything else is sent once: its sender gets the error, or the timeout, and nothing ran.

*A response that is lost.* The request was executed, and its sender gets the timeout. What torch
tries again carries nothing from then on. After an accept, a delete or a cleanup nothing depends on
that. An answer with an RRef leaves its fork (``rref_context.cpp``: ``RRefContext::
prepareChildFork``).

*An RRef whose creation is lost* may be used before its user gets the timeout, and torch knows
nothing of that (``rref_impl.cpp``: ``UserRRef::toHere`` reads ``getTimedOut()`` once, at its
start). Its owner notes forks of it (``RRefContext::addForkOfOwnerIfNotPresent``), and takes a fetch
of it for one of an RRef that is still to be made: it serves that for ever, and the fetch ends by
its timeout (``RRefContext::getOwnerRRef``). A shutdown does not wait for such a call
(``tensorpipe_agent.cpp``: ``TensorPipeAgent::join`` waits for the calls of clients). Where only the
answer is lost, the RRef is there, and its user learns of the timeout later.

*Where the program does not settle*, a graceful shutdown waits for creations and accepts, and an
owner for deletes, for 100 s (``RRefContext::delAllUsersAndUnforkedOwners``). So one of them may be
lost, if the timeout comes before that. A call that is lost has ended its step.

*Ranks that shut down at once* send nothing then (``api.py``: shutdown calls ``_wait_all_workers``
and deletes RRefs only if it is graceful). If they have settled before, faults have nothing left to
act on. If not, what a fault delays, holds or loses is under way like anything else, and bounded in
the same way (``oracle/_hasty.py``): the record names each message once, whatever became of it, and
torch sends nothing again then (``rpc_agent.cpp``: ``RpcAgent::rpcRetryCallback`` asks whether the
agent still runs).

*The other ends* are graceful, and send what the usual one does. A timeout that is reached lets an
owner wait for deletes before the last rank begins its shutdown, so what is late then must be less
late, and the calls by which ranks meet must not miss that timeout (:class:`End`).

*In a distributed autograd context* calls travel as FORWARD_AUTOGRAD_REQ. The caller notes the
other rank before it sends (``autograd/utils.cpp``: ``getMessageWithAutograd``), so that rank gets
the cleanup of the context, whatever was lost.

*In a backward pass* each gradient travels as BACKWARD_AUTOGRAD_REQ, which is sent once and has the
default timeout (``recvrpc_backward.cpp``: ``RecvRpcBackward::apply``). A rank answers when its own
part of the pass has ended, or at once if it was in the pass before (``dist_engine.cpp``:
``DistEngine::executeSendFunctionAsync``). A gradient that gets no answer ends the pass at its
sender with the timeout (``context.cpp``: ``DistAutogradContext::addOutstandingRpc``), and so does
each wait for that sender. The caller has waited longest, so its timeout comes first
(``dist_engine.cpp``: ``DistEngine::execute`` waits for all of its gradients). A gradient that fails
ends the pass in the same way, at once. Each gradient of such a pass depends on the one before it.
So that is also true where a rank is in the pass twice, for it answers its first gradient only when
its whole part has ended. But a rank that has been told too early that all was well may wait for
ever (the finding failed-backward-revisits-rank).

*A request that comes twice* is executed twice. torch calls the four retried types idempotent
(docs/source/rpc/rref.md, Assumptions; ``rref_context.cpp``: ``delForkOfOwner``, ``delPendingChild``
and ``addForkOfOwnerIfNotPresent`` ignore the second; ``container.cpp``:
``releaseContextIfPresent``). A fetch reads. A call runs its function twice.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from typing import Literal

from rpcprops.errors import UsageError
from rpcprops.faults import (
    MAX_DELAY,
    RETRYABLE_MESSAGE_TYPES,
    FaultPlan,
    FaultTable,
    MessageFault,
    MessageType,
    WireMessageType,
)
from rpcprops.oracle.prediction import Prediction, Send
from rpcprops.oracle.ranks import OWNER_WAITS
from rpcprops.outcomes import UNLIMITED_SLACK
from rpcprops.programs import End, Leaf, Program
from rpcprops.steps.base import CLEARLY_IN_TIME, CLEARLY_LATE

#: What becomes of a request: it fails; it is lost, or its answer is; it comes twice. "late": it
#: comes later than its timeout; an answer that does is like a lost one.
Fate = Literal["", "fail", "lost", "unanswered", "twice", "late"]
#: Fates by which the sender gets the timeout.
UNHEARD: tuple[Fate, ...] = ("lost", "unanswered", "late")

_LATE = ("delay", "hold")
#: The most messages of which each waits for the one before: a function that fetches an argument
#: which another user sent needs eight, with their answers.
_IN_A_ROW = 8
_REMOTES = tuple(m for m in MessageType if m.endswith("_REMOTE_CALL"))
_FETCHES = tuple(m for m in MessageType if m.endswith("_FETCH_CALL"))
_CALLS = (MessageType.PYTHON_CALL, MessageType.SCRIPT_CALL)
#: Kinds of step of which it is certain what they send, and in which order.
_CERTAIN = frozenset(
    {
        "own",
        "remote",
        "share",
        "fetch",
        "local",
        "drop",
        "call",
        "count",
        "chain",
        "bump",
        "nest",
        "settle",
        "pause",
        "context",
        "refused",
    }
)
#: Those of them of which it is predicted what a lost message of their own, or its answer, does.
_LOSABLE = frozenset({"remote", "share", "fetch", "call", "count", "bump", "nest"})
#: Those of them of which it is predicted what follows where that message comes after its timeout.
_LATE_ABLE = frozenset({"remote", "share", "fetch", "call", "count"})
_FORWARD = frozenset({WireMessageType.FORWARD_AUTOGRAD_REQ, WireMessageType.FORWARD_AUTOGRAD_RESP})
_BACKWARD = frozenset(
    {WireMessageType.BACKWARD_AUTOGRAD_REQ, WireMessageType.BACKWARD_AUTOGRAD_RESP}
)
_RETRIED = frozenset(WireMessageType(kind) for kind in RETRYABLE_MESSAGE_TYPES)
#: Types to which no step gives a timeout, so that the program's is theirs.
_OF_TORCH = frozenset(
    {*_FORWARD, *_BACKWARD, *_RETRIED, *(answer for one in _RETRIED if (answer := one.answer))}
)
#: What a message that brings an RRef, or the function that it starts, makes ranks send when it
#: comes.
_FOLLOWING = frozenset(
    {
        WireMessageType.RREF_FORK_REQUEST,
        WireMessageType.RREF_CHILD_ACCEPT,
        WireMessageType.RREF_USER_DELETE,
        WireMessageType.RREF_ACK,
        *(WireMessageType(kind) for kind in _FETCHES),
        *(answer for kind in _FETCHES if (answer := WireMessageType(kind).answer)),
    }
)
#: What is sent while the function of a remote goes on after its step, or when it ends.
_AFTER_STEP = _FOLLOWING | {WireMessageType.REMOTE_RET}
#: Those of them that it has sent, and got, before its value is made.
_BEFORE_VALUE = frozenset(
    {
        *(WireMessageType(kind) for kind in _FETCHES),
        *(answer for kind in _FETCHES if (answer := WireMessageType(kind).answer)),
        WireMessageType.RREF_FORK_REQUEST,
    }
)
#: A call, its answer, and the creation of an RRef.
_CALLED = frozenset(
    {
        *(WireMessageType(kind) for kind in (*_CALLS, *_REMOTES)),
        *(answer for kind in _CALLS if (answer := WireMessageType(kind).answer)),
    }
)
#: Those of them of which it does not matter which one a fault acts on, where the ranks settle: each
#: is tried again, and no step waits for its answer.
_ALIKE = frozenset({WireMessageType.RREF_CHILD_ACCEPT, WireMessageType.RREF_USER_DELETE})
#: Requests of distributed autograd of which torch promises nothing where they come twice.
_WHY_ONCE = {
    WireMessageType.FORWARD_AUTOGRAD_REQ: (
        "DistAutogradContext::addRecvFunction (context.cpp) asserts that each message of a context "
        "comes once, and whether the value or that error is answered first is a race of two threads"
    ),
    WireMessageType.BACKWARD_AUTOGRAD_REQ: (
        "DistEngine::executeSendFunctionAsync (dist_engine.cpp) runs the same gradient function "
        "twice, and whether the pass has ended before that is a race of two threads"
    ),
}
#: Steps after which ranks have another agent, which counts its messages anew.
OTHER_AGENTS = frozenset({"rejoin", "member"})
#: Steps whose waits depend on when a message comes, in ways that are not predicted under faults of
#: single messages.
_TIMED = frozenset({"outlast", "onward", "fail_twice", "unreached"})
#: Retried types for whose answers nothing waits: when one was lost, the message was executed.
_UNSEEN = (
    MessageType.RREF_CHILD_ACCEPT,
    MessageType.RREF_USER_DELETE,
    MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ,
)


class Disturbances:
    """The message faults of a plan, as the model of one program meets them.

    Attributes:
        faults: those that act on messages, in the order of the plan.
        beyond: those of them that make messages later than the timeout of a step.
        late: those that make messages late in another way.
        leaf: the number of the step that the model adds, None in the shutdown.
        slack: virtual seconds by which, in that step, what is too late misses its timeout.
    """

    def __init__(self, plan: FaultPlan, program: Program | None = None) -> None:
        self.plan = plan
        self.settles = program is None or program.settles
        self.end = End() if program is None else program.end
        #: Virtual seconds after which a shutdown that follows the last step gets what was lost.
        self.lost_before_end = 0.0
        self.faults = tuple(one for one in plan.others if isinstance(one, MessageFault))
        self.beyond: tuple[MessageFault, ...] = _beyond(self.faults, program) if program else ()
        self.late = tuple(
            one for one in self.faults if one.action in _LATE and one not in self.beyond
        )
        #: How many messages each has counted, and in which steps.
        self.counts = [0] * len(self.faults)
        self.counted_in: list[set[int]] = [set() for _ in self.faults]
        #: Faults that count both answers to a copied request, with its step, until a settle.
        self.copied: dict[int, int | None] = {}
        #: The ranks whose requests are answered by what each fault counts, where that matters.
        self.partners: list[set[int | None]] = [set() for _ in self.faults]
        self.leaf: int | None = None
        self.slack = UNLIMITED_SLACK

    def __bool__(self) -> bool:
        return bool(self.faults)

    @property
    def seconds(self) -> float:
        """Virtual seconds by which an answer may come later because of them all."""
        return sum(one.delay * _times(one) for one in self.late)

    def rest(self) -> None:
        """The ranks have come to rest, so nothing of before is counted later."""
        self.copied.clear()
        for partners in self.partners:
            partners.clear()

    def may_be_late(self, rank: int, message: MessageType) -> bool:
        """Whether such messages of a rank may be late."""
        return any(one.rank == rank and message in one.targets for one in self.late)

    def fate(
        self,
        rank: int,
        to: int | None,
        message: MessageType | WireMessageType,
        limit: float | None,
        answer: WireMessageType | None = None,
    ) -> Fate:
        """Count a request of `rank`, and its answer if it gets one; what becomes of the request.

        Args:
            limit: its timeout, in virtual seconds; None if it has none.
            answer: the type of its answer, if that is not the usual one.
        """
        kind = WireMessageType(message)
        fault = self._strikes(rank, to, kind)
        fate: Fate = ""
        match fault.action if fault else "":
            case "fail":
                return "fail"
            case "lose":
                fate = "lost"
            case "delay" if fault in self.beyond:
                fate = "late"
            case "duplicate":
                return self._fate_of_two(rank, to, kind)
        if fate != "lost":
            silent = self._loses_answer(rank, to, answer or kind.answer)
            if silent is not None and fate == "late":
                why = "when a late request is answered is not modelled"
                raise refused(silent, why)
            fault, fate = (silent, "unanswered") if silent is not None else (fault, fate)
        if fault is not None and fate:
            self._check_noticed(fault, message, limit)
            self._check_order_of_answers(fault, rank, to, kind, fate)
        return fate

    def _fate_of_two(self, rank: int, to: int | None, kind: WireMessageType) -> Fate:
        """The fate of a request that comes twice: each is answered, and one answer is needed."""
        lost = [self._loses_answer(rank, to, kind.answer) for _ in range(2)]
        late = next((one for one in lost if one in self.beyond), None)
        if late is not None:
            raise refused(late, f"it is for an answer to a {kind} that came twice")
        counting = [
            number
            for number, one in enumerate(self.faults)
            if (one.rank, kind.answer) in [(to, kind) for kind in one.may_be]
            and one.to in (None, rank)
        ]
        self.copied.update(dict.fromkeys(counting, self.leaf))
        if all(lost):
            why = f"both answers to a {kind} that came twice are lost"
            raise refused(self.faults[0], why)
        return "twice"

    def _loses_answer(
        self, rank: int, to: int | None, answer: WireMessageType | None
    ) -> MessageFault | None:
        """Count an answer to a request of `rank`; the fault by which it is lost, or too late."""
        fault = self._strikes(to, rank, answer) if to is not None and answer else None
        is_lost = fault is not None and (fault.action == "lose" or fault in self.beyond)
        return fault if is_lost else None

    def _strikes(self, rank: int, to: int | None, kind: WireMessageType) -> MessageFault | None:
        """The first fault that is due for a message; all that match count it."""
        found: MessageFault | None = None
        for number, fault in enumerate(self.faults):
            if fault.rank != rank or fault.to not in (None, to) or kind not in fault.may_be:
                continue
            if fault not in self.late and self.copied.get(number, self.leaf) != self.leaf:
                # Each copy is executed by a thread of its own (TensorPipeAgent::respond), and the
                # first answer ends the step.
                raise refused(fault, "the second answer to a copied request may come later")
            self._check_one_partner(number, kind, to)
            self.counts[number] += 1
            if self.leaf is not None:
                self.counted_in[number].add(self.leaf)
            if fault.acts_on(self.counts[number]):
                found = found or fault
        return found

    def _check_one_partner(self, number: int, kind: WireMessageType, to: int | None) -> None:
        """Check that it is certain in which order a fault counts answers that nobody waits for.

        Ranks delete what they hold at the same time when they shut down, and ``rpc.remote`` returns
        before its answer.

        Raises:
            UsageError: they go to several ranks.
        """
        fault = self.faults[number]
        in_shutdown = self.leaf is None or not self.settles
        if not (
            kind is WireMessageType.REMOTE_RET or (kind is WireMessageType.RREF_ACK and in_shutdown)
        ):
            return
        self.partners[number].add(to)
        if len(self.partners[number]) > 1 and fault not in self.late and fault.which != "every":
            raise refused(
                fault, f"in which order a rank sends {kind} to several; name the receiver"
            )

    def _check_noticed(
        self, fault: MessageFault, message: MessageType | WireMessageType, limit: float | None
    ) -> None:
        """Check that the timeout comes for what is lost or late, and while it is modelled.

        Raises:
            UsageError: it does not.
        """
        if isinstance(message, MessageType) and message.is_retryable:
            # A settle waits for the next try, however long it takes; a shutdown does not.
            in_shutdown = not self._is_at_once and (self.leaf is None or not self.settles)
            most = self._owners_wait if in_shutdown else MAX_DELAY
            if not limit or not CLEARLY_IN_TIME <= limit <= most:
                why = (
                    f"torch tries {message} again when its timeout has come; give the program an "
                    f"rpc_timeout of {CLEARLY_IN_TIME:g} to {most:g} s, so that it comes for "
                    f"nothing else"
                )
                if in_shutdown:
                    why += f", and before a shutdown gives up after {OWNER_WAITS:g} s"
                raise refused(fault, why)
        if not limit:
            why = (
                f"the {message} has no timeout, so its sender waits for ever; give the step one, "
                f"or the program an rpc_timeout"
            )
            raise refused(fault, why)
        if not self.settles and (message in _REMOTES or message in RETRYABLE_MESSAGE_TYPES):
            self.lost_before_end += limit
        if fault in self.beyond:
            slack = fault.delay - limit
            if slack < CLEARLY_LATE:
                why = f"a {message} that it makes late has a timeout of {limit:g} s (virtual)"
                raise refused(fault, why)
            self.slack = min(self.slack, slack)

    def _check_order_of_answers(
        self, fault: MessageFault, rank: int, to: int | None, kind: WireMessageType, fate: Fate
    ) -> None:
        """Check that no fault counts the answer to a late request, which comes at any time.

        Raises:
            UsageError: one does.
        """
        for other in self.faults if fate == "late" else ():
            if other.rank == to and other.to in (None, rank) and kind.answer in other.may_be:
                raise refused(fault, f"when {other.name} counts its answer is not known")

    @property
    def _is_at_once(self) -> bool:
        """Whether the ranks shut down without a message, and wait for none."""
        return self.end.how == "at once"

    @property
    def _owners_wait(self) -> float:
        """Virtual seconds by which a message of a shutdown, or before it, may be late.

        An owner gives up the RRefs of others ``OWNER_WAITS`` after the ranks have met
        (``rref_context.cpp``: ``RRefContext::delAllUsersAndUnforkedOwners``). Where the timeout of
        that meeting is reached, it begins to wait before the last rank has come.
        """
        late = 0.0 if self.end.timeout is None else self.end.lasts
        return OWNER_WAITS - CLEARLY_IN_TIME / 2 - late

    def check_never_answered(
        self, rank: int, to: int, message: MessageType | WireMessageType
    ) -> None:
        """Check that no fault counts the answer of `rank` to a message that it never answers.

        Raises:
            UsageError: one does, and it is counted as if it came.
        """
        answer = WireMessageType(message).answer
        for fault in self.faults:
            if fault.rank == rank and fault.to in (None, to) and answer in fault.may_be:
                raise refused(fault, f"it counts the answer to a {message} that gets none")

    @property
    def is_shutdown_safe(self) -> bool:
        """Whether no fault that is left can break the calls that a shutdown makes.

        One at once makes none (``api.py``: shutdown).
        """
        gathering = (WireMessageType.PYTHON_CALL, WireMessageType.PYTHON_RET)
        return self._is_at_once or not any(
            (fault.action not in _LATE or fault in self.beyond)
            and any(kind in fault.may_be for kind in gathering)
            and (fault.which == "every" or self.counts[number] < fault.n)
            for number, fault in enumerate(self.faults)
        )

    # What is refused.

    def check(self, program: Program) -> None:
        """Raises:
        UsageError: the oracle does not predict what the program shows under these faults.
        """
        for leaf in program.leaves if self.faults else ():
            if leaf.op in OTHER_AGENTS:
                raise refused(self.faults[0], f"{leaf!r} ends the agent that counts the messages")
            if leaf.op in _TIMED:
                raise refused(self.faults[0], f"what {leaf!r} shows depends on when messages come")
        for fault in self.faults:
            self._check_cleanups(fault)
            if fault in self.late:
                continue
            self._check_type(fault)
            _check_order(fault, program)
            is_late = fault.action in ("lose", "delay")
            waits = program.settles or self._is_at_once or _is_noticed_by_end(fault)
            if is_late and not waits:
                raise refused(fault, "a shutdown that comes before the timeout is not modelled")

    def check_branches(self, program: Program) -> None:
        """Check that no fault counts messages of steps that run at the same time.

        Raises:
            UsageError: one does, so that nobody knows which message is the nth.
        """
        for number, fault in enumerate(self.faults):
            if fault in self.late or fault.which == "every":
                continue
            for first, step in program.numbered:
                counting = 0
                for branch in step.at_once:
                    counting += bool(self.counted_in[number] & {*range(first, first + len(branch))})
                    first += len(branch)
                if counting > 1:
                    raise refused(fault, "steps that run at the same time send in no certain order")

    def check_running_on(self, program: Program) -> None:
        """Check that no fault counts what a function sends beside what later steps make ranks send.

        The function of a remote goes on when its step has ended. A fetch of its value waits for the
        end of the function (``request_callback_no_python.cpp``:
        ``RequestCallbackNoPython::retrieveOwnerRRef``), and so for what that has asked for.

        Raises:
            UsageError: one does, so that nobody knows which message is the nth.
        """
        for number, fault in enumerate(self.faults):
            kinds = {*fault.may_be} & _AFTER_STEP
            if fault in self.late or fault.which == "every" or not kinds:
                continue
            if kinds <= _ALIKE and program.settles:
                continue
            # Where a fault may act on a fetch that would wait, what is counted later is not known.
            is_alone = len(self.faults) == 1 and fault.which == "nth"
            waited = _BEFORE_VALUE if is_alone else frozenset[WireMessageType]()
            met = _meets_running(program, self.counted_in[number], waits=kinds <= waited)
            if met:
                raise refused(fault, f"{met!r} goes on, and later steps send such messages, too")

    def check_retries(self, sends: Sequence[Send]) -> None:
        """Check that no fault counts messages among which one comes later than it is modelled.

        What torch tries again is sent again after a second or more, and it goes on meanwhile
        (``rpc_agent.cpp``: ``RpcAgent::rpcRetryCallback``). So do its answers.

        Args:
            sends: all that the program sends before its shutdown.

        Raises:
            UsageError: one does.
        """
        for fault in self.faults:
            if fault in self.late or fault.which == "every":
                continue
            counted = [one for one in sends if _is_counted(fault, one)]
            if len({(one.rank, one.message) for one in counted}) == 1:
                # They are alike to the fault, and it does not matter on which one it acts.
                if fault.message in _RETRIED and len(counted) > 1:
                    self._check_alone(fault)
                continue
            for one in counted:
                if one.failures or self.may_be_late(one.rank, one.message):
                    why = f"rank {one.rank} may send {one.message} again or late, after others"
                    raise refused(fault, f"{why} that it counts")

    @property
    def late_at_meeting(self) -> float:
        """Virtual seconds by which one of the calls may be late by which ranks meet in a shutdown.

        Its request or its answer, by each fault that may act on it.
        """
        meeting = {WireMessageType.PYTHON_CALL, WireMessageType.PYTHON_RET}
        return sum(one.delay for one in self.late if meeting & {*one.may_be})

    def _check_alone(self, fault: MessageFault) -> None:
        """Raises:
        UsageError: another fault lets such messages come again, so their order is not modelled.
        """
        for other in self.faults:
            same = other.rank == fault.rank and fault.message in other.may_be
            if same and other is not fault and other not in self.late:
                raise refused(fault, f"{other.name} lets {fault.message} come again, after others")

    def _check_cleanups(self, fault: MessageFault) -> None:
        """Check that it is known which of two faults acts on a cleanup.

        A rank sends them in the order of an unordered set (``context.cpp``:
        ``DistAutogradContext::getKnownWorkerIds``).

        Raises:
            UsageError: it counts the cleanups to all ranks, and another fault those to one.
        """
        cleanup = WireMessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
        if fault.message is not cleanup or fault.to is not None:
            return
        for other in self.faults:
            both_late = fault in self.late and other in self.late
            meets = other.rank == fault.rank and cleanup in other.may_be
            if meets and other.to is not None and not both_late:
                raise refused(fault, "in which order a rank cleans up others; name their receiver")

    def _check_type(self, fault: MessageFault) -> None:
        kind = fault.message
        if kind is None:
            raise refused(fault, "it acts on all types; name one")
        if any(kind.value in map(str, table.failing) for table in self._tables()):
            raise refused(fault, f"a fault table fails {kind} as well")
        requests = [one for one in WireMessageType if one.is_request and kind in (one, one.answer)]
        if requests == [WireMessageType.FORWARD_AUTOGRAD_REQ] and fault.action != "duplicate":
            return
        if kind in _BACKWARD and fault.action != "duplicate":
            if fault.to is None:
                raise refused(fault, "in which order a rank answers gradients; name their receiver")
            return
        if fault.action == "duplicate" and kind in _WHY_ONCE:
            raise refused(fault, _WHY_ONCE[kind])
        types = [one for one in requests if one in MessageType.__members__]
        if len(types) < len(requests) or not types:
            raise refused(fault, f"what follows where a {kind} is lost, or comes twice, is unknown")
        message = MessageType(types[0])
        most = {"nth": 1, "first": fault.n, "every": OWNER_WAITS}[fault.which]
        if message.is_retryable and fault.action != "duplicate" and most > message.max_retries:
            raise refused(fault, f"torch tries {message} again {message.max_retries} times only")
        if fault.action in ("lose", "delay") and message.is_retryable and most > 1:
            raise refused(fault, "only one message that torch tries again can be lost")

    def _tables(self) -> list[FaultTable]:
        return [self.plan.default, *self.plan.by_rank.values()]

    def _comes_after_deletes(self, fault: MessageFault) -> bool:
        """Whether a function may fetch its argument only after the last deletes of its rank.

        The message that starts it is late as well, and a shutdown does not wait for that.
        """
        fetches = set(fault.targets) <= {*_FETCHES}
        starts = {*_REMOTES, *_CALLS}
        return fetches and any(starts & {*one.targets} for one in self.late if one is not fault)

    def check_shutdown(self, prediction: Prediction, *, settles: bool) -> None:
        """Check that no accept and no delete is so late that a shutdown gives up waiting for it.

        Raises:
            UsageError: one may be.
        """
        if self._is_at_once:
            return
        if settles:
            deletes = [f.delay for f in self.late if MessageType.RREF_USER_DELETE in f.targets]
            longest = max(deletes, default=0.0)
        else:
            waited = [
                one
                for one in self.late
                if not _ends_in_shutdown(one, prediction) or self._comes_after_deletes(one)
            ]
            longest = sum(one.delay * _times(one) for one in waited)
        most = self._owners_wait
        if self.lost_before_end and self.lost_before_end + longest > most:
            # RRefContext::delAllUsersAndUnforkedOwners (rref_context.cpp) waits for that long.
            why = (
                f"what is lost is noticed {self.lost_before_end:g} s (virtual) later, and a "
                f"shutdown that follows the last step waits for {OWNER_WAITS:g} s"
            )
            raise refused(self.faults[0], why)
        if longest > most:
            why = (
                f"messages may be {longest:g} s (virtual) late, and a shutdown waits for "
                f"{OWNER_WAITS:g} s; let it be {most:g} s at most"
            )
            raise refused(self.late[0], why)

    def check_struck(
        self,
        step: Leaf,
        message: MessageType,
        fate: Fate,
        *,
        is_own: bool,
        limit: float | None,
    ) -> None:
        """Check that it is predicted what becomes of a message of a step.

        Args:
            is_own: whether it is the message by which the rank of the step asks for something.
            limit: the timeout of the message, in virtual seconds.

        Raises:
            UsageError: it is not.
        """
        if fate in ("", "fail"):
            return
        fault = next(one for one in self.faults if one not in self.late)
        if message.is_retryable:
            _check_retried(fault, step, message, fate, limit or 0.0)
            return
        # The function of a Nest waits for no answer to its creation (api.py: remote).
        waits_for_it = not (step.op == "nest" and message in _REMOTES)
        if fate == "twice" and message in _FETCHES:
            return
        if is_own and step.op not in _LOSABLE:
            raise refused(fault, f"what {step!r} shows without its own message is not modelled")
        if (not is_own and waits_for_it) or step.op not in _LOSABLE:
            why = (
                f"a function of {step!r} waits for it; its timeout and that of its caller come at "
                f"almost the same time"
            )
            raise refused(fault, why)
        if step.op == "nest" and fate != "lost" and 0.0 < (limit or 0.0) < CLEARLY_IN_TIME:
            raise refused(fault, f"{step!r} may end before its function has ended")
        if fate == "twice":
            _check_twice(fault, step, message)
            self._check_copies(step)
        elif fate != "lost" and (getattr(step, "raises", False) or getattr(step, "seconds", 0.0)):
            raise refused(fault, f"{step!r} raises, or takes time of its own")
        if fate == "late":
            _check_late(fault, step)
            self._check_followers(fault, step)

    def _check_copies(self, step: Leaf) -> None:
        """Check that a Nest whose call comes twice makes the same in both copies.

        Which of the two answers its caller gets is a race of two threads.

        Raises:
            UsageError: a fault may break the creation of one.
        """
        if step.op != "nest":
            return
        creation = {WireMessageType.REMOTE_RET, *map(WireMessageType, _REMOTES)}
        ranks = {getattr(step, "via", None), getattr(step, "to", None)}
        for other in self.faults:
            if other.rank in ranks and creation & {*other.may_be} and other not in self.late:
                why = (
                    f"the call of {step!r} comes twice, the fault breaks what one of the two "
                    f"copies creates, and either may be answered first"
                )
                raise refused(other, why)

    def _check_followers(self, fault: MessageFault, step: Leaf) -> None:
        """Check that no fault counts what a late message with an RRef makes ranks send.

        That comes after messages of later steps, and nobody can tell after which ones.

        Raises:
            UsageError: one does.
        """
        carries = step.op == "share" or isinstance(getattr(step, "right", None), str)
        for other in self.faults if carries else ():
            if other not in self.late and other is not fault and _FOLLOWING & set(other.may_be):
                raise refused(fault, f"when {other.name} counts what follows from it is not known")

    def check_forward(self, step: Leaf) -> None:
        """Check that it is predicted what a context shows of which a call is lost, or late.

        Raises:
            UsageError: it is not.
        """
        acting = [f for f in self.faults if _FORWARD & set(f.may_be) and f not in self.late]
        is_nested = getattr(step, "rrefs", False) and getattr(step, "nested", False)
        if acting and (is_nested or getattr(step, "root", None) is not None):
            why = f"{step!r} creates an RRef whose function makes calls, or a root of its own"
            raise refused(acting[0], why)

    def check_late_forward(self, step: Leaf, ranks: Collection[int]) -> None:
        """Check that no call of a context is lost of which one times out.

        What is only late does not matter to it: its caller waits until the function has begun.

        Args:
            ranks: those that answer these calls. An answer without a gradient is a plain one, and
                who waits for it has no timeout but the program's.

        Raises:
            UsageError: one may be, or its answer, or comes after a timeout.
        """
        plain = WireMessageType.PYTHON_RET
        acting = [
            fault
            for fault in self.faults
            if fault not in self.late
            and (_FORWARD & {*fault.may_be} or (fault.rank in ranks and plain in fault.may_be))
        ]
        if acting:
            raise refused(acting[0], f"a call of {step!r} times out, and others may be disturbed")

    def check_lost_forward(self, step: Leaf, fate: str, number: int, *, nested: bool) -> None:
        """Check that it is certain what follows where a call of a context is lost, or late.

        Args:
            fate: what becomes of it, as :meth:`Model.forward` says.
            number: which call of the context it is, from 0.
            nested: whether the function that is called makes the next call.

        Raises:
            UsageError: it is not.
        """
        acting = [f for f in self.faults if _FORWARD & set(f.may_be) and f not in self.late]
        if nested and number and fate == "injected":
            if len(self.faults) > 1:
                raise refused(acting[0], f"when the answers of {step!r} are counted")
            return
        if nested and number:
            # tensorpipe_agent.cpp: TensorPipeAgent::pollTimeoutRpcs ends both, each at its rank.
            why = (
                f"a call that {step!r} makes on its way waits for it; the timeouts of both come at "
                f"almost the same time, and the error of the first one is raised"
            )
            raise refused(acting[0], why)
        if nested and fate == "late" and (len(acting) > 1 or acting[0].which != "nth"):
            raise refused(acting[0], f"when the calls that follow in {step!r} are counted")
        ranks: Sequence[int] = getattr(step, "path", ())
        if nested and fate == "timeout" and (len(acting) > 1 or ranks.count(acting[0].rank) > 1):
            # A function answers once the calls that it makes have been answered.
            why = (
                f"the answers of {step!r} come in the opposite order of its calls, and which of "
                f"them are lost, or come at all where another fault acts, is not modelled"
            )
            raise refused(acting[0], why)

    def check_cleanup(self, cleanups: Sequence[Send], delay: float) -> None:
        """Check that nothing holds up the cleanup of a context that a late call belongs to.

        Args:
            cleanups: those that its rank has sent.
            delay: virtual seconds by which a fault table delays them.

        Raises:
            UsageError: something does, so that nobody can tell which of the two comes first.
        """
        for send in cleanups:
            if send.failures or delay or self.may_be_late(send.rank, send.message):
                why = "whether the cleanup of the context comes before the late call"
                raise refused(self.beyond[0], why)

    def check_backward(self, step: Leaf, ranks: Sequence[int]) -> None:
        """Check that it is predicted what a context shows of which a gradient is lost.

        Args:
            ranks: the ranks that take part in its backward pass, one for each time.

        Raises:
            UsageError: it is not.
        """
        acting = [f for f in self.faults if _BACKWARD & set(f.may_be) and f not in self.late]
        if acting and any(getattr(step, name, None) is not None for name in ("breaks", "root")):
            why = (
                f"the backward pass of {step!r} raises, or has a root, and another rank may wait "
                f"for ever: see failed-backward-revisits-rank"
            )
            raise refused(acting[0], why)
        is_one = len(acting) == 1 and acting[0].which == "nth" and acting[0] not in self.beyond
        if acting and len({*ranks}) < len(ranks) and not is_one:
            why = (
                f"the backward pass of {step!r} comes by a rank twice, which answers before the "
                f"pass has ended there (DistEngine::executeSendFunctionAsync), and how that goes "
                f"on where more than one message is lost is not modelled"
            )
            raise refused(acting[0], why)


def refused(fault: MessageFault, why: str = "") -> UsageError:
    """The error that says that nothing is predicted under a fault, and why."""
    because = f" ({why})" if why else ""
    msg = (
        f"the oracle does not predict what a program shows under {fault.name}{because}; take it "
        f"out of the plan's others, or run functions of your own under it with rpc_cluster, which "
        f"judges what ranks hold and how they exit."
    )
    return UsageError(msg, why)


def timeout_may_come(step: Leaf, late: float) -> UsageError:
    """The error that says that late messages may meet a timeout of a step."""
    msg = (
        f"{step!r}: its answer may come {late:g} s (virtual) late under the plan's message faults, "
        f"and a timeout may end it first; let the timeout be {CLEARLY_IN_TIME:g} s above that, or "
        f"None."
    )
    return UsageError(msg)


def lost_seconds(program: Program, plan: FaultPlan) -> float:
    """Virtual seconds that ranks may wait for answers that never come, one after the other.

    What comes too late takes at least as long as the timeout that it misses.
    """
    faults = Disturbances(plan, program)
    losing = [f for f in faults.faults if f.action == "lose"]
    longest = max(_limits(program), default=0.0)
    late = sum(fault.delay * _times(fault) for fault in faults.beyond)
    return longest * sum(_times(fault) for fault in losing) + late


def leaf_timeout(leaf: Leaf) -> float | None:
    """The timeout that a step names, in virtual seconds."""
    timeout: float | None = getattr(leaf, "timeout", None)
    return timeout


def _check_retried(
    fault: MessageFault, step: Leaf, message: MessageType, fate: Fate, limit: float
) -> None:
    """Check that torch survives it, by its source, where a message that it retries is lost.

    Args:
        limit: virtual seconds after which torch tries again.

    Raises:
        UsageError: it does not.
    """
    if message in _UNSEEN or fate == "twice":
        return
    if fate == "unanswered":
        why = (
            f"the tries of {message} that follow carry nothing, for tensorpipeSerialize "
            f"(tensorpipe_utils.cpp) has moved the payload out, and in the end its rank aborts: "
            f"see retried-without-payload and fork-request-given-up in docs/findings.md"
        )
        raise refused(fault, why)
    if step.op == "nest":
        # It comes with an answer, and only functions wait for their arguments to be confirmed
        # (request_callback_no_python.cpp: RequestCallbackNoPython::processMessage).
        return
    least = limit + CLEARLY_IN_TIME
    if step.op != "share" or (leaf_timeout(step) or 0.0) < least:
        why = (
            f"{step!r} waits for it, and may time out before torch tries it again "
            f"(RRefContext::waitForThreadLocalPendingRRefs); let it be a Share with a timeout of "
            f"{least:g} s"
        )
        raise refused(fault, why)


def _check_twice(fault: MessageFault, step: Leaf, message: MessageType) -> None:
    """Check that it is certain what a step shows whose message comes twice.

    Raises:
        UsageError: it is not.
    """
    if message in _REMOTES:
        why = (
            "RRefContext::addForkOfOwner asserts that a fork of an RRef is new, and which "
            "of the two copies is answered first is a race of two threads"
        )
        raise refused(fault, why)
    if step.op == "count":
        raise refused(fault, "nobody can tell which of the two counts is answered")
    carries = any(isinstance(getattr(step, name, None), str) for name in ("handle", "right"))
    if message in _CALLS and carries:
        why = (
            "both copies carry the same fork of an RRef; a second user of it fails an assertion "
            "(RRefContext::addPendingUser), or the first that is dropped deletes it for both, and "
            "an owner may make the RRef anew after its last delete (getOrCreateOwnerRRef)"
        )
        raise refused(fault, why)


def _check_late(fault: MessageFault, step: Leaf) -> None:
    """Check that it is certain what a step leaves whose message comes after its timeout.

    Raises:
        UsageError: it is not.
    """
    if step.op not in _LATE_ABLE:
        raise refused(fault, f"what {step!r} leaves is unknown")
    if step.op == "remote" and isinstance(getattr(step, "right", None), str):
        raise refused(fault, f"when the function of {step!r} fetches its argument is not modelled")
    if step.op == "remote" and step.at == getattr(step, "to", None):
        raise refused(fault, f"{step!r} creates an RRef of its own rank")


def _is_counted(fault: MessageFault, send: Send) -> bool:
    """Whether a fault may count a message that torch tries again, or its answer."""
    kind = WireMessageType(send.message)
    if kind not in _RETRIED:
        return False
    if kind in fault.may_be:
        return fault.rank == send.rank and fault.to in (None, send.to)
    return kind.answer in fault.may_be and (fault.rank, fault.to) in (
        (send.to, send.rank),
        (send.to, None),
    )


def _runs_on(leaf: Leaf) -> bool:
    """Whether a step ends while the function that it has started sends messages, or sleeps.

    ``rpc.remote`` returns at once (``torch/distributed/rpc/api.py``: remote).
    """
    if leaf.op != "remote":
        return False
    return isinstance(getattr(leaf, "right", None), str) or bool(getattr(leaf, "seconds", 0.0))


def _is_noticed_by_end(fault: MessageFault) -> bool:
    """Whether a graceful shutdown waits until it is noticed that such a message is lost.

    The step of a call has then waited for its timeout. A graceful shutdown waits for the creation
    of an RRef and for each accept, and an owner for the deletes of what it has
    (``rref_context.cpp``: ``RRefContext::delAllUsersAndUnforkedOwners``). Nothing waits for the
    cleanup of a context.
    """
    return fault.action == "lose" and {*fault.may_be} <= _AFTER_STEP | _CALLED


def _runs_on_for(program: Program) -> float:
    """Virtual seconds for which functions sleep at the most, after the steps that started them."""
    return sum(getattr(leaf, "seconds", 0.0) for leaf in program.leaves if _runs_on(leaf))


def _unordered(fault: MessageFault, program: Program) -> str:
    """Why it is not certain which messages a fault acts on.

    "" where `check_branches` and `check_running_on` decide.
    """
    slept = _runs_on_for(program)
    for leaf in program.leaves:
        carries = isinstance(getattr(leaf, "right", None), str)
        if leaf.op not in _CERTAIN or getattr(leaf, "wait", "") == "later":
            return f"in which order {leaf!r} sends its messages is not modelled"
        limit = leaf_timeout(leaf) or program.rpc_timeout
        # A step that needs a value waits for the function that makes it.
        lasts = CLEARLY_IN_TIME + leaf.lasts + slept
        if fault.which == "every" or limit is None or limit >= lasts:
            continue
        # On a busy machine such a step may end while its function still has to begin, or to end.
        # What it asks for has been sent by then, and is of no type that the function, or its
        # argument, sends.
        follows = _FOLLOWING if carries or leaf.op == "share" else frozenset[WireMessageType]()
        if fault.may_be[0].is_request and leaf.op in _LATE_ABLE and not follows & {*fault.may_be}:
            continue
        return f"{leaf!r} may end before its messages, and those of its function, are sent"
    return ""


def _meets_running(program: Program, counted: Set[int], *, waits: bool) -> Leaf | None:
    """A step whose function may still send messages when they are counted in a later one.

    Args:
        counted: the numbers of the steps in which they are counted.
        waits: whether who has the value of the function has waited for all of them.
    """
    running: list[tuple[int, Leaf]] = []
    lasts = CLEARLY_IN_TIME + _runs_on_for(program)
    for number, leaf in enumerate(program.leaves):
        if leaf.op == "settle":
            running.clear()
        limit = leaf_timeout(leaf) or program.rpc_timeout
        if leaf.op == "fetch" and waits and (limit is None or limit >= lasts):
            handle = getattr(leaf, "handle", "")
            running = [one for one in running if getattr(one[1], "out", "") != handle]
        if number in counted and running:
            return running[0][1]
        if number in counted and _runs_on(leaf):
            running.append((number, leaf))
    return running[0][1] if running and not program.settles else None


def _check_order(fault: MessageFault, program: Program) -> None:
    """Raises:
    UsageError: it is not certain which messages a fault acts on.
    """
    why = _unordered(fault, program)
    if why:
        raise refused(fault, why)


def _limits(program: Program) -> list[float]:
    """All timeouts of a program and its steps, in virtual seconds."""
    limits = [*map(leaf_timeout, program.leaves), program.rpc_timeout]
    return [limit for limit in limits if limit]


def _beyond(faults: Sequence[MessageFault], program: Program) -> tuple[MessageFault, ...]:
    """Faults that make certain messages later than a timeout of the program."""
    found: list[MessageFault] = []
    for one in faults if program.settles else ():
        limits: list[float | None] = [program.rpc_timeout]
        if one.message in _FORWARD:
            limits += [leaf_timeout(leaf) for leaf in program.leaves if leaf.op == "context"]
        elif one.message not in _OF_TORCH:
            limits += map(leaf_timeout, program.leaves)
        least = min((limit for limit in limits if limit), default=None)
        if one.action != "delay" or one.message is None or least is None:
            continue
        if one.delay >= least + CLEARLY_LATE and not _unordered(one, program):
            found.append(one)
    return tuple(found)


def _times(fault: MessageFault) -> int:
    """How many messages of a row it acts on."""
    return {"nth": 1, "first": min(fault.n, _IN_A_ROW), "every": _IN_A_ROW}[fault.which]


def _ends_in_shutdown(fault: MessageFault, prediction: Prediction) -> bool:
    """Whether it holds what a shutdown does not wait for, until a delete that the shutdown sends.

    That delete comes whether or not the held message does (``RRefContext::
    delAllUsersAndUnforkedOwners``), so the message is not held for long. A torch that has the
    finding so deletes what functions that still run have as arguments, too. Only a fork that its
    rank has created itself is deleted later, once its creation has ended (``addPendingUser``).
    """
    until = fault.until
    if until is None or until.to is not None or str(until.message) != MessageType.RREF_USER_DELETE:
        return False
    if any(s.rank == until.rank and s.message in _REMOTES for s in prediction.sends):
        return False
    before = _deletes(until.rank, prediction.sends)
    last = before + _deletes(until.rank, prediction.last_sends)
    early = "shutdown-deletes-argument" in prediction.known_bugs
    is_last = until.n <= last and (early or before < until.n)
    return is_last and bool(fault.targets) and set(fault.targets) <= {*_REMOTES, *_FETCHES}


def _deletes(rank: int, sends: Sequence[Send]) -> int:
    """How often a rank sends a delete, tries that fail included."""
    mine = [s for s in sends if s.rank == rank and s.message is MessageType.RREF_USER_DELETE]
    return sum(send.failures + send.delivered for send in mine)
