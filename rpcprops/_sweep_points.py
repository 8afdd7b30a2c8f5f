"""Tries each message of a program with each fault that it can have: the program's map of points.

A run without faults shows which messages there are. Each of them fails, is late, is held until
another one has passed, comes twice, and is lost, one at a time. What the oracle says of that run is
compared with what it shows. What the oracle does not predict is run as well, and judged by what
torch promises whatever the faults are (:mod:`rpcprops.oracle._unpredicted`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rpcprops._sweep import Record, State, Sweep, Verdict, first_of
from rpcprops.confirmation import Sight, confirm, confirmation_rates
from rpcprops.errors import HarnessError, UsageError
from rpcprops.faults import (
    MESSAGE_ACTIONS,
    FaultPlan,
    MessageAction,
    MessageFault,
    NthMessage,
    points,
    reversal,
)
from rpcprops.oracle import endless_wait, fired_by_type, judge, meeting, predict
from rpcprops.outcomes import WIRE, Outcome, SentMessage
from rpcprops.programs import Program
from rpcprops.properties import Case, Failure, Observation, observe
from rpcprops.runner import FailedInUse, Runner
from rpcprops.torch_facts import UNKNOWN, TorchFacts, facts_of

#: Virtual seconds: what a program gets as its `rpc_timeout` if it has none. What is lost is noticed
#: then, which must be before a shutdown gives up waiting.
RPC_TIMEOUT = 70.0
#: Virtual seconds for which a message is held at most, the longest that is predicted. The timeout
#: must not end what waits for it.
_HELD_SECONDS = (8.0, 4.0)
#: Real seconds that a hold lasts at the least, so that a busy machine can send the other message.
_HELD_REAL_SECONDS = 1.0
#: How much of a hold is over at the most when a message passes that can pass in any run.
_CLEARLY_HELD = 0.9
#: Only requests can have these.
_OF_REQUESTS: tuple[MessageAction, ...] = ("fail", "duplicate")

#: Why nothing is predicted where a call comes twice by which the ranks meet in a shutdown.
_CALLED_TWICE = (
    "_gather_to_leader and _broadcast_to_followers (api.py) assert that each rank calls them once, "
    "and whether that error or the value is answered first is a race of two threads"
)
#: The documented effect of a program whose ranks are ended instead of shut down.
_NO_SHUTDOWN = "no-graceful-shutdown"


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

    A response cannot fail or come twice. The last message, and its request, cannot be held until a
    later one has passed.
    """
    found: list[tuple[SentMessage, int, MessageAction]] = []
    rows = counted(messages)
    for sent, number in rows:
        for action in MESSAGE_ACTIONS:
            if action in _OF_REQUESTS and not sent.is_request:
                continue
            if action == "hold" and _other(sent, rows) is None:
                continue
            found.append((sent, number, action))
    return found


def _other(sent: SentMessage, rows: Sequence[tuple[SentMessage, int]]) -> SentMessage | None:
    """The message that `sent` waits for if it is held: a later one, but not its own answer.

    It is the first of those that were sent before `sent` could have caused them, if there are any.
    """
    later = [one for one, _ in rows if one.id != sent.id and one.seconds > sent.seconds]
    free = [one for one in later if _is_free(one, sent)]
    return min(free or later, key=lambda one: one.seconds, default=None)


def _is_free(later: SentMessage, sent: SentMessage) -> bool:
    """Whether a message was sent when the one before had not been written, or not answered."""
    if sent.written is not None and later.seconds < sent.written:
        return True
    waits = sent.is_request and later.sender == sent.sender
    return waits and sent.ended is not None and later.seconds < sent.ended


def points_of(messages: Sequence[SentMessage], program: Program | None = None) -> tuple[Point, ...]:
    """One point for each message and each action, in the order of the record.

    Args:
        program: what is held is held for as long as is predicted of it, if that is given.
    """
    alone = list(points(messages))
    rows = counted(messages)
    for sent, _ in rows:
        other = _other(sent, rows)
        if other is not None:
            alone.append(_held(sent, other, messages, program))
    order = {key: place for place, key in enumerate(_key(*row) for row in wanted(messages))}
    last = len(order)
    alone.sort(key=lambda fault: order.get(key_of(fault), last))
    return tuple(Point((fault,)) for fault in alone)


def _held(
    sent: SentMessage,
    other: SentMessage,
    messages: Sequence[SentMessage],
    program: Program | None,
) -> MessageFault:
    """The fault that holds a message until another one has passed."""
    holds = [reversal(sent, other, messages, delay=seconds) for seconds in _HELD_SECONDS]
    predicted = (hold for hold in holds if program and not refusal(program, Point((hold,)).plan))
    return next(predicted, holds[0])


