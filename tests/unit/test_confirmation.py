"""What slower rates make of a failure under a fast clock, and what each that asks makes of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st

from rpcprops import _sweep as sweep
from rpcprops import errors, runner, stateful
from rpcprops.confirmation import Confirmation, Sight, confirm, confirmation_rates, is_decided
from rpcprops.errors import HarnessError, MachineCannot
from rpcprops.faults import FaultPlan
from rpcprops.outcomes import (
    UNLIMITED_SLACK,
    Outcome,
    PhaseOutcome,
    RaisedError,
    RankOutcome,
    Violation,
)
from rpcprops.plugin import failures
from rpcprops.plugin.failures import Again, counts, in_time
from rpcprops.plugin.records import Failing, ItemRecord
from rpcprops.programs import Call, Pause, Program
from rpcprops.properties import Case, Examination, Observation, Property, examine
from rpcprops.report.text import artefact_of
from rpcprops.runner import FailedInUse
from rpcprops.stateful import ClusterMachine
from rpcprops.upstream._examine import run_without_faults
from rpcprops.upstream.data import UpstreamTest

RATE = 400.0
#: Real seconds by which waits ended late: enough to eat the slack of a hang or of a test's own code
#: at rate 400, and not.
LATE, IN_TIME = 0.05, 0.002
HUNG = Violation("RankHung", "worker1 hangs", timing_sensitive=True, slack=4.0)
OTHER = Violation("RankDied", "worker1 died")
CANNOT = MachineCannot("rate 40 cannot be had")
OURS = HarnessError("the server has died")
#: What a run does: it fails that late, holds (None), or raises.
Answer = float | Exception | None
COUNTS, UNCONFIRMED, UNDECIDED = "counts", "unconfirmed", "undecided"


def outcome(rate: float, late: float = IN_TIME, **options: Any) -> Outcome:
    """What two ranks showed, one of which was late."""
    ranks = (RankOutcome(0, "worker0"), RankOutcome(1, "worker1", late_seconds=late))
    return Outcome(2, clock_rate=rate, **{"ranks": ranks, **options})


# The rule.


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(400.0, (40.0, 1.0)), (100.0, (10.0, 1.0)), (10.0, (1.0,)), (5.0, (1.0,)), (1.0, ())],
)
def test_rungs(rate: float, expected: tuple[float, ...]) -> None:
    """A failure is run again at a tenth of the rate and in real time, each where it is slower."""
    assert confirmation_rates(rate) == expected


@pytest.mark.parametrize(
    ("rate", "late", "slack", "decided"),
    [
        (1.0, 0.1, 0.25, True),
        (1.0, 0.3, 0.25, False),
        (100.0, 0.001, 0.25, True),
        (100.0, 0.003, 0.25, False),
        (100.0, 3.0, UNLIMITED_SLACK, True),
    ],
)
def test_lateness_times_rate_must_stay_below_the_slack(
    rate: float, late: float, slack: float, decided: bool
) -> None:
    """A verdict whose slack the slowest rank's lateness eats, in virtual seconds, is undecided."""
    violation = Violation("MissingError", "no timeout", timing_sensitive=True, slack=slack)
    assert is_decided(violation, outcome(rate, late)) is decided


def test_one_violation_in_time_is_enough() -> None:
    """A run that breaks a promise twice shows it where the machine can have caused but one."""
    leak = Violation("RankHung", "worker0 hangs", slack=UNLIMITED_SLACK)
    assert Sight.of(outcome(RATE, LATE), [HUNG]) == Sight(True, in_time=False)
    assert Sight.of(outcome(RATE, LATE), [HUNG, leak]) == Sight(True)
    assert not Sight.of(outcome(RATE), []).shows


def asked(
    first: float, answers: Mapping[float, Answer], rate: float = RATE, **options: Any
) -> tuple[Confirmation, list[float]]:
    """What is made of a hang at `rate` that was so late, and the rates that were asked."""
    rates: list[float] = []

    def run(at: float) -> Sight:
        rates.append(at)
        answer = answers[at]
        if isinstance(answer, Exception):
            raise answer
        return Sight.of(outcome(at, answer or 0.0), () if answer is None else (HUNG,))

    return confirm(rate, Sight.of(outcome(rate, first), [HUNG]), run, **options), rates


