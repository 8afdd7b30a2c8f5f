"""Accounts for the faults of a run, by rank and type: asked for, eligible, and fired."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from rpcprops.errors import HarnessError
from rpcprops.faults import Fault, FaultPlan, SendDelay
from rpcprops.oracle._chosen import predict_for
from rpcprops.oracle.errors import is_expected
from rpcprops.oracle.prediction import Prediction
from rpcprops.outcomes import ArmedFaults, Outcome, RankOutcome
from rpcprops.programs import Program
from rpcprops.torch_facts import facts_of

#: How the type of a fired fault is known: by the record of all messages; exactly, by the counts of
#: its rank; inferred from how long the steps of its sender took, or how they ended (where nothing
#: counted it); or not known, with several possible.
Attribution = Literal["recorded", "exact", "inferred", "unattributed"]


class FaultCount(msgspec.Struct, frozen=True, order=True, rename={"eligible": "could"}):
    """One fault, or several of one kind that are counted together at a rank.

    Attributes:
        kind: the name that the fault gives itself: "failure" or "delay" of a message.
        message: its message type, "" where what was seen cannot be attributed to one type.
        eligible: how many messages it can act on, by the message model (None when the program is
            not known). In JSON: `could`.
        fired: how many were seen to fire; None when this run had no way to see them.
        part: 0 for a fault of the cluster's plan, which acts during the whole run; n for one of the
            n-th of those that were armed for a part of it.
    """

    rank: int
    kind: str
    message: str
    eligible: int | None
    fired: int | None
    attribution: Attribution = "exact"
    part: int = 0


def account(program: Program | None, plan: FaultPlan, outcome: Outcome) -> tuple[FaultCount, ...]:
    """The faults that the plan asked for or that were armed later, and which of them fired.

    Where the agent records all messages, the record alone says on which of them a fault of a table,
    or one of single messages, acted, also at a rank that has died.

    Elsewhere each fault names its counter, and what else shows it. The preload library counts
    failures and delays by message type. Where it was not there, failures are counted from torch's
    log line for each failed send that is retried. That names no type, so failures are attributed
    where the table fails one type only, or where the counts add up to the prediction. A failing
    call is not sent again, and shows at its caller.

    Raises:
        HarnessError: the record of messages contradicts what a rank has counted.
    """
    counts: list[FaultCount] = []
    prediction = None if program is None else predict_for(program, plan, outcome)
    agrees = prediction is not None and _steps_agree(prediction, outcome)
    for rank in outcome.ranks:
        known = prediction if prediction and rank.rank < len(prediction.counters) else None
        of_plan = _without_armed(rank, outcome.armed)
        faults = plan.faults_at(rank.rank)
        recorded = {fault: _recorded(fault, plan, outcome, of_plan) for fault in faults}
        groups = [
            [(fault, None if known is None else fault.eligible(known)) for fault in group]
            for group in _counted_together(recorded, of_plan)
        ]
        # If steps took as long as all uncounted faults that can delay them, all of these fired.
        waits = sum(
            fault.waits(could or 0)
            for fault, could in (group[0] for group in groups if len(group) == 1)
            if fault.shows_in == "seconds"
            if recorded[fault] is None and fault.seen(of_plan) is None
        )
        took_all = bool(waits) and (
            _step_milliseconds(program, outcome, rank.rank) >= round(waits * 1000)
        )
        shown = {"errors": agrees, "seconds": took_all}
        for group in groups:
            counts += _attributed(group, of_plan, shown, recorded[group[0][0]])
    return (*counts, *_of_armed(outcome))


def _of_armed(outcome: Outcome) -> Iterable[FaultCount]:
    """The faults that were armed for a part of the run."""
    for part, armed in enumerate(outcome.armed, 1):
        for rank in outcome.ranks:
            alone = armed.of(rank)
            for fault in armed.plan.faults_at(rank.rank):
                recorded = _recorded(fault, armed.plan, outcome, alone, part)
                count = FaultCount(rank.rank, fault.kind, fault.what, None, recorded, part=part)
                if recorded is None:
                    yield replace(count, fired=fault.seen(alone))
                else:
                    yield replace(count, attribution="recorded")


def _recorded(
    fault: Fault, plan: FaultPlan, outcome: Outcome, rank: RankOutcome, part: int = 0
) -> int | None:
    """How often the record of all messages shows a fault; None if it does not say.

    Args:
        rank: what its rank has counted of the faults of that plan.

    Raises:
        HarnessError: that differs. The agent writes to the record before it counts, and a rank
            counts up to its last look: to its end, if it has shut RPC down and exited. Of the
            delays of a program it counts those before the shutdown that it was seen to have.
    """
    shown = fault.recorded(plan, outcome, part) if part else fault.recorded(plan, outcome)
    counted = fault.seen(rank) if fault.is_counted_alone(rank) else None
    if shown is None or counted is None:
        return shown
    has_ended = rank.counters_after_shutdown is not None and rank.exit_code == 0
    if counted > shown or (counted < shown and has_ended and not isinstance(fault, SendDelay)):
        msg = (
            f"{rank.name} has counted {counted} firings of the fault {fault.name!r}, and the "
            f"record of messages shows {shown}."
        )
        raise HarnessError(msg)
    return shown


def _without_armed(rank: RankOutcome, armed: Sequence[ArmedFaults]) -> RankOutcome:
    """What a rank showed of the faults of its plan alone."""
    if not armed or rank.failed_by_type is None or rank.delayed_by_type is None:
        return rank
    failed, delayed = Counter(rank.failed_by_type), Counter(rank.delayed_by_type)
    for one in armed:
        alone = one.of(rank)
        failed.subtract(alone.failed_by_type or {})
        delayed.subtract(alone.delayed_by_type or {})
    return dataclasses.replace(rank, failed_by_type=failed, delayed_by_type=delayed)


def _counted_together(
    recorded: Mapping[Fault, int | None], rank: RankOutcome
) -> Iterable[list[Fault]]:
    """Groups of faults that share one count, kind by kind; faults counted alone come last."""
    groups: dict[tuple[int, bool, int], list[Fault]] = {}
    kinds = list(dict.fromkeys(fault.kind for fault in recorded))
    for number, (fault, times) in enumerate(recorded.items()):
        is_alone = times is not None or fault.is_counted_alone(rank)
        sign = None if is_alone else fault.sign
        key = (kinds.index(fault.kind), sign is None, number if sign is None else sign)
        groups.setdefault(key, []).append(fault)
    return (groups[key] for key in sorted(groups))


def _attributed(
    group: list[tuple[Fault, int | None]],
    rank: RankOutcome,
    shown: Mapping[str, bool],
    recorded: int | None,
) -> list[FaultCount]:
    first, could = group[0]
    if recorded is not None:
        return [FaultCount(rank.rank, first.kind, first.what, could, recorded, "recorded")]
    seen = first.seen(rank)
    known = [could for _, could in group if could is not None]
    could = sum(known) if len(known) == len(group) else None
    if len(group) > 1 and (could is None or could != seen):
        return [FaultCount(rank.rank, first.kind, "", could, seen, "unattributed")]
    if len(group) > 1:
        return [FaultCount(rank.rank, one.kind, one.what, able, able) for one, able in group]
    count = FaultCount(rank.rank, first.kind, first.what, could, seen)
    if seen is None and first.shows_in == "errors":
        return [replace(count, fired=could if shown["errors"] else None, attribution="inferred")]
    if seen is None and first.shows_in == "seconds" and could and shown["seconds"]:
        return [replace(count, fired=could, attribution="inferred")]
    return [count]


def _steps_agree(prediction: Prediction, outcome: Outcome) -> bool:
    """Whether every step ended with the predicted class of error."""
    facts = facts_of(outcome.torch_version)
    return len(outcome.steps) == len(prediction.steps) and all(
        step.ended and is_expected(prediction.steps[step.index].error, step.error, facts)
        for step in outcome.steps
    )


def _step_milliseconds(program: Program | None, outcome: Outcome, rank: int) -> float:
    """Virtual milliseconds that the steps of a rank took in all."""
    leaves = () if program is None else program.leaves
    return 1000 * sum(
        step.seconds for step in outcome.steps if getattr(leaves[step.index], "at", None) == rank
    )


def fired_by_type(counts: tuple[FaultCount, ...]) -> Mapping[str, int]:
    """Fired faults by kind and type: ``{"failure RREF_USER_DELETE": 3, …}``, without zeros."""
    total: Counter[str] = Counter()
    for count in counts:
        if count.fired:
            total[f"{count.kind} {count.message or 'unattributed'}"] += count.fired
    return dict(sorted(total.items()))


def fired(counts: tuple[FaultCount, ...]) -> int:
    """How many faults fired altogether."""
    return sum(count.fired or 0 for count in counts)
