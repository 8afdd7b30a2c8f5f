"""State machines whose failures slower rates show, and do not show: what pytest says of each."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def ran(make_project: MakeProject) -> Any:
    """The run of the project."""
    return make_project(test_machines=CODE).pytest()


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ("TestFastOnly", "not confirmed in real time"),
        ("TestFastOnlyLate", "undecided, the machine was too loaded"),
    ],
)
def test_what_slower_rates_do_not_show_is_named(ran: Any, test: str, words: str) -> None:
    """It fails nothing, and the summary has a line for it."""
    start = f"rpcprops: {words}: test_machines.py::{test}::runTest: WrongValue (step "
    lines = [line for line in ran.lines if f"::{test}::" in line and line.startswith("rpcprops")]
    assert lines, ran.out
    assert all(line.startswith(start) for line in lines)
    assert all(line.endswith(" under FaultPlan()") for line in lines)


def test_what_real_time_shows_fails_however_late_the_fast_run_was(ran: Any) -> None:
    """A late fast run does not hide a promise that is broken at every rate."""
    assert "1 failed, 2 passed" in ran.lines[-1]
    section = ran.section("TestLateEverywhere.runTest")
    assert "WrongValue (step" in section
    assert "replay   rpcprops replay " in section
