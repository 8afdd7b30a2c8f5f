"""What a test of PyTorch's comes to: without faults, and under drawn tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from hypothesis.strategies import SearchStrategy

from rpcprops.faults import RETRYABLE_MESSAGE_TYPES
from rpcprops.oracle import rungs
from rpcprops.properties import Examination, Observation, Property, examine
from rpcprops.runner import Runner
from rpcprops.strategies import fault_plans, fault_tables
from rpcprops.upstream._causes import Cause, cause_of
from rpcprops.upstream._data import UpstreamTest, Verdict
from rpcprops.upstream._ranks import TRANSPORT, Seen, UpstreamCase, UpstreamRanks

#: What drawn tables mean for a test. "known": it fails, for a cause that is written down.
FaultsVerdict = Literal["holds", "known", "violated", "vacuous", "undecided"]
#: The most failures of each payload: what torch retries for every retryable type.
_MAX_FAIL_SENDS = 5


@dataclass(slots=True)
class UnderFaults:
    """A test under drawn tables.

    Attributes:
        tables: how many different plans it ran under.
        faults_fired: how many injected failures were seen to strike.
        cause: why it fails, where that is known.
    """

    verdict: FaultsVerdict
    tables: int
    faults_fired: int
    seconds: float
    examination: Examination
    cause: Cause | None = None


@dataclass(slots=True)
class UpstreamResult:
    """A test of PyTorch's, run.

    Attributes:
        verdict: that of PyTorch's harness for the same, where it is right (see the parity table).
        reason: the traceback of the rank that failed, or why the test did not run.
        rate: virtual seconds for each real second in the run that decided.
        seconds: real seconds, of all runs without faults.
        processor_seconds: of the ranks.
        slower: rates at which it failed before a slower clock showed that it passes.
        under_faults: None where no table was drawn.
    """

    test: UpstreamTest
    verdict: Verdict
    reason: str = ""
    rate: float = 1.0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    slower: tuple[float, ...] = ()
    under_faults: UnderFaults | None = field(default=None)


def run_without_faults(ranks: UpstreamRanks, test: UpstreamTest) -> UpstreamResult:
    """Run a test; what fails under a fast clock is asked again at slower ones, down to real time.

    A test that passes under a fast clock has passed: nothing in it may hang on how fast time goes.
    """
    if test.not_applicable:
        return UpstreamResult(test, "not_applicable", test.not_applicable)
    first = ranks.rate_of(test)
    seen: list[Seen] = []
    for rate in (first, *rungs(first)):
        seen.append(ranks.run(test, rate=rate))
        if seen[-1].verdict != "failed":
            break
    last = seen[-1]
    return UpstreamResult(
        test,
        last.verdict,  # type: ignore[arg-type]
        last.reason,
        last.rate,
        sum(one.seconds for one in seen),
        sum(one.processor_seconds for one in seen),
        tuple(one.rate for one in seen[:-1]),
    )


def run_under_faults(
    ranks: UpstreamRanks,
    runner: Runner,
    plain: UpstreamResult,
    *,
    examples: int,
    seed: int | None = None,
    on_example: Callable[[Examination, Observation], None] | None = None,
) -> None:
    """Run a test that passes under drawn tables as well, and add to its result what they showed.

    What fails is shrunk to the smallest plan and shown in real time, as for a property.
    """
    test = plain.test
    if test.no_faults or plain.verdict != "passed":
        return
    seen = examine(
        _property_of(ranks, test),
        runner,
        max_examples=examples,
        seed=seed,
        on_example=on_example,
        transport=TRANSPORT,
        clock=plain.rate,
    )
    verdict: FaultsVerdict = seen.verdict
    cause = None
    if seen.failure is not None:
        cause = cause_of(test, seen.failure.violations[0], seen.failure.case.plan)
        if cause is not None:
            verdict = "known"
    plain.under_faults = UnderFaults(
        verdict, seen.examples, seen.faults_fired, seen.seconds, seen, cause
    )


def _property_of(ranks: UpstreamRanks, test: UpstreamTest) -> Property:
    def cases() -> SearchStrategy[Any]:
        tables = fault_tables(
            messages=RETRYABLE_MESSAGE_TYPES, max_fail_sends=_MAX_FAIL_SENDS, max_delay=0.0
        )
        plans = fault_plans(world_size=test.world_size, tables=tables)
        return plans.map(lambda plan: UpstreamCase.of(test, plan))

    return Property(
        name=test.id,
        promise=f"PyTorch's own test {test.id} passes under every table that torch retries.",
        cases=cases,
        compares=False,
        observe=ranks.observe,
    )