#: How late the fast run was, what a tenth of its rate and real time show, what it is called, and
#: whether that holds for a test's own code as well, which counts in real time however late.
LADDER: list[tuple[float, Answer, Answer, str]] = [
    # Late or not, what real time shows counts.
    (IN_TIME, IN_TIME, IN_TIME, COUNTS),
    (LATE, IN_TIME, IN_TIME, COUNTS),
    (LATE, None, IN_TIME, COUNTS),
    (LATE, 10 * LATE, IN_TIME, COUNTS),
    # In time, and not shown at a slower rate.
    (IN_TIME, None, IN_TIME, UNCONFIRMED),
    (IN_TIME, IN_TIME, None, UNCONFIRMED),
    (LATE, IN_TIME, None, UNCONFIRMED),
    # Late wherever it failed.
    (LATE, None, None, UNDECIDED),
    (LATE, 10 * LATE, None, UNDECIDED),
]
#: The same, where a promise was shown too late in real time.
TOO_LATE: list[tuple[float, Answer, Answer, str]] = [
    (LATE, None, 100 * LATE, UNDECIDED),
    (IN_TIME, IN_TIME, 100 * LATE, UNDECIDED),
]
#: The same, where the machine cannot give a tenth of the rate: real time decides.
PASSED_OVER: list[tuple[float, Answer, Answer, str]] = [
    (LATE, CANNOT, IN_TIME, COUNTS),
    (IN_TIME, CANNOT, IN_TIME, COUNTS),
    (IN_TIME, CANNOT, None, UNCONFIRMED),
]


@pytest.mark.parametrize(("fast", "tenth", "real", "verdict"), [*LADDER, *TOO_LATE, *PASSED_OVER])
def test_the_ladder(fast: float, tenth: Answer, real: Answer, verdict: str) -> None:
    """The lateness of each run that failed decides what the failure is called."""
    said, rates = asked(fast, {RATE / 10: tenth, 1.0: real})
    assert said.is_confirmed is (verdict == COUNTS)
    assert said.is_undecided is (verdict == UNDECIDED)
    assert (said.kind == "unconfirmed") is (verdict == UNCONFIRMED)
    if fast == LATE:
        # A run that says nothing ends nothing.
        assert rates == [RATE / 10, 1.0]


@pytest.mark.parametrize(
    ("first", "answers", "kind", "at"),
    [
        (LATE, (None, None), "meant nothing", 1.0),
        (IN_TIME, (IN_TIME, 5.0), "too late", 1.0),
        (IN_TIME, (IN_TIME, CANNOT), "not had", 1.0),
        (LATE, (CANNOT, CANNOT), "not had", 1.0),
        (IN_TIME, (None, IN_TIME), "unconfirmed", RATE / 10),
        (LATE, (IN_TIME, None), "unconfirmed", 1.0),
    ],
)
def test_why(first: float, answers: tuple[Answer, Answer], kind: str, at: float) -> None:
    """What is not confirmed says why, and the rate that it comes from."""
    said, _ = asked(first, dict(zip((RATE / 10, 1.0), answers, strict=True)))
    assert (said.kind, said.rate) == (kind, at)
    assert said.cannot is (CANNOT if kind == "not had" else None)


def test_a_slower_run_that_holds_may_decide() -> None:
    """Where each run is judged whole, one that holds ends it, unless a run in time has failed."""
    answers = {RATE / 10: None, 1.0: IN_TIME}
    said, rates = asked(LATE, answers, passing_decides=True)
    assert (said.kind, said.rate, rates) == ("meant nothing", RATE / 10, [RATE / 10])
    said, _ = asked(IN_TIME, answers, passing_decides=True)
    assert said.kind == "unconfirmed"


def test_a_failure_in_real_time_is_run_once_more() -> None:
    """There is no slower rate; who needs no second run says so."""
    said, rates = asked(IN_TIME, {1.0: IN_TIME}, rate=1.0)
    assert (said.kind, rates, said.runs) == ("confirmed", [1.0], ((1.0, True),))
    said, rates = asked(IN_TIME, {}, rate=1.0, rates=())
    assert (said.kind, rates) == ("confirmed", [])


@pytest.mark.parametrize("error", [CANNOT, HarnessError("the fork server has died")])
@pytest.mark.parametrize("rate", [RATE / 10, 1.0])
def test_what_a_run_raises(rate: float, error: Exception) -> None:
    """An error of ours is raised, and one of this machine where it may be the caller's own code."""
    answers: dict[float, Answer] = {RATE / 10: IN_TIME, 1.0: IN_TIME}
    with pytest.raises(type(error)) as raised:
        asked(IN_TIME, answers | {rate: error}, raises_cannot=True)
    assert raised.value is error


