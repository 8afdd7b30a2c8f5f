"""Examines a test of PyTorch's: without faults, and under drawn tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, cast

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rpcprops.confirmation import Sight, confirm, confirmation_rates
from rpcprops.errors import HarnessError, note_shown
from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, FaultTable, MessageType
from rpcprops.properties import Examination, Failure, Property, Repeats, examine
from rpcprops.runner import Runner
from rpcprops.strategies import delay_tables, fail_counts, fault_plans, retryable_subsets
from rpcprops.upstream._ranks import TRANSPORT, Seen, UpstreamCase, UpstreamRanks
from rpcprops.upstream.data import UpstreamTest, Verdict

#: The verdicts of a test under drawn tables.
FaultsVerdict = Literal["holds", "violated", "vacuous", "undecided"]
#: The most failures of each payload: as often as torch retries every retryable type.
_MAX_FAIL_SENDS = 5
#: Virtual seconds, far below the 60 of torch's default timeout.
_MAX_DELAY = 1.0
#: A different delay for each type, too short to change anything. The clock library counts delays
#: by length, so the counts show which types a test sends.
_PROBE = FaultTable((), 0, {message: (n + 1) / 1000 for n, message in enumerate(MessageType)})


@dataclass(slots=True)
class UnderFaults:
    """The result of a test under drawn tables.

    Attributes:
        verdict: "vacuous" if no fault fired; "undecided" if a failure did not show again.
        sent: the message types that the test was seen to send, from which the tables are drawn.
        tables: how many different plans it ran under.
        faults_fired: how many injected faults were seen to fire.
        seconds: real seconds.
    """

    verdict: FaultsVerdict
    sent: tuple[MessageType, ...]
    tables: int
    faults_fired: int
    seconds: float
    examination: Examination | None = None


@dataclass(slots=True)
class UpstreamResult:
    """The result of a test of PyTorch's.

    Attributes:
        verdict: the verdict of PyTorch's harness, except for recorded differences.
        reason: the traceback of the rank that failed, or why the test did not run.
        rate: virtual seconds for each real second in the run that decided.
        seconds: real seconds, of all runs without faults.
        processor_seconds: processor time of the ranks.
        slower: rates at which it failed before a slower clock decided.
        last: the run that decided; None if there was none.
        under_faults: None if no table was drawn.
    """

    test: UpstreamTest
    verdict: Verdict
    reason: str = ""
    rate: float = 1.0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    slower: tuple[float, ...] = ()
    last: Seen | None = None
    under_faults: UnderFaults | None = None


def run_without_faults(ranks: UpstreamRanks, test: UpstreamTest) -> UpstreamResult:
    """Run a test; a failure under a fast clock is tried at slower rates, down to real time.

    A pass under a fast clock counts: tests that could pass only because of the clock, because
    they assert how long something took, run in real time.

    Raises:
        MachineCannot: no rate shows that it passes, and this machine cannot give real time.
        HarnessError: a run shows nothing, by a bug of ours; its notes say what others showed.
    """
    if test.not_applicable:
        return UpstreamResult(test, "not_applicable", test.not_applicable)
    seen: list[Seen] = []

    def run(rate: float) -> Sight:
        seen.append(ranks.run(test, rate=rate))
        # A failure in real time counts, however late the ranks were, as in PyTorch's harness.
        return Sight(seen[-1].verdict == "failed")

    fastest = ranks.rate_of(test)
    # As for a new failure: the first rate is run too, and a pass ends the confirmation.
    rates = (fastest, *confirmation_rates(fastest))
    unseen = Sight(True, in_time=False)
    try:
        said = confirm(fastest, unseen, run, rates=rates, passing_decides=True)
    except HarnessError as own:
        note_shown(own, map(_in_words, seen))
        raise
    if said.cannot is not None:
        raise said.cannot
    last = seen[-1]
    return UpstreamResult(
        test,
        last.verdict,
        last.reason,
        last.rate,
        sum(one.seconds for one in seen),
        sum(one.processor_seconds for one in seen),
        tuple(one.rate for one in seen[:-1]),
        last,
    )


def run_under_faults(
    ranks: UpstreamRanks,
    runner: Runner,
    plain: UpstreamResult,
    *,
    examples: int,
    seed: int | None = None,
) -> None:
    """Run a test that passes under drawn tables too, and add the result to its own.

    A failure is shrunk to the smallest plan and confirmed in real time, as for a property.

    Raises:
        HarnessError: a run shows nothing, by a bug of ours; its notes say what was shown without
            faults, and what that run showed.
    """
    if plain.test.no_faults or plain.verdict != "passed":
        return
    try:
        plain.under_faults = _under_faults(ranks, runner, plain, examples, seed)
    except HarnessError as own:
        note_shown(own, [f"without faults, {_in_words(plain.last)}"] if plain.last else [])
        raise
    ranks.forget()


def _under_faults(
    ranks: UpstreamRanks, runner: Runner, plain: UpstreamResult, examples: int, seed: int | None
) -> UnderFaults:
    sent = _sent(ranks, plain)
    tables = _tables_for(plain.test, sent)
    if tables is None:
        return UnderFaults("vacuous", sent, 0, 0, 0.0)
    seen = examine(
        _property_of(ranks, plain.test, tables),
        runner,
        max_examples=examples,
        seed=seed,
        transport=TRANSPORT,
        clock=plain.rate,
    )
    # No failure is documented here, so "known" is not one of its verdicts.
    verdict = cast("FaultsVerdict", seen.verdict)
    return UnderFaults(verdict, sent, seen.examples, seen.faults_fired, seen.seconds, seen)


def failures_of(result: UpstreamResult) -> tuple[Failure, ...]:
    """The failures of a test, without faults or under them, and those that are undecided."""
    under = result.under_faults
    if under is not None and under.examination is not None:
        failure = under.examination.failure
        return (
            (failure,)
            if failure
            else tuple(doubt.failure for doubt in under.examination.doubts if doubt.failure)
        )
    last = result.last
    if last is None or last.verdict != "failed":
        return ()
    case = UpstreamCase.of(result.test)
    repeats = tuple(Repeats(rate, 1, 1) for rate in (*result.slower, last.rate))
    return (
        Failure(result.test.id, last.promise, case, last.violations, last.outcome, (), repeats),
    )


def _in_words(seen: Seen) -> str:
    """The verdict of a run, and why."""
    why = f", {seen.promise}: {seen.reason}" if seen.promise else ""
    return f"the test {seen.verdict} at rate {seen.rate:g}{why}"


def _sent(ranks: UpstreamRanks, plain: UpstreamResult) -> tuple[MessageType, ...]:
    """The types that a test sends; all types if that could not be seen, or the run failed."""
    seen = ranks.run(plain.test, FaultPlan(_PROBE), plain.rate)
    counts: Counter[int] = Counter()
    for rank in seen.outcome.ranks:
        if rank.delayed_sends is None or seen.verdict != "passed":
            return tuple(MessageType)
        counts.update(rank.delayed_sends)
    return tuple(message for message, ms in _PROBE.delaying.items() if counts[ms])


def _tables_for(
    test: UpstreamTest, sent: tuple[MessageType, ...]
) -> SearchStrategy[FaultTable] | None:
    """Tables that can affect a test and that torch survives; None if there are none."""
    failing = [message for message in RETRYABLE_MESSAGE_TYPES if message in sent]
    fails = st.builds(
        FaultTable,
        retryable_subsets(messages=failing, min_size=min(1, len(failing))),
        fail_counts(min_fail_sends=1, max_fail_sends=_MAX_FAIL_SENDS),
    )
    late = [message for message in MessageType if message in sent and not test.no_delays]
    delays = delay_tables(messages=late, max_delay=_MAX_DELAY, max_size=2).filter(bool)
    kinds: list[SearchStrategy[FaultTable]] = []
    if failing:
        kinds.append(fails)
    if late:
        kinds.append(delays.map(lambda delay: FaultTable((), 0, delay)))
    if failing and late:
        kinds.append(
            st.builds(
                lambda table, delay: FaultTable(
                    table.messages_to_fail, table.num_fail_sends, delay
                ),
                fails,
                delays,
            )
        )
    return st.one_of(kinds) if kinds else None


def _property_of(
    ranks: UpstreamRanks, test: UpstreamTest, tables: SearchStrategy[FaultTable]
) -> Property:
    def cases() -> SearchStrategy[Any]:
        # It has already run without faults.
        plans = fault_plans(world_size=test.world_size, tables=tables).filter(
            lambda plan: bool(plan.faulty_ranks(test.world_size))
        )
        return plans.map(lambda plan: UpstreamCase.of(test, plan))

    return Property(
        name=test.id,
        promise=f"PyTorch's own test {test.id} passes under every table that torch survives.",
        cases=cases,
        compares=False,
        observe=ranks.observe,
    )
