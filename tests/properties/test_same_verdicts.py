"""The fast clock changes nothing but how long it takes: the same outcomes as in real time."""

from __future__ import annotations

from typing import Any

import pytest

from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultTable, retryable_tables
from rpcprops.oracle import judge
from rpcprops.outcomes import Outcome
from rpcprops.programs import Program
from rpcprops.properties import _programs
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner

PROGRAMS = (
    _programs.fork_user_to_user(),
    _programs.nested_remote("script"),
    _programs.context_over(4, (1, 2, 3), nested=True),
)
SAMPLE = (FaultTable(RETRYABLE_MESSAGE_TYPES, 1),)


def essence(program: Program, table: FaultTable, outcome: Outcome) -> dict[str, Any]:
    """What of an outcome may not depend on the clock."""
    return {
        "values": [step.value for step in outcome.steps],
        "errors": [step.error and step.error.type for step in outcome.steps],
        "counters": [rank.counters for rank in outcome.ranks],
        "calls": [dict(rank.calls) for rank in outcome.ranks],
        "failed sends": [rank.failed_sends for rank in outcome.ranks],
        "ends": [rank.describe_end() for rank in outcome.ranks],
        "verdict": judge(program, table, outcome),
    }


def same(rpc_cluster: ClusterFactory, program: Program, table: FaultTable) -> None:
    """Assert that both clocks show the same."""
    runner = Runner(rpc_cluster.server)
    fast = runner.run(program, table)
    real = runner.run(program, table, clock="real")
    assert essence(program, table, fast) == essence(program, table, real)


@pytest.mark.parametrize("table", SAMPLE, ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_sample(program: Program, table: FaultTable, rpc_cluster: ClusterFactory) -> None:
    """Fast and real time show the same values, errors, counters, calls, failures and verdict."""
    same(rpc_cluster, program, table)


@pytest.mark.nightly
@pytest.mark.parametrize("table", retryable_tables(), ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_all_tables(program: Program, table: FaultTable, rpc_cluster: ClusterFactory) -> None:
    """The same under each of the 76 retryable tables."""
    same(rpc_cluster, program, table)