# A test of the user's.

Recorded = list[tuple[FaultPlan, Outcome]]


def seen(rate: float, late: float = IN_TIME, **options: Any) -> Recorded:
    """What a cluster recorded."""
    return [(FaultPlan(), outcome(rate, late, **options))]


def hung(rate: float, late: float) -> Recorded:
    """The same, of a cluster that hung."""
    return seen(rate, late, phases=(PhaseOutcome("settle", "hung", detail="worker1 hangs"),))


@pytest.mark.parametrize(
    ("error", "recorded", "decided"),
    [
        (AssertionError(), seen(RATE, IN_TIME), True),
        (AssertionError(), seen(RATE, LATE), False),
        (AssertionError(), seen(40.0, LATE), True),
        (AssertionError(), seen(1.0, 3.9), True),
        (AssertionError(), [*seen(RATE, IN_TIME), *seen(RATE, LATE)], False),
        # A hang has a second of real time to spare, at any rate.
        (errors.RankHung("hangs"), hung(RATE, 0.9), True),
        (errors.RankHung("hangs"), hung(RATE, 1.1), False),
        (errors.RankHung("hangs"), hung(1.0, 1.1), False),
        # What is held after all has come to rest is held, however late that was.
        (errors.RRefLeak("held"), seen(RATE, LATE), True),
    ],
)
def test_lateness_that_eats_the_slack(
    error: BaseException, recorded: Recorded, decided: bool
) -> None:
    """A failure is believed while lateness times rate stays below its slack, known or stated."""
    assert in_time(error, recorded) is decided


def test_a_shutdown_that_gave_up_has_the_slack_of_the_owner() -> None:
    """A leak at shutdown is believed unless the owner's hundred seconds were eaten.

    Where they are less than a second of real time, a busy machine may have eaten them unseen.
    """
    for rate, late, decided in ((40.0, 2.4, True), (40.0, 2.6, False), (RATE, 0.0, False)):
        rank = RankOutcome(
            0,
            "worker0",
            late_seconds=late,
            shutdown_error=RaisedError("RuntimeError", "Leaking RRef"),
        )
        recorded = seen(rate, ranks=(rank,), phases=(PhaseOutcome("shutdown"),))
        assert in_time(errors.RRefLeak("leak"), recorded) is decided


@pytest.mark.parametrize(
    ("fast", "tenth", "real", "verdict"), [*LADDER, (LATE, 10 * LATE, 100 * LATE, COUNTS)]
)
def test_a_tests_own_failure(
    monkeypatch: pytest.MonkeyPatch, fast: float, tenth: Any, real: Any, verdict: str
) -> None:
    """A failure of a test is kept as what the ladder calls it; in real time its own code counts."""
    answers = {RATE / 10: tenth, 1.0: real}

    def again(session: Any, failing: Any, rate: float) -> Again:
        late = answers[rate]
        return Again(None if late is None else AssertionError("no"), seen(rate, late or 0.0))

    monkeypatch.setattr(failures, "run_again", again)
    record = ItemRecord()
    session: Any = None
    failing = Failing(lambda: None, AssertionError("no"), seen(RATE, fast))
    assert counts(session, record, failing) is (verdict == COUNTS)
    assert record.unconfirmed == (["AssertionError: no"] if verdict == UNCONFIRMED else [])
    assert record.undecided == (["AssertionError: no"] if verdict == UNDECIDED else [])
    assert record.confirmed == ({AssertionError} if verdict == COUNTS else set())


def test_a_promise_that_real_time_shows_too_late_is_undecided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hang of ranks that were late for longer than a hang's slack is none, in real time too."""
    error = errors.RankHung("hangs")
    monkeypatch.setattr(
        failures, "run_again", lambda _s, _f, rate: Again(error, hung(rate or 1.0, 1.5))
    )
    record = ItemRecord()
    session: Any = None
    assert not counts(session, record, Failing(lambda: None, error, hung(RATE, 0.0)))
    assert record.undecided == ["RankHung: hangs"]


