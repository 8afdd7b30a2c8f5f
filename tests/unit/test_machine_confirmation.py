"""What a state machine makes of a violation under a fast clock, by what slower rates show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from rpcprops import runner, stateful
from rpcprops.errors import HarnessError, MachineCannot
from rpcprops.faults import FaultPlan
from rpcprops.outcomes import Outcome, RankOutcome, Violation
from rpcprops.stateful import ClusterMachine

RATE = 400.0
#: Real seconds by which waits ended late: enough to eat the slack below at rate 400, and not.
LATE, IN_TIME = 0.05, 0.002
HUNG = Violation("RankHung", "worker1 hangs", needs_time=True, slack=4.0)
OTHER = Violation("RankDied", "worker1 died")


def seen(rate: float, late: float = IN_TIME) -> Outcome:
    """What two ranks showed, one of which was late."""
    ranks = (RankOutcome(0, "worker0"), RankOutcome(1, "worker1", late_seconds=late))
    return Outcome(2, clock_rate=rate, ranks=ranks)


class Rates:
    """A runner whose run at each rate fails that late, raises, or shows something else (None)."""

    def __init__(self, answers: Mapping[float, float | Exception | None]) -> None:
        self.answers = answers
        self.asked: list[float] = []
        self.told: list[tuple[str, bool]] = []
        self.server = SimpleNamespace(on_unconfirmed=lambda *told: self.told.append(told))

    def run_anew(self, program: Any, plan: FaultPlan, *, clock: float, transport: str) -> Outcome:
        self.asked.append(clock)
        answer = self.answers[clock]
        if isinstance(answer, Exception):
            raise answer
        return seen(clock, answer or 0.0)

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


COUNTS, UNCONFIRMED, UNDECIDED = "counts", "unconfirmed", "undecided"
CANNOT = MachineCannot("rate 40 cannot be had")


@pytest.mark.parametrize(
    ("fast", "tenth", "real", "verdict"),
    [
        # Late or not, what real time shows counts.
        (IN_TIME, IN_TIME, IN_TIME, COUNTS),
        (LATE, IN_TIME, IN_TIME, COUNTS),
        (LATE, None, IN_TIME, COUNTS),
        (LATE, 10 * LATE, IN_TIME, COUNTS),
        (LATE, CANNOT, IN_TIME, COUNTS),
        (IN_TIME, CANNOT, IN_TIME, COUNTS),
        # In time, and not shown at a slower rate.
        (IN_TIME, None, IN_TIME, UNCONFIRMED),
        (IN_TIME, IN_TIME, None, UNCONFIRMED),
        (IN_TIME, CANNOT, None, UNCONFIRMED),
        (LATE, IN_TIME, None, UNCONFIRMED),
        # Late wherever it failed.
        (LATE, None, None, UNDECIDED),
        (LATE, 10 * LATE, None, UNDECIDED),
        (LATE, None, 100 * LATE, UNDECIDED),
        (IN_TIME, IN_TIME, 100 * LATE, UNDECIDED),
    ],
)
def test_the_ladder(
    make_machine: MakeMachine,
    fast: float,
    tenth: float | Exception | None,
    real: float | None,
    verdict: str,
) -> None:
    """The lateness of each run that failed (None: it did not) decides what it is called."""
    rates = Rates({RATE / 10: tenth, 1.0: real})
    machine = make_machine(rates)
    assert machine._is_confirmed(HUNG, seen(RATE, fast)) is (verdict == COUNTS)
    line = "RankHung: worker1 hangs under FaultPlan()"
    assert rates.told == ([] if verdict == COUNTS else [(line, verdict == UNDECIDED)])
    if fast == LATE:
        # A run that says nothing ends nothing.
        assert rates.asked == [RATE / 10, 1.0]
    asked = list(rates.asked)
    assert machine._is_confirmed(HUNG, seen(RATE, fast)) is (verdict == COUNTS)
    # It has been told, and costs no more runs.
    assert len(rates.told) == (verdict != COUNTS)
    assert rates.asked == asked


@pytest.mark.parametrize(
    ("first", "again", "asked", "verdict"),
    [
        (0.1, None, [], COUNTS),
        (5.0, 0.1, [1.0], COUNTS),
        (5.0, 5.0, [1.0], UNDECIDED),
        (5.0, None, [1.0], UNDECIDED),
    ],
)
def test_in_real_time(
    make_machine: MakeMachine, first: float, again: float | None, asked: list[float], verdict: str
) -> None:
    """In real time a run that was in time counts, and one that was late is made once more."""
    rates = Rates({1.0: again})
    assert make_machine(rates)._is_confirmed(HUNG, seen(1.0, first)) is (verdict == COUNTS)
    assert rates.asked == asked
    assert [is_undecided for _, is_undecided in rates.told] == [True] * (verdict == UNDECIDED)


def test_rules_of_the_users_own(make_machine: MakeMachine) -> None:
    """With them a run cannot be made again, and its failure counts as it is, late or not."""
    rates = Rates({})
    machine = make_machine(rates)
    machine._shared = True
    assert machine._is_confirmed(HUNG, seen(RATE, LATE))
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
            machine._is_confirmed(HUNG, seen(RATE))
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
        assert not make_machine(rates)._is_confirmed(HUNG, seen(RATE, late))
