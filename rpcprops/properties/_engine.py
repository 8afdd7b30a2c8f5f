"""Examines a property: draws cases, runs them, shrinks a failing one, confirms it in real time."""

from __future__ import annotations

import builtins
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import ExampleDatabase
from hypothesis.errors import Flaky

from rpcprops import agents, errors
from rpcprops.agents.wire import NAME as WIRE
from rpcprops.confirmation import Sight, confirm
from rpcprops.errors import BrokenPromise, MachineCannot
from rpcprops.oracle import FaultCount, Finding, account, fired, fired_by_type, judge
from rpcprops.outcomes import Outcome, Violation
from rpcprops.properties._base import Case, Observation, Property
from rpcprops.properties._choice import Choice
from rpcprops.properties._findings import finding_case, held_case
from rpcprops.properties._sample import ALL_SECONDS, CASE_SECONDS, Sample, real_waits
from rpcprops.runner import FailedInUse, Ran, Runner
from rpcprops.torch_facts import Status, facts_of

Verdict = Literal["holds", "known", "not_seen", "not_run", "violated", "vacuous", "undecided"]
#: The verdicts that are not failures.
GOOD: tuple[Verdict, ...] = ("holds", "known", "not_seen", "not_run")

#: An example starts processes, so Hypothesis's idea of slow does not apply.
_NO_HEALTH_CHECKS: Any = list(HealthCheck)
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink)
#: Without the phase that varies the case with the most faults: its cases are much alike.
_DIFFERENT_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
#: How often the smallest case is run again, to see how often it fails again.
_REPEATS = 3
#: How many failing cases are tried at rate 1, from the smallest up.
_CONFIRMATIONS = 5
#: The fewest real seconds of waits of which its progress line tells.
_LONG = 10.0
#: The most tries of a finding's case in real time.
REAL_TRIES = 15


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
    """The smallest case that breaks a promise, with all that is known about it.

    Attributes:
        after: if only a used world showed it, the programs that this world had run before.
    """

    property: str
    promise: str
    case: Case
    violations: tuple[Violation, ...]
    outcome: Outcome
    faults: tuple[FaultCount, ...]
    repeats: tuple[Repeats, ...] = ()
    reproduction: tuple[str, ...] = ()
    after: Ran = ()


@dataclass(frozen=True, slots=True)
class Doubt:
    """A failure that slower clocks, or fresh ranks, did not show again.

    Attributes:
        line: which promise was broken, and why that is in doubt.
        failure: the case, to be written to a file; None if there is none.
        once: whether a busy machine can cause something that looks like this violation, and the
            case did not fail again at the fast rate either. Then the verdict does not change.
    """

    line: str
    failure: Failure | None = None
    once: bool = False


@dataclass(slots=True)
class AcceptedCount:
    """A documented effect that cases showed: how many did, and one with the fewest steps.

    Attributes:
        kind: its name in :data:`rpcprops.oracle.DOCUMENTED`.
        times: how often they showed it, each rank and step by itself.
    """

    kind: str
    case: Case
    examples: int = 0
    times: int = 0


