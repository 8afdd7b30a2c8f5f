"""A kind of step of a test's own, written in this one file, goes all the way.

It is drawn, checked, predicted, sent, run in real ranks, judged, and written as a script.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from rpcprops._json import from_json, to_json
from rpcprops.errors import HarnessError, UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import account, fired_by_type, judge, predict, predict_for, set_apart
from rpcprops.outcomes import Violation
from rpcprops.programs import STEP_TYPES, Drop, Own, Parallel, Program, Remote, Share, Step
from rpcprops.report.artefact import Artefact
from rpcprops.report.script import script_of, tried
from rpcprops.runner import default_runner, run
from rpcprops.stateful import ClusterMachine
from rpcprops.steps.in_rank.state import handle_of, note_call
from rpcprops.strategies import programs, programs_under_faults
from rpcprops.strategies.drawing import KINDS, checked_kinds
from tests._draws import QUIET, draws

if TYPE_CHECKING:
    from rpcprops.oracle import Model, StepPrediction
    from rpcprops.programs import Scope
    from rpcprops.steps.base import Way
    from rpcprops.strategies.drawing import StepDrawer


@dataclass(frozen=True, slots=True, repr=False)
class Twice(Step):
    """`at` sends a handle to `to`, where a function fetches it and answers with twice its value."""

    op: ClassVar[str] = "twice"
    in_thread: ClassVar[bool] = True
    comes_first: ClassVar[bool] = False
    at: int
    handle: str
    to: int

    @property
    def fetched_there(self) -> tuple[str, ...]:
        """What the function fetches."""
        return (self.handle,)

    def enter(self, scope: Scope) -> None:
        """Needs the handle."""
        scope.alive(self.at, self.handle)

    def predict(self, model: Model, call: str) -> StepPrediction:
        """One call, and what its function does."""
        handle = model.handle(self.handle)
        there = model.call(self.at, self.to, MessageType.PYTHON_CALL, call, handle)
        model.calls[self.to][call] += 1
        once = model.compute(self.to, [0.0] * len(handle.rref.value), (), there)
        return model.shows([2.0 * x for x in once])

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None) -> Twice | None:
        """One with any handle, or with one of `at`."""
        names = [
            name
            for rank in (drawer.ranks if at is None else (at,))
            for name in drawer.fetchable_there(rank)
        ]
        if not names:
            return None
        name = drawer.recall(names)
        home = drawer.scope.handles[name].home
        return cls(home, name, drawer.peer(home))

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        """The call is a PYTHON_CALL of the rank where the handle lives."""
        if message is not MessageType.PYTHON_CALL or not drawer.fetchable_there(rank):
            return []
        return [(cls.op, lambda: cls.draw(drawer, at=rank))]


def twice(call: str, world: tuple[str, ...], *, handle: str, to: int) -> list[float]:
    """Let another rank fetch the value of a handle that lives here, and double it."""
    from torch.distributed import rpc

    value: list[float] = rpc.rpc_sync(world[to], doubled, args=(call, handle_of(handle)))
    return value


def doubled(call: str, rref: Any) -> list[float]:
    """Twice the value of an RRef."""
    note_call(call)
    value: list[float] = (2.0 * rref.to_here()).tolist()
    return value


@dataclass(frozen=True, slots=True, repr=False)
class Thrice(Twice):
    """Says that it is twice the value, and is run by a function that gives three times that."""

    op: ClassVar[str] = "thrice"


def thrice(call: str, world: tuple[str, ...], *, handle: str, to: int) -> list[float]:
    """What is wrong."""
    return [1.5 * x for x in twice(call, world, handle=handle, to=to)]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    STEP_TYPES.update(TOYS)
    yield
    for op in TOYS:
        del STEP_TYPES[op]


def test_it_is_drawn_where_it_is_asked_for() -> None:
    """Strategies draw it where `kinds` names it, on one rank after the other and at once."""
    found = draws(programs(kinds=("remote", "own", "share", "twice")), 300)
    drawn = [leaf for program in found for leaf in program.leaves if isinstance(leaf, Twice)]
    assert len(drawn) > 20
    assert {step.at == step.to for step in drawn} == {True, False}
    parallel = [s for program in found for s in program.steps if isinstance(s, Parallel)]
    assert any(isinstance(leaf, Twice) for step in parallel for leaf in step.leaves)


def test_it_is_aimed_at_faults() -> None:
    """Where a plan fails the calls of one rank, most of these steps are at that rank."""
    plan = FaultPlan(by_rank={1: FaultTable((MessageType.PYTHON_CALL,), 1)})
    drawn = programs(
        min_world_size=3, max_world_size=3, min_steps=8, kinds=("own", "twice"), plan=plan
    )
    found = [program for start in range(6) for program in draws(drawn, 20, start)]
    at = [leaf.at for program in found for leaf in program.leaves if isinstance(leaf, Twice)]
    assert at.count(1) > at.count(0) + at.count(2) > 0


def test_a_state_machine_has_a_rule_for_it() -> None:
    """A machine whose kinds name it may run it as a rule, and a machine of all kinds does not."""

    class Toys(ClusterMachine):
        kinds = ("own", "twice")

    class Others(ClusterMachine):
        pass

    assert {name for name in dir(Toys) if not hasattr(Others, name)} == {"step_twice"}


def test_it_is_not_drawn_unasked() -> None:
    """What is drawn by default does not change where somebody defines a kind of step."""
    assert checked_kinds(None) == KINDS
    assert Twice.op not in KINDS
    with pytest.raises(UsageError, match="must name a step that can come first"):
        programs(kinds=("twice",))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Twice(0, "a", 1),), "there is no handle 'a' before this step; make it first"),
        ((Own(0, "a"), Twice(0, "a", 7)), "to=7 is no rank of a world of 3"),
        ((Own(0, "a"), Drop(0, "a"), Twice(0, "a", 1)), "handle 'a' was dropped before"),
        (
            (
                Own(0, "a"),
                Share(0, "a", 1, "b"),
                Parallel(((Twice(0, "a", 2),), (Twice(1, "b", 2),))),
            ),
            "two branches of Parallel meet at one RRef",
        ),
    ],
)
def test_it_is_refused_where_it_cannot_be(steps: tuple[Step, ...], message: str) -> None:
    """A program checks its ranks, its handles and what branches share, as of any step."""
    with pytest.raises(UsageError, match=message):
        Program(3, steps)


def test_it_goes_with_the_step_that_it_needs() -> None:
    """Without the step that makes its handle a program is without it as well."""
    program = Program(2, (Own(0, "a"), Twice(0, "a", 1), Own(1, "b")))
    assert program.without(0) == Program(2, (Own(1, "b"),))


def test_its_effect_is_predicted() -> None:
    """The oracle predicts its value, its messages and its calls, and that a lost call raises."""
    program = Program(2, (Remote(0, 1, "a", (1.0, 2.0), (3.0, 4.0)), Twice(0, "a", 1)))
    predicted = predict(program, FaultPlan())
    assert predicted.steps[1].value == [8.0, 12.0]
    assert [(send.rank, send.message) for send in predicted.sends] == [
        (0, MessageType.PYTHON_REMOTE_CALL),
        (0, MessageType.PYTHON_CALL),
        (1, MessageType.RREF_CHILD_ACCEPT),
    ]
    assert predicted.calls == ({}, {"step0": 1, "step1": 1})
    lost = predict(program, FaultPlan(FaultTable((MessageType.PYTHON_CALL,), 1)))
    assert lost.steps[1].error == "injected"


def test_it_travels_as_json() -> None:
    """A program with it is the same after a trip through JSON, and prints as Python."""
    program = Program(2, (Own(0, "a"), Twice(0, "a", 1)))
    data = json.loads(json.dumps(to_json(program)))
    assert data["steps"][1] == {"op": "twice", "at": 0, "handle": "a", "to": 1}
    assert from_json(data, Program) == program
    assert repr(program.steps[1]) == "Twice(at=0, handle='a', to=1)"


def test_two_kinds_cannot_have_one_name() -> None:
    """A second class with the op of a kind that exists is refused, and the first one stays."""
    with pytest.raises(UsageError, match=r"the op 'twice' of .*Other is that of .*Twice"):

        class Other(Step):
            op: ClassVar[str] = "twice"

    assert STEP_TYPES["twice"] is Twice


def test_each_kind_names_what_runs_it() -> None:
    """By default a function of its op, of its family or beside it; nothing where none runs it."""
    assert Twice.runs == f"{__name__}:twice"
    assert Remote.runs == "rpcprops.steps.in_rank.rrefs:remote"
    assert STEP_TYPES["optimize"].runs == "rpcprops.steps.in_rank.training:optimize"
    assert {op for op, cls in STEP_TYPES.items() if not cls.runs} == {"settle", "parallel"}


def test_a_kind_must_say_what_it_shows() -> None:
    """A step whose class predicts nothing is our mistake, not an empty prediction."""
    program = Program(2, (Parallel(((Own(0, "a"),), (Own(1, "b"),))),))
    with pytest.raises(HarnessError, match=r"Parallel does not say what it must show"):
        program.steps[0].predict(None, "step0")  # type: ignore[arg-type]


PROGRAM = Program(
    3,
    (
        Remote(0, 1, "a", (1.0, 2.0), (3.0, 4.0)),
        Twice(0, "a", 1),
        Twice(0, "a", 2),
        Parallel(((Own(1, "b"), Twice(1, "b", 2)), (Twice(0, "a", 0),))),
    ),
    "toys",
)
#: Strikes the call that each of them sends, and the fork request that follows it.
HELD_UP = FaultTable(["RREF_FORK_REQUEST"], 2, {"PYTHON_CALL": 1.0})
LOST = FaultPlan(by_rank={0: FaultTable(["PYTHON_CALL"], 1)})

# Kinds of step only while a test here runs: others count the kinds.
TOYS = {cls.op: STEP_TYPES.pop(cls.op) for cls in (Twice, Thrice)}


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize("plan", [FaultPlan(), FaultPlan(HELD_UP), LOST])
def test_it_runs_in_real_ranks(plan: FaultPlan) -> None:
    """Ranks find its function and run it as predicted, also where faults strike its message."""
    outcome = run(PROGRAM, plan)
    assert judge(PROGRAM, plan, outcome) == ()
    shown = [outcome.steps[index] for index in (1, 2, 4, 5)]
    if plan is LOST:
        assert [step.error is None for step in shown] == [False, False, True, False]
    else:
        assert [step.value for step in shown] == [[8.0, 12.0], [8.0, 12.0], [2.0], [8.0, 12.0]]
    struck = fired_by_type(account(PROGRAM, plan, outcome))
    assert bool(struck) == (plan != FaultPlan())


def _unexplained(program: Program, plan: FaultPlan) -> tuple[Violation, ...]:
    outcome = default_runner().run_anew(program, plan)
    met = predict_for(program, plan, outcome).met
    return set_apart(program, met, outcome, judge(program, plan, outcome))[1]


@pytest.mark.usefixtures("rpc_cluster")
def test_drawn_ones_run_as_predicted() -> None:
    """What is drawn of it runs in real ranks, and they break no promise under drawn faults."""
    drawn = programs_under_faults(
        max_world_size=3, kinds=("own", "remote", "share", "twice"), max_steps=6
    )
    pairs = [pair for pair in draws(drawn, 30) if any(type(x) is Twice for x in pair[0].leaves)]
    for program, plan in pairs[:6]:
        left = _unexplained(program, plan)
        # A busy machine can show what the next run does not.
        assert not left or (left[0].timing_sensitive and not _unexplained(program, plan))


@pytest.mark.usefixtures("rpc_cluster")
def test_a_state_machine_runs_it() -> None:
    """The ranks of a state machine have imported what its rules need, and run it as predicted."""
    ran: list[int] = []

    class Toys(ClusterMachine):
        kinds = ("own", "twice")

        def let_go(self) -> None:
            ran.append(sum(isinstance(step, Twice) for step in self.program.leaves))

    bounded = settings(QUIET, max_examples=8, stateful_step_count=12)
    run_state_machine_as_test(Toys, settings=bounded)
    assert any(ran)


@pytest.mark.usefixtures("rpc_cluster")
def test_a_wrong_value_is_a_violation() -> None:
    """A function that gives another value than the class says is reported, at its step."""
    program = Program(2, (Own(0, "a"), Thrice(0, "a", 1)))
    (violation,) = judge(program, None, run(program))
    assert violation == Violation("WrongValue", "expected [2.0], got [3.0]", 0, 1)


def test_a_script_of_it_runs(tmp_path: Path) -> None:
    """Its function stands in a script of plain torch, which runs without us and finds it right."""
    program = Program(2, (Own(0, "a", (1.0, 2.0)), Twice(0, "a", 1)))
    artefact = Artefact(
        "program",
        "toys",
        "WrongValue",
        program=program,
        plans=(FaultPlan(FaultTable(messages_to_delay={"PYTHON_CALL": 0.2})),),
        violations=(Violation("WrongValue", "planted", 0, 1),),
    )
    script = script_of(artefact)
    assert "gives=[2.0, 4.0]" in script.text
    assert "import rpcprops" not in script.text
    assert "from rpcprops" not in script.text
    assert tried(script, tmp_path, 1).codes == (0,)
