"""Judges an outcome: compares what a program showed with what it had to show. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import fields
from typing import Any

from msgspec.structs import replace

from rpcprops._given import argument, shown
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle._chosen import predict_for
from rpcprops.oracle._log_errors import log_violations
from rpcprops.oracle._recorded import recorded_violations
from rpcprops.oracle.errors import WORDS, error_class, is_expected
from rpcprops.oracle.prediction import Prediction, StepPrediction
from rpcprops.oracle.ranks import owner_slack, shutdown_violations, unsettled
from rpcprops.outcomes import (
    ArmedFaults,
    Counters,
    Outcome,
    PhaseOutcome,
    RankOutcome,
    SentMessage,
    StepOutcome,
    Violation,
)
from rpcprops.programs import Leaf, Program
from rpcprops.torch_facts import TorchFacts, facts_of


def judge(
    program: Program | None,
    plan: FaultPlan | FaultTable | None,
    outcome: Outcome,
    *,
    facts: TorchFacts | None = None,
    aside: Container[int] = (),
) -> tuple[Violation, ...]:
    """Every violation in `outcome`; empty when all promises hold.

    Where steps are wrong, what comes after the last step is not judged.

    Args:
        program: what ran; with None, only how the ranks lived and exited is judged.
        plan: the faults under which it ran.
        outcome: what :func:`rpcprops.run`, or a cluster, returned.
        facts: what is known of its torch; by default that of the outcome's version.
        aside: the numbers of steps that are not judged, so that what comes after the last step is.

    Raises:
        UsageError: the plan or the outcome has another world, or an argument has a wrong type.
    """
    faults = FaultPlan.of(plan)
    _check(program, outcome, facts)
    if not isinstance(aside, Container) or isinstance(aside, str | bytes):
        msg = f"{argument('aside', aside)} must hold the numbers of steps, such as {{0, 2}}."
        raise UsageError(msg)
    facts = facts or facts_of(outcome.torch_version)
    found = [*_phases(outcome), *_deaths(outcome)]
    if program is None:
        shut = outcome.phase("shutdown")
        if shut is not None and not found:
            found += shutdown_violations(
                outcome.ranks, leaks_allowed=False, rate=outcome.clock_rate, facts=facts
            )
        return tuple(found)
    if outcome.world_size < program.world_size:
        msg = f"an outcome of {outcome.world_size} ranks is of no program for {program.world_size}."
        raise UsageError(msg)
    prediction = predict_for(program, faults, outcome, facts)
    judged = _of_program(program, faults, prediction, outcome, found, facts=facts, aside=aside)
    return (*judged, *log_violations(program, prediction, outcome, list(judged), facts))


def _check(program: object, outcome: object, facts: object) -> None:
    for name, value, kind, words in (
        ("program", program, Program | None, "a Program or None"),
        ("outcome", outcome, Outcome, "an Outcome"),
        ("facts", facts, TorchFacts | None, "TorchFacts (rpcprops.torch_facts) or None"),
    ):
        if not isinstance(value, kind):
            msg = f"{argument(name, value)} must be {words}."
            raise UsageError(msg)
    for item in fields(Outcome):
        value = getattr(outcome, item.name)
        kinds = _FIELDS.get(item.name)
        if kinds is None:
            is_right = isinstance(value, str)
        elif isinstance(kinds, tuple):
            is_right = isinstance(value, kinds) and not isinstance(value, bool)
        else:
            is_right = isinstance(value, tuple) and all(isinstance(one, kinds) for one in value)
        if not is_right:
            msg = (
                f"outcome.{item.name}={shown(value)} (type {type(value).__name__}) must be what "
                f"rpcprops.run, or a cluster, gives."
            )
            raise UsageError(msg)


#: What numeric fields of an outcome hold: a number, or a tuple of them; other fields are text.
_FIELDS: dict[str, Any] = {
    "world_size": (int,),
    "clock_rate": (int, float),
    "phases": PhaseOutcome,
    "ranks": RankOutcome,
    "steps": StepOutcome,
    "armed": ArmedFaults,
    "messages": SentMessage,
    "messages_dropped": (int,),
    "ran_before": (int,),
}


def _of_program(
    program: Program,
    plan: FaultPlan,
    prediction: Prediction,
    outcome: Outcome,
    found: list[Violation],
    *,
    facts: TorchFacts,
    aside: Container[int],
) -> tuple[Violation, ...]:
    """The violations by the program's steps and ranks, besides those in `found`."""
    size = outcome.world_size
    if len(outcome.ranks) != size:
        msg = f"an outcome of {size} ranks must hold each, not {len(outcome.ranks)}."
        raise UsageError(msg)
    names = [rank.name for rank in outcome.ranks]
    by_index = {step.index: step for step in outcome.steps}
    for index, (step, expected) in enumerate(zip(program.leaves, prediction.steps, strict=True)):
        seen = by_index.get(index)
        if seen is None or not seen.ended or index in aside:
            continue
        found += _step(index, step, expected, seen, names, facts)
    if any(violation.promise == "RankDied" for violation in found):
        # After a rank has died, what steps raise follows from its death.
        found = [violation for violation in found if violation.promise != "UnexpectedError"]
    # An error that has the right class but cannot be read must not hide other violations.
    unclear = [violation for violation in found if violation.promise == "UnclearError"]
    if len(found) > len(unclear):
        return tuple(violation for violation in found if violation not in unclear)
    found = []
    ended = sum(step.ended for step in outcome.steps)
    if ended != len(program.leaves):
        found.append(Violation("UnexpectedError", f"the program stopped after {ended} steps"))
        return tuple(unclear or found)
    if program.settles:
        found += unsettled(
            [rank.counters or Counters() for rank in outcome.ranks],
            prediction.counters,
            names,
        )
    found += _calls(prediction, outcome)
    # A run that ends at a settle, because ranks hold what they must not, shuts nothing down.
    last = outcome.phases[-1] if outcome.phases else None
    is_cut = last is not None and last.name == "settle" and last.verdict != "ok"
    if not found and prediction.graceful and not is_cut:
        found += _shutdown(prediction, outcome, facts)
    found = found or _sent(program, plan, prediction, outcome)
    return tuple(found or unclear)