@dataclass(slots=True)
class Examination:
    """The result of examining a property.

    Attributes:
        verdict: "known" and "not_seen" are for the smallest case of a known finding, which showed
            it in some try, or in none; "vacuous" if no injected fault fired; "not_run" if it needs
            an agent that is not to be had.
        examples: cases that were run (without those of shrinking).
        faults_fired: injected faults that were seen to fire in these cases.
        fired_by_type: the same by kind and type.
        compared: passing cases that were also run in real time, and judged.
        compared_seconds: the real seconds that they took there.
        doubts: failures that a slower clock, down to real time, did not show again.
        reruns: fast runs that proved nothing because of the machine's load; slower ones decided.
        accepted: documented effects that the cases showed, by name.
        explained: how many cases broke a promise in the way of each known finding, by its name.
        found_after: real seconds from the start until a case first broke a promise in the way of
            each known finding, by its name; and until each broken promise that nothing explains
            was first confirmed, by its name.
        found_at: the same in examples, with that example.
        tries: for a finding, how often its case was tried at each rate, and how often it showed.
        status: for a finding, whether this torch is known to have it.
        agent: for a finding, the agent that brought its messages into the order that shows it;
            empty if that was left to chance.
        reason: a further remark on the verdict.
        seconds: real seconds.
    """

    property: Property
    verdict: Verdict = "holds"
    examples: int = 0
    executions: int = 0
    faults_fired: int = 0
    fired_by_type: Mapping[str, int] = field(default_factory=dict)
    compared: int = 0
    compared_seconds: float = 0.0
    doubts: list[Doubt] = field(default_factory=list)
    reruns: int = 0
    accepted: dict[str, AcceptedCount] = field(default_factory=dict)
    explained: Counter[str] = field(default_factory=Counter)
    found_after: dict[str, float] = field(default_factory=dict)
    found_at: dict[str, int] = field(default_factory=dict)
    tries: tuple[Repeats, ...] = ()
    status: Status | None = None
    agent: str = ""
    reason: str = ""
    seconds: float = 0.0
    failure: Failure | None = None

    @builtins.property
    def unconfirmed(self) -> tuple[str, ...]:
        """The doubts that leave the verdict undecided, one line each."""
        return tuple(doubt.line for doubt in self.doubts if not doubt.once)

    @builtins.property
    def failed_once(self) -> tuple[str, ...]:
        """The doubts that do not, one line each."""
        return tuple(doubt.line for doubt in self.doubts if doubt.once)

    def is_good(self) -> bool:
        """Whether the verdict is not a failure."""
        return self.verdict in GOOD

    def count(self, seen: Observation) -> None:
        """Add a case that was run."""
        self.examples += 1
        self.faults_fired += fired(seen.faults)
        self.fired_by_type = dict(Counter(self.fired_by_type) + Counter(fired_by_type(seen.faults)))
        self.explained.update(seen.explained_by)
        for kind, times in Counter(one.kind for one in seen.accepted).items():
            count = self.accepted.setdefault(kind, AcceptedCount(kind, seen.case))
            count.examples += 1
            count.times += times
            if len(seen.case.program.leaves) < len(count.case.program.leaves):
                count.case = seen.case


def examine(  # noqa: PLR0913 - the ways to draw and to judge
    prop: Property,
    runner: Runner,
    *,
    max_examples: int,
    seed: int | None = None,
    database: ExampleDatabase | None = None,
    on_example: Callable[[Examination, Observation], None] | None = None,
    on_failing: Callable[[str], None] | None = None,
    strict: bool = False,
    by_chance: bool = False,
    can_inject: bool = True,
    different: bool = False,
    candidates: int = 1,
    real_seconds: float = ALL_SECONDS,
    **options: Any,
) -> Examination:
    """Draw `max_examples` cases of `prop`, shrink the first that fails, and return the verdict.

    What a known finding of stock torch can have caused is no failure. The smallest case of such a
    finding is tried until it shows the finding, at most `max_examples` times.

    A failure under a fast clock counts only once real time has shown it too: the first failure of
    each promise, and the smallest case (if real time does not show that one, the next larger case
    that it does show). Cases in between are repeated once, at the fast rate.

    A few of the cases that pass under a fast clock are also run in real time. If one fails only
    there, that is a failure: it is repeated and shrunk in real time.

    Args:
        seed: makes the draws reproducible.
        strict: whether a documented effect is a failure too.
        by_chance: leave it to chance whether a finding shows, even where the agent ``wire`` could
            bring its messages into the order that shows it; and run nothing that needs another
            agent than that of the ranks.
        can_inject: whether the agent of the ranks injects faults; without, what has some is not
            run.
        different: whether only different cases count as draws, drawn independently of how many
            faults fire (otherwise half of the draws are near those in which most do).
        candidates: of so many different cases the one is run that has most of what was seldom run;
            1 runs all. Only with `different`.
        real_seconds: how many real seconds the passing cases that also run in real time may take
            (or a tenth of the time of all, if that is more).
        database: where Hypothesis keeps failing cases between runs.
        on_example: called after each case, for a progress display.
        on_failing: called with what is done with a case that has failed, for a progress display.
        options: `transport` and `clock`, as for :func:`rpcprops.run`.
    """
    sample = Sample(needs_faults=prop.needs_faults, seconds=real_seconds)
    choice = Choice(candidates) if different else None
    examiner = _Examiner(
        prop, runner, on_example, options, sample, choice=choice, by_chance=by_chance
    )
    examiner.on_failing = on_failing
    if prop.injects and not prop.agent and not can_inject:
        examiner.result.reason = "not run: it injects faults, which the agent of the ranks cannot"
        return examiner.ended("not_run")
    if prop.finding is not None:
        result = examiner.examine_finding(prop.finding, max_examples)
    elif not examiner.has_agent():
        return examiner.ended("not_run")
    else:
        result = examiner.examine(prop.examples_of(max_examples), seed, database)
    if strict and result.accepted and result.is_good():
        result.verdict = "violated"
        kinds = ", ".join(f"{one.kind} in {one.examples}" for one in result.accepted.values())
        result.reason = f"strict: documented effects are failures ({kinds})"
    return result


