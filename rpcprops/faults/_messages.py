"""Faults of any message, of all types, requests and responses: what the agent ``wire`` can do.

What follows from each action is read in torch's source; no line here rests on what a run showed.

*An error that the sender gets.* ``RpcAgent::rpcRetryCallback`` (rpc_agent.cpp) asks only whether
the answer is an error. So a send that failed, an EXCEPTION and a timeout are all tried again, where
the request was sent by ``sendWithRetries``: RREF_FORK_REQUEST, RREF_CHILD_ACCEPT, RREF_USER_DELETE
(rref_context.cpp, 5 times) and CLEANUP_AUTOGRAD_CONTEXT_REQ (container.cpp, 20 times). Everything
else is sent once.

*A message that is lost.* Nobody is told. The request ends by its timeout: that of the call for what
users send, and the agent's ``rpc_timeout`` for all that torch sends by itself, because
``sendWithRetries`` and the backward pass (recvrpc_backward.cpp) name none. The time of the next try
is computed when a try is sent, so a try that timed out is followed by the next at once, where the
timeout is longer than the usual wait. With ``rpc_timeout`` 0 there is no timeout, and the message
is never sent again. With a day, the default of a cluster, it takes a day: give a short one.

*A response that is lost.* The request was executed, so a try that follows should execute it again.
It does not: ``tensorpipeSerialize`` (tensorpipe_utils.cpp) moves the payload out of the message
that it writes, and ``sendWithRetries`` keeps that very message for its next try. So every try after
one that was written has no payload, and its receiver answers "Unexpected end of pickler archive"
until the tries are spent. A request that the agent itself failed or lost was never written, so its
tries are whole: that is why torch's faulty agent does not show this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from rpcprops._given import argument, counted, is_one_of, items
from rpcprops.errors import UsageError
from rpcprops.faults._fault import MAX_RANKS, Fault, PredictedSend, fewer, register
from rpcprops.faults._sends import checked_delay
from rpcprops.faults.message_types import (
    MessageType,
    WireMessageType,
    retry_wait,
    wire_message_type,
)

if TYPE_CHECKING:
    from rpcprops.faults.tables import FaultPlan
    from rpcprops.outcomes import Outcome, RankOutcome, SentMessage

MessageAction = Literal["fail", "delay", "hold", "duplicate", "lose"]
Way = Literal["request", "response"]
Which = Literal["nth", "first", "every"]

#: Simplest first.
MESSAGE_ACTIONS: tuple[MessageAction, ...] = ("fail", "delay", "hold", "duplicate", "lose")
_WAYS: tuple[Way, ...] = ("request", "response")
_WHICH: tuple[Which, ...] = ("nth", "first", "every")
#: The end of the error of a request that a fault holds back or delays when its agent is shut down
#: (``agents/wire/_agent.cpp``: ShutDown). torch ends a request that was written by another one.
CUT_OFF = "rpcprops held this message back"
#: The most messages that are counted.
MAX_MESSAGES = 2**31 - 1
#: More messages than a record holds, so that an endless iterable is abandoned.
_MOST_RECORDED = 1_000_000

_CLEANUP = WireMessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ

#: What can happen to requests only, in words.
_OF_REQUESTS = {"fail": "fail", "duplicate": "be duplicated"}


def _number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_MESSAGES:
        msg = (
            f"{argument('n', value)} must be an int from 1 to {MAX_MESSAGES}: messages are counted "
            f"from 1."
        )
        raise UsageError(msg)
    return int(value)


def _checked_selection(one: MessageFault | NthMessage) -> None:
    """Check and set the fields that say which messages are meant.

    Raises:
        UsageError: one of them has a wrong value, or `way` contradicts the type.
    """
    set_ = object.__setattr__
    set_(one, "rank", counted("rank", one.rank, MAX_RANKS))
    if one.to is not None:
        set_(one, "to", counted("to", one.to, MAX_RANKS))
    if one.way is not None and not is_one_of(one.way, _WAYS):
        msg = f"{argument('way', one.way)} must be 'request', 'response' or None (both)."
        raise UsageError(msg)
    if one.message is not None:
        way = "request" if getattr(one, "action", "") in _OF_REQUESTS else one.way
        message = wire_message_type(one.message, way=way)
        its_way = "request" if message.is_request else "response"
        if one.way not in (None, its_way):
            msg = f"way={one.way!r}, but {message} is a {its_way}; leave way out."
            raise UsageError(msg)
        set_(one, "message", message)
        set_(one, "way", None)
    set_(one, "n", _number(one.n))


def _selects(one: MessageFault | NthMessage, sent: SentMessage) -> bool:
    return (
        "spared" not in sent.marks
        and sent.sender == one.rank
        and one.to in (None, sent.receiver)
        and one.message in (None, sent.type)
        and (one.way is None or (one.way == "request") == sent.is_request)
    )


def _types(one: MessageFault | NthMessage) -> tuple[WireMessageType, ...]:
    """The types of the messages that are meant."""
    if one.message is not None:
        return (one.message,)
    return tuple(
        kind
        for kind in WireMessageType
        if one.way is None or kind.is_request == (one.way == "request")
    )


def _selection(one: MessageFault | NthMessage) -> str:
    """Which messages are meant, but for their numbers: ``RREF_ACK:to-2``, ``any-response``."""
    kind = one.message or ("any" if one.way is None else f"any-{one.way}")
    return kind if one.to is None else f"{kind}:to-{one.to}"


def _for_agent(one: MessageFault | NthMessage) -> dict[str, Any]:
    return {
        "to": -1 if one.to is None else one.to,
        "type": "" if one.message is None else str(one.message),
        "way": one.way or "",
        "n": one.n,
    }


def _arguments(one: MessageFault | NthMessage, defaults: dict[str, Any]) -> str:
    """The arguments that differ from these, as code; a type comes first, as a plain string."""
    kind = "" if one.message is None else f", {str(one.message)!r}"
    values = {name: getattr(one, name) for name in defaults}
    return kind + "".join(
        f", {name}={value!r}" for name, value in values.items() if value != defaults[name]
    )


@dataclass(frozen=True, slots=True, repr=False, init=False)
class NthMessage:
    """One message: the nth that rank `rank` sends of those that match.

    Args:
        rank: the rank that sends it.
        message: its type, by torch's name; None: any type.
        to: the rank that it is sent to; None: any.
        way: "request" or "response", where `message` is None; None: both.
        n: its number among the messages that match, from 1, retries included.

    Raises:
        UsageError: an argument has a wrong type or is out of its range, or `way` contradicts
            `message`.
    """

    rank: int
    message: WireMessageType | None = None
    to: int | None = None
    way: Way | None = None
    n: int = 1

    def __init__(
        self,
        rank: int,
        message: WireMessageType | str | None = None,
        *,
        to: int | None = None,
        way: Way | None = None,
        n: int = 1,
    ) -> None:
        for name, value in (
            ("rank", rank),
            ("message", message),
            ("to", to),
            ("way", way),
            ("n", n),
        ):
            object.__setattr__(self, name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        # Separate from __init__, because decoding from JSON calls only this.
        _checked_selection(self)

    def __repr__(self) -> str:
        defaults = {"to": None, "way": None, "n": 1}
        return f"NthMessage({self.rank}{_arguments(self, defaults)})"

    @property
    def label(self) -> str:
        """It in one word, for names of faults."""
        return f"{self.rank}:{_selection(self)}:nth-{self.n}"

    def find(self, messages: Sequence[SentMessage]) -> SentMessage | None:
        """It among the messages of a run; None if there are not so many."""
        found = [sent for sent in messages if _selects(self, sent)]
        return found[self.n - 1] if self.n <= len(found) else None

    def for_agent(self) -> dict[str, Any]:
        """It as plain data: -1 stands for any rank, an empty string for any type or both ways."""
        return {"at": self.rank, **_for_agent(self)}


@register
@dataclass(frozen=True, slots=True, repr=False, init=False)
class MessageFault(Fault):
    """What happens to some of the messages that a rank sends, requests or responses of any type.

    Only the agent ``wire`` can do it: run the cluster with ``agent="wire"``. The agent counts the
    messages that match at their sender, from 1, each retry of torch's anew; the calls by which a
    shutdown gathers do not count, where faults are kept away from them. Where two faults of a rank
    are due for one message, the first of them acts, in the order of ``FaultPlan.others``.

    * ``fail`` (a request): it is not sent, and its sender gets an error, as from torch's faulty
      agent. The four types that torch retries are sent again after 1, 1, 1.5, … s.
    * ``delay``: it is sent `delay` seconds late; the sending thread goes on.
    * ``hold``: it waits until the message `until` has passed, and at most `delay` seconds. A
      request has passed when it is answered, a response when it is written.
    * ``duplicate`` (a request): it arrives twice. Its sender sees the first answer only.
    * ``lose``: it is not sent, and nobody is told: the request ends by its timeout.

    Args:
        rank: the rank that sends the messages.
        action: what happens to them.
        message: their type, by torch's name, such as "RREF_ACK"; None: all types.
        to: the rank that they are sent to; None: every rank.
        way: "request" or "response", where `message` is None; None: both. A type is always the
            one or the other.
        which: "nth" acts on one message, "first" on the first n, "every" on all.
        n: the number for `which`, from 1; it is left out for "every".
        delay: virtual seconds, above 0 and up to 3600, for "delay"; for "hold" the longest wait.
        until: for "hold", the message after which the held ones go.

    Raises:
        UsageError: an argument has a wrong type or is out of its range, or it means nothing, or
            cannot be, together with the others; the message says what to write instead.
    """

    kind: ClassVar[str] = "message"

    rank: int
    action: MessageAction
    message: WireMessageType | None = None
    to: int | None = None
    way: Way | None = None
    which: Which = "nth"
    n: int = 1
    delay: float = 0.0
    until: NthMessage | None = None

    def __init__(  # noqa: PLR0913 - a message has so many properties
        self,
        rank: int,
        action: MessageAction,
        message: WireMessageType | str | None = None,
        *,
        to: int | None = None,
        way: Way | None = None,
        which: Which = "nth",
        n: int = 1,
        delay: float = 0.0,
        until: NthMessage | None = None,
    ) -> None:
        for name, value in (
            ("rank", rank),
            ("action", action),
            ("message", message),
            ("to", to),
            ("way", way),
            ("which", which),
            ("n", n),
            ("delay", delay),
            ("until", until),
        ):
            object.__setattr__(self, name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        # Separate from __init__, because decoding from JSON calls only this.
        for name, words in (("action", MESSAGE_ACTIONS), ("which", _WHICH)):
            value = getattr(self, name)
            if not is_one_of(value, words):
                msg = f"{argument(name, value)} must be one of {', '.join(map(repr, words))}."
                raise UsageError(msg)
        _checked_selection(self)
        if self.which == "every" and self.n != 1:
            msg = f"n={self.n} means nothing with which='every'; leave n out, or write 'first'."
            raise UsageError(msg)
        if self.which == "first" and self.n == 1:
            # So that faults with one effect are equal.
            object.__setattr__(self, "which", "nth")
        self._check_way()
        self._check_delay()
        self._check_until()

    def _check_way(self) -> None:
        if self.action not in _OF_REQUESTS:
            return
        remedy = "lose it, or delay it" if self.action == "fail" else "duplicate its request"
        why = (
            "torch tells nobody of a response that cannot be written"
            if self.action == "fail"
            else "torch aborts a rank that gets a second response"
        )
        # The callback of pipeWrite in TensorPipeAgent::sendCompletedResponseMessage only logs, and
        # TensorPipeAgent::send asserts that the id of a response is known (tensorpipe_agent.cpp).
        if self.way == "response" or (self.message and not self.message.is_request):
            msg = (
                f"a response ({_selection(self)}) cannot {_OF_REQUESTS[self.action]}: {why}; "
                f"{remedy}."
            )
            raise UsageError(msg)
        if self.message is None and self.way is None:
            msg = (
                f"only requests can {_OF_REQUESTS[self.action]} ({why}); name a type, or write "
                f"way='request'."
            )
            raise UsageError(msg)

    def _check_delay(self) -> None:
        takes_time = self.action in ("delay", "hold")
        delay = checked_delay(self.delay, "delay", may_be_zero=not takes_time)
        object.__setattr__(self, "delay", delay)
        if takes_time and not delay:
            what = "by which they are late" if self.action == "delay" else "that they wait at most"
            msg = f"action={self.action!r} needs the virtual seconds {what}, such as delay=1.0."
            raise UsageError(msg)
        if delay and not takes_time:
            msg = f"delay={delay!r} means nothing with action={self.action!r}; leave it out."
            raise UsageError(msg)

    def _check_until(self) -> None:
        given: object = self.until
        if given is not None and not isinstance(given, NthMessage):
            msg = f"{argument('until', given)} must be a NthMessage, or None."
            raise UsageError(msg)
        if self.action != "hold":
            if self.until is not None:
                msg = (
                    f"until={self.until!r} means nothing with action={self.action!r}; leave it "
                    f"out, or write 'hold'."
                )
                raise UsageError(msg)
            return
        if self.until is None:
            msg = (
                "action='hold' needs until=NthMessage(...), the message after which the held ones "
                "go; to send them late, write 'delay'."
            )
            raise UsageError(msg)
        if self._holds(self.until):
            msg = f"until={self.until!r} is itself held, so it would wait for itself; name another."
            raise UsageError(msg)

    def _holds(self, until: NthMessage) -> bool:
        """Whether it acts on the message `until`, whatever the ranks send.

        Where it acts on some messages only, their numbers tell, if both count the same messages.
        """
        if self.which == "every":
            return (
                until.rank == self.rank
                and self.to in (None, until.to)
                and set(_types(until)) <= set(_types(self))
            )
        same = (until.rank, _selection(until)) == (self.rank, _selection(self))
        return same and self.acts_on(until.n)

    def __repr__(self) -> str:
        defaults = {
            "to": None,
            "way": None,
            "which": "nth",
            "n": 1,
            "delay": 0.0,
            "until": None,
        }
        return f"MessageFault({self.rank}, {self.action!r}{_arguments(self, defaults)})"

    @property
    def what(self) -> str:
        """Action, messages and numbers: ``lose:RREF_ACK:to-2:nth-1``."""
        number = self.which if self.which == "every" else f"{self.which}-{self.n}"
        parts = [self.action, _selection(self), number]
        if self.delay:
            parts.append(f"{self.delay!r}s")
        if self.until is not None:
            parts.append(f"until:{self.until.label}")
        return ":".join(parts)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Also the rank that the messages go to, and those of `until`."""
        until = () if self.until is None else (self.until.rank, self.until.to)
        return tuple(rank for rank in (self.rank, self.to, *until) if rank is not None)

    @property
    def may_be(self) -> tuple[WireMessageType, ...]:
        """The types of the messages that it acts on."""
        return _types(self)

    @property
    def targets(self) -> tuple[MessageType, ...]:
        """Those of its types that are among the ten that torch's faulty agent knows."""
        names = set(self.may_be)
        return tuple(kind for kind in MessageType if kind.value in names)

    def matches(self, sent: SentMessage) -> bool:
        """Whether it counts this message: sender, receiver and type are as it says."""
        return _selects(self, sent)

    def acts_on(self, number: int) -> bool:
        """Whether it is due for the message of this number, from 1, among those that match."""
        if self.which == "every":
            return True
        return number == self.n if self.which == "nth" else number <= self.n

    def due(self, messages: Sequence[SentMessage]) -> tuple[SentMessage, ...]:
        """The messages of a run for which it is due: all on which it acts if it acts alone."""
        matching = [sent for sent in messages if self.matches(sent)]
        return tuple(sent for number, sent in enumerate(matching, 1) if self.acts_on(number))

    # What it may do.

    @property
    def is_survivable(self) -> bool:
        """Whether torch promises that a program sees no change.

        * ``fail``: as for a table, if torch retries the type more often than this can fail.
        * ``delay``, ``hold``: yes. torch assumes no order of messages between two ranks
          (docs/source/rpc/rref.md, Assumptions). A wait longer than a timeout still ends in it.
        * ``duplicate``: for the four types that torch retries, which it calls idempotent (the same
          page; rref_context.cpp; ``releaseContextIfPresent`` in container.cpp). By the source a
          fork request is so only until its fork is deleted: a copy that is executed after that adds
          the fork again (``addForkOfOwnerIfNotPresent``), and nobody deletes it. No other request
          is: a function runs twice.
        * ``lose``: no. Even where torch sends the message again, that is after the RPC timeout of
          the agent. A function whose argument waits for a fork request runs after its caller has
          timed out, and a shutdown waits no longer than 100 s. If a response was lost, the tries
          that follow have no payload, see the top of this module.
        """
        match self.action:
            case "fail":
                return all(0 < self._failures <= kind.max_retries for kind in self.may_be)
            case "delay" | "hold":
                return True
            case "duplicate":
                return all(kind.is_retryable for kind in self.may_be)
            case "lose":
                return False

    @property
    def _failures(self) -> int:
        """The most tries of one message that it fails."""
        return {"nth": 1, "first": self.n, "every": MAX_MESSAGES}[self.which]

    def strikes(self, sends: Sequence[PredictedSend]) -> Sequence[int]:
        """Of the ten types that the message model knows, the first tries that it is due for.

        The model says nothing of receivers, so a fault that names one is due for none.
        """
        found: list[int] = []
        number = 0
        for send in sends:
            is_match = send.rank == self.rank and self.to is None and send.message in self.targets
            number += is_match
            found.append(int(is_match and self.acts_on(number)))
        return found

    @property
    def seconds(self) -> float:
        """The delay, or the waits between tries; never the timeout that a lost message takes."""
        return self.waits(self._failures) if self.action == "fail" else self.delay

    def waits(self, times: int) -> float:
        """The waits of torch between its tries, or as often the delay."""
        if self.action != "fail":
            return self.delay * times
        return retry_wait(min(times, max(kind.max_retries for kind in self.may_be)))

    @property
    def unseen_waits(self) -> tuple[float, ...]:
        """The waits of a context's cleanup that failed; torch counts all that it has sent."""
        if self.action != "fail" or _CLEANUP not in self.may_be:
            return ()
        tries = min(self._failures, _CLEANUP.max_retries)
        return tuple(retry_wait(n + 1) - retry_wait(n) for n in range(tries))

    # What it did.

    def is_counted_alone(self, rank: RankOutcome) -> bool:
        """Yes: the record of messages names the fault that acted on each."""
        return True

    def seen(self, rank: RankOutcome) -> int | None:
        """None: a rank's own outcome does not show it. The record of messages does."""
        return None

    def recorded(self, plan: FaultPlan, outcome: Outcome, part: int = 0) -> int | None:
        """On how many messages it acted, by the record of all messages, if there is one."""
        if not outcome.messages and not outcome.is_recorded:
            return None
        return len(acted_on(self, plan, outcome.messages))

    # Where it is.

    def enter_rank(self) -> None:
        """Nothing to do: the agent of the rank is made with its faults."""

    def for_agent(self) -> dict[str, Any]:
        """The fault as the agent takes it: plain data, but for its rank.

        -1 stands for any rank, an empty string for all types or both ways. `until` is None, or the
        same without `which`, `action` and `seconds`, with `at` as its sender.
        """
        return {
            **_for_agent(self),
            "which": self.which,
            "action": self.action,
            "seconds": self.delay,
            "until": None if self.until is None else self.until.for_agent(),
        }

    def simpler(self) -> Iterator[Self]:
        """Fewer messages, then the first; a shorter delay; an earlier message to wait for."""
        if self.which != "nth":
            yield from self._with(which="nth", n=1)
        if self.which == "every":
            yield from self._with(which="first", n=2)
        for n in fewer(self.n):
            if self.which == "nth" or n > 1:
                yield from self._with(n=n)
        for milliseconds in fewer(round(self.delay * 1000)):
            yield from self._with(delay=milliseconds / 1000)
        for n in fewer(self.until.n) if self.until else ():
            yield from self._with(until=replace(self.until, n=n) if self.until else None)

    def _with(self, **changes: Any) -> Iterator[Self]:
        """It with these changes, unless it would wait for itself."""
        try:
            yield replace(self, **changes)
        except UsageError:
            return


