"""Planted faults: each is found, shrunk to the minimum that a person would name, and replayed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import judge
from rpcprops.outcomes import Violation
from rpcprops.properties import Case, Property, _base, _programs, examine
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.report.artefact import read, write
from rpcprops.report.text import artefact_of, failure_lines
from rpcprops.runner import Runner
from rpcprops.strategies import fault_plans

SECONDS = 150
USER_TESTS = """
import os
import signal

import torch
import torch.distributed.rpc as rpc
from hypothesis import given

from rpcprops import strategies

HELD = []


def hold(rref):
    HELD.append(rref)


def share_with_a_hoarder():
    rref = rpc.remote("worker1", torch.add, args=(torch.ones(1), 1))
    rpc.rpc_sync("worker2", hold, args=(rref,))


@given(faults=strategies.fault_plans(world_size=3))
def test_hoarder(rpc_cluster, faults):
    with rpc_cluster(world_size=3, faults=faults) as cluster:
        cluster.on(0).call(share_with_a_hoarder)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@given(faults=strategies.fault_plans(world_size=2))
def test_killed(rpc_cluster, faults):
    table = faults.table(1)
    with rpc_cluster(world_size=2, faults=faults) as cluster:
        cluster.on(0).call(lambda: rpc.rpc_sync("worker1", torch.add, args=(torch.ones(1), 1)))
        if "RREF_USER_DELETE" in table.failing and table.num_fail_sends >= 2:
            cluster.on(1).call(die)
"""


def _command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def _fails_and_replays(folder: Path, test: str) -> dict[str, Any]:
    """Run a planted test and the replay line that it prints; the artefact."""
    (folder / "test_planted_user.py").write_text(USER_TESTS)
    (folder / "pytest.ini").write_text("[pytest]\n")
    ran = _command(folder, "-m", "pytest", "-q", f"test_planted_user.py::{test}")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("replay ")]
    path = folder / line.split()[-1]
    replayed = _command(folder, "-m", "rpcprops", "replay", str(path), "--no-needed")
    assert replayed.returncode == 1, replayed.stdout + replayed.stderr
    assert f"in 3 of 3 runs at rate 400 (test_planted_user.py::{test})" in replayed.stdout
    data: dict[str, Any] = json.loads(path.read_text())
    return data


@pytest.mark.nightly
def test_a_global_that_holds_an_rref_is_found(tmp_path: Path) -> None:
    """A user function that keeps an RRef for ever leaks without any fault: the empty plan."""
    data = _fails_and_replays(tmp_path, "test_hoarder")
    assert data["promise"] == "RRefLeak"
    assert read(next((tmp_path / ".rpcprops").rglob("*.json"))).plans == (FaultPlan(),)


@pytest.mark.nightly
def test_a_rank_that_is_killed_in_a_step_is_found(tmp_path: Path) -> None:
    """A rank that dies when two deletes fail is shrunk to that rank, that type and two failures."""
    data = _fails_and_replays(tmp_path, "test_killed")
    assert data["promise"] == "RankDied"
    minimum = FaultPlan(by_rank={1: FaultTable(["RREF_USER_DELETE"], 2)})
    assert read(next((tmp_path / ".rpcprops").rglob("*.json"))).plans == (minimum,)


@pytest.mark.nightly
def test_a_wrong_value_of_the_oracle_is_found(
    rpc_cluster: ClusterFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An oracle that expects a wrong value where accepts fail is shrunk, reported and replayed."""
    honest = judge

    def wrong(program: Any, plan: Any, outcome: Any) -> tuple[Violation, ...]:
        table = FaultPlan.of(plan).table(2)
        accepts = MessageType.RREF_CHILD_ACCEPT in table.failing and table.num_fail_sends >= 3
        if accepts and program.name == "fork_user_to_user":
            return (Violation("WrongValue", "expected [4.0], got [3.0]", 2, 3),)
        return honest(program, plan, outcome)

    monkeypatch.setattr(_base, "judge", wrong)
    programs = [_programs.create_and_fetch("python"), _programs.fork_user_to_user()]

    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        program = draw(st.sampled_from(programs))
        return Case(program, draw(fault_plans(world_size=program.world_size)))

    prop = Property("planted", "The oracle is right.", cases)
    result = examine(prop, Runner(rpc_cluster.server), max_examples=200, seed=1)
    assert result.verdict == "violated"
    failure = result.failure
    assert failure is not None
    assert failure.promise == "WrongValue"
    assert failure.case.program == programs[1]
    assert failure.case.plan == FaultPlan(by_rank={2: FaultTable(["RREF_CHILD_ACCEPT"], 3)})
    path = write(artefact_of(failure), tmp_path)
    text = "\n".join(failure_lines(failure, path))
    assert "WrongValue (step 3, rank 2): expected [4.0], got [3.0]" in text
    assert "faults at rank 2 of 3" in text
    assert "rank 2: failure RREF_CHILD_ACCEPT: 3 fired of 3 that could" in text
    # Without the wrong oracle the same case holds: the replay says that it is fixed.
    replayed = _command(tmp_path, "-m", "rpcprops", "replay", str(path), "--times", "1")
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert replayed.stdout.splitlines()[-1].startswith("fixed: WrongValue in 0 of 1 runs")


