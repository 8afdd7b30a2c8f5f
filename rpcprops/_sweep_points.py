"""Tries each message of a program with each fault that it can have: the program's map of points.

A run without faults shows which messages there are. Each of them fails, is late, is held until the
next one has passed, comes twice, and is lost, one at a time. What the oracle says of that run is
compared with what it shows. What the oracle does not predict is named with the reason, and not run.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rpcprops._sweep import Record, State, Sweep, Verdict, first_of
from rpcprops.errors import HarnessError, UsageError
from rpcprops.faults import (
    MESSAGE_ACTIONS,
    FaultPlan,
    MessageAction,
    MessageFault,
    points,
    reversal,
)
from rpcprops.oracle import fired_by_type, predict
from rpcprops.outcomes import Outcome, SentMessage
from rpcprops.programs import Program
from rpcprops.properties import Case, Failure, observe
from rpcprops.runner import Runner
from rpcprops.torch_facts import facts_of

#: Virtual seconds: what a program gets as its `rpc_timeout` if it has none. What is lost is noticed
#: then, which must be before a shutdown gives up waiting.
RPC_TIMEOUT = 70.0
#: Virtual seconds for which a message is held at most. The timeout must not end what waits for it.
_HELD_SECONDS = 4.0
#: Only requests can have these.
_OF_REQUESTS: tuple[MessageAction, ...] = ("fail", "duplicate")


@dataclass(frozen=True, slots=True)
class Point:
    """A message of the run without faults, with one action: the faults of one plan.

    Attributes:
        faults: one; two for a pair.
    """

    faults: tuple[MessageFault, ...]

    @property
    def plan(self) -> FaultPlan:
        """The plan of this point."""
        return FaultPlan(others=self.faults)


def with_timeout(program: Program) -> Program:
    """The program with an `rpc_timeout`, if it has none and is predicted with one."""
    if program.rpc_timeout is not None:
        return program
    changed = replace(program, rpc_timeout=RPC_TIMEOUT)
    try:
        predict(changed, FaultPlan())
    except UsageError:
        return program
    return changed


def counted(messages: Sequence[SentMessage]) -> list[tuple[SentMessage, int]]:
    """Each message that faults can act on, with its number among those of its sender, receiver and
    type, from 1.
    """
    count: Counter[tuple[int, int, str]] = Counter()
    found: list[tuple[SentMessage, int]] = []
    for sent in messages:
        if "spared" not in sent.marks:
            kind = (sent.sender, sent.receiver, sent.type)
            count[kind] += 1
            found.append((sent, count[kind]))
    return found


def wanted(messages: Sequence[SentMessage]) -> list[tuple[SentMessage, int, MessageAction]]:
    """Each message with each action that it must be tried with.

    The last message, and its request, cannot be held until a later one has passed.
    """
    found: list[tuple[SentMessage, int, MessageAction]] = []
    rows = counted(messages)
    for sent, number in rows:
        for action in MESSAGE_ACTIONS:
            if action in _OF_REQUESTS and not sent.is_request:
                continue
            if action == "hold" and _next(sent, rows) is None:
                continue
            found.append((sent, number, action))
    return found


def _next(sent: SentMessage, rows: Sequence[tuple[SentMessage, int]]) -> SentMessage | None:
    """The message that was sent next, unless that is its own answer."""
    later = [one for one, _ in rows if one.id != sent.id and one.seconds > sent.seconds]
    return min(later, key=lambda one: one.seconds, default=None)


def points_of(messages: Sequence[SentMessage]) -> tuple[Point, ...]:
    """One point for each message and each action, in the order of the record."""
    alone = list(points(messages))
    rows = counted(messages)
    for sent, _ in rows:
        other = _next(sent, rows)
        if other is not None:
            alone.append(reversal(sent, other, messages, delay=_HELD_SECONDS))
    order = {key: place for place, key in enumerate(_key(*row) for row in wanted(messages))}
    last = len(order)
    alone.sort(key=lambda fault: order.get(key_of(fault), last))
    return tuple(Point((fault,)) for fault in alone)


def pairs_of(single: Sequence[Point]) -> tuple[Point, ...]:
    """Every two points that are about different messages."""
    found: list[Point] = []
    for one, other in itertools.combinations(single, 2):
        if key_of(one.faults[0])[:4] != key_of(other.faults[0])[:4]:
            found.append(Point((*one.faults, *other.faults)))
    return tuple(found)


#: Sender, receiver, type, number and action.
Key = tuple[int, int, str, int, str]


def _key(sent: SentMessage, number: int, action: MessageAction) -> Key:
    return (sent.sender, sent.receiver, sent.type, number, action)


def key_of(fault: MessageFault) -> Key:
    """The message that a fault is about, and what it does."""
    assert fault.to is not None
    return (fault.rank, fault.to, str(fault.message), fault.n, fault.action)


class PointSweep(Sweep):
    """Runs a program under points that have no result yet; arguments as for :class:`Sweep`."""

    def __init__(self, program: Program, runner: Runner, state: State, **options: Any) -> None:
        super().__init__(program, runner, state, agent="WIRE", **options)

    def record_messages(self) -> Outcome:
        """A run without faults, which must be right.

        Raises:
            HarnessError: the run recorded no messages, or not all of them.
            UsageError: it breaks a promise even without faults.
        """
        seen = observe(self.runner, Case(self.program), anew=True, **self.options, reuse=False)
        if seen.violations:
            msg = (
                f"the program breaks a promise without any fault: {seen.violations[0]}; sweep one "
                f"that holds."
            )
            raise UsageError(msg)
        if not seen.outcome.messages or seen.outcome.messages_dropped:
            msg = "the agent WIRE recorded no messages, or had no room for them all"
            raise HarnessError(msg)
        return seen.outcome

    def try_all(self, places: Sequence[Point]) -> Iterator[tuple[Record, Failure | None]]:
        """Run the points without a result; yields each record once it is kept, and its failure."""
        for point in places:
            if self.state.has(point):
                continue
            record, failure = self._try(point)
            self.state.add(record)
            yield record, failure

    def _try(self, point: Point) -> tuple[Record, Failure | None]:
        began = time.monotonic()
        plan = point.plan
        try:
            predict(self.program, plan, facts_of(self.state.torch_version))
        except UsageError as error:
            return Record(plan, "unpredicted", broken=str(error)), None
        seen, in_use = self._observe(plan)
        verdict, repeats = self._verdict(seen)
        acted = sum(bool(sent.done) for sent in seen.outcome.messages)
        promise, broken = first_of(seen.violations)
        if verdict == "holds" and seen.accepted:
            verdict = "documented"
        elif verdict == "holds" and acted < len(point.faults):
            verdict, broken = _without_message(point, seen.outcome)
        failure = self._failure(seen, repeats) if verdict == "violated" else None
        if failure is None and in_use is not None:
            promise, _ = first_of(in_use.violations)
            verdict, broken = "undecided", str(in_use)
        record = Record(
            plan=plan,
            verdict=verdict,
            promise=promise,
            broken=broken,
            fired=acted,
            fired_by_type=fired_by_type(seen.faults),
            seconds=round(time.monotonic() - began, 3),
            artefact=self._written(failure, in_use),
            findings=seen.explained_by,
            accepted=tuple(dict.fromkeys(one.kind for one in seen.accepted)),
            used=seen.outcome.ran_before > 0,
        )
        return record, failure


def _without_message(point: Point, outcome: Outcome) -> tuple[Verdict, str]:
    """The verdict where all is as predicted, and a fault had no message to act on; why.

    After a message that failed or was lost, a program need not send what it sends otherwise.
    """
    stopped = {sent.done for sent in outcome.messages} & {"fail", "lose"}
    if len(point.faults) > 1 and stopped:
        return "unmet", "without one of the two messages, the other one is not sent"
    return "undecided", "the message did not come, so nothing was tried"


def rows(
    messages: Sequence[SentMessage], state: State, places: Sequence[Point]
) -> list[dict[str, Any]]:
    """One row for each message of the run without faults and each action, with its verdict.

    A row whose message was not tried with its action says so.
    """
    plans = {key_of(point.faults[0]): point.plan for point in places}
    found: list[dict[str, Any]] = []
    for sent, number, action in wanted(messages):
        plan = plans.get(_key(sent, number, action))
        record = None if plan is None else state.records.get(plan)
        verdict: Verdict | str = "not tried" if record is None else record.verdict
        found.append(
            {
                "type": sent.type,
                "sender": sent.sender,
                "receiver": sent.receiver,
                "number": number,
                "action": action,
                "fault": "" if plan is None else plan.others[0].name,
                "verdict": verdict,
                "findings": [] if record is None else list(record.findings),
                "accepted": [] if record is None else list(record.accepted),
                "said": "" if record is None else record.broken,
                "artefact": "" if record is None else record.artefact,
            }
        )
    return found
