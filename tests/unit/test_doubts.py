"""What the engine makes of a failure by what slower clocks, and more fast runs, show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st

from rpcprops.errors import MachineCannot
from rpcprops.outcomes import Outcome, RankOutcome, Violation
from rpcprops.programs import Pause, Program
from rpcprops.properties import Case, Examination, Observation, Property, examine

RATE = 400.0
CASE = Case(Program(1, (Pause(0, 1.0),)))
#: A busy machine can seem to leak; it cannot make another value of one.
LEAK = Violation("RRefLeak", "holds 1 owner", 0, needs_time=True)
WRONG = Violation("WrongValue", "expected [3.0], got [4.0]", 0, 0)


class Runs:
    """Runs of one case: the numbers of those at each rate that show a violation.

    Args:
        cannot: rates that this machine cannot give.
    """

    def __init__(
        self, violation: Violation, shows: dict[float, set[int]], cannot: tuple[float, ...] = ()
    ) -> None:
        self.violation, self.shows, self.cannot = violation, shows, cannot
        self.asked: list[float] = []
        self.first: Observation | None = None

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
        outcome = Outcome(1, clock_rate=rate, ranks=(RankOutcome(0, "worker0"),))
        seen = Observation(case, outcome, (self.violation,) if broken else (), ())
        self.first = self.first or seen
        return seen

    def examine(self) -> Examination:
        server = SimpleNamespace(torch_version="2.13.0", rate_of=lambda _: RATE)
        prop = Property(
            "p", "It holds.", lambda: st.just(CASE), needs_faults=False, observe=self.observe
        )
        runner: Any = SimpleNamespace(server=server)
        return examine(prop, runner, max_examples=3)


ALL = set(range(50))


@pytest.mark.parametrize("violation", [LEAK, WRONG])
def test_what_slower_clocks_show_too_is_violated(violation: Violation) -> None:
    """A tenth of the rate, then real time."""
    runs = Runs(violation, {RATE: ALL, RATE / 10: ALL, 1.0: ALL})
    result = runs.examine()
    assert result.verdict == "violated"
    assert runs.asked[:3] == [RATE, RATE / 10, 1.0]


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