@pytest.mark.parametrize("kind", [HarnessError, MachineCannot])
@pytest.mark.parametrize("rate", [None, RATE / 10, 1.0])
def test_an_error_of_ours_is_no_run_without_the_failure(
    kind: type[Exception], rate: float | None
) -> None:
    """A run made again that fails for a reason of ours raises that, and confirms nothing."""
    error = kind("the fork server has died")
    server = SimpleNamespace(override_rate=None)
    session: Any = SimpleNamespace(
        server=server,
        in_flight=SimpleNamespace(again=lambda: None),
        ended=lambda error: (error, []),
    )
    runs: list[float | None] = []

    def body() -> None:
        runs.append(server.override_rate)
        raise error if server.override_rate == rate else AssertionError("no")

    record = ItemRecord()
    failing = Failing(body, AssertionError("no"), seen(RATE))
    if rate is None:
        record.confirmed.add(AssertionError)
    with pytest.raises(kind) as raised:
        counts(session, record, failing)
    assert raised.value is error
    assert runs == ([None] if rate is None else [RATE / 10, 1.0][: runs.index(rate) + 1])
    assert not record.unconfirmed
    assert not record.undecided


# A state machine.


class Rates:
    """A runner whose run at each rate fails that late, raises, or shows something else (None)."""

    def __init__(self, answers: Mapping[float, Answer]) -> None:
        self.answers = answers
        self.asked: list[float] = []
        self.told: list[tuple[str, bool]] = []
        self.server = SimpleNamespace(on_unconfirmed=lambda *told: self.told.append(told))

    def run_anew(self, program: Any, plan: FaultPlan, *, clock: float, **_: Any) -> Outcome:
        self.asked.append(clock)
        answer = self.answers[clock]
        if isinstance(answer, Exception):
            raise answer
        return outcome(clock, answer or 0.0)

    def judge(self, program: Any, plan: FaultPlan, outcome: Outcome) -> tuple[Violation, ...]:
        return (OTHER,) if self.answers[outcome.clock_rate] is None else (OTHER, HUNG)


MakeMachine = Callable[[Rates], ClusterMachine]


@pytest.fixture
def make_machine(monkeypatch: pytest.MonkeyPatch) -> MakeMachine:
    """Makes a machine that has no ranks, over such a runner."""

    def make(rates: Rates) -> ClusterMachine:
        monkeypatch.setattr(runner, "default_runner", lambda: rates)
        monkeypatch.setattr(stateful, "judge", rates.judge)
        monkeypatch.setattr(stateful, "event", lambda _: None)
        machine: ClusterMachine = type("Machine", (ClusterMachine,), {})()
        return machine

    return make


@pytest.mark.parametrize(("fast", "tenth", "real", "verdict"), [*LADDER, *TOO_LATE, *PASSED_OVER])
def test_a_state_machine(
    make_machine: MakeMachine, fast: float, tenth: Answer, real: Answer, verdict: str
) -> None:
    """A violation is told of as what the ladder calls it, once, and costs no more runs after."""
    rates = Rates({RATE / 10: tenth, 1.0: real})
    machine = make_machine(rates)
    assert machine._is_confirmed(HUNG, outcome(RATE, fast)) is (verdict == COUNTS)
    line = "RankHung: worker1 hangs under FaultPlan()"
    assert rates.told == ([] if verdict == COUNTS else [(line, verdict == UNDECIDED)])
    runs = list(rates.asked)
    assert machine._is_confirmed(HUNG, outcome(RATE, fast)) is (verdict == COUNTS)
    assert len(rates.told) == (verdict != COUNTS)
    assert rates.asked == runs


@pytest.mark.parametrize(
    ("first", "again", "runs", "verdict"),
    [
        (0.1, None, [], COUNTS),
        (5.0, 0.1, [1.0], COUNTS),
        (5.0, 5.0, [1.0], UNDECIDED),
        (5.0, None, [1.0], UNDECIDED),
    ],
)
def test_a_state_machine_in_real_time(
    make_machine: MakeMachine, first: float, again: float | None, runs: list[float], verdict: str
) -> None:
    """In real time a run that was in time counts, and one that was late is made once more."""
    rates = Rates({1.0: again})
    assert make_machine(rates)._is_confirmed(HUNG, outcome(1.0, first)) is (verdict == COUNTS)
    assert rates.asked == runs
    assert [is_undecided for _, is_undecided in rates.told] == [True] * (verdict == UNDECIDED)


