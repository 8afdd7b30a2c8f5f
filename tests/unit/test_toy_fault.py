"""A kind of fault that exists in this file alone goes wherever torch's own two kinds go."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import pytest
from msgspec import structs

from rpcprops import _replay as replay
from rpcprops._json import from_json, to_json
from rpcprops._sweep import Record
from rpcprops.cluster.deadlines import Deadlines
from rpcprops.errors import UsageError
from rpcprops.faults import (
    Fault,
    FaultPlan,
    FaultTable,
    MessageType,
    PredictedSend,
    SendFailure,
    register,
)
from rpcprops.oracle import FaultCount, account, fired_by_type, judge, predict
from rpcprops.outcomes import Outcome, RankOutcome, Violation
from rpcprops.programs import Call, Program
from rpcprops.properties import Case, Observation, _base
from rpcprops.properties._sample import real_waits
from rpcprops.report.artefact import Artefact
from rpcprops.report.as_test import regression_test
from rpcprops.report.script import script_of
from rpcprops.report.text import describe_faults, describe_plan
from rpcprops.strategies import programs
from tests._draws import draws
from tests.seeded._ideal import ideal, with_rank

CALL = MessageType.PYTHON_CALL


@register
@dataclass(frozen=True, slots=True)
class Hold(Fault):
    """The second message of a type that a rank sends is held back, for whole virtual seconds."""

    kind: ClassVar[str] = "hold"
    blocks_sender: ClassVar[bool] = True

    rank: int
    message: MessageType
    held: int

    @property
    def what(self) -> str:
        """The type of message."""
        return self.message

    @property
    def targets(self) -> tuple[MessageType, ...]:
        """The type of message."""
        return (self.message,)

    @property
    def is_survivable(self) -> bool:
        """It arrives in the end."""
        return True

    def strikes(self, sends: Sequence[PredictedSend]) -> Sequence[int]:
        """Once, the second."""
        mine = [send.rank == self.rank and send.message is self.message for send in sends]
        return [int(is_mine and sum(mine[:n]) == 1) for n, is_mine in enumerate(mine)]

    @property
    def seconds(self) -> float:
        """As long as it is held."""
        return self.held

    def seen(self, rank: RankOutcome) -> int | None:
        """How often the log says so."""
        return len(re.findall(f"^held {self.message}$", rank.log, re.MULTILINE))

    def enter_rank(self) -> None:
        """No rank is run with it here."""

    def simpler(self) -> Iterator[Self]:
        """A second less, down to one."""
        if self.held > 1:
            yield replace(self, held=self.held - 1)


TOY = Hold(0, CALL, 4)
TABLES = {0: FaultTable(["RREF_USER_DELETE"], 2), 1: FaultTable(["RREF_USER_DELETE"], 1)}
BARE = FaultPlan(by_rank=TABLES)
PLAN = FaultPlan(by_rank=TABLES, others=(TOY,))
PROGRAM = Program(2, (Call(0, 1), Call(0, 1), Call(0, 1)))
ARTEFACT = Artefact("program", "planted", "RRefLeak", program=PROGRAM, plans=(PLAN,))
HELD = with_rank(ideal(PROGRAM, PLAN), 0, log="held PYTHON_CALL\n")


def test_a_plan_lists_names_and_leaves_out() -> None:
    """A plan has the fault after those of its rank's table, and is without it as it was before."""
    assert PLAN.fault_names(2) == ("0:RREF_USER_DELETE", "0:hold:PYTHON_CALL", "1:RREF_USER_DELETE")
    assert PLAN.named(["0:hold:PYTHON_CALL", "0:hold:SCRIPT_CALL"], 2) == (TOY,)
    assert PLAN.without(["0:hold:PYTHON_CALL"], 2) == BARE
    assert PLAN.without(["0:RREF_USER_DELETE"], 2).others == (TOY,)
    assert TOY.put_into(BARE) == PLAN
    alone = FaultPlan(others=(TOY,))
    assert alone.faulty_ranks(2) == (0,)
    assert alone.is_within_budget(2)
    with pytest.raises(UsageError, match="raise world_size"):
        FaultPlan(others=(Hold(2, CALL, 1),)).check(2)


def test_plans_with_it_are_values() -> None:
    """Plans with such faults are hashed, ordered and printed; in which order they came is lost."""
    other = Hold(1, CALL, 1)
    both = FaultPlan(others=(other, TOY, other))
    assert both == FaultPlan(others=(TOY, other))
    assert len({both, FaultPlan(others=(TOY, other)), FaultPlan()}) == 2
    assert sorted([both, FaultPlan(), PLAN]) == sorted([PLAN, both, FaultPlan()])
    names = {cls.__name__: cls for cls in (FaultPlan, FaultTable, Hold, MessageType)}
    assert eval(repr(PLAN), names) == PLAN


@pytest.mark.parametrize("odd", [TOY, "hold", 3, ("hold",), (SendFailure(0, CALL, 1),)])
def test_what_is_no_other_fault_is_refused(odd: Any) -> None:
    """Other faults are a collection of faults, and those of tables stay in tables."""
    with pytest.raises(UsageError, match="others"):
        FaultPlan(others=odd)


def test_it_travels_as_json() -> None:
    """It comes back by its word, also inside a sweep's record; without one nothing has changed."""
    assert from_json(json.loads(json.dumps(to_json(PLAN))), FaultPlan) == PLAN
    record = Record(PLAN, "holds")
    assert from_json(json.loads(json.dumps(to_json(record))), Record) == record
    assert (
        set(to_json(BARE))
        == set(to_json(Record(BARE, "holds"))["plan"])
        == {
            "default",
            "by_rank",
        }
    )
    assert "others" not in repr(BARE)