def _sent(
    program: Program, plan: FaultPlan, prediction: Prediction, outcome: Outcome
) -> list[Violation]:
    """Messages, and faults that acted on them, which are not as predicted."""
    found: list[Violation] = []
    if program.settles and prediction.certain:
        found += _firing(prediction, plan, outcome)
    return found or recorded_violations(
        prediction, outcome, gathers=program.gathers, settles=program.settles
    )


def _phases(outcome: Outcome) -> list[Violation]:
    return [
        Violation(
            "RankHung",
            phase.detail,
            phase.ranks[0] if phase.ranks else None,
            timing_sensitive=True,
            # One real second. A rank is called hung only after three real seconds or more, unless a
            # known finding explains that it hangs.
            slack=outcome.clock_rate,
        )
        for phase in outcome.phases
        if phase.verdict == "hung"
    ]


def _deaths(outcome: Outcome) -> list[Violation]:
    found: list[Violation] = []
    shutting = outcome.phase("shutdown") is not None
    for rank in outcome.ranks:
        if rank.signal or (rank.exit_code is not None and not shutting):
            when = "in its shutdown" if shutting else "before its time"
            message = f"{rank.name} died {when}: {rank.describe_end()}"
            found.append(Violation("RankDied", message, rank.rank))
    shutdown = outcome.phase("shutdown")
    if shutdown is not None and shutdown.verdict == "failed" and not found:
        rank_number = shutdown.ranks[0] if shutdown.ranks else None
        found.append(Violation("RankDied", f"during shutdown: {shutdown.detail}", rank_number))
    start = outcome.phase("start")
    if start is not None and start.verdict == "failed" and not found:
        found.append(Violation("UnexpectedError", start.detail))
    return found