def test_rules_of_the_users_own(make_machine: MakeMachine) -> None:
    """With them a run cannot be made again, and its failure counts as it is, late or not."""
    rates = Rates({})
    machine = make_machine(rates)
    machine._shared = True
    assert machine._is_confirmed(HUNG, outcome(RATE, LATE))
    assert not rates.told


@pytest.mark.parametrize("rate", [RATE / 10, 1.0])
def test_an_error_of_ours_confirms_nothing(make_machine: MakeMachine, rate: float) -> None:
    """A slower run that fails for a reason of ours is raised: it is no run without the failure."""
    error = HarnessError("the fork server has died")
    rates = Rates({RATE / 10: IN_TIME, 1.0: IN_TIME} | {rate: error})
    machine = make_machine(rates)
    # Hypothesis runs a failing example again, which must not change its mind.
    for _ in range(2):
        with pytest.raises(HarnessError) as raised:
            machine._is_confirmed(HUNG, outcome(RATE))
        assert raised.value is error
        rates.answers = {RATE / 10: None, 1.0: None}
    assert not rates.told


@pytest.mark.parametrize(
    ("late", "words"),
    [
        (LATE, "undecided, the machine was too loaded"),
        (IN_TIME, "unconfirmed, slower clocks did not show it"),
    ],
)
def test_without_a_listener_it_is_a_warning(
    make_machine: MakeMachine, late: float, words: str
) -> None:
    """Where nobody reports it, a failure that slower rates do not show is warned of."""
    rates = Rates({RATE / 10: None, 1.0: None})
    rates.server = SimpleNamespace(on_unconfirmed=None)
    with pytest.warns(UserWarning, match=f"^rpcprops: {words}: RankHung: worker1 hangs under"):
        assert not make_machine(rates)._is_confirmed(HUNG, outcome(RATE, late))


# A property.

CASE = Case(Program(1, (Pause(0, 1.0),)))
#: A busy machine can seem to leak; it cannot make another value of one.
LEAK = Violation("RRefLeak", "holds 1 owner", 0, timing_sensitive=True)
WRONG = Violation("WrongValue", "expected [3.0], got [4.0]", 0, 0)
ALL = set(range(50))


class Runs:
    """Runs of one case: the numbers of those at each rate that show a violation.

    Args:
        cannot: rates that this machine cannot give.
        late: real seconds by which its ranks were late at the fast rate.
    """

    def __init__(
        self,
        violation: Violation,
        shows: dict[float, set[int]],
        cannot: tuple[float, ...] = (),
        late: float = 0.0,
    ) -> None:
        self.violation, self.shows, self.cannot, self.late = violation, shows, cannot, late
        self.asked: list[float] = []
        self.first: Observation | None = None
        self.failed_in_use: list[FailedInUse] = []
        self.said: list[str] = []

    def observe(
        self, _: Any, case: Case, *, clock: Any = None, anew: bool = False, **__: Any
    ) -> Observation:
        rate = float(clock or RATE)
        if rate in self.cannot:
            msg = "run fewer processes at once"
            raise MachineCannot(msg)
        if not anew and self.first is not None:
            # Runs are remembered.
            return self.first
        number = self.asked.count(rate)
        self.asked.append(rate)
        broken = number in self.shows.get(rate, ())
        late = self.late if rate == RATE else 0.0
        found = (self.violation,) if broken else ()
        observed = Observation(case, outcome(rate, late), found, ())
        self.first = self.first or observed
        return observed

    def examine(self, *, different: bool = False, case: Case = CASE) -> Examination:
        server = SimpleNamespace(torch_version="2.13.0", rate_of=lambda _: RATE)
        prop = Property(
            "p", "It holds.", lambda: st.just(case), needs_faults=False, observe=self.observe
        )
        runner: Any = SimpleNamespace(server=server, failed_in_use=self.failed_in_use)
        return examine(
            prop, runner, max_examples=3, different=different, on_failing=self.said.append
        )


@pytest.mark.parametrize("violation", [LEAK, WRONG])
def test_what_slower_clocks_show_too_is_violated(violation: Violation) -> None:
    """A tenth of the rate, then real time."""
    runs = Runs(violation, {RATE: ALL, RATE / 10: ALL, 1.0: ALL})
    result = runs.examine()
    assert result.verdict == "violated"
    assert runs.asked[:3] == [RATE, RATE / 10, 1.0]
    again = "runs a failing example again "
    smaller = "makes a failing example smaller: run 1"
    assert runs.said[:3] == [f"{again}at clock rate 40", f"{again}in real time", smaller]


