"""What the runner does with a cluster, shown with one that only pretends to run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pytest

from rpcprops import agents
from rpcprops.cluster.finder import describe_modules
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import judge, predict
from rpcprops.outcomes import Counters, Outcome, PhaseOutcome, RaisedError, RankOutcome, StepOutcome
from rpcprops.programs import (
    Call,
    Context,
    Drop,
    Fetch,
    Leaf,
    Module,
    Nest,
    Parallel,
    Program,
    Refused,
    Remote,
    Settle,
)
from rpcprops.runner import Runner, _parts
from tests.seeded._ideal import ideal

TIMEOUT = RaisedError("RuntimeError", "RPC ran for more than set timeout (1100 ms)")
LATE = FaultPlan(by_rank={0: FaultTable(messages_to_delay={"PYTHON_CALL": 1.0})})


class PretendedCluster:
    """Gives the steps' outcomes that it was made with, and holds nothing."""

    has_found = False
    torch_version = "2.13.0"
    #: Virtual seconds for which functions of the program run.
    lasts = 0.0

    def __init__(self, size: int, steps: Sequence[StepOutcome]) -> None:
        self.size = size
        self.steps = {step.index: step for step in steps}
        self.did: list[str] = []
        self.contexts: dict[str, int] = {}
        self.expected: list[tuple[tuple[Counters, ...], tuple[int, ...]]] = []
        self.awaited: list[tuple[Mapping[str, int], ...]] = []
        self.stuck: set[int] = set()
        self.kept: list[bool] = []
        self.names = tuple(f"worker{rank}" for rank in range(size))

    def start(self) -> None:
        self.did.append("start")

    def run_branches(
        self,
        branches: Sequence[Sequence[tuple[int, Leaf]]],
        contexts: Mapping[str, int],
        goes_on: Callable[[StepOutcome], bool],
        *,
        together: bool = False,
        stuck: Collection[int] = (),
    ) -> list[StepOutcome]:
        self.stuck.update(stuck)
        self.contexts = dict(contexts)
        done: list[StepOutcome] = []
        for branch in branches:
            for index, _ in branch:
                self.did.append(f"step {index}")
                done.append(self.steps[index])
                if not goes_on(done[-1]):
                    break
        return done

    def settle_to(
        self,
        expect: Sequence[Counters],
        failures: Sequence[int],
        calls: Sequence[Mapping[str, int]],
        is_kept: Callable[[Sequence[Counters]], bool] | None,
    ) -> tuple[Counters, ...]:
        self.did.append("settle")
        self.expected.append((tuple(expect), tuple(failures)))
        self.awaited.append(tuple(calls))
        self.kept.append(is_kept is not None)
        return tuple(expect)

    def take_time(self, seconds: float) -> None:
        assert seconds == self.lasts

    def look(self) -> None:
        self.did.append("look")

    def shutdown(self) -> None:
        self.did.append("shutdown")

    def kill(self) -> None:
        self.did.append("kill")

    @property
    def outcome(self) -> Outcome:
        calls = {f"step{index}": 1 for index in self.steps}
        ranks = (
            RankOutcome(0, "worker0", exit_code=0, calls={}),
            RankOutcome(1, "worker1", exit_code=0, calls=calls),
        )
        return Outcome(self.size, phases=(PhaseOutcome("shutdown"),), ranks=ranks)


class PretendedServer:
    """Hands out one pretended cluster, and counts how often."""

    def __init__(self, cluster: PretendedCluster) -> None:
        self.pretended = cluster
        self.made = 0
        self.agent = agents.default_name()
        self.reuse = False
        self.imports: list[tuple[str, ...]] = []

    def rate_of(self, clock: Any) -> float:
        return 1.0 if clock is None else float(clock)

    def make_cluster(self, *modules: str, **_options: Any) -> PretendedCluster:
        self.made += 1
        self.imports.append(describe_modules(modules).first)
        return self.pretended


def pretend(*steps: StepOutcome) -> tuple[Runner, PretendedServer]:
    """A runner over a cluster that pretends to give these outcomes."""
    server: Any = PretendedServer(PretendedCluster(2, steps))
    return Runner(server), server


