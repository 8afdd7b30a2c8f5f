"""What the plugin makes of a user's failure under a fast clock, by what slower rates show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rpcprops import errors
from rpcprops.faults import FaultPlan
from rpcprops.outcomes import Outcome, PhaseOutcome, RaisedError, RankOutcome
from rpcprops.plugin import failures
from rpcprops.plugin.failures import Again, counts, in_time
from rpcprops.plugin.records import Failing, ItemRecord

RATE = 400.0
#: Real seconds by which waits ended late: too late for a test's own code at rate 400, and not.
LATE, IN_TIME = 0.05, 0.002


def seen(rate: float, late: float = IN_TIME, **options: Any) -> list[tuple[FaultPlan, Outcome]]:
    """What two ranks recorded, one of which was late."""
    ranks = (RankOutcome(0, "worker0"), RankOutcome(1, "worker1", late_seconds=late))
    return [(FaultPlan(), Outcome(2, clock_rate=rate, **{"ranks": ranks, **options}))]


def hung(rate: float, late: float) -> list[tuple[FaultPlan, Outcome]]:
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
    error: BaseException, recorded: list[tuple[FaultPlan, Outcome]], decided: bool
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


COUNTS, UNCONFIRMED, UNDECIDED = "counts", "unconfirmed", "undecided"


@pytest.mark.parametrize(
    ("fast", "tenth", "real", "verdict"),
    [
        # Late or not, what real time shows counts.
        (IN_TIME, IN_TIME, IN_TIME, COUNTS),
        (LATE, IN_TIME, IN_TIME, COUNTS),
        (LATE, None, IN_TIME, COUNTS),
        (LATE, 10 * LATE, 100 * LATE, COUNTS),
        # In time, and not shown at a slower rate.
        (IN_TIME, None, IN_TIME, UNCONFIRMED),
        (IN_TIME, IN_TIME, None, UNCONFIRMED),
        (LATE, IN_TIME, None, UNCONFIRMED),
        # Late wherever it failed.
        (LATE, None, None, UNDECIDED),
        (LATE, 10 * LATE, None, UNDECIDED),
    ],
)
def test_the_ladder(
    monkeypatch: pytest.MonkeyPatch,
    fast: float,
    tenth: float | None,
    real: float | None,
    verdict: str,
) -> None:
    """The lateness of each run that failed (None: it passed) decides what the failure is called."""
    answers = {RATE / 10: tenth, 1.0: real}
    asked: list[float] = []

    def again(session: Any, failing: Any, rate: float) -> Again:
        asked.append(rate)
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
    if fast == LATE:
        # A run that says nothing ends nothing.
        assert asked == [RATE / 10, 1.0]


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


@pytest.mark.parametrize("kind", [errors.HarnessError, errors.MachineCannot])
@pytest.mark.parametrize("rate", [None, RATE / 10, 1.0])
def test_an_error_of_ours_is_no_run_without_the_failure(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], rate: float | None
) -> None:
    """A run made again that fails for a reason of ours raises that, and confirms nothing."""
    error = kind("the fork server has died")
    server = SimpleNamespace(override_rate=None)
    session: Any = SimpleNamespace(
        server=server, underway=SimpleNamespace(again=lambda: None), take_recorded=list
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
