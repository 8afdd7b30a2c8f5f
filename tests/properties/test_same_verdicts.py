"""Neither the clock nor the agent, nor programs before, change what a program shows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import strategies as st

from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, FaultTable, retryable_tables
from rpcprops.oracle import judge
from rpcprops.outcomes import Outcome
from rpcprops.programs import Program
from rpcprops.properties import _programs, shipped_programs
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner
from rpcprops.strategies import programs, programs_under_faults
from tests._draws import draws, seed_of_this_run
from tests._wire import needs_wire, own_worlds

PROGRAMS = (
    _programs.fork_user_to_user(),
    _programs.nested_remote("script"),
    _programs.context_over(4, (1, 2, 3), nested=True),
)
SAMPLE = (FaultTable(RETRYABLE_MESSAGE_TYPES, 1),)
#: How ranks may be had: the options of a run. The first is the usual one.
WAYS: Mapping[str, Mapping[str, Any]] = {
    "faulty": {"agent": "FAULTY_TENSORPIPE"},
    "wire": {"agent": "wire"},
    "used": {"agent": "wire", "reuse": True},
}
#: What one run shows may be one of several things that torch allows. Each way has so many runs to
#: show one that all others show.
_TRIES = 5


def essence(program: Program, plan: FaultPlan | FaultTable, outcome: Outcome) -> dict[str, Any]:
    """What of an outcome may depend on no clock and no agent."""
    return {
        "values": [_relative(step.value) for step in outcome.steps],
        "errors": [step.error and step.error.type for step in outcome.steps],
        # Without a settle, ranks may still delete what they hold when they are looked at.
        "counters": [rank.counters for rank in outcome.ranks] if program.settles else None,
        "left": [rank.counters_after_shutdown for rank in outcome.ranks],
        "calls": [dict(rank.calls) for rank in outcome.ranks],
        "failed sends": [rank.failed_sends for rank in outcome.ranks],
        "ends": [rank.describe_end() for rank in outcome.ranks],
        "verdict": [violation.promise for violation in judge(program, plan, outcome)],
    }


def _relative(value: Any) -> str:
    """A value as text, with each id of a context as the rank that made it.

    A process counts its contexts for as long as it lives (``context/container.cpp``:
    ``DistAutogradContainer::newContext``), and the upper bits of an id name the rank.
    """
    return re.sub(r"(id'?): (\d+)", lambda found: f"{found[1]}: {int(found[2]) >> 48}", repr(value))


def same_clocks(rpc_cluster: ClusterFactory, program: Program, table: FaultTable) -> None:
    """Assert that both clocks show the same."""
    runner = Runner(rpc_cluster.server)
    fast = runner.run(program, table)
    real = runner.run(program, table, clock="real")
    assert essence(program, table, fast) == essence(program, table, real)


@pytest.fixture
def runner(rpc_cluster: ClusterFactory) -> Iterator[Runner]:
    """A runner on the server of all tests, whose kept worlds are its own."""
    with own_worlds(rpc_cluster.server):
        yield Runner(rpc_cluster.server)


def differences(runner: Runner, program: Program, plan: FaultPlan) -> tuple[dict[str, Any], int]:
    """What each way shows and not all others show too; and how many runs each way had."""
    seen: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(_TRIES):
        for way, options in WAYS.items():
            kept = runner.worlds["kept"]
            outcome = runner.run_anew(program, plan, **options)
            shown = essence(program, plan, outcome)
            if runner.worlds["kept"] > kept:
                # Its ranks live on, as they should.
                assert {*shown["ends"]} == {"still running"}
                shown["ends"] = ["exit code 0"] * program.world_size
            seen[way].append(shown)
        if any(all(one in others for others in seen.values()) for one in seen["faulty"]):
            return {}, number + 1
    return {
        f"{way}: {key}": [one[key] for one in runs]
        for way, runs in seen.items()
        for key in runs[0]
        if any(one[key] != other[key] for one in runs for other in seen["faulty"])
    }, _TRIES


def same_ways(runner: Runner, cases: Sequence[tuple[Program, FaultPlan]]) -> Counter[str]:
    """Assert that all ways show the same in each case; how many runs needed how many tries."""
    done: Counter[str] = Counter()
    for program, plan in cases:
        found, tries = differences(runner, program, plan)
        # In full: another run of the nightly profile draws other cases.
        assert not found, f"{program!r} under {plan!r}: {found}"
        done[f"after {tries}"] += 1
    assert not runner.failed_in_use
    return done


@pytest.mark.parametrize("table", SAMPLE, ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_sample(program: Program, table: FaultTable, rpc_cluster: ClusterFactory) -> None:
    """Fast and real time show the same values, errors, counters, calls, failures and verdict."""
    same_clocks(rpc_cluster, program, table)


@pytest.mark.nightly
@pytest.mark.parametrize("table", retryable_tables(), ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_all_tables(program: Program, table: FaultTable, rpc_cluster: ClusterFactory) -> None:
    """The same under each of the 76 retryable tables."""
    same_clocks(rpc_cluster, program, table)


@needs_wire
def test_a_sample_under_both_agents(runner: Runner) -> None:
    """torch's faulty agent, the agent WIRE and used ranks of it show the same in each program."""
    same_ways(runner, [(program, FaultPlan(table)) for program in PROGRAMS for table in SAMPLE])
    # The first two have worlds of one size.
    assert runner.worlds == {"new": 2, "used": 1, "kept": 3}


@needs_wire
@pytest.mark.nightly
@pytest.mark.parametrize("name", shipped_programs())
def test_all_tables_under_both_agents(runner: Runner, name: str) -> None:
    """The same for each shipped program under each of the 76 retryable tables."""
    program = shipped_programs()[name]
    same_ways(runner, [(program, FaultPlan(table)) for table in retryable_tables()])


@needs_wire
@pytest.mark.nightly
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("faults", [False, True], ids=["without", "under"])
def test_drawn_programs_under_both_agents(runner: Runner, faults: bool, part: int) -> None:
    """The same for 250 drawn programs, and for 250 with drawn plans."""
    same_ways(runner, drawn_cases(faults, 50, seed_of_this_run() + part))


def drawn_cases(faults: bool, number: int, start: int) -> list[tuple[Program, FaultPlan]]:
    """Programs of all kinds of step; with plans for them, or without faults."""
    alone = programs(plan=FaultPlan()).map(lambda program: (program, FaultPlan()))
    drawn: st.SearchStrategy[tuple[Program, FaultPlan]] = (
        programs_under_faults() if faults else alone
    )
    return draws(drawn, number, start)
