"""Replays of users' tests: how often they fail again, and which faults that needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

CODE = """
import torch
import torch.distributed.rpc as rpc
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcprops import FaultPlan, FaultTable

PLAN = FaultPlan(by_rank={
    0: FaultTable(["RREF_USER_DELETE"], 1),
    1: FaultTable([], 0, {"PYTHON_CALL": 0.5}),
})


def make_and_drop():
    rpc.remote("worker1", torch.add, args=(torch.ones(1), 1)).to_here()


def used(rpc_cluster, faults):
    with rpc_cluster(world_size=2, faults=faults) as cluster:
        cluster.on(0).call(make_and_drop)
        assert not cluster.plan.table(0).failing, "planted"


@settings(max_examples=3)
@given(faults=st.just(PLAN))
def test_drawn(rpc_cluster, faults):
    used(rpc_cluster, faults)


def test_plain(rpc_cluster):
    used(rpc_cluster, PLAN)
"""

MakeProject = Callable[..., Any]


@pytest.fixture(scope="module")
def failed(make_project: MakeProject) -> tuple[Any, dict[str, str]]:
    """The project after a run, and the artefact of each failing test."""
    project = make_project(test_user=CODE)
    project.pytest()
    found = sorted((project.folder / ".rpcprops" / "failures").glob("*.json"))
    names = {path.name.split("--")[1].split("-")[0]: str(path) for path in found}
    return project, names


def test_a_replay_says_which_faults_are_needed(failed: tuple[Any, dict[str, str]]) -> None:
    """Of two faults, the one that the planted failure looks at is needed, the other is not."""
    project, artefacts = failed
    ended = project.command("rpcprops", "replay", artefacts["test_drawn"], "--needed")
    assert ended.code == 1, ended.out + ended.err
    assert "faults by name: 0:RREF_USER_DELETE, 1:delay:PYTHON_CALL" in ended.lines
    assert "3 of 3 at rate 400" in ended.out
    assert ended.lines[-3:] == [
        "  0:RREF_USER_DELETE: needed (fails in 0 of 3 without it)",
        "  1:delay:PYTHON_CALL: not needed (fails in 3 of 3 without it)",
        "needed   0:RREF_USER_DELETE",
    ]


@pytest.mark.parametrize("test", ["test_drawn", "test_plain"])
def test_without_a_fault(failed: tuple[Any, dict[str, str]], test: str) -> None:
    """Without the fault that it needs a failure is gone, drawn or not, at the clock asked for."""
    project, artefacts = failed
    options = ["--without-fault", "0:RREF_USER_DELETE", "--clock", "real", "--times", "2"]
    ended = project.command("rpcprops", "replay", artefacts[test], *options)
    assert ended.code == 0, ended.out + ended.err
    text = "fixed: AssertionError in 0 of 2 runs at rate 1, without 0:RREF_USER_DELETE"
    assert f"{text} (test_user.py::{test})" in ended.lines


def test_a_wrong_fault_is_misuse(failed: tuple[Any, dict[str, str]]) -> None:
    """A fault that the artefact has not exits 2 with one line that lists those that it has."""
    project, artefacts = failed
    ended = project.command("rpcprops", "replay", artefacts["test_plain"], "--without-fault=1:X")
    assert ended.code == 2
    assert len(ended.err.strip().splitlines()) == 1
    assert "no fault '1:X'; it has: 0:RREF_USER_DELETE, 1:delay:PYTHON_CALL." in ended.err
