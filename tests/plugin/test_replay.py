"""Replays of users' tests: how often they fail again, and which faults that needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CODE = """
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcprops import FaultPlan, FaultTable

PLAN = FaultPlan(by_rank={
    0: FaultTable(["RREF_USER_DELETE"], 1),
    1: FaultTable([], 0, {"PYTHON_CALL": 0.5}),
})


def make_and_drop():
    # Imported in the ranks alone, which have it already: in this process it takes two seconds.
    import torch
    import torch.distributed.rpc as rpc

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
    ended = project.command(
        "rpcprops", "replay", artefacts["test_drawn"], "--needed", "--times", "2"
    )
    assert ended.code == 1, ended.out + ended.err
    assert "faults by name: 0:RREF_USER_DELETE, 1:delay:PYTHON_CALL" in ended.lines
    assert "2 of 2 at rate 400" in ended.out
    assert ended.lines[-3:] == [
        "  0:RREF_USER_DELETE: needed (fails in 0 of 2 without it)",
        "  1:delay:PYTHON_CALL: not needed (fails in 2 of 2 without it)",
        "needed   0:RREF_USER_DELETE",
    ]


@pytest.mark.parametrize(
    "test", ["test_drawn", pytest.param("test_plain", marks=pytest.mark.nightly)]
)
def test_without_a_fault(failed: tuple[Any, dict[str, str]], test: str) -> None:
    """Without the fault that it needs a failure is gone, drawn or not, at the clock asked for."""
    project, artefacts = failed
    options = ["--without-fault", "0:RREF_USER_DELETE", "--clock", "real", "--times", "2"]
    ended = project.command("rpcprops", "replay", artefacts[test], *options)
    assert ended.code == 0, ended.out + ended.err
    text = "not shown: AssertionError in 0 of 2 runs at rate 1, without 0:RREF_USER_DELETE"
    assert f"{text} (test_user.py::{test})" in ended.lines


def test_a_replay_runs_the_test_where_it_is_called(
    failed: tuple[Any, dict[str, str]], tmp_path: Path
) -> None:
    """An artefact from elsewhere runs this folder's test, not that of the folder that it names.

    Nor does anything of it reach the terminal but what can be read.
    """
    project, artefacts = failed
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "conftest.py").write_text("open('sprung', 'w')\n", encoding="utf-8")
    data = json.loads(Path(artefacts["test_plain"]).read_bytes())
    data |= {"rootdir": str(trap), "head": ["\x1b]0;title\x07clear\nfixed: forged"]}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    ended = project.command("rpcprops", "replay", str(path), "--times", "1", "--no-needed")
    assert ended.code == 1, ended.out + ended.err
    assert "reproduced: AssertionError in 1 of 1 runs" in ended.out
    said = f"the test ran in {str(trap)!r}, which is not where you are: it is replayed in "
    assert f"{said}{str(project.folder)!r}" in ended.lines
    assert not (trap / "sprung").exists()
    assert "\x1b" not in ended.out
    assert ended.lines[:2] == ["  \\x1b]0;title\\x07clear", "  fixed: forged"]


def test_options_in_an_artefact_are_misuse(
    failed: tuple[Any, dict[str, str]], tmp_path: Path
) -> None:
    """A file that pytest would read options from is no node id: exit 2, and nothing is written."""
    project, artefacts = failed
    (project.folder / "options.py::x").write_text("--junitxml=own.xml\n", encoding="utf-8")
    data = json.loads(Path(artefacts["test_plain"]).read_bytes())
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data | {"subject": "@options.py::x"}), encoding="utf-8")
    ended = project.command("rpcprops", "replay", str(path))
    assert ended.code == 2
    assert "'@options.py::x' is no node id of a test" in ended.err
    assert not (project.folder / "own.xml").exists()


def test_a_wrong_fault_is_misuse(failed: tuple[Any, dict[str, str]]) -> None:
    """A fault that the artefact has not exits 2 with one line that lists those that it has."""
    project, artefacts = failed
    ended = project.command("rpcprops", "replay", artefacts["test_plain"], "--without-fault=1:X")
    assert ended.code == 2
    assert len(ended.err.strip().splitlines()) == 1
    assert "no fault '1:X'; it has: 0:RREF_USER_DELETE, 1:delay:PYTHON_CALL." in ended.err