def failure_in_use(name: str, failed: FailedInUse) -> Failure:
    """What only a used world showed, in an example of the property with that name."""
    return Failure(
        property=name,
        promise=failed.violations[0].promise,
        case=Case(failed.program, failed.plan),
        violations=failed.violations,
        outcome=failed.outcome,
        faults=account(failed.program, failed.plan, failed.outcome),
        after=failed.after,
    )


def broken_promise(violations: tuple[Violation, ...]) -> BrokenPromise:
    """The exception of the first broken promise; its message names all violations."""
    kind: type[BrokenPromise] = getattr(errors, violations[0].promise)
    return kind("\n".join(str(violation) for violation in violations))


class _Examiner:
    def __init__(
        self,
        prop: Property,
        runner: Runner,
        on_example: Callable[[Examination, Observation], None] | None,
        options: dict[str, Any],
        sample: Sample,
        *,
        choice: Choice | None,
        by_chance: bool = False,
    ) -> None:
        self.by_chance = by_chance
        self.began = time.monotonic()
        self.prop = prop
        self.runner = runner
        self.on_example = on_example
        self.on_failing: Callable[[str], None] | None = None
        self.options = {**options, "with_findings": False}
        self.result = Examination(prop)
        self.confirmed: set[str] = set()
        self.first_ones: list[Observation] = []
        self.failing: dict[Case, Observation] = {}
        self.doubted: set[Case] = set()
        self.sample = sample
        #: Which of different cases are run; None: all, and the same ones again.
        self.choice = choice
        #: Cases that only real time shows to fail, so that real time judges them.
        self.in_real_time: set[Case] = set()
        self.real_only = False
        self.shrinking = False
        self.shrunk = 0
        #: What ended the examination: no failure of a case.
        self.error: Exception | None = None
        self.seen: set[Case] = set()
        self.known_in_use = len(runner.failed_in_use)

    def examine(
        self, max_examples: int, seed: int | None, database: ExampleDatabase | None
    ) -> Examination:
        error = self.search(max_examples, seed, database)
        if error is not None:
            self.result.failure = self.smallest(error)
            if self.result.failure is None and not self.result.unconfirmed:
                self.result.doubts.append(Doubt(f"not shown again: {error}"))
        self.doubt_used_worlds()
        return self.ended(self.verdict())

    def doubt_used_worlds(self) -> None:
        """Record what only used worlds have shown so far."""
        for failed in self.runner.failed_in_use[self.known_in_use :]:
            failure = failure_in_use(self.prop.name, failed)
            self.result.doubts.append(Doubt(str(failed), failure))
        self.known_in_use = len(self.runner.failed_in_use)

    def ended(self, verdict: Verdict) -> Examination:
        self.result.fired_by_type = dict(sorted(self.result.fired_by_type.items()))
        self.result.seconds = time.monotonic() - self.began
        self.result.verdict = verdict
        return self.result

    def examine_finding(self, finding: Finding, max_examples: int) -> Examination:
        """Try the smallest case of a finding until it shows: fast, then in real time."""
        version = self.runner.server.torch_version
        self.result.status = finding.status(version)
        self.result.agent = self.holding(finding)
        fast = self.runner.server.rate_of(self.options.get("clock"))
        rates = dict.fromkeys((fast, 1.0))
        numbers = itertools.count()
        tries: list[Repeats] = []
        shown: Observation | None = None
        fast_one: Observation | None = None
        for rate in rates:
            most = max_examples if rate == fast else min(max_examples, REAL_TRIES)
            tried, shown = self.try_finding(finding, rate, itertools.islice(numbers, most))
            fast_one = fast_one or shown
            tries.append(tried)
            if self.result.failure is not None:
                break
        self.result.tries = tuple(tries)
        self.doubt_used_worlds()
        if self.result.failure is not None:
            return self.ended("violated")
        if shown is not None:
            # Report what real time showed last. But a message that is held must be held for as long
            # in the fast runs that a replay makes.
            reported = fast_one if self.result.agent and fast_one else shown
            self.result.failure = self.failure_of(reported, repeats=tuple(tries))
            if self.result.status == "unlisted":
                self.result.reason = f"not yet listed for torch {version}"
            return self.ended("known")
        if self.result.status == "fixed":
            is_before = finding.is_before(version)
            self.result.reason = (
                f"begins with torch {finding.broken_in} ({finding.broken_by})"
                if is_before
                else f"fixed in torch {finding.fixed_in} ({finding.fixed_by})"
            )
            return self.ended("holds")
        self.result.reason = f"not seen: {', '.join(map(str, tries))}"
        return self.ended("not_seen")

    def try_finding(
        self, finding: Finding, rate: float, numbers: Iterable[int]
    ) -> tuple[Repeats, Observation | None]:
        """Try the case at one rate until it shows; how often it was tried, and the run that did."""
        tried = 0
        for number in numbers:
            case, options = finding_case(finding.name, number), {**self.options, "clock": rate}
            held = held_case(finding.name, number, rate) if self.result.agent else None
            if held is not None:
                case, options["agent"] = held, self.result.agent
            seen = self.prop.observe(self.runner, case, anew=True, **options)
            tried += 1
            self.result.executions += 1
            self.count(seen)
            if seen.violations and self.confirms(seen):
                self.result.failure = self.failure_of(seen)
                break
            if finding.name in seen.explained_by:
                return Repeats(rate, 1, tried), seen
        return Repeats(rate, 0, tried), None

    def holding(self, finding: Finding) -> str:
        """The agent that can show a finding in every run; empty if it is not to be had."""
        version = self.runner.server.torch_version
        if (
            self.by_chance
            or held_case(finding.name, 0, 1.0) is None
            or not facts_of(version).has_bug(finding.name)
        ):
            return ""
        try:
            agents.named(WIRE).prepare()
        except MachineCannot:
            return ""
        return WIRE

    def has_agent(self) -> bool:
        """Whether the ranks can have the agent that the property needs; else the reason is said."""
        needed = self.prop.agent
        usual = self.runner.server.agent if needed else ""
        if needed == usual:
            return True
        if self.by_chance:
            self.result.reason = f"not run: it needs the agent {needed}, and {usual} was named"
            return False
        try:
            agents.named(needed).prepare()
        except MachineCannot as error:
            self.result.reason = f"not run: it needs the agent {needed}: {error}"
            return False
        self.options["agent"] = needed
        return True

    def verdict(self) -> Verdict:
        if self.result.failure is not None:
            return "violated"
        if self.result.unconfirmed:
            return "undecided"
        if self.prop.needs_faults and not self.result.faults_fired:
            return "vacuous"
        return "holds"

    def search(
        self, max_examples: int, seed: int | None, database: ExampleDatabase | None
    ) -> BaseException | None:
        """Run Hypothesis; the failure that remains at its end, if any."""

        @settings(
            max_examples=max_examples,
            deadline=None,
            database=database,
            print_blob=True,
            suppress_health_check=_NO_HEALTH_CHECKS,
            report_multiple_bugs=False,
            phases=_PHASES if self.choice is None else _DIFFERENT_PHASES,
            verbosity=hypothesis.Verbosity.quiet,
        )
        @hypothesis.given(self.prop.cases())
        def test(case: Case) -> None:
            self.example(case)

        # One function serves all properties; in the example database it has the property's name.
        test.hypothesis.inner_test._hypothesis_internal_add_digest = (  # type: ignore[attr-defined]
            self.prop.name.encode()
        )
        if seed is not None:
            test = hypothesis.seed(seed)(test)
        try:
            test()
        except (BrokenPromise, Flaky) as error:
            if self.error is not None:
                raise self.error from None
            return error
        return None

    def example(self, case: Case) -> None:
        if self.error is not None:
            raise self.error
        if self.choice is not None and not self.shrinking:
            if case in self.seen or not self.choice.takes(case):
                # Hypothesis then draws another one in its place.
                hypothesis.reject()
        try:
            seen = self.prop.observe(self.runner, case, **self.options)
        except Exception as error:
            # Hypothesis runs the case again, and would call what it then sees inconsistent.
            self.error = error
            raise
        self.result.executions += 1
        if self.shrinking:
            self.shrunk += 1
            self.say(f"makes a failing example smaller: run {self.shrunk}")
        is_new = not self.shrinking and case not in self.seen
        if is_new:
            self.seen.add(case)
            self.count(seen)
        for name, count in fired_by_type(seen.faults).items():
            hypothesis.event(f"fired {name}", count)
        hypothesis.target(float(fired(seen.faults)), label="faults fired")
        if not seen.violations and self.is_compared(seen, is_new=is_new):
            seen = self.in_real(case)
        if seen.violations and self.repeats(seen):
            self.shrinking = True
            # Ordered by when each last failed: Hypothesis runs the smallest last.
            self.failing.pop(case, None)
            self.failing[case] = seen
            self.real_only |= case in self.in_real_time
            raise broken_promise(seen.violations)

    def say(self, what: str) -> None:
        """Tell what is done with a case that has failed."""
        if self.on_failing is not None:
            self.on_failing(what)

    def in_real(self, case: Case) -> Observation:
        """Run a case of the sample in real time."""
        began = time.monotonic()
        seen = self.prop.observe(self.runner, case, **{**self.options, "clock": 1.0})
        seconds = time.monotonic() - began
        self.result.compared_seconds += seconds
        self.sample.took(seconds)
        return seen

    def count(self, seen: Observation) -> None:
        self.result.count(seen)
        self.found(seen.explained_by)
        if self.on_example is not None:
            self.on_example(self.result, seen)

    def found(self, names: Iterable[str]) -> None:
        """Note when known findings, or broken promises, were first seen."""
        for name in names:
            self.result.found_after.setdefault(name, time.monotonic() - self.began)
            self.result.found_at.setdefault(name, self.result.examples)

    def is_compared(self, seen: Observation, *, is_new: bool) -> bool:
        """Whether a case that passed under a fast clock is also run in real time."""
        if seen.outcome.clock_rate == 1.0 or not self.prop.compares:
            return False
        if seen.case in self.in_real_time:
            return True
        if self.real_only:
            # If only real time shows a failure, its smaller cases must run there too.
            taken = real_waits(seen.case, facts_of(seen.outcome.torch_version)) <= CASE_SECONDS
        else:
            taken = is_new and self.sample.takes(seen)
            self.result.compared += taken
        if taken:
            self.in_real_time.add(seen.case)
        return taken

    def again(self, seen: Observation, rate: float | None = None) -> Observation:
        """Run the same case once more in fresh ranks, by default at the same rate."""
        rate = rate or seen.outcome.clock_rate
        options = {**self.options, "clock": rate, "reuse": False}
        self.say(f"runs a failing example again {_how(seen, rate)}")
        return self.prop.observe(self.runner, seen.case, anew=True, **options)

    def repeats(self, seen: Observation) -> bool:
        """Whether a failing case fails again: in real time for a new promise, else at its rate."""
        if seen.case in self.failing:
            return True
        if seen.case in self.doubted:
            return False
        promise = seen.violations[0].promise
        if promise in self.confirmed:
            again = self.again(seen)
            return any(v.promise == promise for v in again.violations)
        if not self.confirms(seen):
            return False
        self.confirmed.add(promise)
        self.found([promise])
        self.first_ones.append(seen)
        return True

    def confirms(self, seen: Observation) -> bool:
        """Whether slower clocks, down to real time, show a violation of the same promise."""
        first, rate = seen.violations[0], seen.outcome.clock_rate

        def run(at: float) -> Sight:
            again = self.again(seen, at)
            same = [v for v in again.violations if v.promise == first.promise]
            return Sight.of(again.outcome, same)

        said = confirm(
            rate,
            Sight.of(seen.outcome, [first]),
            run,
            passing_decides=True,
            more_runs=_REPEATS if first.timing_sensitive else 0,
        )
        if said.kind == "not had":
            self.doubt(f"rate {said.rate:g} could not be had ({said.cannot})", seen)
        elif said.kind == "meant nothing":
            # The fast run proved nothing on this machine; the slower one has decided.
            self.result.reruns += 1
        elif said.kind == "failed once":
            where = f"{_REPEATS} runs at rate {rate:g} and one at {said.rate:g}"
            self.doubt(f"not again in {where}", seen, once=True)
        elif said.kind == "unconfirmed":
            self.doubt(f"not again at rate {said.rate:g}", seen)
        elif said.kind == "too late":
            self.doubt("undecided, the machine was too loaded", seen)
        return said.is_confirmed

    def doubt(self, why: str, seen: Observation, *, once: bool = False) -> None:
        """Record a failure that slower clocks did not show."""
        self.doubted.add(seen.case)
        line = f"{why}: {seen.violations[0]} under {seen.case.plan!r}"
        self.result.doubts.append(Doubt(line, self.failure_of(seen), once))

    def failure_of(self, seen: Observation, repeats: tuple[Repeats, ...] = ()) -> Failure:
        """A failing case as it was seen, including violations that a finding explains."""
        violations = seen.violations or judge(seen.case.program, seen.case.plan, seen.outcome)
        return Failure(
            property=self.prop.name,
            promise=violations[0].promise,
            case=seen.case,
            violations=violations,
            outcome=seen.outcome,
            faults=seen.faults,
            repeats=repeats,
        )

    def smallest(self, error: BaseException) -> Failure | None:
        """The smallest failing case that real time confirms."""
        # Hypothesis runs the smallest case last.
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
        again = [self.again(seen) for _ in range(_REPEATS)]
        failed = sum(any(v.promise == promise for v in o.violations) for o in again)
        repeats = [Repeats(seen.outcome.clock_rate, failed, len(again))]
        if seen.outcome.clock_rate != 1.0:
            repeats.append(Repeats(1.0, 1, 1))
        elif seen.case in self.in_real_time:
            repeats.append(Repeats(self.runner.server.rate_of(self.options.get("clock")), 0, 1))
        lines = () if error is None else reproduction_lines(error)
        return replace(self.failure_of(seen, tuple(repeats)), reproduction=lines)


def _how(seen: Observation, rate: float) -> str:
    """How fast a case is run again, and for how long it waits if that is real time."""
    if rate != 1.0:
        return f"at clock rate {rate:g}"
    waits = real_waits(seen.case, facts_of(seen.outcome.torch_version))
    return "in real time" + (f", where it waits for {waits:.0f} s" if waits >= _LONG else "")


def reproduction_lines(error: BaseException) -> tuple[str, ...]:
    """Hypothesis's lines on how to draw an example again, from the notes of its error."""
    found: list[str] = []
    for note in getattr(error, "__notes__", ()):
        found += re.findall(r"@reproduce_failure\(.*\)", note)
    return tuple(dict.fromkeys(found))
