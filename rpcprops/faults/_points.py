"""Faults that are aimed at single messages of a run without faults, which the record shows.

Pure functions. A *point* is one message with one action: a fault that acts on exactly that message.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rpcprops._given import argument, items, shown
from rpcprops.errors import UsageError
from rpcprops.faults._messages import (
    MESSAGE_ACTIONS,
    MessageAction,
    MessageFault,
    NthMessage,
    checked_message,
    checked_messages,
)
from rpcprops.faults.message_types import wire_message_type

if TYPE_CHECKING:
    from rpcprops.outcomes import SentMessage

#: More than there are actions: an endless iterable is abandoned there.
_MAX_ACTIONS = 100
#: More points than a record gives, so that an endless iterable is abandoned.
_MOST = 1_000_000
#: What can be done to one message alone.
_ALONE: tuple[MessageAction, ...] = tuple(one for one in MESSAGE_ACTIONS if one != "hold")


def points(
    messages: Sequence[SentMessage],
    *,
    actions: Iterable[MessageAction] = _ALONE,
    delay: float = 1.0,
) -> tuple[MessageFault, ...]:
    """Each message of a run without faults with each action that it can have, in their order.

    Each is a fault that names sender, receiver and type, and the number of the message among those
    that share them. So its name stays the same as long as a run sends these in the same order. A
    response can only be delayed or lost.

    Args:
        messages: the record of the run, ``Outcome.messages``.
        actions: what is done to each message. "hold" needs a second message: see :func:`reversal`.
        delay: virtual seconds by which "delay" makes a message late.

    Raises:
        UsageError: `actions` is no collection of such actions, `delay` is out of range, or a fault
            has acted on a message of the run.
    """
    given = items("actions", actions, _MAX_ACTIONS, "a collection of actions")
    wrong = [action for action in given if action not in _ALONE]
    if wrong:
        known = ", ".join(_ALONE)
        msg = f"actions holds {shown(wrong[0])}; the actions of a single message are {known}."
        raise UsageError(msg)
    found: list[MessageFault] = []
    for sent, number in _numbered(messages):
        for action in dict.fromkeys(given):
            if sent.is_request or action in ("delay", "lose"):
                late = delay if action == "delay" else 0.0
                found.append(_at(sent, number, action, late))
    return tuple(found)


def pairs(single: Sequence[MessageFault]) -> Iterator[tuple[MessageFault, MessageFault]]:
    """Every two of these points that are about different messages, in their order.

    Raises:
        UsageError: they are no points.
    """
    given = items("single", single, _MOST, "a collection of points")
    wrong = [point for point in given if not isinstance(point, MessageFault)]
    if wrong:
        msg = f"single holds {shown(wrong[0])}; give points, which are MessageFaults."
        raise UsageError(msg)
    for first, second in itertools.combinations(given, 2):
        if _message(first) != _message(second):
            yield first, second


def reversal(
    one: SentMessage, other: SentMessage, messages: Sequence[SentMessage], *, delay: float = 10.0
) -> MessageFault:
    """The fault under which two messages of a run without faults come in the opposite order.

    It holds the one that was sent first until the other has passed, wherever that is. If the other
    follows from the first, such as a call by the function that the first one runs, it does not
    come: then the first one goes after `delay`, as if it was only delayed.

    Args:
        one: a message of the run.
        other: another one.
        messages: the record of the run, ``Outcome.messages``, which has both.
        delay: the longest wait, in virtual seconds.

    Raises:
        UsageError: they are the same message, or a request and its own response; one of them is not
            among `messages`; `delay` is out of range; or a fault has acted on a message of the run.
    """
    numbered = _numbered(messages)
    one, other = checked_message("one", one), checked_message("other", other)
    places = [place for place, (sent, _) in enumerate(numbered) if sent in (one, other)]
    expected = 2
    if len(places) != expected:
        known = [sent for sent, _ in numbered]
        lacking = [sent for sent in (one, other) if sent not in known]
        why = f"{shown(lacking[0])} is not among messages" if lacking else "they are one message"
        msg = f"these two messages have no order: {why}; give two of Outcome.messages."
        raise UsageError(msg)
    # Clocks of ranks agree, but a record lists one rank after another.
    (first, number), (second, later) = sorted(
        (numbered[place] for place in places), key=lambda row: row[0].seconds
    )
    if first.id == second.id:
        msg = f"message {first.id} and its own response have only one order; give another message."
        raise UsageError(msg)
    until = NthMessage(second.sender, second.type, to=second.receiver, n=later)
    return _at(first, number, "hold", delay, until)


def _at(
    sent: SentMessage,
    number: int,
    action: MessageAction,
    delay: float,
    until: NthMessage | None = None,
) -> MessageFault:
    return MessageFault(
        sent.sender, action, sent.type, to=sent.receiver, n=number, delay=delay, until=until
    )


def _message(point: MessageFault) -> tuple[Any, ...]:
    return (point.rank, point.to, point.message, point.n)


def _numbered(messages: Sequence[SentMessage]) -> list[tuple[SentMessage, int]]:
    """Each message with its number among those of its sender, receiver and type.

    Left out are those of a shutdown from which faults are kept away: no agent counts them.

    Raises:
        UsageError: a fault has acted on one of them, or one has a type that torch does not send.
    """
    count: Counter[tuple[int, int, str]] = Counter()
    found: list[tuple[SentMessage, int]] = []
    for sent in checked_messages(messages):
        if "spared" in sent.marks:
            continue
        if sent.done or sent.failed_by_table or sent.delayed_by_table:
            msg = (
                f"{argument('messages', sent)} is of a run in which a fault acted; give the "
                f"messages of a run without faults."
            )
            raise UsageError(msg)
        kind = (sent.sender, sent.receiver, wire_message_type(sent.type))
        count[kind] += 1
        found.append((sent, count[kind]))
    return found