def test_a_run_in_real_time_says_how_long_it_waits() -> None:
    """Where that is long: a function that sleeps for minutes does so in real time too."""
    runs = Runs(WRONG, {RATE: ALL, RATE / 10: ALL, 1.0: ALL})
    runs.examine(case=Case(Program(2, (Call(0, 1, seconds=435.0),))))
    assert "runs a failing example again in real time, where it waits for 435 s" in runs.said


def test_what_failed_in_a_used_world_alone_is_undecided() -> None:
    """The outcome is that of a new world, which holds, and the doubt is named."""

    class Used(Runs):
        def observe(self, _: Any, case: Case, **options: Any) -> Observation:
            before = ((case.program, case.plan),) * 3
            failed = FailedInUse(case.program, case.plan, (LEAK,), outcome(RATE), before)
            self.failed_in_use.append(failed)
            return super().observe(_, case, **options)

    result = Used(LEAK, {}).examine()
    assert result.verdict == "undecided"
    assert "only in a world that had run 3 programs before" in result.unconfirmed[0]
    doubt = result.doubts[0]
    assert doubt.failure is not None
    artefact = artefact_of(doubt.failure)
    assert [one.program for one in artefact.after] == [CASE.program] * 3
    assert "3: Program(1, (Pause" in "\n".join(artefact.head)


def test_fresh_ranks_confirm_what_used_ones_may_have_shown() -> None:
    """The run that fails may be in used ranks; none of those that confirm it may."""
    asked: list[Any] = []

    class Asked(Runs):
        def observe(self, _: Any, case: Case, **options: Any) -> Observation:
            asked.append(options.get("reuse"))
            return super().observe(_, case, **options)

    assert Asked(LEAK, {RATE: ALL, RATE / 10: ALL, 1.0: ALL}).examine().verdict == "violated"
    assert asked[:3] == [None, False, False]


@pytest.mark.parametrize("different", [False, True])
def test_an_error_of_the_harness_ends_the_examination(*, different: bool) -> None:
    """Also one that comes once: it is no failure of a case, and nothing is in doubt."""

    class Broken(Runs):
        def observe(self, _: Any, case: Case, **options: Any) -> Observation:
            if not self.asked:
                self.asked.append(RATE)
                msg = "the control channel is broken"
                raise HarnessError(msg)
            return super().observe(_, case, **options)

    with pytest.raises(HarnessError, match="the control channel is broken"):
        Broken(LEAK, {}).examine(different=different)


def test_what_may_be_the_machines_and_comes_once_leaves_the_verdict() -> None:
    """It is named, with its file, and the rest of the examples decide."""
    result = Runs(LEAK, {RATE: {0}}).examine()
    assert result.verdict == "holds"
    assert result.is_good()
    (doubt,) = result.doubts
    assert doubt.once
    assert doubt.failure is not None
    assert result.unconfirmed == ()
    (line,) = result.failed_once
    assert line.startswith("not again in 3 runs at rate 400 and one at 40: RRefLeak")


def test_what_the_fast_clock_shows_again_is_undecided() -> None:
    """Something is wrong there that slower clocks do not show."""
    result = Runs(LEAK, {RATE: {0, 2}}).examine()
    assert result.verdict == "undecided"
    assert not result.is_good()
    assert "not again at rate 40" in result.unconfirmed[0]


def test_what_no_machine_can_cause_is_undecided_though_it_comes_once() -> None:
    """A wrong value is no matter of time."""
    result = Runs(WRONG, {RATE: {0}}).examine()
    assert result.verdict == "undecided"
    assert result.failed_once == ()


def test_a_case_in_doubt_is_asked_about_once() -> None:
    """Hypothesis draws a case again; its failure is the remembered one, and so is the answer."""
    runs = Runs(WRONG, {RATE: {0}})
    result = runs.examine()
    assert len(result.doubts) == 1
    assert runs.asked == [RATE, RATE / 10]


def test_a_rate_that_a_busy_machine_cannot_give_is_passed_over() -> None:
    """Real time decides: it needs no measurement."""
    everywhere = {RATE: ALL, 1.0: ALL}
    assert Runs(LEAK, everywhere, cannot=(RATE / 10,)).examine().verdict == "violated"
    result = Runs(LEAK, {RATE: {0}}, cannot=(RATE / 10,)).examine()
    assert (result.verdict, len(result.failed_once)) == ("holds", 1)
    result = Runs(LEAK, {RATE: {0}}, cannot=(RATE / 10, 1.0)).examine()
    assert result.verdict == "undecided"
    assert result.unconfirmed[0].startswith("rate 1 could not be had (run fewer processes at once)")


