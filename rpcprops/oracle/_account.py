"""Accounts for the faults of a run: asked for, able to strike, and fired, by rank and type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rpcprops.faults import FaultPlan, MessageType
from rpcprops.oracle._chosen import predict_for
from rpcprops.oracle._errors import is_expected
from rpcprops.oracle._prediction import Prediction
from rpcprops.outcomes import Outcome
from rpcprops.programs import Program

Kind = Literal["failure", "delay"]
#: How sure the type of a fired fault is: exact, inferred from how long the steps of its sender
#: took (where the clock library was not there to see it), or not known which of several it was.
Attribution = Literal["exact", "inferred", "unattributed"]


@dataclass(frozen=True, slots=True, order=True)
class FaultCount:
    """One kind of fault at one rank.

    Attributes:
        message: the type, "" for signs that cannot be attributed to one.
        could: how many could strike, by the message model (None when the program is not known).
        fired: how many were seen; None when this run had no way to see them.
    """

    rank: int
    kind: Kind
    message: str
    could: int | None
    fired: int | None
    attribution: Attribution = "exact"


def account(program: Program | None, plan: FaultPlan, outcome: Outcome) -> tuple[FaultCount, ...]:
    """What the plan asked for and what came of it.

    Failures are counted from torch's own log line for each failed retryable send, which names no
    type: they are attributed where one type was armed, or where the counts add up to what the
    model predicts. A failing call is never sent again, and shows at its caller. Delays are counted
    by the clock library, by their length; they are attributed where no other type at that rank has
    the same length.
    """
    counts: list[FaultCount] = []
    prediction = None if program is None else predict_for(program, plan, outcome)
    shown = prediction is not None and _steps_agree(prediction, outcome)
    failures = _expected_failures(prediction) if prediction else None
    delays = prediction.delays(plan) if prediction else None
    for rank in outcome.ranks:
        table = plan.table(rank.rank)
        could = failures[rank.rank] if failures and rank.rank < len(failures) else None
        retryable = [m for m in table.failing if m.is_retryable]
        lines = None if could is None else {m: could.get(m, 0) for m in retryable}
        counts += _failures(rank.rank, retryable, lines, rank.failed_sends)
        counts += [
            FaultCount(rank.rank, "failure", m, *_lost(could, m, shown), "inferred")
            for m in table.failing
            if not m.is_retryable
        ]
        could = delays[rank.rank] if delays and rank.rank < len(delays) else None
        delayed = _delays(rank.rank, table.delaying, could, rank.delayed_sends)
        if rank.delayed_sends is None and program is not None:
            spent = _step_seconds(program, outcome, rank.rank)
            delayed = _inferred(delayed, table.delaying, spent)
        counts += delayed
    return tuple(counts)


def _expected_failures(prediction: Prediction) -> list[Mapping[MessageType, int]]:
    pairs = zip(prediction.failures(), prediction.last_failures(), strict=True)
    return [Counter(settled) + Counter(leaving) for settled, leaving in pairs]


def _steps_agree(prediction: Prediction, outcome: Outcome) -> bool:
    """Whether every step ended with the class of error that it had to."""
    return len(outcome.steps) == len(prediction.steps) and all(
        step.ended and is_expected(prediction.steps[step.index].error, step.error)
        for step in outcome.steps
    )


def _lost(
    could: Mapping[MessageType, int] | None, message: MessageType, shown: bool
) -> tuple[int | None, int | None]:
    """A message that torch never sends again shows at its caller: how many could, how many did."""
    able = None if could is None else could.get(message, 0)
    return able, able if shown else None


def _step_seconds(program: Program, outcome: Outcome, rank: int) -> float:
    """Virtual seconds that the steps of a rank took in all."""
    leaves = program.leaves
    return sum(
        step.seconds for step in outcome.steps if getattr(leaves[step.index], "at", None) == rank
    )


def _inferred(
    counts: list[FaultCount], lengths: Mapping[MessageType, int], seconds: float
) -> list[FaultCount]:
    """The delays that could strike did, if the steps of the rank took as long as all of them."""
    known = [count for count in counts if count.message and count.could]
    asked = sum((count.could or 0) * lengths[MessageType(count.message)] for count in known)
    if not known or seconds * 1000 < asked:
        return counts
    return [
        replace(count, fired=count.could, attribution="inferred") if count in known else count
        for count in counts
    ]


def _failures(
    rank: int, armed: list[MessageType], could: Mapping[MessageType, int] | None, fired: int
) -> list[FaultCount]:
    if len(armed) == 1:
        (only,) = armed
        able = None if could is None else could.get(only, 0)
        return [FaultCount(rank, "failure", only, able, fired)]
    if could is not None and sum(could.values()) == fired:
        return [FaultCount(rank, "failure", m, could.get(m, 0), could.get(m, 0)) for m in armed]
    if not armed:
        return []
    able = None if could is None else sum(could.values())
    return [FaultCount(rank, "failure", "", able, fired, "unattributed")]


def _delays(
    rank: int,
    armed: Mapping[MessageType, int],
    could: Mapping[MessageType, int] | None,
    seen: Mapping[int, int] | None,
) -> list[FaultCount]:
    counts: list[FaultCount] = []
    for length, types in sorted(_by_length(armed).items()):
        fired = None if seen is None else seen.get(length, 0)
        able = None if could is None else sum(could.get(m, 0) for m in types)
        if len(types) == 1:
            counts.append(FaultCount(rank, "delay", types[0], able, fired))
        elif could is not None and able == fired:
            counts += [
                FaultCount(rank, "delay", m, could.get(m, 0), could.get(m, 0)) for m in types
            ]
        else:
            counts.append(FaultCount(rank, "delay", "", able, fired, "unattributed"))
    return counts


def _by_length(armed: Mapping[MessageType, int]) -> dict[int, list[MessageType]]:
    lengths: dict[int, list[MessageType]] = {}
    for message, milliseconds in sorted(armed.items()):
        lengths.setdefault(milliseconds, []).append(message)
    return lengths


def fired_by_type(counts: tuple[FaultCount, ...]) -> Mapping[str, int]:
    """Fired faults by kind and type: ``{"failure RREF_USER_DELETE": 3, …}``; zeros left out."""
    total: Counter[str] = Counter()
    for count in counts:
        if count.fired:
            total[f"{count.kind} {count.message or 'unattributed'}"] += count.fired
    return dict(sorted(total.items()))


def fired(counts: tuple[FaultCount, ...]) -> int:
    """How many faults fired in all."""
    return sum(count.fired or 0 for count in counts)
