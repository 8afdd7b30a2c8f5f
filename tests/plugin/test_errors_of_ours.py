"""Errors that are not of the code under test: they fail a test as what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeProject = Callable[..., Any]

CODE = """
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcprops.errors import HarnessError, MachineCannot

few = settings(max_examples=5, database=None, derandomize=True)
raised = []


def rate_of(rpc_cluster):
    with rpc_cluster(world_size=1, clock=20) as cluster:
        return cluster.rate


@few
@given(number=st.integers(0, 3))
def test_always(rpc_cluster, number):
    rate_of(rpc_cluster)
    raise HarnessError("planted: always")


@few
@given(number=st.integers(0, 3))
def test_once(rpc_cluster, number):
    rate_of(rpc_cluster)
    if not raised:
        raised.append(number)
        raise HarnessError("planted: once")


@few
@given(number=st.integers(0, 3))
def test_cannot(rpc_cluster, number):
    rate_of(rpc_cluster)
    raise MachineCannot("planted: cannot")


@few
@given(number=st.integers(0, 3))
def test_confirming(rpc_cluster, number):
    if rate_of(rpc_cluster) == 1:
        raise HarnessError("planted: confirming")
    assert number == 17


def test_plain(rpc_cluster):
    rate_of(rpc_cluster)
    raise HarnessError("planted: plain")
"""

TESTS = {
    "test_always": "HarnessError: planted: always",
    "test_once": "HarnessError: planted: once",
    "test_cannot": "MachineCannot: planted: cannot",
    "test_confirming": "HarnessError: planted: confirming",
    "test_plain": "HarnessError: planted: plain",
}


@pytest.fixture(scope="module")
def ran(make_project: MakeProject) -> tuple[Any, Any, dict[str, Any]]:
    """The project, its run, and its report."""
    project = make_project(test_ours=CODE)
    result, report = project.report()
    return project, result, report


@pytest.mark.parametrize("test", TESTS)
def test_it_fails_as_what_it_is(ran: tuple[Any, Any, dict[str, Any]], test: str) -> None:
    """The test fails with the error itself; none is called unconfirmed, undecided or flaky."""
    _, result, report = ran
    section = result.section(test)
    last = [line for line in section.splitlines() if line.startswith("E ")]
    assert any(line.endswith(f"rpcprops.errors.{TESTS[test]}") for line in last), section
    assert report[test]["outcome"] == "failed"
    assert not report[test]["unconfirmed"]
    assert not report[test]["undecided"]
    assert "Flaky" not in section
    assert "repeats  " not in section


def test_no_artefact_blames_the_test(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """Nothing is written that would replay as a failure of the user's code."""
    project, _, _ = ran
    assert not list(Path(project.folder, ".rpcprops", "failures").glob("*"))