def message_faults_at(plan: FaultPlan, rank: int) -> tuple[MessageFault, ...]:
    """The message faults of a rank, in the order in which its agent numbers them, from 0."""
    return tuple(
        fault for fault in plan.others if isinstance(fault, MessageFault) and fault.rank == rank
    )


def agent_faults(plan: FaultPlan, rank: int) -> list[dict[str, Any]]:
    """The message faults of a rank as its agent takes them, see :meth:`MessageFault.for_agent`."""
    return [fault.for_agent() for fault in message_faults_at(checked_plan(plan), rank)]


#: By what a plan and a message are told from other values: their modules import this one.
_OF_PLAN = ("default", "by_rank", "others")
_OF_MESSAGE = ("sender", "receiver", "type", "fault", "done", "marks")


def checked_plan(value: object) -> FaultPlan:
    """Raises:
    UsageError: it is no plan.
    """
    if not all(hasattr(value, name) for name in _OF_PLAN):
        msg = f"{argument('plan', value)} must be a FaultPlan."
        raise UsageError(msg)
    return cast("FaultPlan", value)


def checked_message(name: str, value: object) -> SentMessage:
    """Raises:
    UsageError: it is no message of a record.
    """
    if not all(hasattr(value, part) for part in _OF_MESSAGE):
        msg = f"{argument(name, value)} must be a SentMessage, one of Outcome.messages."
        raise UsageError(msg)
    return cast("SentMessage", value)


def checked_messages(value: object) -> list[SentMessage]:
    """Raises:
    UsageError: it is no record of messages.
    """
    must_be = "the record of a run, Outcome.messages"
    given = items("messages", value, _MOST_RECORDED, must_be)
    return [checked_message("messages[...]", sent) for sent in given]


def acted_on(
    fault: MessageFault, plan: FaultPlan, messages: Sequence[SentMessage]
) -> tuple[SentMessage, ...]:
    """The messages of a run under `plan` on which this fault of it acted.

    Raises:
        UsageError: the plan does not have this fault.
    """
    given: object = fault
    if not isinstance(given, MessageFault):
        msg = f"{argument('fault', given)} must be a MessageFault of the plan."
        raise UsageError(msg)
    mine = message_faults_at(checked_plan(plan), fault.rank)
    if fault not in mine:
        msg = f"the plan does not have {fault!r}, so it acted on nothing; give the plan of the run."
        raise UsageError(msg)
    number = mine.index(fault)
    return tuple(
        sent
        for sent in checked_messages(messages)
        if sent.sender == fault.rank and sent.fault == number and sent.done == fault.action
    )
