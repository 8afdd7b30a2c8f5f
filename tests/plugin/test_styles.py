"""Tests of unittest and tests that run in an event loop are treated as plain functions are."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest

MakeProject = Callable[..., Any]

IMPORTS = """
import unittest

import pytest
from hypothesis import given, settings
import torch
from torch.distributed import rpc

from rpcprops import strategies

few = settings(max_examples=8, database=None, derandomize=True)
faulty = given(faults=strategies.fault_tables(messages=["RREF_USER_DELETE"], max_delay=0))


def count():
    return rpc.rpc_sync("worker1", torch.add, args=(torch.ones(1), 1)).item()
"""

UNITTEST = """
class TestCounter(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def use_cluster(self, rpc_cluster):
        self.rpc_cluster = rpc_cluster

    def setUp(self):
        self.wanted = 2

    def tearDown(self):
        del self.wanted

    @few
    @faulty
    def test_drawn(self, faults):
        with self.rpc_cluster(world_size=2, faults=faults) as cluster:
            assert cluster.on(0).call(count) == self.wanted
            assert not faults.messages_to_fail

    def test_plain(self):
        with self.rpc_cluster(world_size=2) as cluster:
            assert cluster.on(0).call(count) == self.wanted + 1

    def test_passes(self):
        with self.rpc_cluster(world_size=2) as cluster:
            assert cluster.on(0).call(count) == self.wanted
"""

ASYNC = """
import asyncio


@pytest.mark.{mark}
@few
@faulty
async def test_drawn(rpc_cluster, faults):
    await asyncio.sleep(0)
    with rpc_cluster(world_size=2, faults=faults) as cluster:
        assert cluster.on(0).call(count) == 2
        assert not faults.messages_to_fail
"""

#: A plugin that does what pytest-asyncio and anyio do, for a machine that has neither.
LOOP = """
import asyncio
import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    handle = pyfuncitem.obj.hypothesis
    inner = handle.inner_test
    handle.inner_test = lambda *args, **kwargs: asyncio.run(inner(*args, **kwargs))


def pytest_configure(config):
    config.addinivalue_line("markers", "loop: runs in an event loop")
"""


def _artefacts(project: Any) -> dict[str, dict[str, Any]]:
    """The artefacts of a project, by the name of the test."""
    found = [json.loads(p.read_text()) for p in (project.folder / ".rpcprops/failures").iterdir()]
    return {one["subject"].partition("::")[2]: one for one in found}


def test_a_failure_is_confirmed_reported_and_kept(make_project: MakeProject) -> None:
    """A test of unittest, or in an event loop, has its section, its repeats and its artefact."""
    project = make_project(
        conftest=LOOP, test_unit=IMPORTS + UNITTEST, test_async=IMPORTS + ASYNC.format(mark="loop")
    )
    result, seen = project.report()
    assert result.code == 1, result.out
    drawn = ("TestCounter::test_drawn", "test_drawn")
    assert {name: test["outcome"] for name, test in seen.items()} == {
        **dict.fromkeys((*drawn, "TestCounter::test_plain"), "failed"),
        "TestCounter::test_passes": "passed",
    }
    kept = _artefacts(project)
    for name in drawn:
        section = result.section(name.replace("::", "."))
        assert "num_fail_sends=1" in section
        # In a run after tearDown, the error would be another one.
        assert "repeats  3 of 3 at rate " in section
        assert ", 1 of 1 at rate 1" in section
        assert kept[name]["promise"] == "AssertionError"
        assert kept[name]["reproduction"]
    assert "replay   rpcprops replay " in result.section("TestCounter.test_plain")
    assert set(kept) == {*drawn, "TestCounter::test_plain"}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("package", "mark"), [("pytest_asyncio", "asyncio"), ("anyio", "anyio")], ids=str
)
def test_a_coroutine_is_confirmed_and_replayed(
    make_project: MakeProject, package: str, mark: str
) -> None:
    """With the real plugins: a failing coroutine test has an artefact that replay reproduces."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -e .[integrations]")
    project = make_project(test_async=IMPORTS + ASYNC.format(mark=mark))
    result = project.pytest()
    assert result.code == 1, result.out
    assert "repeats  3 of 3 at rate " in result.out
    (file,) = (project.folder / ".rpcprops/failures").iterdir()
    again = project.command("rpcprops", "replay", "--no-needed", str(file))
    assert again.code == 1, again.out + again.err
    assert "reproduced: AssertionError in 3 of 3 runs" in again.out


COUNTED = """
import torch
from torch.distributed import rpc


def twice(x):
    y = x + x
    return y


def entry():
    x = torch.ones(1)
    return rpc.rpc_sync("worker1", twice, args=(x,)).item()


def never():
    return 0
"""

COUNTING = """
import counted


def test_it(rpc_cluster):
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.on(0).call(counted.entry) == 2
"""


@pytest.mark.nightly
def test_lines_that_run_in_ranks_are_covered(make_project: MakeProject) -> None:
    """pytest-cov sees calls and the targets of torch's requests, and no data file is left."""
    if importlib.util.find_spec("pytest_cov") is None:
        pytest.skip("pytest-cov is not installed: pip install -e .[integrations]")
    project = make_project(counted=COUNTED, test_it=COUNTING)
    (project.folder / ".coveragerc").write_text("[run]\npatch = subprocess, _exit\n")
    result = project.pytest("--cov=counted", "--cov-report=json")
    assert result.code == 0, result.out
    report = json.loads((project.folder / "coverage.json").read_text())
    lines = COUNTED.splitlines()
    assert report["files"]["counted.py"]["missing_lines"] == [lines.index("    return 0") + 1]
    assert [path.name for path in project.folder.glob(".coverage*")] == [".coverage", ".coveragerc"]
