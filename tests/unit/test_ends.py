"""How a program ends: what is refused, what the oracle says of it, and what is drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import accepted, judge, predict
from rpcprops.programs import Drop, End, Fetch, Program, Remote, Share
from rpcprops.programs._end import SHUTDOWNS
from rpcprops.properties import Case
from rpcprops.properties._sample import real_waits
from rpcprops.strategies import programs
from tests._draws import draws
from tests.seeded._ideal import LEAKED, OWNER_WAITED, ideal, with_rank

HOLDS = Program(3, (Remote(0, 1, "a"), Fetch(0, "a"), Share(0, "a", 2, "b")))
AT_ONCE = replace(HOLDS, end=End("at once"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"how": "never"}, "how='never'"),
        ({"how": None}, "how=None"),
        ({"waits": (-1.0,)}, "must be a tuple of virtual seconds"),
        ({"waits": (1001.0,)}, "must be a tuple of virtual seconds"),
        ({"waits": (True,)}, "must be a tuple of virtual seconds"),
        ({"waits": 3.0}, "must be a tuple of virtual seconds"),
        ({"waits": (0.0,) * 17}, "must be a tuple of virtual seconds"),
    ],
)
def test_an_odd_end_is_refused(given: dict[str, Any], message: str) -> None:
    """The message names the value and what is right."""
    with pytest.raises(UsageError, match=message):
        End(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"end": "at once"}, "must be an End"),
        ({"end": End(waits=(0.0, 0.0, 1.0))}, "there are 2 ranks, and 3 waits"),
        ({"end": End("at once"), "settles": False}, "needs settles=True"),
    ],
)
def test_a_program_refuses_an_end_that_it_cannot_have(given: dict[str, Any], message: str) -> None:
    """It is refused when the program is made."""
    with pytest.raises(UsageError, match=message):
        Program(2, **given)


@pytest.mark.parametrize("how", SHUTDOWNS[:3])
def test_a_graceful_end_shows_what_it_always_did(how: Any) -> None:
    """A timeout that nothing reaches, a second call and ranks that come late change nothing."""
    plan = FaultPlan(FaultTable(["RREF_USER_DELETE"], 6))
    program = replace(HOLDS, end=End(how, (30.0,)))
    assert predict(program, plan) == predict(HOLDS, plan)


def test_an_end_at_once_reports_what_users_hold() -> None:
    """Nothing is deleted, and the owner reports the forks; that is documented, and counted."""
    predicted = predict(AT_ONCE, FaultPlan())
    assert not predicted.last_sends
    assert predicted.leaking == {1}
    outcome = ideal(AT_ONCE, FaultPlan())
    assert outcome.ranks[1].shutdown_error == LEAKED
    assert judge(AT_ONCE, None, outcome) == ()
    assert [(one.kind, one.rank) for one in accepted(AT_ONCE, FaultPlan(), outcome)] == [
        ("held-at-once", 1)
    ]
    silent = with_rank(outcome, 1, shutdown_error=None, exit_code=0)
    assert [v.promise for v in judge(AT_ONCE, None, silent)] == ["MissingError"]


def test_an_end_at_once_waits_for_nobody() -> None:
    """An owner that says that it has waited for deletes is a violation there."""
    outcome = ideal(AT_ONCE, FaultPlan())
    waited = with_rank(outcome, 1, log=OWNER_WAITED)
    assert [(v.promise, v.rank) for v in judge(AT_ONCE, None, waited)] == [("ErrorInLog", 1)]


def test_a_dropped_rref_is_no_leak_at_once() -> None:
    """The program settles before, so what nobody holds is gone."""
    program = replace(AT_ONCE, steps=(*HOLDS.steps, Drop(2, "b"), Drop(0, "a")))
    assert predict(program, FaultPlan()).leaking == set()


def test_an_end_at_once_needs_no_call() -> None:
    """A plan that breaks the calls of a graceful shutdown does not keep ranks from leaving."""
    plan = FaultPlan(FaultTable(["PYTHON_CALL"], 1))
    program = Program(2, (Remote(0, 1, "a", flavour="script"),))
    assert not predict(program, plan).graceful
    assert predict(replace(program, end=End("at once")), plan).graceful


def test_a_late_rank_counts_in_real_time() -> None:
    """The seconds by which it comes late are seconds of a run at rate 1."""
    late = real_waits(Case(replace(HOLDS, end=End("graceful", (0.0, 30.0)))))
    assert late == real_waits(Case(HOLDS)) + 30.0


def test_programs_of_each_end_are_drawn() -> None:
    """Most end as usual; the others end in every way, with ranks that come first and last."""
    drawn = draws(programs(min_world_size=2, max_steps=2), 300)
    ways = Counter(program.end.how for program in drawn)
    assert set(ways) == set(SHUTDOWNS)
    assert sum(program.end == End() for program in drawn) > 100
    assert any(program.end.wait_of(0) > program.end.wait_of(1) for program in drawn)
    assert any(program.end.wait_of(program.world_size - 1) for program in drawn)
    assert not any(program.end.how == "at once" and not program.settles for program in drawn)