def _step(  # noqa: PLR0911 - one return for each thing that can be wrong
    index: int,
    step: Leaf,
    expected: StepPrediction,
    seen: StepOutcome,
    names: Sequence[str],
    facts: TorchFacts,
) -> list[Violation]:
    where = getattr(step, "at", None)
    if expected.counters:
        # The value of this step is what all ranks hold.
        if len(seen.counters) != len(names):
            msg = (
                f"step {index} of the program settles, and the outcome has the counters of "
                f"{len(seen.counters)} ranks there, not of {len(names)}: it is of another program."
            )
            raise UsageError(msg)
        found = unsettled(seen.counters, expected.counters, names)
        return [replace(v, step=index) for v in found]
    if (
        expected.error == "unknown"
        and expected.value is None
        and error_class(seen.error, facts) != "unknown"
    ):
        return []
    if not is_expected(expected.error, seen.error, facts):
        late = "timeout" in (expected.error, error_class(seen.error, facts))
        if seen.error is None:
            message = f"expected {WORDS[expected.error]}, got the value {seen.value!r}"
            return [Violation("MissingError", message, where, index, late, expected.slack)]
        message = f"expected {WORDS[expected.error]}, got {seen.error.first_line()}"
        return [Violation("UnexpectedError", message, where, index, late, expected.slack)]
    if seen.error is not None:
        if seen.error.type != facts.texts.unreadable:
            return []
        message = f"{WORDS[expected.error]} came as {seen.error.first_line()}"
        return [Violation("UnclearError", message, where, index)]
    if not isinstance(seen.value, step.gives):
        msg = (
            f"step {index} of the program, {step!r}, cannot give {argument('value', seen.value)}: "
            f"the outcome is of another program."
        )
        raise UsageError(msg)
    found = step.judge(expected.value, seen.value)
    return [replace(violation, rank=where, step=index) for violation in found]


def _shutdown(prediction: Prediction, outcome: Outcome, facts: TorchFacts) -> list[Violation]:
    """What a graceful shutdown showed, less predicted leaks; and predicted leaks it lacks."""
    found: list[Violation] = []
    reported: set[int | None] = set()
    rate = outcome.clock_rate
    leaking = prediction.leaking | prediction.may_leak
    seen = shutdown_violations(outcome.ranks, leaks_allowed=False, rate=rate, facts=facts)
    for violation in seen:
        if violation.promise == "RRefLeak" and violation.rank in leaking:
            reported.add(violation.rank)
        elif (
            violation.promise != "ContextLeak"
            or violation.rank not in prediction.may_warn_unreleased_context
        ):
            found.append(violation)
    for rank in sorted(prediction.leaking - reported):
        message = f"rank {rank} had to report the RRef that nobody can delete, and did not"
        found.append(Violation("MissingError", message, rank, timing_sensitive=True))
    return [*found, *_left_over(prediction, outcome, found)]


def _left_over(
    prediction: Prediction, outcome: Outcome, found: Sequence[Violation]
) -> list[Violation]:
    """What ranks wrongly still hold after a graceful shutdown, by torch's own counters."""
    left: list[Violation] = []
    told = {(violation.promise, violation.rank) for violation in found}
    slack = owner_slack(outcome.clock_rate)
    for rank, allowed in zip(outcome.ranks, prediction.contexts_left, strict=True):
        held = rank.counters_after_shutdown
        if held is None:
            continue
        message = f"{rank.name} still holds {held.describe()} after its shutdown"
        if prediction.most_left:
            kinds = _too_much(prediction, rank.rank, held)
        else:
            kinds = _not_released(prediction, rank.rank, held)
        if held.contexts not in allowed:
            kinds = ["ContextLeak", *kinds]
        left += [
            Violation(kind, message, rank.rank, timing_sensitive=True, slack=slack)
            for kind in dict.fromkeys(kinds)
            if (kind, rank.rank) not in told
        ]
    return left


