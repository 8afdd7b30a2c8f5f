"""The end of a program whose world may be used again: RPC goes on, and all must be at rest.

All ranks do what ``rpc.shutdown()`` does first: they meet, and delete what they still hold. Then
each drops what the program has kept there, and says what is left. The world stays if that is
nothing, and no message was sent, in any rank, since the first of them was looked at: ranks are not
looked at in the same moment, so one that is at rest could be woken by one that is looked at later.
Where one was sent, another round of looks follows.

What is asked of each rank:

* No call of it is unanswered, and it runs no call (``TensorPipeAgent``: its active calls, pending
  responses and timeouts). Nothing waits to be sent again (``RpcAgent::rpcRetryMap_``), or is held
  back by a fault. Each write has ended, and no thread of its pool has work. So no request and no
  response is on its way. Nobody waits for the second copy of a request: the ledger must show that
  both were processed.
* It owns no RRef that others know, uses none, and waits for none (``RRefContext``: its owners,
  forks, users and children, also those that ``getDebugInfo`` leaves out).
* It holds no autograd context, and no backward pass runs.
* No thread is left, and no global that a program could change differs
  (:mod:`rpcprops.cluster._anew`).

What grows from program to program is in no outcome that is judged: ids of messages, RRefs, contexts
and meetings, and what TorchScript has compiled.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rpcprops.cluster._channel import Channel
from rpcprops.cluster._phases import Phase, Phases
from rpcprops.cluster._ranks import Ranks
from rpcprops.cluster._shutdown import note_shutdown
from rpcprops.cluster.deadlines import Deadlines
from rpcprops.cluster.options import WorldOptions
from rpcprops.faults import MessageFault

#: Real seconds for which ranks may come to rest; a new world takes about as long.
_REST_SECONDS = 0.1
#: Real seconds within which ranks meet, on top of what the faults need.
_MEET_SECONDS = 5.0


def stay(ranks: Ranks, phases: Phases, deadlines: Deadlines, options: WorldOptions) -> str:
    """Let the ranks meet and come to rest. Why the world cannot be used again; empty if it can.

    No violation is recorded.
    """
    with phases.open("shutdown", deadlines.shutdown) as phase:
        # The first round of looks comes with the answers: it saves an exchange with each rank.
        number = ranks.send_to_all("meet")
        until = time.monotonic() + _MEET_SECONDS + deadlines.shutdown - deadlines.look
        answers = _answers(ranks, number, min(until, time.monotonic() + phase.left()))
        if answers is None:
            return "the ranks did not meet at the end"
        named = zip(ranks.channels, answers, strict=True)
        failed = [channel.name for channel, (kind, _) in named if kind != "ok"]
        if failed:
            return f"{failed[0]} could not meet the others at the end"
        return _rest(ranks, phase, options, answers)


def _rest(
    ranks: Ranks, phase: Phase, options: WorldOptions, answers: list[tuple[str, Any]] | None
) -> str:
    """Look until two rounds in a row show that all are at rest; `answers` are of the first."""
    assert ranks.ledger is not None
    copies = any(
        isinstance(fault, MessageFault) and fault.action == "duplicate"
        for fault in options.plan.others
    )
    until = time.monotonic() + min(_REST_SECONDS, phase.left())
    while answers is not None:
        why = ""
        for channel, (_, seen) in zip(ranks.channels, answers, strict=True):
            note_shutdown(channel, options, b"", seen)
            channel.processor_seconds = seen["processor"] - channel.processor_before
            why = why or _unrest(channel, seen)
        why = why or (_copy(ranks) if copies else "")
        if not why and ranks.ledger.may_send_again():
            # Between two tries a message may be in no counter and in no map: the thread that has
            # failed to send it may not have come to put it there (rpc_agent.cpp:
            # RpcAgent::retryExpiredRpcs).
            why = "a message may be sent again"
        sent = ranks.ledger.count
        if not why and all(seen["sent"] == sent for _, seen in answers):
            return ""
        if time.monotonic() > until:
            return why or "messages are still sent"
        number = ranks.send_to_all("rest", not why)
        answers = _answers(ranks, number, time.monotonic() + _MEET_SECONDS)
    return "a rank did not say whether it is at rest"


def _answers(ranks: Ranks, number: int, until: float) -> list[tuple[str, Any]] | None:
    """The answers of all ranks; None if a rank has ended, or the time is over."""
    while ranks.without_answer(number):
        left = until - time.monotonic()
        if left <= 0 or ranks.peer is None or ranks.peer.reader.closed:
            return None
        if any(channel.lost or channel.broken for channel in ranks.channels):
            return None
        ranks.pump(min(left, 0.5))
    return [channel.answers.pop(number) for channel in ranks.channels]


def _unrest(channel: Channel, seen: Mapping[str, Any]) -> str:
    """What a rank still holds or does, in words; empty if nothing."""
    if seen["differs"]:
        return f"{channel.name}: {seen['differs']}"
    held = seen["counters"]
    if held is None or not held.is_zero:
        return f"{channel.name} {'has no agent' if held is None else f'holds {held.describe()}'}"
    return f"{channel.name}: {', '.join(seen['busy'])} of its agent" if seen["busy"] else ""


def _copy(ranks: Ranks) -> str:
    """Whether a request that was sent twice has not been processed twice, in words."""
    under_way = any(
        message.done == "duplicate" and message.processed < 2 for message in ranks.messages()
    )
    return "the copy of a request is under way" if under_way else ""