def refusal(program: Program, plan: FaultPlan, facts: TorchFacts = UNKNOWN) -> str:
    """Why the oracle does not predict a program under a plan; empty if it does."""
    try:
        predict(program, plan, facts)
    except UsageError as error:
        return error.why or str(error)
    return ""


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


def record_of(state: State, point: Point) -> Record | None:
    """The last record of a point: of its plan, or of one that does the same to the same message.

    Which message a held one waits for may differ. One that is decided comes before others.
    """
    if len(point.faults) > 1:
        return state.records.get(point.plan)
    key = key_of(point.faults[0])
    found = None
    for plan, record in state.records.items():
        one, *more = plan.others
        is_same = not more and isinstance(one, MessageFault) and key_of(one) == key
        if is_same and (found is None or record.verdict != "undecided"):
            found = record
    return found


def as_recorded(single: Sequence[Point], state: State) -> tuple[Point, ...]:
    """The points, each as it was run, if it was."""
    records = [record_of(state, point) for point in single]
    return tuple(
        point if record is None else Point(message_faults_of(record.plan))
        for point, record in zip(single, records, strict=True)
    )


def message_faults_of(plan: FaultPlan) -> tuple[MessageFault, ...]:
    """The faults of a plan of this sweep, which has no others."""
    return tuple(fault for fault in plan.others if isinstance(fault, MessageFault))


def has(state: State, point: Point) -> bool:
    """Whether a point has a result; an undecided one does not count."""
    record = record_of(state, point)
    return record is not None and record.verdict != "undecided"


def passed_meanwhile(outcome: Outcome) -> NthMessage | None:
    """The first message that was sent, and has passed, while another one was held in vain.

    A request has passed when it is answered, a response when it is written. None if no hold ran
    out, or nothing has passed meanwhile.
    """
    rows = counted(outcome.messages)
    held = next((sent for sent, _ in rows if is_overdue(sent)), None)
    if held is None or held.written is None:
        return None
    end = held.seconds + (held.written - held.seconds) * _CLEARLY_HELD
    later = [
        (one, number)
        for one, number in rows
        if one.id != held.id and held.seconds < one.seconds and _passed(one) < end
    ]
    if not later:
        return None
    one, number = min(later, key=lambda row: row[0].seconds)
    return NthMessage(one.sender, one.type, to=one.receiver, n=number)


def _passed(sent: SentMessage) -> float:
    """When a message had passed, as :class:`MessageFault` says of a hold."""
    when = sent.ended if sent.is_request else sent.written
    return math.inf if when is None else when


def is_overdue(sent: SentMessage) -> bool:
    """Whether a message was held for as long as its fault allows: the other one did not pass."""
    return sent.done == "hold" and "overdue" in sent.marks


