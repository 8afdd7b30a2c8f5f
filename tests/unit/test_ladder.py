"""When a fast clock may be believed."""

from __future__ import annotations

import pytest

from rpcprops.confirmation import is_decided, rungs
from rpcprops.outcomes import UNLIMITED_SLACK, Outcome, RankOutcome, Violation


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(400.0, (40.0, 1.0)), (100.0, (10.0, 1.0)), (10.0, (1.0,)), (5.0, (1.0,)), (1.0, ())],
)
def test_rungs(rate: float, expected: tuple[float, ...]) -> None:
    """A failure is run again at a tenth of the rate and in real time, each where it is slower."""
    assert rungs(rate) == expected


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
    ranks = (RankOutcome(0, "worker0"), RankOutcome(1, "worker1", late_seconds=late))
    outcome = Outcome(2, clock_rate=rate, ranks=ranks)
    violation = Violation("MissingError", "no timeout", needs_time=True, slack=slack)
    assert is_decided(violation, outcome) is decided
