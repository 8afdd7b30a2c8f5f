"""State machines: what pytest says of their failures, of their misuse, and of what they ran."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

MakeProject = Callable[..., Any]

CODE = """
import itertools
from dataclasses import replace

from hypothesis import HealthCheck, settings

from rpcprops import Cluster, confirmation
from rpcprops.programs import Bump
from rpcprops.stateful import ClusterMachine

run_branches, is_decided = Cluster.run_branches, confirmation.is_decided
running = None


def miscounted(cluster, branches, contexts, goes_on=lambda _: True, **options):
    bumps = [n for branch in branches for n, leaf in branch if isinstance(leaf, Bump)]
    return [
        replace(seen, value=[x + 1 for x in seen.value])
        if seen.index in bumps and running.is_wrong(cluster.rate) else seen
        for seen in run_branches(cluster, branches, contexts, goes_on, **options)
    ]


def in_time(violation, outcome):
    return not (running.is_late and outcome.clock_rate > 1) and is_decided(violation, outcome)


Cluster.run_branches, confirmation.is_decided = miscounted, in_time


class Base(ClusterMachine):
    kinds = ("own", "bump")
    clock = 20
    is_late = False

    def __init__(self):
        global running
        running = self
        super().__init__()


class FastOnly(Base):
    def is_wrong(self, rate):
        return rate > 1


class FastOnlyLate(FastOnly):
    is_late = True


class LateEverywhere(FastOnlyLate):
    def is_wrong(self, rate):
        return True


few = settings(
    max_examples=3, stateful_step_count=4, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)
for machine in (FastOnly, FastOnlyLate, LateEverywhere):
    machine.TestCase.settings = few
TestFastOnly = FastOnly.TestCase
TestFastOnlyLate = FastOnlyLate.TestCase
TestLateEverywhere = LateEverywhere.TestCase
"""


#: Machines whose runs are counted, tests that run programs, and machines that are set up wrongly.
OTHERS = """
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

import rpcprops
from rpcprops import FaultPlan, FaultTable, strategies
from rpcprops.programs import Call, Program
from rpcprops.stateful import ClusterMachine

few = settings(
    max_examples=3, stateful_step_count=4, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)


class Fires(ClusterMachine):
    kinds = ("own", "call")
    faults = FaultTable(messages_to_delay={"SCRIPT_CALL": 0.01, "PYTHON_CALL": 0.01})


class FiresNothing(ClusterMachine):
    kinds = ("own",)
    faults = FaultTable(["RREF_USER_DELETE"], 1)


class Fails(ClusterMachine):
    kinds = ("own",)

    @rule()
    def fails(self):
        self.cluster.on(0).call(abs, -1)
        raise AssertionError("of a rule")


class NoPlan(ClusterMachine):
    faults = [1]


class RankTooHigh(ClusterMachine):
    faults = FaultPlan(by_rank={5: FaultTable(["RREF_USER_DELETE"], 1)})


class CannotInject(ClusterMachine):
    agent = "TENSORPIPE"
    kinds = ("own",)
    faults = strategies.fault_plans(world_size=2)


for machine in (Fires, FiresNothing, Fails, NoPlan, RankTooHigh, CannotInject):
    machine.TestCase.settings = few
TestFires = Fires.TestCase
TestFiresNothing = FiresNothing.TestCase
TestFails = Fails.TestCase
TestNoPlan = NoPlan.TestCase
TestRankTooHigh = RankTooHigh.TestCase
TestCannotInject = CannotInject.TestCase


def test_function():
    run_state_machine_as_test(FiresNothing, settings=few)


@few
@given(number=st.integers(0, 9))
def test_programs(number):
    rpcprops.run(Program(2, (Call(0, 1, (float(number),), (1.0,)),)))


@few
@example(number=10)
@example(number=11)
@given(number=st.just(12))
def test_examples(number):
    rpcprops.run(Program(2, (Call(0, 1, (float(number),), (2.0,)),)))
    assert number < 12


def test_program():
    rpcprops.run(Program(1, ()))


def test_no_ranks():
    pass


@few
@given(faults=strategies.fault_tables())
def test_cannot_inject(rpc_cluster, faults):
    with rpc_cluster(world_size=2, faults=faults, agent="TENSORPIPE"):
        pass
"""


@pytest.fixture(scope="module")
def ran_by_xdist(make_project: MakeProject) -> Any:
    """The run of the project by workers of xdist's, and its report."""
    return make_project(test_machines=CODE).report("-n", "2")


@pytest.fixture(scope="module")
def ran(ran_by_xdist: Any) -> Any:
    """The same without its report."""
    return ran_by_xdist[0]


@pytest.fixture(scope="module")
def others(make_project: MakeProject) -> Any:
    """The run of the other project, and its report."""
    return make_project(test_others=OTHERS).report()


