"""What the runner does with a cluster, shown with one that only pretends to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import judge
from rpcprops.outcomes import Counters, Outcome, PhaseOutcome, RaisedError, RankOutcome, StepOutcome
from rpcprops.programs import Call, Program, Step
from rpcprops.runner import Runner

TIMEOUT = RaisedError("RuntimeError", "RPC ran for more than set timeout (1100 ms)")
LATE = FaultPlan(by_rank={0: FaultTable(messages_to_delay={"PYTHON_CALL": 1.0})})


class PretendedCluster:
    """Gives the steps' outcomes that it was made with, and holds nothing."""

    has_found = False

    def __init__(self, size: int, steps: Sequence[StepOutcome]) -> None:
        self.size = size
        self.steps = {step.index: step for step in steps}
        self.did: list[str] = []

    def start(self) -> None:
        self.did.append("start")

    def run_step(self, index: int, _step: Step, _at: int, _ids: Mapping[str, int]) -> StepOutcome:
        self.did.append(f"step {index}")
        return self.steps[index]

    def settle_to(self, expect: Sequence[Counters], _failures: Any = None) -> tuple[Counters, ...]:
        self.did.append("settle")
        return tuple(expect)

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

    def rate_of(self, clock: Any) -> float:
        return 1.0 if clock is None else float(clock)

    def cluster(self, **_options: Any) -> PretendedCluster:
        self.made += 1
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
