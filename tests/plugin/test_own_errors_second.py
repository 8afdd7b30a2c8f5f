"""An error of ours never hides the error of the user's own test: it is a note of that error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests._wire import needs_wire

pytestmark = needs_wire

#: A rank takes the mark of the table out of the record of its messages, so that the record says
#: that no fault has acted. What the rank has counted contradicts that.
CODE = """
import contextlib
import os
import unittest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rpcprops import FaultTable
from rpcprops.agents.wire import ledger

few = settings(max_examples=3, database=None, derandomize=True)


def call_and_falsify():
    import torch
    import torch.distributed.rpc as rpc

    with contextlib.suppress(RuntimeError, ValueError):
        rpc.rpc_sync("worker1", torch.add, (torch.ones(1), 1))
    files = (f"/proc/self/fd/{number}" for number in range(256))
    (file,) = [
        file
        for file in files
        if os.path.exists(file) and "rpcprops-ledger" in os.readlink(file)
    ]
    record = os.open(file, os.O_RDWR)
    for number in range(ledger.count_in(record)):
        at = ledger._HEADER_SIZE + number * ledger._RECORD.size
        row = list(ledger._RECORD.unpack(os.pread(record, ledger._RECORD.size, at)))
        row[12] = 0
        os.pwrite(record, ledger._RECORD.pack(*row), at)
    os.close(record)


@contextlib.contextmanager
def contradicted(rpc_cluster):
    table = FaultTable(["SCRIPT_CALL"], 1)
    with rpc_cluster(world_size=2, agent="wire", faults=table, clock="real") as cluster:
        cluster.on(0).call(call_and_falsify)
        yield cluster


def test_passes(rpc_cluster):
    with contradicted(rpc_cluster):
        pass


def test_plain(rpc_cluster):
    with contradicted(rpc_cluster):
        raise ValueError("the user's own")


@few
@given(number=st.integers(0, 3))
def test_drawn_passes(rpc_cluster, number):
    with contradicted(rpc_cluster):
        pass


@few
@given(number=st.integers(0, 3))
def test_drawn(rpc_cluster, number):
    with contradicted(rpc_cluster):
        raise ValueError("the user's own")


def hold():
    import torch
    import torch.distributed.rpc as rpc

    global held
    held = rpc.remote("worker1", torch.add, (torch.ones(1), 1))


def test_leak(rpc_cluster):
    with contradicted(rpc_cluster) as cluster:
        cluster.on(0).call(hold)


class TestOld(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def take(self, rpc_cluster):
        self.make = rpc_cluster

    def test_old(self):
        with contradicted(self.make):
            raise ValueError("the user's own")

    def test_old_passes(self):
        with contradicted(self.make):
            pass
"""

OURS = "counted 1 firings of the fault"


@pytest.fixture(scope="module")
def ran(make_project: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """The run, and its report."""
    result, report = make_project(test_ours=CODE).report()
    return result, report


def _raised(section: str) -> list[str]:
    return [line for line in section.splitlines() if line.startswith("E ")]


@pytest.mark.parametrize(
    ("test", "error"),
    [
        ("test_plain", "ValueError: the user's own"),
        ("test_drawn", "ValueError: the user's own"),
        ("test_leak", "RRefLeak"),
    ],
)
def test_the_users_error_comes_first(ran: tuple[Any, Any], test: str, error: str) -> None:
    """The test fails with its own error, and a note says what is wrong with us."""
    result, report = ran
    said = _raised(result.section(test))
    assert error in said[0], said
    assert any(OURS in line and "rpcprops itself is at fault too" in line for line in said[1:])
    assert "INTERNALERROR" not in result.out
    assert report[test]["outcome"] == "failed"


def test_the_report_of_it_is_whole(ran: tuple[Any, Any]) -> None:
    """It has its replay line, and says that nobody knows what fired."""
    result, _ = ran
    for test in ("test_plain", "test_drawn"):
        section = result.section(test)
        assert "fired    not known: worker0 has counted 1" in section, section
        assert "replay   rpcprops replay" in section
    assert "needs    not known" in result.section("test_drawn")


@pytest.mark.parametrize("test", ["test_passes", "test_drawn_passes"])
def test_it_is_no_secret_where_the_test_passes(ran: tuple[Any, Any], test: str) -> None:
    """A test that has raised nothing fails with our error."""
    result, report = ran
    said = _raised(result.section(test))
    assert any("HarnessError" in line and OURS in line for line in said), said
    assert report[test]["outcome"] == "failed"


def test_a_test_of_unittest(ran: tuple[Any, Any]) -> None:
    """The same for a test that unittest calls."""
    result, _ = ran
    assert "ValueError: the user's own" in _raised(result.section("TestOld.test_old"))[0]
    assert any(OURS in line for line in _raised(result.section("TestOld.test_old_passes")))