@pytest.mark.parametrize("first", [StepOutcome(0, [3.0]), StepOutcome(0, error=TIMEOUT)])
def test_a_step_that_may_go_either_way_does_not_end_the_program(first: StepOutcome) -> None:
    """A call that may or may not time out is followed by the next step, whichever it did."""
    program = Program(2, (Call(0, 1, timeout=1.1), Call(0, 1)))
    runner, server = pretend(first, StepOutcome(1, [3.0]))
    outcome = runner.run(program, LATE)
    assert server.pretended.did == ["start", "step 0", "step 1", "settle", "shutdown", "kill"]
    assert judge(program, LATE, outcome) == ()


@pytest.mark.parametrize(
    ("timeout", "first"),
    [(None, StepOutcome(0, error=TIMEOUT)), (0.1, StepOutcome(0, [3.0]))],
)
def test_a_step_that_surely_went_wrong_ends_the_program(
    timeout: float | None, first: StepOutcome
) -> None:
    """After an error that had no right to be, or the lack of one, no further step is judged."""
    program = Program(2, (Call(0, 1, timeout=timeout), Call(0, 1)))
    runner, server = pretend(first)
    outcome = runner.run(program, LATE)
    assert server.pretended.did == ["start", "step 0", "look", "kill"]
    assert len(outcome.steps) == 1
    assert len(judge(program, LATE, outcome)) == 1


def test_what_a_finding_keeps_from_ending_or_makes_ranks_keep_is_told_to_the_cluster() -> None:
    """So that it does not wait long for it; of other programs it is told nothing."""
    lost = FaultPlan(by_rank={0: FaultTable(["PYTHON_REMOTE_CALL"], 1)})
    second = Program(2, (Remote(0, 1, "a"), Remote(0, 1, "b"), Fetch(0, "b")))
    nested = Program(2, (Nest(0, 1, 1, "a", timeout=3.0, seconds=12.0),))
    for program, plan, lasts, stuck, kept in (
        (second, lost, 0.0, {2}, []),
        (nested, FaultPlan(), 12.0, set(), [True]),
        (Program(2, (Call(0, 1),)), FaultPlan(), 0.0, set(), [False]),
    ):
        runner, server = pretend(*ideal(program, plan).steps)
        server.pretended.lasts = lasts
        runner.run(program, plan)
        cluster = server.pretended
        assert (cluster.stuck, cluster.kept[: len(kept)]) == (stuck, kept)


def test_a_run_is_remembered_by_program_plan_and_clock() -> None:
    """The same arguments give the first run's outcome; another clock or plan runs anew."""
    program = Program(2, (Call(0, 1),))
    runner, server = pretend(StepOutcome(0, [3.0]))
    first = runner.run(program, LATE)
    assert runner.run(program, LATE) is first
    assert runner.run(Program(2, (Call(0, 1),)), FaultPlan(by_rank=dict(LATE.by_rank))) is first
    assert server.made == 1
    runner.run(program)
    runner.run(program, LATE, clock=2.0)
    assert server.made == 3
    runner.run_anew(program, LATE)
    assert server.made == 4


def test_a_world_too_small_for_the_program_is_refused() -> None:
    """The message shows the size that was given and the size that is needed."""
    runner, server = pretend()
    with pytest.raises(UsageError, match=r"world_size=1.*needs 2 ranks"):
        runner.run(Program(2, (Call(0, 1),)), world_size=1)
    assert server.made == 0


def test_branches_are_numbered_one_after_the_other() -> None:
    """A parallel step's leaves keep their places among the program's, and so do the next steps."""
    step = Parallel(((Call(0, 1), Call(0, 1)), (Call(1, 1),)))
    program = Program(2, (Call(0, 1), step, Call(0, 1)))
    runner, server = pretend(*(StepOutcome(index, [3.0]) for index in range(5)))
    outcome = runner.run(program)
    steps = [did for did in server.pretended.did if did.startswith("step")]
    assert steps == [f"step {index}" for index in range(5)]
    assert [step.index for step in outcome.steps] == [0, 1, 2, 3, 4]
    assert judge(program, None, outcome) == ()


