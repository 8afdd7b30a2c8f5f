"""What is left on disk when pytest is killed: the example that was under way, which replays."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests._wire import needs_wire

CODE = """
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rpcprops
from rpcprops import FaultPlan, FaultTable, programs

import bug


def make_and_drop():
    # Imported in the ranks alone, which have it already: in this process it takes two seconds.
    import torch
    import torch.distributed.rpc as rpc

    rpc.remote("worker1", torch.add, args=(torch.ones(1), 1)).to_here()


def stop():
    Path("ready").touch()
    time.sleep(100 if bug.STOPS else 0)


@settings(max_examples=20, derandomize=True)
@given(count=st.integers(1, 5))
def test_drawn(rpc_cluster, count):
    faults = FaultTable(["RREF_USER_DELETE"], count)
    with rpc_cluster(world_size=2, faults=faults) as cluster:
        cluster.on(0).call(make_and_drop)
        if count == 3:
            stop()
            assert not bug.FAILS


def test_program(rpc_cluster):
    Path("agent").write_text(rpc_cluster.server.agent)
    program = programs.Program(2, (programs.Remote(0, 1, "a"), programs.Drop(0, "a")))
    rpcprops.run(program, FaultTable(["RREF_USER_DELETE"], 1))
    stop()
"""

MakeProject = Callable[..., Any]


@pytest.fixture(scope="module")
def project(make_project: MakeProject) -> Any:
    return make_project(test_user=CODE, test_none="", bug="STOPS = True; FAILS = False")


def _kill_while_running(project: Any, command: list[str], until: Callable[[], bool]) -> None:
    """Start a command and SIGKILL it once `until` says so."""
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=project.folder,
        env=project.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 60
        while not until() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL


def _kill_a_test(project: Any, test: str, *options: str) -> Path:
    """Kill a pytest in the middle of a test; the one file that it leaves under way."""
    ready = project.folder / "ready"
    ready.unlink(missing_ok=True)
    project.write(bug="STOPS = True; FAILS = False")
    command = ["pytest", "-q", "-p", "no:cacheprovider", f"test_user.py::{test}", *options]
    _kill_while_running(project, command, ready.exists)
    project.write(bug="STOPS = False; FAILS = False")
    (left,) = (project.folder / ".rpcprops" / "underway").glob("*.json")
    return Path(left)


def test_a_killed_pytest_leaves_its_example(project: Any) -> None:
    """After SIGKILL the file holds test, table and blob; it replays; the next run reports it."""
    left = _kill_a_test(project, "test_drawn")
    data = json.loads(left.read_text(encoding="utf-8"))
    assert data["subject"] == "test_user.py::test_drawn"
    assert data["underway"]
    assert data["plans"][0]["default"]["num_fail_sends"] == 3
    # Where it lies: the same example runs, and holds now that it does not stop.
    path = str(left.relative_to(project.folder))
    held = project.command("rpcprops", "replay", path, "--times", "2")
    assert held.code == 0, held.out + held.err
    assert "It was under way when its process ended." in held.lines
    assert "holds: no failure of 2 runs at rate 400 (test_user.py::test_drawn)" in held.lines
    # The next run that has a header says so in one line, and moves it to the failures.
    ran = project.pytest("test_none.py")
    (line,) = [line for line in ran.lines if "an earlier run died" in line]
    assert line.startswith("rpcprops: an earlier run died during test_user.py::test_drawn: ")
    assert not list((project.folder / ".rpcprops" / "underway").iterdir())
    assert " rpcprops replay .rpcprops/failures/" in line


@pytest.mark.nightly  # test_replay.py replays failures; the line of this one is what is added here
def test_a_replay_of_what_died_says_so(project: Any) -> None:
    """What was under way when a run died, and fails later, is replayed with a line that says it."""
    _kill_a_test(project, "test_drawn")
    ran = project.pytest("test_none.py")
    (line,) = [line for line in ran.lines if "an earlier run died" in line]
    moved = line.split("rpcprops replay ")[1]
    project.write(bug="STOPS = False; FAILS = True")
    fails = project.command("rpcprops", "replay", moved, "--times", "1", "--no-needed")
    assert fails.code == 1, fails.out + fails.err
    assert "fails: AssertionError in 1 of 1 runs at rate 400" in fails.out
    assert "died     this was under way when its process ended" in fails.out


def test_a_program_under_way_is_kept(project: Any) -> None:
    """A killed test that ran a program leaves the program too, as data."""
    left = _kill_a_test(project, "test_program")
    data = json.loads(left.read_text(encoding="utf-8"))
    assert [step["op"] for step in data["program"]["steps"]] == ["remote", "drop"]
    assert data["plans"][0]["default"]["num_fail_sends"] == 1
    left.unlink()


@needs_wire
def test_its_agent_is_kept(project: Any) -> None:
    """An example that was under way with --rpc-agent is replayed on that agent."""
    left = _kill_a_test(project, "test_program", "--rpc-agent=wire")
    assert json.loads(left.read_text(encoding="utf-8"))["chosen_agent"] == "WIRE"
    agent = project.folder / "agent"
    agent.unlink()
    path = str(left.relative_to(project.folder))
    held = project.command("rpcprops", "replay", path, "--times", "1")
    assert held.code == 0, held.out + held.err
    assert agent.read_text(encoding="utf-8") == "WIRE"
    left.unlink()


def test_runs_that_end_leave_nothing(project: Any) -> None:
    """A pytest that ends in order, passing or failing, leaves no file of an example under way."""
    project.write(bug="STOPS = False; FAILS = True")
    ran = project.pytest("-n", "1")
    assert ran.code == 1
    assert not list((project.folder / ".rpcprops" / "underway").iterdir())
    assert "an earlier run died" not in ran.out


@pytest.mark.nightly  # tests/stress/test_deaths.py does the same at random moments
def test_a_killed_check_leaves_its_program(project: Any) -> None:
    """`check` that is killed leaves the case under way, which replays, and the next one says so."""
    in_flight = project.folder / ".rpcprops" / "underway"
    command = ["rpcprops", "check", "timeout-holds", "-n", "500"]
    _kill_while_running(project, command, lambda: bool(list(in_flight.glob("*.json"))))
    (left,) = in_flight.glob("*.json")
    ended = project.command("rpcprops", "replay", str(left), "--times", "1")
    assert ended.code == 0, ended.out + ended.err
    assert "holds: no failure of 1 runs at rate 400" in ended.lines
    checked = project.command("rpcprops", "check", "timeout-holds", "-n", "1")
    assert checked.code == 0, checked.out + checked.err
    assert "an earlier run died during timeout-holds: rpcprops replay " in checked.out
    assert not list(in_flight.iterdir())
