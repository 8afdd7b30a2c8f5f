"""Tests of users whose ranks the machine does not schedule: stopped for a while, in real time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

CODE = """
import os
import subprocess
import time

from hypothesis import given, settings
from hypothesis import strategies as st

few = settings(max_examples=3)


def stopped():
    # The virtual seconds that pass, while this process is stopped four times for 0.03 real ones:
    # more than once, for a stop that does not fall into a sleep makes no sleep late.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    once = f"sleep 0.02; kill -STOP {os.getpid()}; sleep 0.03; kill -CONT {os.getpid()}; "
    script = 4 * once
    began = time.monotonic()
    child = subprocess.Popen(["sh", "-c", script], env=environment)
    while child.poll() is None:
        time.sleep(0.2)
    return time.monotonic() - began


@few
@given(number=st.integers(0, 2))
def test_after(rpc_cluster, number):
    with rpc_cluster(world_size=1) as cluster:
        took = cluster.on(0).call(stopped)
    assert took < 30


@few
@given(number=st.integers(0, 2))
def test_inside(rpc_cluster, number):
    with rpc_cluster(world_size=1) as cluster:
        assert cluster.on(0).call(stopped) < 30


@few
@given(number=st.integers(0, 2))
def test_always(rpc_cluster, number):
    with rpc_cluster(world_size=1) as cluster:
        cluster.on(0).call(stopped)
    assert number == 17
"""

MakeProject = Callable[..., Any]


@pytest.fixture(scope="module")
def ran(make_project: MakeProject) -> tuple[Any, dict[str, Any]]:
    """The run of the project, and its report."""
    result, report = make_project(test_late=CODE).report()
    return result, report


@pytest.mark.parametrize(
    "test", ["test_after", pytest.param("test_inside", marks=pytest.mark.nightly)]
)
def test_what_a_loaded_machine_shows_is_undecided(
    ran: tuple[Any, dict[str, Any]], test: str
) -> None:
    """A failure of late ranks that slower rates do not show is undecided, and fails nothing."""
    result, report = ran
    assert report[test]["outcome"] == "passed", result.out
    assert report[test]["unconfirmed"] == []
    assert len(report[test]["undecided"]) >= 1
    start = "rpcprops: undecided, the machine was too loaded: test_late.py::"
    assert any(line.startswith(f"{start}{test}: AssertionError") for line in result.lines)


def test_what_real_time_shows_fails(ran: tuple[Any, dict[str, Any]]) -> None:
    """A failure that real time shows as well counts, however late the fast ranks were."""
    result, report = ran
    assert report["test_always"]["outcome"] == "failed"
    assert report["test_always"]["undecided"] == []
    assert "1 of 1 at rate 1" in result.section("test_always")