class PointSweep(Sweep):
    """Runs a program under points that have no result yet; arguments as for :class:`Sweep`."""

    def __init__(self, program: Program, runner: Runner, state: State, **options: Any) -> None:
        super().__init__(program, runner, state, agent=WIRE, **options)
        self.facts = facts_of(state.torch_version)
        #: For what ranks were seen to wait at a slower rate, too.
        self._waited_for: set[str] = set()

    def record_messages(self) -> Outcome:
        """A run without faults, which must be right; or one with its messages, if they are kept.

        What is sent in which order may differ from run to run, and the points follow from it. So a
        sweep that goes on takes those that it began with.

        Raises:
            HarnessError: the run recorded no messages, or not all of them.
            UsageError: it breaks a promise even without faults.
        """
        if self.state.messages:
            return Outcome(self.program.world_size, messages=self.state.messages)
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
        self.state.keep(seen.outcome.messages)
        return seen.outcome

    def try_all(
        self, single: Sequence[Point], *, pairs: bool = False
    ) -> Iterator[tuple[Record, Failure | None]]:
        """Run the points without a result, and then their pairs, if these are asked for.

        Yields each record once it is kept, and its failure.
        """
        yield from self._try_each(single)
        if pairs:
            yield from self._try_each(pairs_of(as_recorded(single, self.state)))

    def _try_each(self, places: Sequence[Point]) -> Iterator[tuple[Record, Failure | None]]:
        for point in places:
            if not has(self.state, point):
                record, failure = self._try(point)
                self.state.add(record)
                yield record, failure

    def _try(self, point: Point) -> tuple[Record, Failure | None]:
        began = time.monotonic()
        trial = self._run(point)
        if len(point.faults) == 1 and not trial.seen.violations:
            trial = self._with_another_order(trial) or trial
        seen, in_use = trial.seen, trial.in_use
        verdict, repeats = self._verdict(seen)
        promise, broken = first_of(seen.violations)
        if verdict == "holds":
            verdict, broken = _good_verdict(trial)
        if verdict == "waits":
            verdict, broken = self._confirmed_wait(trial, broken)
        failure = self._failure(seen, repeats) if verdict == "violated" else None
        if failure is None and in_use is not None:
            promise, _ = first_of(in_use.violations)
            verdict, broken = "undecided", str(in_use)
        record = Record(
            plan=trial.point.plan,
            verdict=verdict,
            promise=promise,
            broken=broken,
            fired=trial.acted,
            fired_by_type=fired_by_type(seen.faults),
            seconds=round(time.monotonic() - began, 3),
            artefact=self._written(failure, in_use),
            findings=seen.explained_by,
            accepted=tuple(dict.fromkeys(one.kind for one in seen.accepted)),
            used=seen.outcome.ran_before > 0,
            predicted=trial.is_predicted,
            overdue=sum(map(is_overdue, seen.outcome.messages)),
            unpredicted=trial.why,
        )
        return record, failure

    def _confirmed_wait(self, trial: _Trial, told: str) -> tuple[Verdict, str]:
        """The verdict of a run in which a rank waits for what never comes; what there is to say.

        As a failure, it must show again: at a slower rate too, if none for this reason did before.
        """
        why, rate = _why_waits(trial.wait), trial.seen.outcome.clock_rate
        again: list[Observation] = []

        def run(at: float) -> Sight:
            again.append(self._observe(trial.seen.case, clock=at)[0])
            return _wait_seen(self.program, again[-1].outcome)

        # In real time the timeouts of a whole program take minutes.
        slower = () if why in self._waited_for else confirmation_rates(rate)[:1]
        said = confirm(
            rate, _wait_seen(self.program, trial.seen.outcome), run, rates=(rate, *slower)
        )
        if said.is_confirmed:
            self._waited_for.add(why)
            return "waits", told
        shown = ", ".join(f"{'yes' if shows else 'no'} at rate {at:g}" for at, shows in said.runs)
        broken = [str(one) for seen in again for one in seen.violations]
        if trial.why == _CALLED_TWICE and not (said.is_undecided or broken):
            # Who gets the error leaves, and the other waits for it (TensorPipeAgent::join).
            return "ran", f"not in every run ({shown}): {told}"
        late = "its ranks were too late to tell" if said.is_undecided else "not again"
        words = [f"a wait that is not confirmed ({late}: {shown})", told, *broken[:1]]
        return "undecided", "; ".join(words)

    def _run(self, point: Point) -> _Trial:
        """Run the program under a point; without a prediction where there is none.

        A prediction ends where a fault acts on a call by which the ranks meet in the shutdown. Such
        a point is run once more, with its shutdown, which is judged by how ranks then wait.
        """
        why = refused = refusal(self.program, point.plan, self.facts)
        if not refused:
            seen, in_use = self._observe(Case(self.program, point.plan), **self._clock(point))
            trial = _Trial(self.program, point, seen, in_use)
            if seen.violations or in_use or not trial.lacks_shutdown:
                return trial
            why = _why_no_shutdown(point)
        case = Case(self.program, point.plan, kind="unpredicted")
        seen, in_use = self._observe(case, **self._clock(point))
        if meeting(self.program, point.plan, seen.outcome, self.facts) and not refused:
            why = ""
        return _Trial(self.program, point, seen, in_use, why)

    def _clock(self, point: Point) -> dict[str, float]:
        """The clock of a point, as options: slow enough for what it holds."""
        held = [fault.delay for fault in point.faults if fault.action == "hold"]
        rate = max(1.0, min(held, default=0.0) / _HELD_REAL_SECONDS)
        return {"clock": rate} if held and rate < self.runner.server.rate else {}

    def _with_another_order(self, trial: _Trial) -> _Trial | None:
        """The same with a hold that another message has ended; None where none can be had.

        Where a hold ran out, that run shows which messages can pass.
        """
        until = passed_meanwhile(trial.seen.outcome)
        if until is None:
            return None
        point = Point((replace(trial.point.faults[0], until=until),))
        if trial.is_predicted and refusal(self.program, point.plan, self.facts):
            return None
        again = self._run(point)
        overdue = any(map(is_overdue, again.seen.outcome.messages))
        return None if overdue or not again.acted else again