def test_a_branch_that_went_wrong_ends_the_program_but_no_other_branch() -> None:
    """A branch stops at its first wrong step; the others run on, and then nothing follows."""
    step = Parallel(((Call(0, 1), Call(0, 1)), (Call(1, 1), Call(1, 1))))
    program = Program(2, (step, Call(0, 1)))
    wrong = StepOutcome(0, error=RaisedError("RuntimeError", "no such node"))
    runner, server = pretend(wrong, StepOutcome(2, [3.0]), StepOutcome(3, [3.0]))
    outcome = runner.run(program)
    assert server.pretended.did == ["start", "step 0", "step 2", "step 3", "look", "kill"]
    (violation,) = judge(program, None, outcome)
    assert (violation.promise, violation.rank, violation.step) == ("UnexpectedError", 0, 0)


def test_an_error_that_had_to_come_does_not_end_the_program() -> None:
    """A lost call raises at its caller as predicted, and the program goes on."""
    program, plan = Program(2, (Call(0, 1), Call(0, 1))), FaultTable(["PYTHON_CALL"], 1)
    steps = ideal(program, FaultPlan(plan)).steps
    runner, server = pretend(*steps)
    runner.run(program, plan)
    # Shutdown itself calls by PYTHON_CALL, so it cannot be graceful here.
    assert server.pretended.did == ["start", "step 0", "step 1", "settle", "kill"]


def test_a_program_that_does_not_settle_is_looked_at_and_shut_down() -> None:
    """Without a settle there is one look, for the outcome, and then the shutdown."""
    program = Program(2, (Call(0, 1),), settles=False)
    runner, server = pretend(StepOutcome(0, [3.0]))
    runner.run(program)
    assert server.pretended.did == ["start", "step 0", "look", "shutdown", "kill"]


def test_a_settle_waits_for_what_is_predicted() -> None:
    """Each settle gets the counters, failures and calls of its place, idle ranks hold nothing."""
    program = Program(2, (Remote(0, 1, "a"), Settle(), Fetch(0, "a"), Drop(0, "a")))
    plan = FaultPlan(FaultTable(["RREF_USER_DELETE"], 2))
    runner, server = pretend(StepOutcome(0), StepOutcome(2, [3.0]), StepOutcome(3))
    runner.run(program, plan, world_size=3)
    held = (Counters(), Counters(owners=1, forks=1), Counters())
    assert server.pretended.expected == [(held, (0, 0, 0)), ((Counters(),) * 3, (2, 0, 0))]
    assert server.pretended.awaited == [({}, {"step0": 1}, {})] * 2


def test_the_ids_of_contexts_reach_later_steps() -> None:
    """What a context step gave as its id is what a refusal asks for."""
    program = Program(2, (Context(0, "x", (1,)), Settle(), Refused(1, "x")))
    runner, server = pretend(StepOutcome(0, {"id": 17}), StepOutcome(2, {"refused": True}))
    runner.run(program)
    assert server.pretended.contexts == {"x": 17}


def test_only_programs_that_train_have_the_optimizers_imported() -> None:
    """torch's optimizers take more than a second to import, so only those who need them wait."""
    runner, server = pretend(StepOutcome(0, [3.0]))
    runner.run(Program(2, (Call(0, 1),)))
    runner.run(Program(2, (Module(0, 1),)))
    assert server.imports == [(), ("rpcprops.steps.in_rank.training",)]


def test_only_steps_that_must_not_raise_are_sent_with_the_next() -> None:
    """Consecutive steps of one rank are one branch, up to one that must raise; others are not."""
    program = Program(
        2,
        (
            Remote(0, 1, "a"),
            Fetch(0, "a"),
            Call(0, 1, raises=True),
            Call(0, 1),
            Call(1, 0),
            Parallel(((Call(0, 0),), (Call(1, 1),))),
            Call(1, 0),
            Settle(),
            Call(1, 0),
        ),
    )
    parts = [
        (first, [len(branch) for branch in branches])
        for first, branches, _ in _parts(program, predict(program, FaultPlan()), together=True)
    ]
    assert parts == [(0, [3]), (3, [1]), (4, [1]), (5, [1, 1]), (7, [1]), (8, [1]), (9, [1])]
    alone = list(_parts(program, predict(program, FaultPlan()), together=False))
    assert [(first, step) for first, _, step in alone] == [*program.numbered]
