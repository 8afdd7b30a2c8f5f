"""Strategies for faults of single messages, which the agent ``wire`` carries out.

Nothing here runs anything. Every delay is in virtual seconds, in whole milliseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from rpcprops._given import argument, shown
from rpcprops.errors import UsageError
from rpcprops.faults import (
    MAX_RANKS,
    MESSAGE_ACTIONS,
    RETRYABLE_MESSAGE_TYPES,
    FaultPlan,
    MessageAction,
    MessageFault,
    MessageType,
    NthMessage,
    WireMessageType,
    checked_delay,
    wire_message_type,
)
from rpcprops.strategies import hints
from rpcprops.strategies._checks import first_items, whole_number
from rpcprops.strategies._weighted import Weighted

#: Within the retries of every type that torch retries.
_MAX_MESSAGES = 5
_MAX_DELAY = 2.0
_MAX_INT32 = 2**31 - 1
#: The most message faults in a plan.
_MAX_FAULTS = 3

_RETRIED = tuple(WireMessageType(kind) for kind in RETRYABLE_MESSAGE_TYPES)
#: What most programs send.
_USUAL = frozenset(
    {
        WireMessageType.PYTHON_CALL,
        WireMessageType.PYTHON_REMOTE_CALL,
        WireMessageType.PYTHON_RREF_FETCH_CALL,
    }
)
#: What is easiest to understand comes first: a call, the other requests, the responses.
_ALL = tuple(sorted(WireMessageType, key=lambda kind: (kind not in _USUAL, not kind.is_request)))
#: Actions that only requests can have.
_OF_REQUESTS = ("fail", "duplicate")
#: What torch promises to survive, for some types at least.
_SURVIVED: tuple[MessageAction, ...] = ("fail", "delay", "hold", "duplicate")

_Kinds = tuple[WireMessageType | None, ...]


def message_faults(
    *,
    world_size: int,
    actions: Iterable[MessageAction] = _SURVIVED,
    messages: Iterable[WireMessageType | MessageType | str] | None = None,
    max_messages: int = _MAX_MESSAGES,
    max_delay: float = _MAX_DELAY,
) -> st.SearchStrategy[MessageFault]:
    """A fault of some messages of a rank, of any type, for a cluster with ``agent="wire"``.

    By default torch promises to survive it: messages are late or held, and those that torch sends
    again fail a few times, or arrive twice. Wider arguments may draw what a program sees;
    :attr:`MessageFault.is_survivable` says so. With "lose" among the actions, give the cluster a
    short ``rpc_timeout``: a request that is lost, or whose response is, ends by its timeout only.

    Shrinks to a fault of rank 0, to the first action and the first type of message, to one message,
    the first one, and to 0.001 s.

    Args:
        world_size: how many ranks there are.
        actions: what may happen to messages.
        messages: the types, or their names, that it may act on (None: for "fail" and "duplicate"
            the four that torch retries, for other actions all types, one or all at once).
        max_messages: the highest number of a message, and the most first messages.
        max_delay: the longest delay, in virtual seconds.

    Raises:
        UsageError: `world_size` is no int from 1 to 1024; `actions` or `messages` is empty, no
            collection, or holds something else; one of the actions can happen to none of the
            `messages`; `max_messages` is no int from 1 up; or `max_delay` is no number of seconds
            from 0.001 to 3600.
    """
    remedy = "give the number of ranks, as rpc_cluster(world_size=...) gets it"
    size = whole_number(world_size, "world_size", least=1, most=MAX_RANKS, remedy=remedy)
    chosen = _actions(actions)
    kinds = tuple(_kinds(action, messages) for action in chosen)
    remedy = "1 to 5 is within the retries of every type that torch retries"
    most = whole_number(max_messages, "max_messages", least=1, most=_MAX_INT32, remedy=remedy)
    longest = int(checked_delay(max_delay, "max_delay") * 1000)
    if not longest:
        msg = f"{argument('max_delay', max_delay)} must be at least 0.001 s; raise it."
        raise UsageError(msg)
    return _message_faults(size, chosen, kinds, most, longest)


def with_message_faults(
    plans: st.SearchStrategy[FaultPlan], faults: object
) -> st.SearchStrategy[FaultPlan]:
    """Plans that have up to three message faults in addition.

    Raises:
        UsageError: `faults` is no strategy. When drawn: it drew something that is no
            :class:`MessageFault`.
    """
    if not isinstance(faults, st.SearchStrategy):
        msg = (
            f"{argument('message_faults', faults)} must be a strategy that draws message faults; "
            f"write message_faults(world_size=...)."
        )
        raise UsageError(msg)
    return _with_message_faults(plans, faults)


def _actions(actions: object) -> tuple[MessageAction, ...]:
    must_be = "a collection of actions; write actions=('delay',) for a single one"
    given = first_items("actions", actions, must_be)
    wrong = [action for action in given if action not in MESSAGE_ACTIONS]
    if wrong or not given:
        what = f"holds {shown(wrong[0])}" if wrong else "is empty"
        msg = f"actions {what}; name at least one of {', '.join(MESSAGE_ACTIONS)}, and no others."
        raise UsageError(msg)
    # In one order, so that a set draws the same in every process.
    return tuple(action for action in MESSAGE_ACTIONS if action in given)


def _kinds(action: MessageAction, messages: object) -> _Kinds:
    """The types that may have an action; None stands for all at once.

    Raises:
        UsageError: `messages` is no collection of types, or leaves none.
    """
    if messages is None:
        return _RETRIED if action in _OF_REQUESTS else (*_ALL, None)
    must_be = "a collection of message types; write messages=('RREF_ACK',) for a single one"
    given = {wire_message_type(one) for one in first_items("messages", messages, must_be)}
    kinds = tuple(
        kind for kind in _ALL if kind in given and (kind.is_request or action not in _OF_REQUESTS)
    )
    if not kinds:
        done = "be duplicated" if action == "duplicate" else action
        msg = (
            f"{argument('messages', messages)} holds no message that can {done}; name a "
            f"{'request' if action in _OF_REQUESTS else 'type'}, or take {action!r} out of actions."
        )
        raise UsageError(msg)
    return kinds


_Sends = tuple[frozenset[MessageType], ...]


def _sends(world_size: int) -> _Sends:
    """What each rank is known to send, by the hint."""
    found: list[frozenset[MessageType]] = []
    for rank in range(world_size):
        with hints.at_rank(rank):
            found.append(hints.sent_types())
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def _places(kinds: _Kinds, sends: _Sends) -> st.SearchStrategy[int]:
    """The place of a type and of a rank; nine in ten are of what that rank probably sends."""
    known = frozenset().union(*sends)
    requests = {WireMessageType(kind) for kind in known} or _USUAL
    answers = {kind.answer for kind in requests}
    heavy = [
        place * len(sends) + rank
        for place, kind in enumerate(kinds)
        for rank, mine in enumerate(sends)
        if kind in answers or kind in (mine if known else requests)
    ]
    number = len(kinds) * len(sends)
    return Weighted(0, number - 1, dict.fromkeys(heavy or range(number), 1.0))


@functools.lru_cache(maxsize=1024)
def _below(number: int) -> st.SearchStrategy[int]:
    return st.integers(0, number - 1)


def _kind_and_rank(
    draw: st.DrawFn, kinds: _Kinds, sends: _Sends
) -> tuple[WireMessageType | None, int]:
    place, rank = divmod(draw(_places(kinds, sends)), len(sends))
    return kinds[place], rank


@st.composite
def _message_faults(
    draw: st.DrawFn,
    world_size: int,
    actions: Sequence[MessageAction],
    kinds: Sequence[_Kinds],
    max_messages: int,
    max_ms: int,
) -> MessageFault:
    # Few numbers, because Hypothesis deletes a few at a time: it can then leave out a whole fault.
    sends = _sends(world_size)
    form, receiver = divmod(draw(_below(len(actions) * 3 * 2 * world_size)), 2 * world_size)
    place, way = divmod(form, 3)
    action = actions[place]
    kind, rank = _kind_and_rank(draw, kinds[place], sends)
    # Half of the faults are of messages to any rank.
    to = receiver - world_size if receiver >= world_size else None
    # A send that fails each time never arrives, and what is held must not wait for itself.
    which = ("nth", "first", "nth" if action in ("fail", "hold") else "every")[way]
    # Drawn in any case: for Hypothesis a fault of fewer choices is simpler, and "every" is not.
    number = 1 + draw(_below(max_messages))
    n = 1 if which == "every" else number
    delay = (1 + draw(_below(max_ms))) / 1000 if action in ("delay", "hold") else 0.0
    until = None
    if action == "hold":
        other, sender = _kind_and_rank(draw, kinds[place], sends)
        later = 1 + draw(_below(max_messages))
        # Beyond those that are held, if it is one of the same messages.
        is_same = (sender, other, None) == (rank, kind, to)
        until = NthMessage(sender, other, n=n + later if is_same else later)
    given: Any = {"to": to, "which": which, "n": n, "delay": delay, "until": until}
    return MessageFault(rank, action, kind, **given)


@st.composite
def _with_message_faults(
    draw: st.DrawFn,
    plans: st.SearchStrategy[FaultPlan],
    faults: st.SearchStrategy[MessageFault],
) -> FaultPlan:
    plan = draw(plans)
    found = draw(st.lists(faults, max_size=_MAX_FAULTS))
    for fault in found:
        given: Any = fault
        if not isinstance(given, MessageFault):
            msg = (
                f"{argument('message_faults', faults)} drew {shown(given)} (type "
                f"{type(given).__name__}); it must draw MessageFault only."
            )
            raise UsageError(msg)
    return replace(plan, others=(*plan.others, *found)) if found else plan