@pytest.mark.parametrize(
    "damaged", [{"kind": "unknown"}, {"kind": "hold", "rank": 0}, {"rank": 0}, [], {"kind": []}]
)
def test_damaged_json_is_refused(damaged: Any) -> None:
    """An unknown word, a missing field and what is no object are refused in a sentence."""
    with pytest.raises(UsageError, match="this is no FaultPlan"):
        from_json({"default": to_json(FaultTable()), "others": [damaged]}, FaultPlan)


def test_a_word_is_that_of_one_class() -> None:
    """A second class of the same word is refused, as is what is no class of faults."""
    assert register(Hold) is Hold
    with pytest.raises(UsageError, match="is the word of Hold"):
        register(type("Other", (Hold,), {}))
    with pytest.raises(UsageError, match="must be a class"):
        register(3)  # type: ignore[arg-type]


def test_it_is_accounted_for_and_described() -> None:
    """What was asked for, could strike and fired is counted, and reports say it in its words."""
    counts = account(PROGRAM, PLAN, HELD)
    toy = FaultCount(0, "hold", CALL, 1, 1)
    assert [count for count in counts if count.kind == "hold"] == [toy]
    assert account(None, FaultPlan(others=(TOY,)), HELD) == (structs.replace(toy, eligible=None),)
    short = Program(2, (Call(0, 1),))
    assert account(short, FaultPlan(others=(TOY,)), ideal(short, FaultPlan())) == (
        structs.replace(toy, eligible=0, fired=0),
    )
    assert fired_by_type(counts) == {"hold PYTHON_CALL": 1}
    assert describe_faults(counts) == ["fired    rank 0: hold PYTHON_CALL: 1 fired of 1 that could"]
    first, second = describe_plan(FaultPlan(others=(TOY,)), 2)
    assert repr(TOY) in first
    assert second.strip() == "faults at rank 0 of 2"


def test_what_fired_is_judged() -> None:
    """A fault that fired as predicted is right, and one that did not is a difference."""
    assert judge(PROGRAM, PLAN, HELD) == ()
    (found,) = judge(PROGRAM, PLAN, ideal(PROGRAM, PLAN))
    assert str(found) == (
        "FaultsDiffer (rank 0): 0:hold:PYTHON_CALL struck 0 times, the message model predicts 1"
    )


@pytest.mark.parametrize("is_needed", [True, False])
def test_it_is_found_needed_or_not(monkeypatch: pytest.MonkeyPatch, is_needed: bool) -> None:
    """A replay leaves it out by its name, and says whether the failure shows without it."""

    def observe(_: Any, case: Case, **options: Any) -> Observation:
        fails = bool(case.plan.others) or not is_needed
        broken = (Violation("RRefLeak", "planted"),) if fails else ()
        return Observation(case, Outcome(2), broken, ())

    monkeypatch.setattr(_base, "observe", observe)

    def run(names: Sequence[str]) -> replay.Replay:
        return replay.replay_program(ARTEFACT, None, times=2, without=names)  # type: ignore[arg-type]

    needs = {need.name: need.is_needed for need in replay.needed(ARTEFACT, run)}
    assert needs["0:hold:PYTHON_CALL"] is is_needed
    assert needs["0:RREF_USER_DELETE"] is False


def test_it_shrinks_by_its_own_candidates() -> None:
    """Simpler plans lack a fault or have a simpler one, and end at the smallest that still fails.

    What fails here is a call that is held for two seconds at least, while deletes fail at rank 1.
    """

    def fails(plan: FaultPlan) -> bool:
        return any(f.seconds >= 2 for f in plan.others) and "RREF_USER_DELETE" in str(
            plan.table(1).failing
        )

    plan = PLAN
    while smaller := next((one for one in plan.simpler(2) if fails(one)), None):
        plan = smaller
    assert plan.faults(2) == (
        Hold(0, CALL, 2),
        SendFailure(1, MessageType.RREF_USER_DELETE, 1),
    )


def test_its_time_is_allowed_for() -> None:
    """Deadlines, the prediction and the sample for real time count the seconds that it holds."""
    alone = FaultPlan(others=(TOY,))
    with_it, without = (Deadlines.of(plan, 2, 1.0, 30.0) for plan in (alone, FaultPlan()))
    assert with_it.run >= without.run + TOY.seconds
    assert predict(PROGRAM, alone).fault_seconds(alone) == TOY.seconds
    # And the one call of rank 0 by which a shutdown of two ranks gathers.
    assert real_waits(Case(PROGRAM, alone)) == 2 * TOY.seconds


def test_drawn_programs_aim_at_it() -> None:
    """Programs for a plan with it send what it strikes more often than programs for any plan."""
    alone = FaultPlan(others=(Hold(1, MessageType.SCRIPT_CALL, 1),))
    struck = [
        sum(
            bool(alone.others[0].eligible(predict(program, FaultPlan())))
            for program in draws(programs(min_world_size=2, max_world_size=2, plan=plan), 30)
        )
        for plan in (alone, None)
    ]
    assert struck[0] > struck[1]


def test_a_script_refuses_it_and_a_test_imports_it() -> None:
    """Plain torch has no such fault, and a regression test imports what its plan is written in."""
    failed = replace(
        ARTEFACT,
        promise="WrongValue",
        violations=(Violation("WrongValue", "planted", 0, 0),),
        outcomes=(HELD,),
    )
    with pytest.raises(UsageError, match="0:hold:PYTHON_CALL; a script cannot"):
        script_of(failed)
    source = regression_test(failed)
    made: dict[str, Any] = {}
    exec(source, made)
    assert made["PLAN"] == PLAN