def _wrong_in_real_time(monkeypatch: pytest.MonkeyPatch) -> Property:
    """A property that real time breaks where a remote call is late by 2 ms, and no fast clock."""
    honest = judge

    def wrong(program: Any, plan: Any, outcome: Any) -> tuple[Violation, ...]:
        late = FaultPlan.of(plan).table(0).delaying.get(MessageType.PYTHON_REMOTE_CALL, 0)
        if outcome.clock_rate == 1.0 and late >= 2:
            return (Violation("WrongValue", "expected [4.0], got [3.0]", 0, 1),)
        return honest(program, plan, outcome)

    monkeypatch.setattr(_base, "judge", wrong)

    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        late = draw(st.integers(1, 200)) / 1000
        table = FaultTable(messages_to_delay={MessageType.PYTHON_REMOTE_CALL: late})
        return Case(_programs.create_and_drop(), FaultPlan(by_rank={0: table}))

    return Property("planted", "Real time shows no more than a fast clock.", cases)


def test_what_only_real_time_shows_is_found(
    rpc_cluster: ClusterFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A passing case that fails in real time is a failure: shrunk and replayed at rate 1."""
    prop = _wrong_in_real_time(monkeypatch)
    result = examine(prop, Runner(rpc_cluster.server), max_examples=20, seed=1)
    assert result.verdict == "violated"
    assert result.compared >= 1
    failure = result.failure
    assert failure is not None
    assert failure.outcome.clock_rate == 1.0
    late = failure.case.plan.table(0).delaying[MessageType.PYTHON_REMOTE_CALL]
    assert late == 2
    fast = rpc_cluster.server.rate
    assert [str(r) for r in failure.repeats] == ["3 of 3 at rate 1", f"0 of 1 at rate {fast:g}"]
    artefact = read(write(artefact_of(failure), tmp_path))
    assert artefact.clock_rate == 1.0


def test_real_time_compares_nothing(
    rpc_cluster: ClusterFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all runs in real time there is nothing to compare; what fails is found as ever."""
    prop = _wrong_in_real_time(monkeypatch)
    result = examine(prop, Runner(rpc_cluster.server), max_examples=5, seed=1, clock="real")
    assert (result.verdict, result.compared) == ("violated", 0)
    assert result.failure is not None
    assert [str(r) for r in result.failure.repeats] == ["3 of 3 at rate 1"]


def test_what_real_time_shows_once_is_unconfirmed(
    rpc_cluster: ClusterFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure of the sample that real time does not show again makes the verdict undecided."""
    honest = judge
    shown: list[Any] = []

    def once(program: Any, plan: Any, outcome: Any) -> tuple[Violation, ...]:
        if outcome.clock_rate == 1.0 and (not shown or shown[0] is outcome):
            shown.append(outcome)
            return (Violation("WrongValue", "expected [4.0], got [3.0]", 0, 1),)
        return honest(program, plan, outcome)

    monkeypatch.setattr(_base, "judge", once)
    table = FaultTable(messages_to_delay={MessageType.PYTHON_REMOTE_CALL: 0.01})
    case = Case(_programs.create_and_drop(), FaultPlan(table))
    prop = Property("planted", "Real time shows it once.", lambda: st.just(case))
    result = examine(prop, Runner(rpc_cluster.server), max_examples=3, seed=1)
    assert (result.verdict, result.compared) == ("undecided", 1)
    assert "not again at rate 1" in result.unconfirmed[0]
