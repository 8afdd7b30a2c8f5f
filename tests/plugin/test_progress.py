"""What a run of pytest says while the agent WIRE is compiled for its tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpcprops.agents.wire import build

#: A compiler that takes its time and then gives up, and says nothing of that.
SLOW = """#!/bin/sh
sleep 0.3
exit 1
"""
CODE = """
def test_user(rpc_cluster):
    print("what the test prints")
    with rpc_cluster(world_size=1, agent="wire"):
        pass
"""


@pytest.fixture
def project(make_project: Callable[..., Any], tmp_path: Path) -> Any:
    """A project for whose test the agent must be compiled."""
    compiler = tmp_path / "c++"
    compiler.write_text(SLOW, encoding="utf-8")
    compiler.chmod(0o755)
    made = make_project(test_user=CODE)
    made.environment.update(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    return made


def test_it_is_said_beside_the_progress(project: Any) -> None:
    """The line comes on the terminal, although what tests write is captured."""
    result = project.pytest()
    version = build.installed_torch().version
    line = f"rpcprops: compiling the agent WIRE for torch {version}; this takes about a minute, "
    before, said, after = result.out.partition(line)
    assert said, result.out
    assert "collected 1 item" in before
    assert "what the test prints" not in before
    assert "it ended with exit code 1 and wrote nothing." in after


def test_it_is_said_where_workers_run_the_tests(project: Any) -> None:
    """Only the controller of xdist has a terminal; its workers share its stderr."""
    pytest.importorskip("xdist")
    result = project.pytest("-n", "1")
    assert result.err.count("rpcprops: compiling the agent WIRE") == 1, (result.out, result.err)
