"""Deadlines grow with what the faults account for, and shrink with the clock's rate."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from rpcprops.cluster.deadlines import Deadlines
from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, FaultTable, MessageType

NONE = FaultPlan()
RREF = tuple(m for m in MessageType if m.max_retries == 5)
CLEANUP = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
PHASES = ("start", "run", "look", "settle", "shutdown")


def everything(deadlines: Deadlines) -> dict[str, float]:
    """All deadlines by name."""
    return dataclasses.asdict(deadlines)


def test_without_faults_a_phase_has_its_margin() -> None:
    """Honest work has the margin alone; only shutdown may wait an owner's 100 virtual seconds."""
    found = Deadlines.of(NONE, 4, 1.0, 30.0)
    assert [getattr(found, phase) for phase in PHASES] == [30.0, 30.0, 30.0, 30.0, 130.0]
    assert Deadlines.of(NONE, 4, 100.0, 30.0).shutdown == 31.0


def test_retries_of_rref_messages_are_waited_for() -> None:
    """Three types failing five times wait 9.125 s each, one after the other: 27.375 s."""
    found = Deadlines.of(FaultPlan(FaultTable(RREF, 5)), 2, 1.0, 30.0)
    assert found.run == pytest.approx(30.0 + 27.375)
    assert found.settle >= 30.0 + 27.375
    assert found.shutdown >= 130.0 + 27.375
    assert found.start == found.look == 30.0


def test_retries_of_a_cleanup_are_waited_for() -> None:
    """Three failures of a cleanup wait 3.5 virtual seconds in all, twenty of them 4433."""
    few = Deadlines.of(FaultPlan(FaultTable([CLEANUP], 3)), 2, 1.0, 30.0)
    assert few.settle >= 33.5
    assert few.quiet_cleanup >= few.quiet + 3.5
    many = Deadlines.of(FaultPlan(FaultTable([CLEANUP], 20)), 2, 1.0, 30.0)
    assert many.settle >= 30.0 + 4432
    assert many.quiet_cleanup >= 4432


def test_functions_that_sleep_are_waited_for() -> None:
    """A program whose functions sleep is quiet for so long, and each phase may last so long."""
    found = Deadlines.of(NONE, 2, 10.0, 30.0, 130.0)
    without = Deadlines.of(NONE, 2, 10.0, 30.0)
    longer = {name for name, value in everything(found).items() if value != getattr(without, name)}
    waits = {"quiet", "quiet_cleanup", "stalled", "stuck", "unseen"}
    assert longer == {"run", "settle", "shutdown", *waits}
    assert all(
        getattr(found, name) == pytest.approx(getattr(without, name) + 13.0) for name in longer
    )


def test_what_never_ends_is_waited_for_longer_in_real_time() -> None:
    """Under a fast clock a known hang costs little; the rate that confirms it waits as for any."""
    fast, real = Deadlines.of(NONE, 2, 400.0, 30.0), Deadlines.of(NONE, 2, 1.0, 30.0)
    assert fast.stuck < fast.stalled / 4
    assert real.stuck == real.stalled == fast.stalled


def test_what_a_finding_keeps_is_not_waited_for_as_long_as_functions_run() -> None:
    """Where ranks run none, and hold what they keep for ever, nothing else can come."""
    long, short = (Deadlines.of(NONE, 2, 400.0, 30.0, lasts) for lasts in (435.0, 0.0))
    assert long.kept == short.kept <= short.quiet < long.quiet


@pytest.mark.parametrize(("failures", "longest"), [(1, 1.0), (2, 1.0), (3, 1.5), (5, 3.375)])
def test_between_two_cleanup_tries_lies_the_longest_wait(failures: int, longest: float) -> None:
    """A cleanup that is still to be tried logs again within its longest single wait."""
    plan = FaultPlan(by_rank={1: FaultTable([CLEANUP], failures)})
    assert Deadlines.of(plan, 2, 1.0, 30.0).between_cleanups >= longest
    assert Deadlines.of(plan, 2, 100.0, 30.0).between_cleanups >= longest / 100
    assert Deadlines.of(plan, 2, 100.0, 30.0).between_cleanups < longest


def test_without_cleanup_failures_there_is_nothing_to_wait_for() -> None:
    """Where no cleanup fails, quiet is quiet, with or without a context."""
    for table in (FaultTable(), FaultTable(RREF, 5), FaultTable([CLEANUP], 0)):
        found = Deadlines.of(FaultPlan(table), 2, 1.0, 30.0)
        assert found.quiet_cleanup == found.quiet
        assert found.between_cleanups < 0.1


def test_delays_are_waited_for_by_every_phase_that_sends() -> None:
    """A delay of two seconds on each of four ranks may hold up a step at each of them."""
    plan = FaultPlan(FaultTable(messages_to_delay={"PYTHON_CALL": 2.0}))
    found = Deadlines.of(plan, 4, 1.0, 30.0)
    assert found.run >= 30.0 + 4 * 2.0
    assert found.settle >= 30.0 + 4 * 2.0
    assert found.stalled >= 2.0


def test_the_rank_with_the_most_faults_decides() -> None:
    """One faulty rank is waited for as if all were, and a rank outside the world is not."""
    table = FaultTable(RETRYABLE_MESSAGE_TYPES, 5)
    one = Deadlines.of(FaultPlan(by_rank={1: table}), 2, 1.0, 30.0)
    assert one == Deadlines.of(FaultPlan(table), 2, 1.0, 30.0)
    outside = Deadlines.of(FaultPlan(by_rank={7: table}), 2, 1.0, 30.0)
    assert outside == Deadlines.of(NONE, 2, 1.0, 30.0)


@pytest.mark.parametrize(
    "table",
    [
        FaultTable(),
        FaultTable(RETRYABLE_MESSAGE_TYPES, 5),
        FaultTable([CLEANUP], 20),
        FaultTable(messages_to_delay=dict.fromkeys(MessageType, 2.0)),
    ],
)
def test_a_faster_clock_never_lengthens_a_deadline(table: FaultTable) -> None:
    """What faults account for passes faster; the margin is real time and stays."""
    slow, fast = (Deadlines.of(FaultPlan(table), 4, rate, 30.0) for rate in (1.0, 100.0))
    for name, seconds in everything(fast).items():
        assert seconds <= everything(slow)[name]
    for phase in PHASES:
        assert getattr(fast, phase) >= 30.0


def test_more_failures_never_shorten_a_deadline() -> None:
    """Each deadline is at least that of one failure fewer."""
    found = [
        everything(Deadlines.of(FaultPlan(FaultTable(RETRYABLE_MESSAGE_TYPES, n)), 3, 1.0, 30.0))
        for n in range(21)
    ]
    for fewer, more in itertools.pairwise(found):
        assert all(more[name] >= fewer[name] for name in more)


def test_failures_beyond_the_retries_take_no_longer() -> None:
    """A message is given up after its last retry, however many failures are left."""
    known = Deadlines.of(FaultPlan(FaultTable(RREF, 5)), 2, 1.0, 30.0)
    beyond = Deadlines.of(FaultPlan(FaultTable(RREF, 2**31 - 1)), 2, 1.0, 30.0)
    assert beyond == known


def test_every_deadline_is_positive_and_quiet_is_the_shortest() -> None:
    """Nothing is called stuck before a moment has passed, nor a step before a settle would be."""
    for rate in (1.0, 100.0, 1000.0):
        found = Deadlines.of(NONE, 16, rate, 0.5)
        assert min(everything(found).values()) > 0
        assert found.quiet < found.stalled
