"""xdist: a worker that is killed, and workers whose controller is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

CODE = """
import os
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcprops import FaultTable


@settings(max_examples=20, derandomize=True, database=None)
@given(count=st.integers(1, 5))
def test_dies(rpc_cluster, count):
    with rpc_cluster(world_size=2, faults=FaultTable(["RREF_USER_DELETE"], count)):
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def torn_down():
    yield
    Path("torn-down").touch()


@settings(max_examples=20, derandomize=True, database=None, deadline=None)
@given(count=st.integers(1, 5))
def test_stays(rpc_cluster, torn_down, count):
    with rpc_cluster(world_size=2):
        Path("ready").touch()
        time.sleep(100)


def test_other():
    pass
"""

MakeProject = Callable[..., Any]


@pytest.fixture(scope="module")
def project(make_project: MakeProject) -> Any:
    return make_project(test_user=CODE)


def test_a_killed_worker_is_named_by_its_run_and_by_the_next(project: Any) -> None:
    """The run that goes on names the example at its end; so does the next, also under -q."""
    ran = project.pytest("-n", "1", "-k", "dies or other")
    assert ran.code == 1, ran.out
    (line,) = [line for line in ran.lines if " died during " in line]
    start = "a worker of this run died during test_user.py::test_dies: rpcprops replay "
    assert line.startswith(f"rpcprops: {start}.rpcprops/failures/")
    assert (project.folder / line.split(" replay ")[1]).exists()
    said = line.replace("a worker of this run", "an earlier run")
    following = project.pytest("-q", "-k", "other")
    assert following.code == 0, following.out
    assert [line for line in following.lines if " died " in line] == [said]
    assert not list((project.folder / ".rpcprops" / "underway").iterdir())


def _below(pid: int) -> list[psutil.Process]:
    """All that a process has started, and that those have: some leave its session."""
    return psutil.Process(pid).children(recursive=True)


def _runs(process: psutil.Process) -> bool:
    """Whether a process is left; one that only waits to be reaped is not (it has no parent)."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_controller_leaves_nothing(project: Any) -> None:
    """Three seconds after SIGKILL no worker, server or rank is left; fixtures were torn down."""
    ready = project.folder / "ready"
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "1", "-k", "stays"],
        cwd=project.folder,
        env=project.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as controller:
        deadline = time.monotonic() + 60
        while not ready.exists() and controller.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        below = _below(controller.pid)
        try:
            # A worker, the fork server, its two ranks, and what else it keeps.
            assert len(below) >= 4
            controller.kill()
            assert controller.wait(10) == -signal.SIGKILL
            deadline = time.monotonic() + 3
            while any(map(_runs, below)) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not [process for process in below if _runs(process)]
        finally:
            for process in below:
                if _runs(process):
                    os.kill(process.pid, signal.SIGKILL)
    assert (project.folder / "torn-down").exists()
    # Its run was killed, so that the next one names the example.
    following = project.pytest("-q", "-k", "other")
    assert "an earlier run died during test_user.py::test_stays: " in following.out