@dataclass(frozen=True, slots=True)
class _Trial:
    """A point that was run.

    Attributes:
        why: why nothing was predicted; empty if it was.
    """

    program: Program
    point: Point
    seen: Observation
    in_use: FailedInUse | None
    why: str = ""

    @property
    def is_predicted(self) -> bool:
        return not self.why

    @property
    def wait(self) -> str:
        """For what a rank waits without end that torch gives no timeout; empty if none does."""
        is_run = self.seen.case.kind == "unpredicted"
        return endless_wait(self.program, self.seen.outcome) if is_run else ""

    @property
    def acted(self) -> int:
        """How many messages a fault has acted on."""
        return sum(bool(sent.done) for sent in self.seen.outcome.messages)

    @property
    def lacks_shutdown(self) -> bool:
        """Whether a fault has not acted, and the run ended before its shutdown."""
        is_short = any(one.kind == _NO_SHUTDOWN for one in self.seen.accepted)
        return is_short and self.acted < len(self.point.faults)


def _why_no_shutdown(point: Point) -> str:
    """Why nothing is predicted of a shutdown in which a fault acts on a call of its meeting.

    Phase 1 of ``torch/distributed/rpc/api.py``: _all_gather is a call of _gather_to_leader by each
    follower, phase 2 one of _broadcast_to_followers by the leader. Without a timeout a shutdown
    gives it 0, which is none, and waits for ``proceed_signal`` without one.
    """
    actions = {fault.action for fault in point.faults}
    if actions == {"duplicate"}:
        return _CALLED_TWICE
    if actions <= {"fail", "lose"}:
        return (
            "without such a call the ranks do not meet in the shutdown, and a rank waits for ever "
            "(api.py: _all_gather); which one is predicted only of a usual shutdown of ranks that "
            "have come to rest, and which no finding keeps"
        )
    return "how a shutdown ends whose own calls are disturbed (api.py: _all_gather) is not modelled"


def _good_verdict(trial: _Trial) -> tuple[Verdict, str]:
    """The verdict of a run that breaks no promise, and what there is to say of it."""
    outcome = trial.seen.outcome
    if trial.acted < len(trial.point.faults):
        return _without_message(trial.point, outcome)
    overdue = any(map(is_overdue, outcome.messages))
    late = "the hold ran out: the other message did not pass meanwhile" if overdue else ""
    if not trial.is_predicted:
        told = "; ".join(text for text in (trial.wait, late, trial.why) if text)
        return ("waits" if trial.wait else "ran"), told
    if trial.wait:
        return "waits", trial.wait
    if trial.seen.accepted:
        return "documented", late
    return ("overdue" if overdue else "holds"), late


def _why_waits(wait: str) -> str:
    """The reason in what :func:`endless_wait` says, without who waits."""
    return wait.rpartition(": ")[2]


def _wait_seen(program: Program, outcome: Outcome) -> Sight:
    """Whether a run shows such a wait, with ranks that were in time."""
    hangs = [one for one in judge(None, FaultPlan(), outcome) if one.promise == "RankHung"]
    return Sight.of(outcome, hangs if endless_wait(program, outcome) else [])


def _without_message(point: Point, outcome: Outcome) -> tuple[Verdict, str]:
    """The verdict where all is as predicted, and a fault had no message to act on; why.

    After a message that failed or was lost, a program need not send what it sends otherwise.
    """
    stopped = {sent.done for sent in outcome.messages} & {"fail", "lose"}
    if len(point.faults) > 1 and stopped:
        return "unmet", "without one of the two messages, the other one is not sent"
    return "undecided", "the message did not come, so nothing was tried"


def _of_shutdown(messages: Sequence[SentMessage]) -> frozenset[int]:
    """The ids of the requests that ranks sent while they shut down; their answers share them."""
    return frozenset(one.id for one in messages if one.is_request and "leaving" in one.marks)


def rows(
    messages: Sequence[SentMessage], state: State, places: Sequence[Point]
) -> list[dict[str, Any]]:
    """One row for each message of the run without faults and each action, with its verdict.

    A row whose message was not tried with its action says so.
    """
    tried = {key_of(point.faults[0]): point for point in places}
    leaving = _of_shutdown(messages)
    found: list[dict[str, Any]] = []
    for sent, number, action in wanted(messages):
        point = tried.get(_key(sent, number, action))
        record = None if point is None else record_of(state, point)
        plan = record.plan if record is not None else point.plan if point is not None else None
        verdict: Verdict | str = "not tried" if record is None else record.verdict
        found.append(
            {
                "type": sent.type,
                "sender": sent.sender,
                "receiver": sent.receiver,
                "number": number,
                "in_shutdown": sent.id in leaving,
                "action": action,
                "fault": "" if plan is None else plan.others[0].name,
                "verdict": verdict,
                "predicted": record is not None and record.predicted,
                "overdue": record is not None and record.overdue > 0,
                "findings": [] if record is None else list(record.findings),
                "accepted": [] if record is None else list(record.accepted),
                "said": "" if record is None else record.broken,
                "unpredicted": "" if record is None else record.unpredicted,
                "artefact": "" if record is None else record.artefact,
            }
        )
    return found