def _not_released(prediction: Prediction, rank: int, held: Counters) -> list[str]:
    """The promises that a rank breaks by what it still holds, besides contexts."""
    kinds: list[str] = []
    if held.backward_passes != prediction.counters[rank].backward_passes:
        kinds.append("ContextLeak")
    may_leak = rank in prediction.leaking | prediction.may_leak
    keeps = (held.owners or held.forks or held.pending_users) and not may_leak
    # Deletes that wait to be sent again; a rank that exits early may leave before them.
    waits = held.pending_futures and rank not in prediction.may_exit_early
    if keeps or waits:
        kinds.append("RRefLeak")
    return kinds


def _too_much(prediction: Prediction, rank: int, held: Counters) -> list[str]:
    """The same after a shutdown that has cut off what was under way: what is beyond its bounds."""
    kinds: list[str] = []
    most = prediction.most_left[rank]
    passes = prediction.counters[rank].backward_passes
    if not passes <= held.backward_passes <= most.backward_passes:
        kinds.append("ContextLeak")
    names = ("owners", "forks", "pending_users", "pending_futures")
    if any(getattr(held, name) > getattr(most, name) for name in names):
        kinds.append("RRefLeak")
    return kinds


def _calls(prediction: Prediction, outcome: Outcome) -> list[Violation]:
    found: list[Violation] = []
    rows = zip(outcome.ranks, prediction.calls, prediction.abandoned_calls, strict=True)
    for rank, wanted, abandoned_calls in rows:
        for call in sorted(set(wanted) | set(rank.calls)):
            times, seen = wanted.get(call, 0), rank.calls.get(call, 0)
            if times != seen and not (call in abandoned_calls and seen < times):
                message = f"{call} ran {seen} times on {rank.name}, expected {times}"
                found.append(Violation("NotRunOnce", message, rank.rank))
    return found


def _firing(prediction: Prediction, plan: FaultPlan, outcome: Outcome) -> list[Violation]:
    found: list[Violation] = []
    before, last = prediction.failures(), prediction.last_failures()
    rows = zip(outcome.ranks, before, last, prediction.failed_sends(), strict=True)
    for rank, settled, leaving, numbers in rows:
        if rank.failed_sends not in numbers:
            counts = Counter({m: n for m, n in settled.items() if m.is_retryable})
            counts.update(leaving)
            types = ", ".join(f"{m} {n}" for m, n in sorted(counts.items())) or "none"
            span = " to ".join(map(str, sorted({numbers[0], numbers[-1]})))
            message = (
                f"{rank.name} failed {rank.failed_sends} sends, the message model predicts "
                f"{span} ({types})"
            )
            found.append(Violation("FaultsDiffer", message, rank.rank, timing_sensitive=True))
    for rank, by_type in zip(outcome.ranks, prediction.delays(plan), strict=True):
        if rank.delayed_sends is None:
            continue
        lengths = plan.table(rank.rank).delaying
        wanted: Counter[int] = Counter(dict.fromkeys(lengths.values(), 0))
        for message_type, count in by_type.items():
            wanted[lengths[message_type]] += count
        if dict(wanted) != dict(rank.delayed_sends):
            message = (
                f"{rank.name} held up sends {dict(rank.delayed_sends)!r} (by milliseconds), the "
                f"message model predicts {dict(wanted)!r}"
            )
            found.append(Violation("FaultsDiffer", message, rank.rank, timing_sensitive=True))
    for rank in outcome.ranks:
        for fault in plan.others:
            seen = fault.seen(rank) if fault.rank == rank.rank else None
            could = fault.eligible(prediction)
            if seen not in (None, could):
                message = f"{fault.name} struck {seen} times, the message model predicts {could}"
                found.append(Violation("FaultsDiffer", message, rank.rank, timing_sensitive=True))
    return found