def test_a_late_fast_run_of_a_property_means_nothing() -> None:
    """The slower run decides; what that shows in time, and real time does not, is in doubt."""
    result = Runs(HUNG, {RATE: {0}}, late=LATE).examine()
    assert (result.verdict, result.doubts, result.reruns > 0) == ("holds", [], True)
    result = Runs(HUNG, {RATE: ALL, RATE / 10: ALL}, late=LATE).examine()
    assert result.verdict == "undecided"
    assert "not again at rate 1" in result.unconfirmed[0]


# A sweep.


@pytest.mark.parametrize(("fast", "tenth", "real", "verdict"), [*LADDER, *TOO_LATE, *PASSED_OVER])
def test_a_sweep(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fast: float,
    tenth: Answer,
    real: Answer,
    verdict: str,
) -> None:
    """A place of a map is violated where the failure counts, and undecided where it does not."""
    monkeypatch.chdir(tmp_path)
    answers = {RATE: fast, RATE / 10: tenth, 1.0: real}

    def observe(_: Any, case: Case, *, clock: float = RATE, **options: Any) -> Observation:
        answer = answers[clock]
        if isinstance(answer, Exception):
            raise answer
        found = () if answer is None else (HUNG,)
        return Observation(case, outcome(clock, answer or 0.0), found, ())

    monkeypatch.setattr(sweep, "observe", observe)
    program = Program(2)
    state = sweep.State(program, torch_version="2.13.0", rate=RATE, transport="tcp", root=tmp_path)
    places = sweep.cells(2, "all")[:1]
    runner: Any = SimpleNamespace(failed_in_use=[])
    ((record, _),) = sweep.Sweep(program, runner, state).run(places)
    assert record.verdict == ("violated" if verdict == COUNTS else "undecided")


# A test of PyTorch's.


@pytest.mark.parametrize(
    ("answers", "verdict", "rates"),
    [
        ({50.0: None}, "passed", [50.0]),
        ({50.0: LATE, 5.0: None}, "passed", [50.0, 5.0]),
        ({50.0: CANNOT, 5.0: None}, "passed", [5.0]),
        ({50.0: IN_TIME, 5.0: CANNOT, 1.0: None}, "passed", [50.0, 1.0]),
        ({50.0: IN_TIME, 5.0: IN_TIME, 1.0: 9.0}, "failed", [50.0, 5.0, 1.0]),
        # Real time has not shown it, so it is no failure yet.
        ({50.0: IN_TIME, 5.0: IN_TIME, 1.0: CANNOT}, CANNOT, [50.0, 5.0]),
        ({50.0: CANNOT, 5.0: CANNOT, 1.0: CANNOT}, CANNOT, []),
        # An error of ours ends it, and says what the runs before it showed.
        ({50.0: IN_TIME, 5.0: OURS}, OURS, [50.0]),
    ],
)
def test_a_test_of_pytorchs(
    answers: dict[float, Answer], verdict: str | Exception, rates: list[float]
) -> None:
    """The first rate at which it passes decides, and real time where there is none."""
    test = UpstreamTest("RpcTest", "test_add", "generic", 4)
    ran: list[float] = []

    def run(_: UpstreamTest, *, rate: float) -> Any:
        answer = answers[rate]
        if isinstance(answer, Exception):
            raise answer
        ran.append(rate)
        said = "passed" if answer is None else "failed"
        return SimpleNamespace(
            verdict=said,
            promise="UpstreamTestFails" if said == "failed" else "",
            reason="a traceback",
            rate=rate,
            seconds=0.0,
            processor_seconds=0.0,
        )

    ranks: Any = SimpleNamespace(rate_of=lambda _: 50.0, run=run)
    if isinstance(verdict, Exception):
        with pytest.raises(type(verdict)) as caught:
            run_without_faults(ranks, test)
        if verdict is OURS:
            (note,) = caught.value.__notes__
            assert note.endswith("the test failed at rate 50, UpstreamTestFails: a traceback")
    else:
        result = run_without_faults(ranks, test)
        assert (result.verdict, result.rate) == (verdict, rates[-1])
        assert result.slower == tuple(rates[:-1])
    assert ran == rates
