"""Tests whose code passes timeouts of its own to torch: their ranks run slower."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

CODE = """
import json
import sys
from collections import defaultdict

import torch
import torch.distributed.rpc as rpc
from hypothesis import given, settings
from hypothesis import strategies as st

few = settings(max_examples=4, derandomize=True, database=None)
rates = defaultdict(list)


def call(timeout):
    return rpc.rpc_sync("worker1", torch.add, args=(torch.ones(1), 1), timeout=timeout)


def fetch(timeout):
    return rpc.remote("worker1", torch.add, args=(torch.ones(1), 1)).to_here(timeout)


def create(timeout):
    rref = rpc.remote("worker1", torch.add, args=(torch.ones(1), 1), timeout=timeout)
    return rref.to_here()


def proxy(timeout):
    rref = rpc.remote("worker1", torch.add, args=(torch.ones(1), 1))
    return rref.rpc_sync(timeout=timeout).add(1)


def used(rpc_cluster, fn, timeout, **options):
    with rpc_cluster(world_size=2, **options) as cluster:
        rates[sys._getframe(1).f_code.co_name].append(cluster.rate)
        cluster.on(0).call(fn, timeout)


@few
@given(number=st.integers(0, 9))
def test_call(rpc_cluster, number):
    used(rpc_cluster, call, 2)


@few
@given(number=st.integers(0, 9))
def test_fetch(rpc_cluster, number):
    used(rpc_cluster, fetch, 5.0)


@few
@given(number=st.integers(0, 9))
def test_create(rpc_cluster, number):
    used(rpc_cluster, create, 5)


@few
@given(number=st.integers(0, 9))
def test_proxy(rpc_cluster, number):
    used(rpc_cluster, proxy, 5)


@few
@given(number=st.integers(0, 9))
def test_option(rpc_cluster, number):
    used(rpc_cluster, call, -1, rpc_timeout=10)


@few
@given(number=st.integers(0, 9))
def test_none(rpc_cluster, number):
    used(rpc_cluster, call, 0)


@few
@given(number=st.integers(0, 9))
def test_chosen(rpc_cluster, number):
    used(rpc_cluster, call, 30, clock=100)


def test_rates():
    print("\\nrates", json.dumps(rates))
"""

MakeProject = Callable[..., Any]

#: The rate of the first example of each test, and of the others; and the timeout.
EXPECTED = {
    "test_call": (400, 20, 2),
    "test_fetch": (400, 50, 5),
    "test_create": (400, 50, 5),
    "test_proxy": (400, 50, 5),
    "test_option": (100, 100, 10),
    "test_none": (400, 400, 0),
    "test_chosen": (100, 100, 0),
}


@pytest.mark.nightly
def test_the_timeouts_of_a_test_choose_its_clock(make_project: MakeProject) -> None:
    """From the second example on, each timeout lasts a tenth of a real second, and this is said.

    Every way to pass a timeout counts; a timeout of 0 is none, and a clock that the code has
    chosen stays.
    """
    result, report = make_project(test_user=CODE).report("-s")
    assert result.code == 0, result.out
    found = next(line for line in result.lines if line.startswith("rates "))
    rates = json.loads(found.removeprefix("rates "))
    for test, (first, others, timeout) in EXPECTED.items():
        assert rates[test][0] == first, test
        # An example whose timeout has passed runs again, and a loaded machine slows it further.
        assert max(rates[test][1:]) <= others, test
        start = f"rpcprops: test_user.py::{test}: ranks run at rate "
        said = [line for line in result.lines if line.startswith(start)]
        assert len(said) == bool(timeout), test
        end = f"because of a timeout of {timeout:g} s"
        assert all(line.endswith(end) for line in said)
        assert report[test]["clock"].endswith(end) if timeout else not report[test]["clock"]
