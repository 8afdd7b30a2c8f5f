"""Examines a property: draws cases, runs them, shrinks what fails, and confirms it in real time."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import ExampleDatabase
from hypothesis.errors import Flaky

from rpcprops import errors
from rpcprops.errors import BrokenPromise, MachineCannot
from rpcprops.oracle import FaultCount, fired, fired_by_type, is_decided, rungs
from rpcprops.outcomes import Outcome, Violation
from rpcprops.properties._base import Case, Observation, Property
from rpcprops.properties._sample import CASE_SECONDS, Sample, real_waits
from rpcprops.runner import Runner

Verdict = Literal["holds", "known", "violated", "vacuous", "undecided"]

#: An example starts processes, so Hypothesis's idea of slow does not apply.
_NO_HEALTH_CHECKS: Any = list(HealthCheck)
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink)
#: How often the smallest case is run again to tell how often it repeats.
_REPEATS = 3
#: How many failing cases, from the smallest up, are tried at rate 1.
_CONFIRMATIONS = 5
#: How often a failure that only some runs show is tried at each slower rate.
_TRIES_SOMETIMES = 15


@dataclass(frozen=True, slots=True)
class Repeats:
    """How often a case failed again: `failed` of `times` at `rate`."""

    rate: float
    failed: int
    times: int

    def __str__(self) -> str:
        return f"{self.failed} of {self.times} at rate {self.rate:g}"


@dataclass(frozen=True, slots=True)
class Failure:
    """The smallest case that breaks a promise, with all that is known of it."""

    property: str
    promise: str
    case: Case
    violations: tuple[Violation, ...]
    outcome: Outcome
    faults: tuple[FaultCount, ...]
    repeats: tuple[Repeats, ...] = ()
    reproduction: tuple[str, ...] = ()


@dataclass(slots=True)
class Examination:
    """What an examination of a property showed.

    Attributes:
        examples: cases that were run (shrinking not counted).
        faults_fired: injected faults that were seen to strike, in those.
        fired_by_type: the same by kind and type.
        compared: passing cases that were run in real time as well, and judged.
        unconfirmed: failures that a slower clock, down to real time, did not show again.
        doubtful: the same as failures, to be written to files.
        reruns: fast runs that meant nothing on a machine this loaded; slower ones decided.
        reason: why it is violated without a failing case.
        seconds: real seconds.
    """

    property: Property
    verdict: Verdict = "holds"
    examples: int = 0
    executions: int = 0
    faults_fired: int = 0
    fired_by_type: Mapping[str, int] = field(default_factory=dict)
    compared: int = 0
    unconfirmed: list[str] = field(default_factory=list)
    doubtful: list[Failure] = field(default_factory=list)
    reruns: int = 0
    reason: str = ""
    seconds: float = 0.0
    failure: Failure | None = None


def examine(
    prop: Property,
    runner: Runner,
    *,
    max_examples: int,
    seed: int | None = None,
    database: ExampleDatabase | None = None,
    on_example: Callable[[Examination, Observation], None] | None = None,
    **options: Any,
) -> Examination:
    """Draw `max_examples` cases of `prop`, shrink the first that fails, and say what holds.

    A failure under a fast clock counts once real time has shown it too: the first of each promise,
    and the smallest case (one that real time does not show gives way to the next larger one that it
    does). Cases in between are repeated once, at the fast rate.

    A few of the cases that pass under a fast clock are run in real time as well. One that fails
    only there fails: it is repeated there, and what shrinks it runs there too.

    Args:
        seed: makes the draws reproducible.
        database: where Hypothesis keeps failing cases between runs.
        on_example: called after each case, for a progress display.
        options: `transport` and `clock`, as for :func:`rpcprops.run`.
    """
    return _Examiner(prop, runner, on_example, options).examine(max_examples, seed, database)


def broken_promise(violations: tuple[Violation, ...]) -> BrokenPromise:
    """The exception of the first promise that is broken; the message names them all."""
    kind: type[BrokenPromise] = getattr(errors, violations[0].promise)
    return kind("\n".join(str(violation) for violation in violations))


class _Examiner:
    def __init__(
        self,
        prop: Property,
        runner: Runner,
        on_example: Callable[[Examination, Observation], None] | None,
        options: dict[str, Any],
    ) -> None:
        self.prop = prop
        self.runner = runner
        self.on_example = on_example
        self.options = {**options, "with_findings": prop.with_findings}
        self.result = Examination(prop)
        #: How often a slower clock may try to show a failure again.
        self.tries = _TRIES_SOMETIMES if prop.known and prop.known.sometimes else 1
        self.fired: Counter[str] = Counter()
        self.confirmed: set[str] = set()
        self.first_ones: list[Observation] = []
        self.failing: dict[Case, Observation] = {}
        #: How many runs it took until the slowest clock showed a case.
        self.tried: dict[Case, int] = {}
        self.sample = Sample(needs_faults=prop.needs_faults)
        #: Cases that are judged by what real time shows, since the fast clock shows nothing.
        self.in_real_time: set[Case] = set()
        self.real_only = False
        self.shrinking = False
        self.seen: set[Case] = set()

    def examine(
        self, max_examples: int, seed: int | None, database: ExampleDatabase | None
    ) -> Examination:
        began = time.monotonic()
        error = self.search(max_examples, seed, database)
        if error is not None:
            self.result.failure = self.smallest(error)
            if self.result.failure is None and not self.result.unconfirmed:
                self.result.unconfirmed.append(f"not shown again: {error}")
        self.result.fired_by_type = dict(sorted(self.fired.items()))
        self.result.seconds = time.monotonic() - began
        self.result.verdict = self.verdict()
        return self.result

    def verdict(self) -> Verdict:
        known = self.prop.known
        expects = known is not None and known.expects(self.runner.server.torch_version)
        failure = self.result.failure
        if failure is not None:
            if expects and known is not None and failure.promise == known.promise:
                return "known"
            return "violated"
        if expects and known is not None and known.sometimes:
            self.result.reason = "documented to fail in some runs, and held in this one"
            return "known"
        if expects and known is not None:
            version = self.runner.server.torch_version
            self.result.reason = (
                f"documented to fail on torch {version} ({known.promise}), and holds"
            )
            return "undecided" if self.result.unconfirmed else "violated"
        if self.result.unconfirmed:
            return "undecided"
        if self.prop.needs_faults and not self.result.faults_fired:
            return "vacuous"
        return "holds"

    def search(
        self, max_examples: int, seed: int | None, database: ExampleDatabase | None
    ) -> BaseException | None:
        """Run Hypothesis; the failure that it ends with, if any."""

        @settings(
            max_examples=max_examples,
            deadline=None,
            database=database,
            print_blob=True,
            suppress_health_check=_NO_HEALTH_CHECKS,
            report_multiple_bugs=False,
            # What is documented is at its smallest.
            phases=[phase for phase in _PHASES if phase != Phase.shrink or not self.prop.known],
            verbosity=hypothesis.Verbosity.quiet,
        )
        @hypothesis.given(self.prop.cases())
        def test(case: Case) -> None:
            self.example(case)

        # One function serves all properties; its name in the example database is the property's.
        test.hypothesis.inner_test._hypothesis_internal_add_digest = (  # type: ignore[attr-defined]
            self.prop.name.encode()
        )
        if seed is not None:
            test = hypothesis.seed(seed)(test)
        try:
            test()
        except (BrokenPromise, Flaky) as error:
            return error
        return None

    def example(self, case: Case) -> None:
        seen = self.prop.observe(self.runner, case, **self.options)
        self.result.executions += 1
        is_new = not self.shrinking and case not in self.seen
        if is_new:
            self.seen.add(case)
            self.count(seen)
        for name, count in fired_by_type(seen.faults).items():
            hypothesis.event(f"fired {name}", count)
        hypothesis.target(float(fired(seen.faults)), label="faults fired")
        if not seen.violations and self.is_compared(seen, is_new=is_new):
            seen = self.prop.observe(self.runner, case, **{**self.options, "clock": 1.0})
        if seen.violations and self.repeats(seen):
            self.shrinking = True
            # The order is the one in which they last failed: Hypothesis ends with the smallest.
            self.failing.pop(case, None)
            self.failing[case] = seen
            self.real_only |= case in self.in_real_time
            raise broken_promise(seen.violations)

    def count(self, seen: Observation) -> None:
        self.result.examples += 1
        self.result.faults_fired += fired(seen.faults)
        self.fired.update(fired_by_type(seen.faults))
        if self.on_example is not None:
            self.on_example(self.result, seen)

    def is_compared(self, seen: Observation, *, is_new: bool) -> bool:
        """Whether a case that passed under a fast clock is run in real time as well."""
        if seen.outcome.clock_rate == 1.0 or not self.prop.compares:
            return False
        if seen.case in self.in_real_time:
            return True
        if self.real_only:
            # What shrinks a failure that only real time shows must be looked for there.
            taken = real_waits(seen.case) <= CASE_SECONDS
        else:
            taken = is_new and not self.prop.known and self.sample.takes(seen)
            self.result.compared += taken
        if taken:
            self.in_real_time.add(seen.case)
        return taken

    def again(self, seen: Observation) -> Observation:
        """The same case once more, at the same rate."""
        options = {**self.options, "clock": seen.outcome.clock_rate}
        return self.prop.observe(self.runner, seen.case, anew=True, **options)

    def repeats(self, seen: Observation) -> bool:
        """Whether a failing case fails again: in real time for a new promise, else as it did."""
        if seen.case in self.failing:
            return True
        promise = seen.violations[0].promise
        if promise in self.confirmed:
            again = self.again(seen)
            return any(v.promise == promise for v in again.violations)
        if not self.confirms(seen):
            return False
        self.confirmed.add(promise)
        self.first_ones.append(seen)
        return True

    def confirms(self, seen: Observation) -> bool:
        """Whether slower clocks, down to real time, show the same broken promise."""
        first = seen.violations[0]
        rate = seen.outcome.clock_rate
        # What is documented needs no ladder: real time says whether it is still so.
        slower = (1.0,) if self.prop.known else rungs(rate) or (1.0,)
        same: list[Violation] = []
        again = seen
        for slower_rate in slower:
            again, same = seen, list[Violation]()
            for attempt in range(1, self.tries + 1):
                try:
                    again = self.prop.observe(
                        self.runner, seen.case, anew=True, **{**self.options, "clock": slower_rate}
                    )
                except MachineCannot as error:
                    self.unconfirmed(f"rate {slower_rate:g} could not be had ({error})", seen)
                    return False
                same = [v for v in again.violations if v.promise == first.promise]
                if same:
                    self.tried[seen.case] = attempt
                    break
            if not same:
                if is_decided(first, seen.outcome):
                    self.unconfirmed(f"not again at rate {slower_rate:g}", seen)
                else:
                    # The fast run meant nothing on this machine; the slower one has decided.
                    self.result.reruns += 1
                return False
            if slower_rate == 1.0 and not is_decided(same[0], again.outcome):
                self.unconfirmed("undecided, the machine was too loaded", seen)
                return False
        return True

    def unconfirmed(self, why: str, seen: Observation) -> None:
        self.result.unconfirmed.append(f"{why}: {seen.violations[0]} under {seen.case.plan!r}")
        self.result.doubtful.append(
            Failure(
                self.prop.name,
                seen.violations[0].promise,
                seen.case,
                seen.violations,
                seen.outcome,
                seen.faults,
            )
        )

    def smallest(self, error: BaseException) -> Failure | None:
        """The smallest failing case that real time confirms."""
        # Hypothesis ends with the smallest.
        candidates = list(reversed(self.failing.values()))
        tried = candidates[:_CONFIRMATIONS]
        # The first failure of each promise was confirmed when it was found.
        tried += [seen for seen in self.first_ones if seen not in tried]
        for seen in tried:
            if seen in self.first_ones or self.confirms(seen):
                return self.failure(seen, error if seen is candidates[0] else None)
        return None

    def failure(self, seen: Observation, error: BaseException | None) -> Failure:
        promise = seen.violations[0].promise
        again = [self.again(seen) for _ in range(1 if self.prop.known else _REPEATS)]
        failed = sum(any(v.promise == promise for v in o.violations) for o in again)
        repeats = [Repeats(seen.outcome.clock_rate, failed, len(again))]
        if seen.outcome.clock_rate != 1.0:
            repeats.append(Repeats(1.0, 1, self.tried.get(seen.case, 1)))
        elif seen.case in self.in_real_time:
            repeats.append(Repeats(self.runner.server.rate_of(self.options.get("clock")), 0, 1))
        return Failure(
            property=self.prop.name,
            promise=promise,
            case=seen.case,
            violations=seen.violations,
            outcome=seen.outcome,
            faults=seen.faults,
            repeats=tuple(repeats),
            reproduction=() if error is None else reproduction_lines(error),
        )


def reproduction_lines(error: BaseException) -> tuple[str, ...]:
    """Hypothesis's own lines on how to draw the same example again, from the notes of its error."""
    found: list[str] = []
    for note in getattr(error, "__notes__", ()):
        found += re.findall(r"@reproduce_failure\(.*\)", note)
    return tuple(dict.fromkeys(found))
