"""An examination that asks for different cases: none runs twice, and a failure is still shrunk."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from rpcprops.outcomes import Outcome, Violation
from rpcprops.programs import Pause
from rpcprops.properties import WITHOUT_FAULTS, Case, Examination, Observation, examine

WRONG = Violation("WrongValue", "expected [3.0], got [4.0]", 0, 0)


class Ranks:
    """Ranks that are wrong wherever a program pauses after another step, if they are wrong at all.

    What is under test draws, counts and shrinks, and asks ranks for outcomes only.
    """

    def __init__(self, *, wrong: bool) -> None:
        self.wrong = wrong
        self.ran: list[Case] = []

    def observe(self, _: Any, case: Case, *, clock: float = 1.0, **__: Any) -> Observation:
        self.ran.append(case)
        is_wrong = self.wrong and any(isinstance(leaf, Pause) for leaf in case.program.leaves[1:])
        outcome = Outcome(case.program.world_size, clock_rate=clock, torch_version="2.13.0")
        return Observation(case, outcome, (WRONG,) if is_wrong else (), ())

    def examine(self, draws: int) -> Examination:
        server = SimpleNamespace(torch_version="2.13.0", rate_of=lambda _: 400.0)
        runner: Any = SimpleNamespace(server=server, failed_in_use=[])
        prop = replace(WITHOUT_FAULTS, observe=self.observe)
        return examine(prop, runner, max_examples=draws, seed=1, different=True)


def test_each_draw_is_another_case() -> None:
    """As many cases are run as draws were asked for, each once."""
    ranks = Ranks(wrong=False)
    result = ranks.examine(60)
    assert (result.verdict, result.examples) == ("holds", 60)
    assert len(set(ranks.ran)) == len(ranks.ran) == 60


def test_a_failure_is_shrunk_although_cases_come_again() -> None:
    """The fewest steps with which it fails, and in how many examples it was found."""
    result = Ranks(wrong=True).examine(300)
    assert result.verdict == "violated"
    assert result.failure is not None
    assert len(result.failure.case.program.leaves) == 2
    assert 0 < result.found_at["WrongValue"] <= result.examples