@pytest.mark.parametrize(
    ("test", "words", "remedy"),
    [
        ("TestFastOnly", "not confirmed in real time", ""),
        (
            "TestFastOnlyLate",
            "undecided, the machine was too loaded",
            "; a slower clock helps: --rpc-clock=real, or clock = 'real' in the class of the "
            "machine",
        ),
    ],
)
def test_what_slower_rates_do_not_show_is_named(
    ran: Any, test: str, words: str, remedy: str
) -> None:
    """It fails nothing, and the summary has a line for it."""
    start = f"rpcprops: {words}: test_machines.py::{test}::runTest: WrongValue (step "
    lines = [line for line in ran.lines if f"::{test}::" in line and line.startswith("rpcprops")]
    assert lines, ran.out
    assert all(line.startswith(start) for line in lines)
    assert all(f" under FaultPlan(){remedy}" in re.sub(r" \(and .*\)", "", one) for one in lines)


def test_what_real_time_shows_fails_however_late_the_fast_run_was(ran: Any) -> None:
    """A late fast run does not hide a promise that is broken at every rate."""
    assert "1 failed, 2 passed" in ran.lines[-1]
    section = ran.section("TestLateEverywhere.runTest")
    assert "WrongValue (step" in section
    assert "replay   rpcprops replay " in section


def test_a_worker_of_xdist_counts_machines(ran_by_xdist: Any) -> None:
    """The report of the controller has them, with what slower rates did not show."""
    result, report = ran_by_xdist
    assert set(report) == {
        f"Test{name}::runTest" for name in ("FastOnly", "FastOnlyLate", "LateEverywhere")
    }
    for test in report.values():
        assert test["clusters"] >= test["examples"] > 0
    assert report["TestFastOnly::runTest"]["unconfirmed"]
    clusters = sum(test["clusters"] for test in report.values())
    assert f"rpcprops: {clusters} clusters in 3 tests, 0 injected faults fired" in result.lines


@pytest.mark.parametrize("name", ["TestFiresNothing::runTest", "test_function"])
def test_a_machine_under_which_no_fault_fired_is_vacuous(others: Any, name: str) -> None:
    """As a test of `rpc_cluster` is; the report counts its examples and clusters."""
    result, report = others
    counts = {key: report[name][key] for key in ("examples", "clusters", "armed", "faults_fired")}
    assert counts == {"examples": 3, "clusters": counts["clusters"], "armed": 3, "faults_fired": 0}
    assert counts["clusters"] >= 3
    assert report[name]["drawn"]
    assert (
        f"rpcprops: vacuous: no injected fault fired in test_others.py::{name} (3 examples)"
        in result.lines
    )


def test_the_faults_of_a_machine_are_counted(others: Any) -> None:
    """By their type, as those of a test of `rpc_cluster` are."""
    _, report = others
    fires = report["TestFires::runTest"]
    assert fires["faults_fired"] == sum(fires["fired_by_type"].values()) > 0
    assert set(fires["fired_by_type"]) <= {"delay SCRIPT_CALL", "delay PYTHON_CALL"}
    assert fires["outcome"] == "passed"


def test_programs_are_counted(others: Any) -> None:
    """Each different example of a test that runs programs; a test without ranks is left out."""
    _, report = others
    assert report["test_programs"]["examples"] == report["test_programs"]["clusters"] == 3
    # Two that the test names itself, and one that fails, which Hypothesis runs again.
    assert report["test_examples"]["examples"] == report["test_examples"]["clusters"] == 3
    assert report["test_program"]["examples"] == report["test_program"]["clusters"] == 1
    assert not report["test_program"]["drawn"]
    assert "test_no_ranks" not in report


def test_a_rule_that_fails_is_shown_alone(others: Any) -> None:
    """Without the frames of Hypothesis's that lead to it, and without its search for reasons."""
    result, _ = others
    section = result.section("TestFails.runTest")
    assert '>       raise AssertionError("of a rule")' in section
    assert "run_state_machine_as_test" not in section
    assert "Explanation" not in section


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NoPlan", "faults=[1] (type list) must be a FaultTable (for every rank), a FaultPlan, or"),
        ("RankTooHigh", "the plan names rank 5, but a world of 2 has ranks 0 to 1; raise"),
        ("CannotInject", "the agent TENSORPIPE injects no faults, so it cannot carry out FaultTa"),
    ],
)
def test_a_machine_that_is_set_up_wrongly_fails_once(others: Any, name: str, said: str) -> None:
    """Its message says where the class is; no frame, no example and no artefact is shown."""
    result, _ = others
    lines = result.section(f"Test{name}.runTest").splitlines()
    shown = [line.removeprefix("E").strip() for line in lines if line.startswith("E")]
    assert shown[0].startswith(f"rpcprops.errors.UsageError: {said}")
    assert re.fullmatch(rf"That comes from the class {name} \(.*test_others\.py:\d+\)\.", shown[1])
    assert len(shown) == 2
    assert not [line for line in lines if line.startswith(">") or " in " in line]


def test_an_agent_that_cannot_inject_is_refused_once(others: Any) -> None:
    """In the first example that has a fault, at the line of the test's that asks for it."""
    result, _ = others
    section = result.section("test_cannot_inject")
    assert "the agent TENSORPIPE injects no faults, so it cannot carry out FaultTable(" in section
    assert "or choose another agent: wire, or none for torch's faulty one." in section
    assert '>       with rpc_cluster(world_size=2, faults=faults, agent="TENSORPIPE"):' in section
    assert "Failing test case" not in section
